"""The named studies: which students of a recipe are trained beside each other."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS, VIEW_MODES
from deit.config.recipes import RECIPES, recipe_of_path
from deit.config.schema import (
    Config,
    LossConfig,
    OptimConfig,
)
from deit.config.teachers import single_teacher
from deit.config.validation import load_config
from deit.core.errors import ConfigError

Arms = dict[str, Config]


def without_teacher(config: Config) -> Config:
    """The same without its teacher. It stays in the configuration: training ignores it, evaluation
    compares with it."""
    labels = dataclasses.replace(LOSS_PRESETS["none"], label_smoothing=config.loss.label_smoothing)
    return dataclasses.replace(config, loss=labels).replace(student={"num_distillation_tokens": 1})


def with_and_without_teacher(config: Config) -> Arms:
    """What the teacher is worth: with it and without. Raises ConfigError where there is none."""
    if config.loss.kind == "none":
        raise ConfigError("--study teacher: the objective has no teacher (loss.kind = 'none')")
    return {"distilled": config, "undistilled": without_teacher(config)}


def view_modes(config: Config) -> Arms:
    """Every teaching mode (the divergence alone) beside DeiT's hard and soft labels and none."""
    if config.teacher.combine == "tokens":  # the modes teach every head the same
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
    """DeiT's objective through the token or the only head; the recipe's, if it is of the kind."""
    if config.loss.kind == kind:
        return config.loss
    head = "deit" if config.student.has_distillation_token else "class"
    return _with_loss(config, f"{head}-{kind}").loss


def epoch_scaling(config: Config) -> Arms:
    """A quarter, half, all and twice the epochs, with the teacher and without."""
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
    """Several teachers together, by each way of combining them, beside each alone and none.

    Raises ConfigError with fewer than two teachers.
    """
    teacher, one = config.teacher, {"num_distillation_tokens": 1}
    if len(teacher.source) < 2:
        raise ConfigError("--study ensemble: needs several teachers (--teacher.source A,B)")
    if len(teacher.target_stores) == 1:
        raise ConfigError(
            "--study ensemble: one store of what all teachers say together serves neither one "
            "alone nor another mean; give a store for each (`deit targets write ... "
            "--teacher-index 1`)"
        )
    arms: Arms = {}
    for combine in ("probabilities", "logits"):
        arms[f"mean of {combine}"] = config.replace(student=one, teacher={"combine": combine})
    if config.student.has_distillation_token and config.loss.head == "distillation":
        tokens = {"num_distillation_tokens": len(teacher.source)}
        arms["a token each"] = config.replace(student=tokens, teacher={"combine": "tokens"})
    names = [source.rstrip("/").rpartition("/")[2] for source in teacher.source]
    if len(set(names)) < len(names):
        names = list(teacher.source)
    for place, name in enumerate(names):
        one_alone = dataclasses.replace(config, teacher=single_teacher(teacher, place))
        arms[f"only {name}"] = one_alone.replace(student=one)
    arms["none"] = without_teacher(config)
    return arms


def resolution(config: Config) -> Arms:
    """Fine-tuning taught by teachers fitted to the resolution, by the same merely shown larger
    images, by them at the size they were trained at; and by labels alone.

    Raises ConfigError without a start.
    """
    if config.init.weights is None:
        raise ConfigError("--study resolution: the recipe starts from nothing (init.weights)")
    arms: Arms = {}
    before = tuple(map(_before_fitting, config.teacher.source))
    labels = without_teacher(config)
    if None not in before:
        arms["teacher fitted"] = config
        config = config.replace(teacher={"source": before})
    # Shown images of a size it never saw, a ConvNet may fall to chance: this arm shows it.
    arms["teacher resized"] = config.replace(teacher={"allow_near_chance": True})
    arms["teacher as trained"] = config.replace(teacher={"image_size": ()})
    arms["none"] = labels
    return arms


def _before_fitting(source: str) -> str | None:
    """What a teacher, a run of ours, was fine-tuned from; None where it was not."""
    recipe, saved = recipe_of_path(source), Path(source).expanduser() / "config.json"
    if recipe is None and not saved.is_file():
        return None
    try:
        before = (load_config(saved) if recipe is None else RECIPES[recipe]()).init.weights
    except ConfigError:
        return None  # another's config.json: timm's folders have one as well
    # A start is never code; as a teacher it would be run.
    return None if before is None or ".py:" in before else before


def _labels_alone(config: Config, student: dict[str, object]) -> Config:
    """Trained by labels, the student changed; its teacher stays for evaluation to compare with."""
    return without_teacher(config).replace(student=student)


def _class_token_twin(config: Config, study: str) -> dict[str, object]:
    """What makes a student its twin with a class token alone. Raises ConfigError."""
    name = config.student.name
    if not name.startswith("deit_"):
        raise ConfigError(
            f"--study {study}: compares a deit_* student with its twin without a distillation "
            f"token; student.name is {name!r}"
        )
    return {"name": name.replace("deit_", "vit_", 1), "num_distillation_tokens": 1}


def table_3(config: Config) -> Arms:
    """Ways of distilling (the DeiT paper's Table 3): none, soft and hard labels through the class
    token of a network without another, hard labels through a token of their own.

    Raises ConfigError for a student without a distillation token.
    """
    return _ways(config, "table-3")


def _ways(config: Config, study: str) -> Arms:
    if config.teacher.combine == "tokens":
        config = config.replace(teacher={"combine": "probabilities"})
    twin = _class_token_twin(config, study)
    plain = config.replace(student=twin)
    return {
        "none": _labels_alone(config, twin),
        **{name: _with_loss(plain, f"class-{name}") for name in ("soft", "hard")},
        "token": dataclasses.replace(config, loss=_deit_loss(config, "hard")).replace(
            student={"num_distillation_tokens": 1},
        ),
    }


def _with_loss(config: Config, name: str) -> Config:
    """An objective by its name, with the recipe's smoothing of labels."""
    smoothing = config.loss.label_smoothing
    return dataclasses.replace(
        config, loss=dataclasses.replace(LOSS_PRESETS[name], label_smoothing=smoothing)
    )


def table_4(config: Config) -> Arms:
    """Who decides like whom (the DeiT paper's Table 4): the student with a distillation token and
    its twin without, beside the teacher. Raises ConfigError as `table_3` does."""
    arms = _ways(config, "table-4")
    return {"undistilled": arms["none"], "distilled": arms["token"]}


def table_2(config: Config) -> Arms:
    """The same student taught by each teacher of its family (the DeiT paper's Table 2): a ConvNet,
    a network of involutions, a transformer; and by none.

    Raises ConfigError where the teacher is of no recipe of ours.
    """
    own = recipe_of_path(config.teacher.source[0]) if config.teacher.source else None
    if own is None or not own.endswith("-teacher"):
        raise ConfigError(
            "--study table-2: the teacher should be that of a recipe of ours; of others write a "
            "sweep with a grid over teacher.source"
        )
    family = own.removesuffix("-teacher")
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
    """What each part of the training is worth (the DeiT paper's Table 8): DeiT's whole recipe, and
    the same with one part changed. The paper's student had no teacher: `--loss none`."""
    ours = config.student.is_transformer
    views = {**AUGMENTATIONS["deit"], "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    whole = config.replace(
        views=views,
        student={"drop_path": 0.1 if ours else config.student.drop_path, "dropout": 0.0},
        optim={"name": "adamw", "ema_epochs": 0.0, "momentum": OptimConfig.momentum},
    )
    sgd = {"name": "sgd", "beta1": OptimConfig.beta1, "beta2": OptimConfig.beta2}
    # An SGD that moves as far as this AdamW wants a rate some hundred times as large. Its decay is
    # part of the gradient, so momentum and rate enlarge it: the same share of the weights at each
    # update is far less of it.
    optim, rate = whole.optim, 100 * whole.optim.lr
    share = optim.weight_decay * (1 if optim.independent_weight_decay else optim.peak_lr)
    decay = share * (1 - optim.momentum) / (rate / optim.lr * optim.peak_lr)
    sgd |= {
        "independent_weight_decay": False,
        "lr": rate,
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
        "weight average": {"optim": {"ema_epochs": max(whole.optim.epochs / 20, 1.0)}},
    }
    arms = {name: whole.replace(**sections) for name, sections in changes.items()}
    if not ours:  # they have no dropout of this kind, and few have stochastic depth
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
"""Every study by its name on the command line: recipe -> configurations by name."""
