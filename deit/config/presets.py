"""Presets: named values for a section of a configuration (loss, augmentation, view mode)."""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, NamedTuple

from deit.config.field_types import TeacherView
from deit.config.sections.loss import LossConfig
from deit.config.sections.views import ViewsConfig
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
"""Loss sections by name: the rows of the DeiT paper's Table 3 (soft: tau 3, lambda 0.1); function
matching (Beyer et al. 2022: KL only); USI (Ridnik et al. 2022: CE + 5 KL); decoupled distillation
with the values for CIFAR-100 (Zhao et al. 2022)."""


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
"""Fields of the views by name: those of the DeiT paper (Table 9) and of DeiT III, mixup and cutmix
only, none, and those of USI. Crop, flip, rotation and normalization depend on the data set, so
presets do not set them."""


class ViewMode(NamedTuple):
    """The views of teacher and student (Beyer et al. 2022, section 3.1.1).

    crop: of the student's view. mixup: alpha, 0 for no mixup.
    """

    teacher_view: TeacherView
    crop: Literal["none", "mild", "inception"]
    mixup: float = 0.0

    def fields(self, views: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of ViewsConfig that the mode sets, given those of a recipe.

        Sets crop and mixing only. A recipe with crop `padded` keeps it as its mild crop, because
        its images are small. An inception crop has at least 5 % of the area, unless the recipe
        sets crop_scale.
        """
        recipe_scale = tuple(views["crop_scale"])
        scale = (0.05, 1.0) if recipe_scale == ViewsConfig.crop_scale else recipe_scale
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
"""View modes by their names in the paper."""


class Preset(NamedTuple):
    """An option that sets fields of a section.

    section: the section that it changes.
    names: the values of the option.
    fields: returns the fields to set for a name, given the section's values in the recipe.
    """

    section: str
    names: Iterable[str]
    fields: Callable[[str, dict[str, Any]], dict[str, Any]]


PRESETS = {
    "loss": Preset("loss", LOSS_PRESETS, lambda name, loss: dataclasses.asdict(LOSS_PRESETS[name])),
    "augmentation": Preset("views", AUGMENTATIONS, lambda name, views: AUGMENTATIONS[name]),
    "view_mode": Preset("views", VIEW_MODES, lambda name, views: VIEW_MODES[name].fields(views)),
}
"""Presets by option, in the order in which they are applied."""


def apply_presets(
    values: dict[str, dict[str, Any]], names: dict[str, str | None]
) -> dict[str, str]:
    """Apply presets to the values of a recipe, in place.

    names: by option; None keeps the recipe's values.
    Return an error message for each option with an unknown name.
    """
    errors = {}
    for option, preset in PRESETS.items():
        name = names.get(option)
        if name in preset.names:
            values[preset.section] |= preset.fields(name, values[preset.section])
        elif name is not None:
            known = ", ".join(preset.names)
            errors[option] = f"should be one of {known}{did_you_mean(name, preset.names)}"
    return errors


def follow_from_epochs(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Return the fields that differ only because `fit_epochs` limited them to half of the epochs.

    before, now: configurations as dicts, with different numbers of epochs.

    >>> before = {"optim": {"epochs": 60, "warmup_epochs": 5, "ema_epochs": 0}}
    >>> now = {"optim": {"epochs": 4, "warmup_epochs": 2, "ema_epochs": 0}}
    >>> for values in (before, now):
    ...     values["loss"] = {"distillation_warmup_epochs": 0}
    >>> follow_from_epochs(before, now)
    {'optim.warmup_epochs'}
    """
    following = set()
    for name in _EPOCH_FIELDS:
        section, leaf = name.split(".")
        limited, other = sorted((before, now), key=lambda values: values[section][leaf])
        epochs, value = limited["optim"]["epochs"], limited[section][leaf]
        if epochs < other["optim"]["epochs"] and value == epochs / 2 < other[section][leaf]:
            following.add(name)
    return following


_EPOCH_FIELDS = ("optim.warmup_epochs", "optim.ema_epochs", "loss.distillation_warmup_epochs")


def fit_epochs(values: dict[str, dict[str, Any]], given: Collection[str]) -> None:
    """Limit warm-ups and the average's horizon to half of the epochs, in place.

    values: of a configuration; may be text from a command line.
    given: the fields and presets that the user gave. Those fields are not changed, and nothing is
    unless optim.epochs or a preset is among them.
    """
    if "optim.epochs" not in given and not PRESETS.keys() & set(given):
        return
    try:
        half = int(values["optim"]["epochs"]) / 2
    except (TypeError, ValueError):
        return  # validation reports it
    for name in _EPOCH_FIELDS:
        section, leaf = name.split(".")
        if name not in given and half > 0:
            values[section][leaf] = min(values[section][leaf], half)
