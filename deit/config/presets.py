"""Whole sections of a configuration by name: objectives, augmentations, teaching modes."""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, NamedTuple

from deit.config.data_section import ViewsConfig
from deit.config.fields import TeacherView
from deit.config.schema import LossConfig
from deit.core.errors import did_you_mean

_TOKEN = {"head": "distillation", "distillation_weight": 0.5}
_HEAD = {"head": "class", "distillation_weight": 0.5}
_ALPHA = {"distillation_weight": 0.1, "temperature": 3.0}
LOSS_PRESETS: dict[str, LossConfig] = {
    "deit-hard": LossConfig(kind="hard", **_TOKEN),
    "deit-soft": LossConfig(kind="soft", **_TOKEN | _ALPHA),
    "class-hard": LossConfig(kind="hard", **_HEAD),
    "class-soft": LossConfig(kind="soft", **_HEAD | _ALPHA),
    "function-matching": LossConfig(
        kind="soft", head="all", distillation_weight=1.0, label_smoothing=0.0
    ),
    "usi": LossConfig(
        kind="soft", head="all", distillation_weight=5.0, label_weight=1.0, label_smoothing=0.0
    ),
    "dkd": LossConfig(
        kind="dkd",
        head="all",
        distillation_weight=1.0,
        label_weight=1.0,
        distillation_warmup_epochs=20.0,
        temperature=4.0,
        label_smoothing=0.0,
    ),
    "none": LossConfig(kind="none"),
}
"""Whole loss sections by name: the rows of the DeiT paper's Table 3 (soft: tau 3, lambda 0.1);
function matching (Beyer et al. 2022: KL alone); USI (Ridnik et al. 2022: CE + 5 KL); decoupled
distillation as on CIFAR-100 (Zhao et al. 2022)."""


_FULL_MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5}
_NO_MIX = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5}
_PLAIN = {
    "auto_augment": "none",
    "randaugment_magnitude": 9.0,
    "color_jitter": 0.0,
    "erasing_prob": 0.0,
    "aug_repeats": 1,
}
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "deit": {
        **_PLAIN,
        **_FULL_MIX,
        "auto_augment": "randaugment",
        "erasing_prob": 0.25,
        "aug_repeats": 3,
    },
    "deit3": {
        **_PLAIN,
        **_FULL_MIX,
        "auto_augment": "three_augment",
        "color_jitter": 0.3,
        "aug_repeats": 3,
    },
    "mix": {**_PLAIN, **_FULL_MIX},
    "none": {**_PLAIN, **_NO_MIX},
    "usi": {
        **_PLAIN,
        **_FULL_MIX,
        "auto_augment": "randaugment",
        "randaugment_magnitude": 7.0,
        "color_jitter": 0.4,
        "aug_repeats": 3,
    },
}
"""Fields of the views by name: the DeiT paper's (Table 9), DeiT III's, mixup and cutmix alone,
nothing, and USI's. Crop, flip, rotation and normalisation belong to the data and stay as they
are."""


class ViewMode(NamedTuple):
    """A way of showing an image to teacher and student (Beyer et al. 2022, section 3.1.1).

    crop: the student's: none, mild or inception. mixup: alpha, 0 for none.
    """

    teacher_view: TeacherView
    crop: Literal["none", "mild", "inception"]
    mixup: float = 0.0

    def fields(self, views: dict[str, Any]) -> dict[str, Any]:
        """The fields it sets over those of a recipe; policy, flip and erasing stay the recipe's.

        A mild crop of small images is to shift them: where the recipe's crop is `padded`, it stays.
        Inception's crop has at least 5 % of the area, unless the recipe sets its own crop_scale.
        """
        own = tuple(views["crop_scale"])
        scale = (0.05, 1.0) if own == ViewsConfig.crop_scale else own
        crops: dict[str, dict[str, Any]] = {
            "none": {"crop": "none"},
            "mild": {"crop": "padded" if views["crop"] == "padded" else "random"},
            "inception": {"crop": "random_resized", "crop_scale": scale},
        }
        fields = crops[self.crop]
        if fields["crop"] != "random":
            fields = {**fields, "crop_pct": ViewsConfig.crop_pct}
        mixing = {**_NO_MIX, "mixup_alpha": self.mixup}
        return {"teacher_view": self.teacher_view, **fields, **mixing}


VIEW_MODES: dict[str, ViewMode] = {
    "fix/rs": ViewMode("resized", "none"),
    "fix/cc": ViewMode("center", "mild"),
    "fix/ic_ens": ViewMode("crops", "inception"),
    "ind/rc": ViewMode("independent", "mild"),
    "ind/ic": ViewMode("independent", "inception"),
    "same/rc": ViewMode("same", "mild"),
    "same/ic": ViewMode("same", "inception"),
    "function-matching": ViewMode("same", "inception", mixup=1.0),
}
"""The teaching modes by the paper's names."""


class Preset(NamedTuple):
    """What a preset does: the section it changes, its names, and for one of them the fields that
    it sets over those of the recipe."""

    section: str
    names: Iterable[str]
    fields: Callable[[str, dict[str, Any]], dict[str, Any]]


PRESETS = {
    "loss": Preset("loss", LOSS_PRESETS, lambda name, loss: dataclasses.asdict(LOSS_PRESETS[name])),
    "augmentation": Preset("views", AUGMENTATIONS, lambda name, views: AUGMENTATIONS[name]),
    "view_mode": Preset("views", VIEW_MODES, lambda name, views: VIEW_MODES[name].fields(views)),
}
"""By flag, in the order in which they are applied."""


def apply_presets(
    values: dict[str, dict[str, Any]], names: dict[str, str | None]
) -> dict[str, str]:
    """Put presets over the values of a recipe, in place.

    names: by flag; None leaves the recipe's. Returns, for each flag whose name does not exist, what
    it should be.
    """
    wrong = {}
    for flag, preset in PRESETS.items():
        name = names.get(flag)
        if name in preset.names:
            values[preset.section] |= preset.fields(name, values[preset.section])
        elif name is not None:
            known = ", ".join(preset.names)
            wrong[flag] = f"should be one of {known}{did_you_mean(name, preset.names)}"
    return wrong


_OF_EPOCHS = ("optim.warmup_epochs", "optim.ema_epochs", "loss.distillation_warmup_epochs")
"""The fields that are numbers of epochs within a run."""


def fit_epochs(values: dict[str, dict[str, Any]], said: Collection[str]) -> None:
    """Shorten warm-ups and the average's horizon to half of the epochs, in place, where a recipe or
    a preset brings them and not the user.

    values: of a configuration, text from a command line too. said: the fields and presets that
    the user named. Without optim.epochs and presets among them nothing is changed.
    """
    if "optim.epochs" not in said and not PRESETS.keys() & set(said):
        return
    try:
        half = int(values["optim"]["epochs"]) / 2
    except (TypeError, ValueError):
        return  # the check of the configuration tells
    for name in _OF_EPOCHS:
        section, leaf = name.split(".")
        if name not in said and half > 0:
            values[section][leaf] = min(values[section][leaf], half)
