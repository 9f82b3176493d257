"""What stored teacher outputs depend on, as plain values: data, views, sizes, teachers."""

import dataclasses
import hashlib
from typing import Any

from deit.config.sections.teacher import TeacherConfig
from deit.config.sections.views import ViewsConfig
from deit.config.teachers import teacher_specs
from deit.datasets.images import InMemoryImages
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import Splits
from deit.datasets.views import VIEW_VERSION
from deit.models.teachers import Teacher

OF_TEACHERS = ("teacher", "combine", "weights")
"""The keys of a store's fingerprint that identify the teachers (see `teachers_fingerprint`)."""

# Fields of the views section that never change what a teacher sees.
_NEVER = ("mean", "std", "seed")
# Fields that matter only if the teacher's view is fixed.
_ONLY_FIXED = ("eval_crop_pct", "teacher_num_crops")
# All fields that a fixed teacher view depends on, by views.teacher_view.
_FIXED = {
    "resized": ("teacher_view", "interpolation"),
    "center": ("teacher_view", "eval_crop_pct"),
    "crops": (
        *("teacher_view", "teacher_num_crops", "crop", "crop_padding", "crop_pct", "crop_scale"),
        *("crop_ratio", "flip", "rotation", "interpolation"),
    ),
}


def fingerprint_of(splits: Splits, loader: TrainLoader) -> dict[str, Any]:
    """Return the fingerprint of the images that teachers see, ready for JSON.

    It holds only what can change them: with a fixed teacher view, one store serves any augmentation
    of the student.
    """
    views, sizes = loader.views, loader.sizes
    in_memory = isinstance(splits.train, InMemoryImages)
    values: dict[str, Any] = {
        "dataset": splits.fingerprint,
        "classes": hashlib.sha256("\n".join(splits.class_names).encode()).hexdigest(),
        "images": len(splits.train.labels),
        "storage": "memory" if in_memory else "files",
        "source_size": sizes.source,
        "view_code": VIEW_VERSION,
        "views": _view_fields(views),
        "teacher_size": sizes.teacher,
    }
    if not views.has_fixed_teacher_view or views.teacher_view == "crops":
        values["seed"] = loader.seed
    if views.teacher_view == "same":
        values["view_size"], values["student_size"] = sizes.view, sizes.student
    if not views.has_fixed_teacher_view:
        if views.aug_repeats > 1:
            values["batch_size"] = loader.optim.batch_size
        if views.auto_augment != "none" or views.erasing_prob > 0:
            # The fill color of geometric operations and the noise of erased boxes depend on these.
            values["mean"] = list(loader.channel_stats.mean)
            values["std"] = list(loader.channel_stats.std)
    return values


def teachers_fingerprint(config: TeacherConfig, teachers: list[Teacher]) -> dict[str, Any]:
    """Return the part of the fingerprint that identifies the teachers and how they are combined."""
    by_number = {str(index): teacher.fingerprint() for index, teacher in enumerate(teachers, 1)}
    values: dict[str, Any] = {"teacher": by_number}
    if len(teachers) > 1:
        values["combine"] = config.combine
        # Rounded: 3,1 and 0.3,0.1 are the same proportion, but not the same last bits.
        values["weights"] = [round(spec.weight, 9) for spec in teacher_specs(config)]
    return values


def _view_fields(views: ViewsConfig) -> dict[str, Any]:
    values = dataclasses.asdict(views)
    if views.has_fixed_teacher_view:
        return {name: _as_json(values[name]) for name in _FIXED[views.teacher_view]}
    excluded = (*_NEVER, *_ONLY_FIXED)
    return {name: _as_json(value) for name, value in values.items() if name not in excluded}


def _as_json(value: Any) -> Any:
    """Return the value that JSON gives back."""
    return list(value) if isinstance(value, tuple) else value


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dictionary as a flat one, with keys such as `views.crop`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return `key: X in the store, Y in this run` for each value that differs."""
    before, now = _flatten(stored), _flatten(current)
    return [
        f"{key}: {_short(before.get(key))} in the store, {_short(now.get(key))} in this run"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]


def _short(value: Any) -> str:
    digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if digest else repr(value)
