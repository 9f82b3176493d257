"""Checks of the data and the views."""

import dataclasses

from deit.config.checks.effects import without_effect
from deit.config.data_section import ViewsConfig
from deit.config.schema import Config
from deit.core.errors import ConfigProblem
from deit.core.user_code import HUB_PREFIXES, address_hint


def check_addresses(config: Config) -> list[ConfigProblem]:
    """Addresses, where files and folders are named."""
    found = []
    for section in dataclasses.fields(config):
        for leaf in dataclasses.fields(section.type):
            name, value = f"{section.name}.{leaf.name}", getattr(config, section.name)
            value = getattr(value, leaf.name)
            for word in value if isinstance(value, tuple) else (value,):
                if not isinstance(word, str) or (
                    name in TIMM_LOADS and word.startswith(HUB_PREFIXES)
                ):
                    continue
                if (advice := address_hint(word.removeprefix("@"))) is not None:
                    found.append(ConfigProblem(name, word, advice))
    return found


def check_data(config: Config) -> list[ConfigProblem]:
    data, found = config.data, []
    if data.source == "reader":
        if data.reader is None:
            advice = "data.source 'reader' needs one: folder, tar, hfds/NAME or torch/NAME"
            found.append(ConfigProblem("data.reader", None, advice))
    else:
        advice = f"only data.source 'reader' takes it, data.source is {data.source!r}"
        found += without_effect("data", data, ("reader",), advice)
    if data.source not in ("mnist", "cifar10", "cifar100", "reader"):
        advice = "only mnist, cifar10, cifar100, or what data.reader names, can be downloaded"
        found += without_effect("data", data, ("download",), advice)
    if data.source not in ("folder", "shards", "reader"):
        advice = f"only image files take it, data.source {data.source!r} is always in memory"
        found += without_effect("data", data, ("storage", "num_workers", "exclude_list"), advice)
    elif data.storage == "memory":
        advice = "has no effect, data.storage is 'memory'"
        found += without_effect("data", data, ("num_workers",), advice)
    return found


def check_views(config: Config) -> list[ConfigProblem]:
    views = config.views
    found = []
    for leaf in ("crop_scale", "crop_ratio", "erasing_scale", "erasing_ratio"):
        low, high = getattr(views, leaf)
        if low > high:
            found.append(ConfigProblem(f"views.{leaf}", (low, high), "should go from low to high"))
    for leaf in ("crop_scale", "erasing_scale"):
        if getattr(views, leaf)[1] > 1:
            advice = "a box cannot exceed the image (1.0)"
            found.append(ConfigProblem(f"views.{leaf}", getattr(views, leaf), advice))
    for leaves, on, advice in _effects(views):
        if not on:
            found += without_effect("views", views, leaves, advice)
    if (views.mean is None) != (views.std is None):
        found.append(ConfigProblem("views.mean", views.mean, "goes together with views.std"))
    if views.std is not None and min(views.std) <= 0:
        found.append(ConfigProblem("views.std", views.std, "should be positive"))
    return found


def _effects(views: ViewsConfig) -> list[tuple[tuple[str, ...], bool, str]]:
    """Fields of the views, whether they take effect, and why they would not."""
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
            "has no effect, views.erasing_prob is 0",
        ),
        (("crop_pct",), views.crop == "random", "has an effect with views.crop random only"),
    ]


TIMM_LOADS = ("init.weights", "teacher.source")
"""Fields that take a repository of the Hugging Face hub, as timm names it."""
