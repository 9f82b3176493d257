"""Checks of the data and the views."""

import dataclasses

from deit.config.cross_field_checks.unused_fields import without_effect
from deit.config.schema import Config
from deit.config.sections.views import ViewsConfig
from deit.core.errors import ConfigProblem
from deit.core.user_code import HUB_PREFIXES, address_hint


def check_addresses(config: Config) -> list[ConfigProblem]:
    """Check for addresses in fields that take files and folders."""
    problems = []
    for section in dataclasses.fields(config):
        for leaf in dataclasses.fields(section.type):
            name, value = f"{section.name}.{leaf.name}", getattr(config, section.name)
            value = getattr(value, leaf.name)
            for item in value if isinstance(value, tuple) else (value,):
                if not isinstance(item, str):
                    continue
                if name in TIMM_LOADS and item.startswith(HUB_PREFIXES):
                    continue
                if (hint := address_hint(item.removeprefix("@"))) is not None:
                    problems.append(ConfigProblem(name, item, hint))
    return problems


def check_data(config: Config) -> list[ConfigProblem]:
    """Check the data section."""
    data, problems = config.data, []
    if data.source == "reader":
        if data.reader is None:
            hint = "is required by data.source 'reader': folder, tar, hfds/NAME or torch/NAME"
            problems.append(ConfigProblem("data.reader", None, hint))
    else:
        hint = f"has an effect with data.source 'reader' only; it is {data.source!r}"
        problems += without_effect("data", data, ("reader",), hint)
    if data.source not in ("mnist", "cifar10", "cifar100", "reader"):
        hint = "only mnist, cifar10, cifar100 and the dataset of data.reader can be downloaded"
        problems += without_effect("data", data, ("download",), hint)
    if data.source not in ("folder", "shards", "reader"):
        hint = f"has an effect on image files only; data.source {data.source!r} is kept in memory"
        problems += without_effect("data", data, ("storage", "num_workers", "exclude_list"), hint)
    elif data.storage == "memory":
        hint = "has no effect because data.storage is 'memory'"
        problems += without_effect("data", data, ("num_workers",), hint)
    return problems


def check_views(config: Config) -> list[ConfigProblem]:
    """Check the views section."""
    views = config.views
    problems = []
    for leaf in ("crop_scale", "crop_ratio", "erasing_scale", "erasing_ratio"):
        low, high = getattr(views, leaf)
        if low > high:
            problems.append(
                ConfigProblem(f"views.{leaf}", (low, high), "should go from low to high")
            )
    for leaf in ("crop_scale", "erasing_scale"):
        if getattr(views, leaf)[1] > 1:
            hint = "a box cannot exceed the image (1.0)"
            problems.append(ConfigProblem(f"views.{leaf}", getattr(views, leaf), hint))
    for leaves, has_effect, hint in _effects(views):
        if not has_effect:
            problems += without_effect("views", views, leaves, hint)
    if (views.mean is None) != (views.std is None):
        hint = "set both views.mean and views.std, or neither"
        problems.append(ConfigProblem("views.mean", views.mean, hint))
    if views.std is not None and min(views.std) <= 0:
        problems.append(ConfigProblem("views.std", views.std, "should be positive"))
    return problems


def _effects(views: ViewsConfig) -> list[tuple[tuple[str, ...], bool, str]]:
    """Return groups of fields, whether they have an effect, and otherwise why not."""
    return [
        (
            (
                "randaugment_magnitude",
                "randaugment_magnitude_std",
                "randaugment_num_ops",
                "randaugment_prob",
            ),
            views.auto_augment == "randaugment",
            "has an effect with views.auto_augment randaugment only",
        ),
        (
            ("erasing_mode", "erasing_scale", "erasing_ratio"),
            views.erasing_prob > 0,
            "has no effect because views.erasing_prob is 0",
        ),
        (("crop_pct",), views.crop == "random", "has an effect with views.crop random only"),
    ]


TIMM_LOADS = ("init.weights", "teacher.source")
"""Fields that accept a repository of the Hugging Face hub by timm's name (hf-hub:...)."""
