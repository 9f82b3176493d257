"""What an answer of a teacher depends on, as plain values: data, views, sizes, teachers."""

import dataclasses
import hashlib
from typing import Any

from deit.config.data_section import ViewsConfig
from deit.config.schema import Config
from deit.config.teachers import teacher_specs
from deit.datasets import views as view_code
from deit.datasets.images import InMemoryImages
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import Splits
from deit.models.teachers import Teacher

# Of the views section, what the teacher's view does not depend on.
_NEVER = ("mean", "std", "seed")
_DRAWN_ALONE = ("eval_crop_pct", "teacher_num_crops")
# What a view that is always the same does depend on.
_FIXED = {
    "resized": ("teacher_view", "interpolation"),
    "center": ("teacher_view", "eval_crop_pct"),
    "crops": (
        *("teacher_view", "teacher_num_crops", "crop", "crop_padding", "crop_pct", "crop_scale"),
        *("crop_ratio", "flip", "rotation", "interpolation"),
    ),
}


def fingerprint_of(
    config: Config, splits: Splits, loader: TrainLoader, teachers: list[Teacher] | None
) -> dict[str, Any]:
    """The fingerprint of the answers these teachers give to these views, ready for JSON.

    Only what can change an answer is in it: a store with a teacher's fixed view serves any
    augmentation of the student. teachers: None where they are not at hand, and then not in it.
    """
    views, sizes = config.views, loader.sizes
    memory = isinstance(splits.train, InMemoryImages)
    found: dict[str, Any] = {
        "dataset": splits.fingerprint,
        "classes": hashlib.sha256("\n".join(splits.class_names).encode()).hexdigest(),
        "images": len(splits.train.labels),
        "storage": "memory" if memory else "files",
        "square": config.data.image_size,
        "view_code": view_code.VERSION,
        "views": _of_views(views),
        "teacher_size": sizes.teacher,
    }
    if not views.has_fixed_teacher_view or views.teacher_view == "crops":
        found["seed"] = config.views_seed
    if views.teacher_view == "same":
        found["view_size"], found["student_size"] = sizes.view, sizes.student
    if not views.has_fixed_teacher_view:
        if views.aug_repeats > 1:
            found["batch_size"] = config.optim.batch_size
        if views.auto_augment != "none" or views.erasing_prob > 0:
            # What moves in from outside, and the noise of erased boxes, have these colours.
            found["mean"] = list(views.mean or splits.mean)
            found["std"] = list(views.std or splits.std)
    if teachers is not None:
        found |= teachers_fingerprint(config, teachers)
    return found


def teachers_fingerprint(config: Config, teachers: list[Teacher]) -> dict[str, Any]:
    """The part of the fingerprint that is about the teachers."""
    named = {str(number): one.fingerprint() for number, one in enumerate(teachers, start=1)}
    found: dict[str, Any] = {"teacher": named}
    if len(teachers) > 1:
        found["combine"] = config.teacher.combine
        # Rounded: 3,1 and 0.3,0.1 are the same proportion, but not the same last bits.
        found["weights"] = [round(member.weight, 9) for member in teacher_specs(config.teacher)]
    return found


def _of_views(views: ViewsConfig) -> dict[str, Any]:
    values = dataclasses.asdict(views)
    if views.has_fixed_teacher_view:
        return {name: _plain(values[name]) for name in _FIXED[views.teacher_view]}
    left_out = (*_NEVER, *_DRAWN_ALONE)
    return {name: _plain(value) for name, value in values.items() if name not in left_out}


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
