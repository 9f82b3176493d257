"""The named studies: which students of a recipe are trained beside each other."""

import dataclasses
from collections.abc import Callable

from deit.config import OBJECTIVES, TEACHING, Config, LossConfig, derive, has_distillation_token

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
        arms[f"distilled, {epochs} epochs"] = derive(config, optim=fields)
        arms[f"undistilled, {epochs} epochs"] = derive(undistilled(config), optim=fields)
    return arms


def ensemble(config: Config) -> Arms:
    """Several teachers together, by each way of combining them, beside each alone and none."""
    sources, one = config.teacher.source, {"distillation_tokens": 1}
    arms: Arms = {}
    if len(sources) > 1:
        for combine in ("probabilities", "logits"):
            arms[f"mean of {combine}"] = derive(config, student=one, teacher={"combine": combine})
        if has_distillation_token(config.student) and config.loss.through == "distillation":
            tokens = {"distillation_tokens": len(sources)}
            arms["a token each"] = derive(config, student=tokens, teacher={"combine": "tokens"})
    for source in sources:
        alone = {"source": (source,), "weight": (), "combine": "probabilities"}
        name = source.rstrip("/").rpartition("/")[2]
        arms[f"only {name}"] = derive(config, student=one, teacher=alone)
    arms["none"] = undistilled(config)
    return arms


STUDIES: dict[str, Callable[[Config], Arms]] = {
    "worth": worth,
    "teaching": teaching,
    "patience": patience,
    "ensemble": ensemble,
}
"""Every study by its name on the command line: recipe -> configurations by name."""
