"""The named studies: which students of a recipe are trained beside each other."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from deit.config import Config, LossConfig, derive, has_distillation_token
from deit.errors import ConfigError
from deit.presets import OBJECTIVES, TEACHING
from deit.recipes import RECIPES, recipe_of
from deit.seats import alone
from deit.validation import load

Arms = dict[str, Config]


def undistilled(config: Config) -> Config:
    """The same without its teacher. It stays in the configuration: training ignores it, evaluation
    compares with it."""
    labels = dataclasses.replace(OBJECTIVES["none"], label_smoothing=config.loss.label_smoothing)
    return derive(dataclasses.replace(config, loss=labels), student={"distillation_tokens": 1})


def worth(config: Config) -> Arms:
    """What the teacher is worth: with it and without."""
    return {"distilled": config, "undistilled": undistilled(config)}


def teaching(config: Config) -> Arms:
    """Every teaching mode (the divergence alone) beside DeiT's hard and soft labels and none."""
    if config.teacher.combine == "tokens":  # the modes teach every head the same
        combined = {"combine": "probabilities"}
        config = derive(config, student={"distillation_tokens": 1}, teacher=combined)
    matching = dataclasses.replace(
        OBJECTIVES["function-matching"], temperature=config.loss.temperature
    )
    views = dataclasses.asdict(config.views)
    arms = {
        name: derive(dataclasses.replace(config, loss=matching), views=mode.fields(views))
        for name, mode in TEACHING.items()
    }
    for name in ("hard", "soft"):
        arms[name] = dataclasses.replace(config, loss=_deit_loss(config, name))
    arms["none"] = undistilled(config)
    return arms


def _deit_loss(config: Config, kind: str) -> LossConfig:
    """DeiT's objective through the token or the only head; the recipe's, if it is of the kind."""
    if config.loss.kind == kind:
        return config.loss
    head = "deit" if has_distillation_token(config.student) else "class"
    smoothing = config.loss.label_smoothing
    return dataclasses.replace(OBJECTIVES[f"{head}-{kind}"], label_smoothing=smoothing)


def patience(config: Config) -> Arms:
    """A quarter, half, all and twice the epochs, with the teacher and without."""
    arms: Arms = {}
    for factor in (0.25, 0.5, 1, 2):
        epochs = max(round(config.optim.epochs * factor), 1)
        fields = {
            "epochs": epochs,
            "warmup_epochs": min(config.optim.warmup_epochs, epochs / 4),
            "ema_epochs": min(config.optim.ema_epochs, epochs / 2),
        }
        warmup = min(config.loss.distillation_warmup, epochs / 4)
        arms[f"distilled-{epochs}"] = derive(
            config, optim=fields, loss={"distillation_warmup": warmup}
        )
        arms[f"undistilled-{epochs}"] = derive(undistilled(config), optim=fields)
    return arms


def ensemble(config: Config) -> Arms:
    """Several teachers together, by each way of combining them, beside each alone and none.

    Raises ConfigError with fewer than two teachers.
    """
    teacher, one = config.teacher, {"distillation_tokens": 1}
    if len(teacher.source) < 2:
        raise ConfigError("--study ensemble: needs several teachers (--teacher.source A,B)")
    if len(teacher.targets) == 1:
        raise ConfigError(
            "--study ensemble: one store of what all teachers say together serves neither one "
            "alone nor another mean; give a store for each (`deit targets write ... --only 1`)"
        )
    arms: Arms = {}
    for combine in ("probabilities", "logits"):
        arms[f"mean of {combine}"] = derive(config, student=one, teacher={"combine": combine})
    if has_distillation_token(config.student) and config.loss.through == "distillation":
        tokens = {"distillation_tokens": len(teacher.source)}
        arms["a token each"] = derive(config, student=tokens, teacher={"combine": "tokens"})
    names = [source.rstrip("/").rpartition("/")[2] for source in teacher.source]
    if len(set(names)) < len(names):
        names = list(teacher.source)
    for place, name in enumerate(names):
        one_alone = dataclasses.replace(config, teacher=alone(teacher, place))
        arms[f"only {name}"] = derive(one_alone, student=one)
    arms["none"] = undistilled(config)
    return arms


def resolution(config: Config) -> Arms:
    """Fine-tuning taught by teachers fitted to the resolution, by the same merely shown larger
    images, by them at the size they were trained at; and by labels alone.

    Raises ConfigError without a start.
    """
    if config.start.source is None:
        raise ConfigError("--study resolution: the recipe starts from nothing (start.source)")
    arms: Arms = {}
    before = tuple(map(_before_fitting, config.teacher.source))
    labels = undistilled(config)
    if None not in before:
        arms["teacher fitted"] = config
        config = derive(config, teacher={"source": before})
    # Shown images of a size it never saw, a ConvNet may fall to chance: this arm shows it.
    arms["teacher resized"] = derive(config, teacher={"allow_weak": True})
    arms["teacher as trained"] = derive(config, teacher={"image_size": ()})
    arms["none"] = labels
    return arms


def _before_fitting(source: str) -> str | None:
    """What a teacher, a run of ours, was fine-tuned from; None where it was not."""
    recipe, saved = recipe_of(source), Path(source).expanduser() / "config.json"
    if recipe is None and not saved.is_file():
        return None
    try:
        return (load(saved) if recipe is None else RECIPES[recipe]()).start.source
    except ConfigError:
        return None  # another's config.json: timm's folders have one as well


STUDIES: dict[str, Callable[[Config], Arms]] = {
    "worth": worth,
    "teaching": teaching,
    "patience": patience,
    "ensemble": ensemble,
    "resolution": resolution,
}
"""Every study by its name on the command line: recipe -> configurations by name."""
