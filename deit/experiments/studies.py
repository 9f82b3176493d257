"""The named studies: the students of a recipe that each of them compares."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS, VIEW_MODES
from deit.config.recipes import RECIPES, recipe_of_path
from deit.config.schema import Config
from deit.config.sections.loss import LossConfig
from deit.config.sections.optim import OptimConfig
from deit.config.teachers import single_teacher
from deit.config.validation import load_config
from deit.core.errors import ConfigError

Arms = dict[str, Config]
"""The configurations that a study compares, by name."""


def without_teacher(config: Config) -> Config:
    """Return the configuration trained by labels only.

    The teacher stays in the configuration: training ignores it, evaluation compares with it.
    """
    labels = dataclasses.replace(LOSS_PRESETS["none"], label_smoothing=config.loss.label_smoothing)
    return dataclasses.replace(config, loss=labels).replace(student={"num_distillation_tokens": 1})


def with_and_without_teacher(config: Config) -> Arms:
    """Return the recipe with and without its teacher. Raises ConfigError if it has none.

    Both arms use the same labels and take the same number of steps. If the loss takes no labels and
    the teacher has learned from a part of the training images, the student without it trains on
    this part, for more epochs.

    >>> arms = with_and_without_teacher(RECIPES["digits"]())
    >>> {name: config.loss.kind for name, config in arms.items()}
    {'distilled': 'soft', 'undistilled': 'none'}
    >>> arms = with_and_without_teacher(RECIPES["digits-few-labels"]())
    >>> {name: config.data.train_fraction for name, config in arms.items()}
    {'distilled': 1.0, 'undistilled': 0.05}
    """
    if config.loss.kind == "none":
        raise ConfigError("study teacher: the loss has no teacher (loss.kind = 'none')")
    return {"distilled": config, "undistilled": _on_labeled_images(config)}


def _on_labeled_images(config: Config) -> Config:
    """Return a configuration without its teacher, on the images whose labels it uses with it."""
    optim, fraction = config.optim, config.data.train_fraction
    if not config.loss.uses_labels:
        labeled = [_labeled_fraction(source, config) for source in config.teacher.source]
        fraction = min(fraction, max(labeled, default=1.0))
    ratio = config.data.train_fraction / fraction
    return without_teacher(config).replace(
        data={"train_fraction": fraction},
        optim={
            "epochs": round(ratio * optim.epochs),
            "warmup_epochs": ratio * optim.warmup_epochs,
            "ema_epochs": ratio * optim.ema_epochs,
        },
        run={"eval_every_epochs": round(ratio * config.run.eval_every_epochs)},
    )


def _labeled_fraction(source: str, config: Config) -> float:
    """Return the fraction of the training images that a teacher of a configuration learns from; 1
    if it is neither a built-in recipe nor a run."""
    teacher = _config_of_run(source)
    if teacher is None:
        return 1.0
    if recipe_of_path(source) and config.data.train_fraction < 1:
        return config.data.train_fraction  # a built-in teacher takes the data of the command line
    return teacher.data.train_fraction


def view_modes(config: Config) -> Arms:
    """Return every view mode with the divergence alone, DeiT's hard and soft losses, and no
    teacher."""
    if config.teacher.combine == "tokens":  # in all modes the heads share one target
        combined = {"combine": "probabilities"}
        config = config.replace(student={"num_distillation_tokens": 1}, teacher=combined)
    matching = dataclasses.replace(
        LOSS_PRESETS["function-matching"], temperature=config.loss.temperature
    )
    views = dataclasses.asdict(config.views)
    arms = {
        name: dataclasses.replace(config, loss=matching).replace(views=mode.fields(views))
        for name, mode in VIEW_MODES.items()
    }
    for name in ("hard", "soft"):
        arms[name] = dataclasses.replace(config, loss=_deit_loss(config, name))
    arms["none"] = without_teacher(config)
    return arms


def _deit_loss(config: Config, kind: str) -> LossConfig:
    """Return DeiT's loss of a kind for the distillation token, or for the only head. Returns the
    recipe's own loss if it is of that kind."""
    if config.loss.kind == kind:
        return config.loss
    head = "deit" if config.student.has_distillation_token else "class"
    return _with_loss(config, f"{head}-{kind}").loss


def epoch_scaling(config: Config) -> Arms:
    """Return a quarter, half, all and twice the epochs, each with and without teacher.

    >>> list(epoch_scaling(RECIPES["digits"]()))[:4]
    ['distilled-15', 'undistilled-15', 'distilled-30', 'undistilled-30']
    """
    arms: Arms = {}
    for factor in (0.25, 0.5, 1, 2):
        epochs = max(round(config.optim.epochs * factor), 1)
        fields = {
            "epochs": epochs,
            "warmup_epochs": min(config.optim.warmup_epochs, epochs / 4),
            "ema_epochs": min(config.optim.ema_epochs, epochs / 2),
        }
        warmup = min(config.loss.distillation_warmup_epochs, epochs / 4)
        arms[f"distilled-{epochs}"] = config.replace(
            optim=fields, loss={"distillation_warmup_epochs": warmup}
        )
        arms[f"undistilled-{epochs}"] = without_teacher(config).replace(optim=fields)
    return arms


def ensemble(config: Config) -> Arms:
    """Return each way of combining the teachers, each teacher alone, and no teacher.

    Raises ConfigError with fewer than two teachers.
    """
    teacher, one_token = config.teacher, {"num_distillation_tokens": 1}
    if len(teacher.source) < 2:
        raise ConfigError("study ensemble: needs several teachers (teacher.source A,B)")
    if len(teacher.target_stores) == 1:
        raise ConfigError(
            "study ensemble: a store of the combined teachers has neither the outputs of one "
            "teacher nor another mean; give one store per teacher (`deit targets write ... "
            "--teacher-index 1`)"
        )
    arms: Arms = {}
    for combine in ("probabilities", "logits"):
        arms[f"mean of {combine}"] = config.replace(student=one_token, teacher={"combine": combine})
    if config.student.has_distillation_token and config.loss.head == "distillation":
        tokens = {"num_distillation_tokens": len(teacher.source)}
        with_tokens = config.replace(student=tokens, teacher={"combine": "tokens"})
        arms["one token per teacher"] = with_tokens
    names = [source.rstrip("/").rpartition("/")[2] for source in teacher.source]
    if len(set(names)) < len(names):
        names = list(teacher.source)
    for index, name in enumerate(names):
        only = dataclasses.replace(config, teacher=single_teacher(teacher, index))
        arms[f"only {name}"] = only.replace(student=one_token)
    arms["none"] = without_teacher(config)
    return arms


def resolution(config: Config) -> Arms:
    """Return a fine-tuning at another resolution with different teachers.

    The arms are: teachers fine-tuned at that resolution; the teachers before that fine-tuning, on
    images of the new size; the same on images of their own size; and no teacher.

    Raises ConfigError if the recipe has no initial weights.
    """
    if config.init.weights is None:
        raise ConfigError("study resolution: the recipe has no initial weights; set init.weights")
    arms: Arms = {}
    original = tuple(map(_before_finetuning, config.teacher.source))
    labels = without_teacher(config)
    if None not in original:
        arms["teacher fitted"] = config
        config = config.replace(teacher={"source": original})
    # On images of a new size a ConvNet can fall to chance; this arm measures that.
    arms["teacher resized"] = config.replace(teacher={"allow_near_chance": True})
    arms["teacher as trained"] = config.replace(teacher={"image_size": ()})
    arms["none"] = labels
    return arms


def _before_finetuning(source: str) -> str | None:
    """Return the weights that a teacher's run was fine-tuned from; None if it was not."""
    teacher = _config_of_run(source)
    weights = None if teacher is None else teacher.init.weights
    # Initial weights are never loaded by code; a teacher's source would be.
    return None if weights is None or ".py:" in weights else weights


def _config_of_run(source: str) -> Config | None:
    """Return the configuration of a built-in recipe's run, which may not exist yet, or of a saved
    run; None for other sources."""
    recipe, saved = recipe_of_path(source), Path(source).expanduser() / "config.json"
    if recipe is None and not saved.is_file():
        return None
    try:
        return load_config(saved) if recipe is None else RECIPES[recipe]()
    except ConfigError:
        return None  # not our config.json: timm's folders have one as well


def _class_token_twin(config: Config, study: str) -> dict[str, object]:
    """Return the student fields of the same network with a class token only. Raises ConfigError."""
    name = config.student.name
    if not name.startswith("deit_"):
        raise ConfigError(
            f"study {study}: compares a deit_* student with the same network without a "
            f"distillation token; student.name is {name!r}"
        )
    return {"name": name.replace("deit_", "vit_", 1), "num_distillation_tokens": 1}


def table_3(config: Config) -> Arms:
    """Return the distillation methods of the DeiT paper's Table 3.

    They are: no teacher, soft and hard distillation of the class token in a network without a
    distillation token, and hard distillation of a distillation token.

    Raises ConfigError for a student without a distillation token.
    """
    return _distillation_methods(config, "table-3")


def _distillation_methods(config: Config, study: str) -> Arms:
    if config.teacher.combine == "tokens":
        config = config.replace(teacher={"combine": "probabilities"})
    twin = _class_token_twin(config, study)
    plain = config.replace(student=twin)
    return {
        "none": without_teacher(config).replace(student=twin),
        **{name: _with_loss(plain, f"class-{name}") for name in ("soft", "hard")},
        "token": dataclasses.replace(config, loss=_deit_loss(config, "hard")).replace(
            student={"num_distillation_tokens": 1},
        ),
    }


def _with_loss(config: Config, name: str) -> Config:
    """Return the configuration with a loss preset and the recipe's label smoothing."""
    smoothing = config.loss.label_smoothing
    return dataclasses.replace(
        config, loss=dataclasses.replace(LOSS_PRESETS[name], label_smoothing=smoothing)
    )


def table_4(config: Config) -> Arms:
    """Return the students of the DeiT paper's Table 4, which shows their disagreement with each
    other and with the teacher: with and without a distillation token. Raises ConfigError as
    `table_3` does."""
    arms = _distillation_methods(config, "table-4")
    return {"undistilled": arms["none"], "distilled": arms["token"]}


def table_2(config: Config) -> Arms:
    """Return the student with each teacher of its recipe family, as in the DeiT paper's Table 2: a
    ConvNet, a network of involutions, a transformer; and without teacher.

    Raises ConfigError if the teacher is not the run of a built-in recipe.
    """
    recipe = recipe_of_path(config.teacher.source[0]) if config.teacher.source else None
    if recipe is None or not recipe.endswith("-teacher"):
        raise ConfigError(
            "study table-2: teacher.source should be the teacher of a built-in recipe; for other "
            "teachers write a sweep with a grid over teacher.source"
        )
    family = recipe.removesuffix("-teacher")
    kinds = {"ConvNet": "teacher"}
    kinds |= {kind: f"{kind}-teacher" for kind in ("involution", "transformer")}
    arms = {}
    for kind, name in kinds.items():
        if f"{family}-{name}" in RECIPES:
            teacher = {"source": (f"checkpoints/{family}-{name}",), "combine": "probabilities"}
            arms[kind] = config.replace(teacher=teacher, student={"num_distillation_tokens": 1})
    arms["none"] = without_teacher(config)
    return arms


def table_8(config: Config) -> Arms:
    """Return the ablations of the DeiT paper's Table 8: DeiT's training recipe, and the same with
    one component changed. The paper's student had no teacher: set the loss preset `none`."""
    is_transformer = config.student.is_transformer
    views = {**AUGMENTATIONS["deit"], "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    drop_path = 0.1 if is_transformer else config.student.drop_path
    reference = config.replace(
        views=views,
        student={"drop_path": drop_path, "dropout": 0.0},
        optim={"name": "adamw", "ema_epochs": 0.0, "momentum": OptimConfig.momentum},
    )
    sgd = {"name": "sgd", "beta1": OptimConfig.beta1, "beta2": OptimConfig.beta2}
    # For steps of about the same size, SGD needs about 100 times the learning rate of this AdamW.
    # SGD adds weight decay to the gradient, so momentum and learning rate scale it. The decay below
    # shrinks the weights by the same share at each step as AdamW does.
    optim, lr = reference.optim, 100 * reference.optim.lr
    share = optim.weight_decay * (1 if optim.independent_weight_decay else optim.peak_lr)
    decay = share * (1 - optim.momentum) / (lr / optim.lr * optim.peak_lr)
    sgd |= {
        "independent_weight_decay": False,
        "lr": lr,
        "weight_decay": decay,
        "clip_grad_norm": 1.0,
    }
    changes: dict[str, dict[str, dict[str, object]]] = {
        "DeiT": {},
        "SGD": {"optim": sgd},
        "no RandAugment": {"views": {"auto_augment": "none"}},
        "AutoAugment": {"views": {"auto_augment": "autoaugment"}},
        "no mixup": {"views": {"mixup_alpha": 0.0}},
        "no cutmix": {"views": {"cutmix_alpha": 0.0}},
        "neither mixup nor cutmix": {"views": {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}},
        "no erasing": {"views": {"erasing_prob": 0.0}},
        "no stochastic depth": {"student": {"drop_path": 0.0}},
        "no repeated augmentation": {"views": {"aug_repeats": 1}},
        "dropout": {"student": {"dropout": 0.1}},
        "weight average": {"optim": {"ema_epochs": max(reference.optim.epochs / 20, 1.0)}},
    }
    arms = {name: reference.replace(**sections) for name, sections in changes.items()}
    if not is_transformer:  # these have no dropout of this kind, and few have stochastic depth
        del arms["dropout"], arms["no stochastic depth"]
    return arms


STUDIES: dict[str, Callable[[Config], Arms]] = {
    "teacher": with_and_without_teacher,
    "view-modes": view_modes,
    "epochs": epoch_scaling,
    "ensemble": ensemble,
    "resolution": resolution,
    "table-2": table_2,
    "table-3": table_3,
    "table-4": table_4,
    "table-8": table_8,
}
"""Studies by their names on the command line: functions from a recipe to its arms by name."""
