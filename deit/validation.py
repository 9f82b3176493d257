"""Checks a configuration as a whole: every problem found at once, each with what to do."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from deit.config import (
    STUDENTS,
    Config,
    ViewsConfig,
    has_distillation_token,
    is_transformer,
    mixes,
    peak_lr,
    to_dict,
)
from deit.errors import ConfigError
from deit.text import nearest


class Problem(NamedTuple):
    """One thing wrong with a configuration: the field, its value, and what to do."""

    field: str
    value: Any
    advice: str

    def __str__(self) -> str:
        shown = "" if self.value is _NO_VALUE else f" = {self.value!r}"
        return f"{self.field}{shown}: {self.advice}"


_NO_VALUE = object()


def field_names() -> list[str]:
    """Every field as `section.field`."""
    return [
        f"{section.name}.{leaf.name}"
        for section in dataclasses.fields(Config)
        for leaf in dataclasses.fields(section.type)
    ]


def build(values: dict[str, Any], extra: typing.Iterable[Problem] = ()) -> Config:
    """A checked configuration from nested values (text from a command line is converted).

    extra: problems found earlier, reported in the same message.
    Raises ConfigError naming every problem.
    """
    problems, broken = list(extra), set()
    adapter = TypeAdapter(Config)
    try:
        config = adapter.validate_python(values)
    except ValidationError as error:
        problems += [_translate(item) for item in error.errors()]
        # What is left after the broken sections can still contradict itself: say that as well.
        broken = {str(item["loc"][0]) for item in error.errors()}
        config = adapter.validate_python(
            {name: fields for name, fields in values.items() if name not in broken}
        )
    for check, sections in _CHECKS.items():
        if not sections & broken:
            problems += check(config)
    if problems:
        raise _config_error(problems)
    return config


def validate(config: Config) -> Config:
    """The same configuration, checked. Raises ConfigError naming every problem."""
    return build(to_dict(config))


def load(path: Path) -> Config:
    """A configuration from the config.json of a run. Raises ConfigError."""
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable configuration ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a JSON object of sections")
    return build(values)


def _config_error(problems: list[Problem]) -> ConfigError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "".join(f"\n  {problem}" for problem in problems)
    return ConfigError(f"{count} in the configuration:{lines}")


def _translate(error: dict[str, Any]) -> Problem:
    """A Problem from one of pydantic's error records."""
    # Below a field, locations also name union members and tuple positions: not the user's words.
    name = ".".join(str(part) for part in error["loc"][:2])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_field(name)
    value, advice = error["input"], error["msg"].removeprefix("Value error, ")
    advice = advice.replace("Input should", "should").replace("Field required", "is required")
    if error["type"] == "literal_error" and isinstance(value, str):
        section, leaf = name.split(".")
        annotation = typing.get_type_hints(_section_type(section))[leaf]
        advice += nearest(value, typing.get_args(annotation))
    return Problem(name, value, advice)


def _section_type(name: str) -> type:
    return typing.get_type_hints(Config)[name]


def unknown_field(name: str) -> Problem:
    """The problem of a field that does not exist, with the nearest name."""
    return Problem(name, _NO_VALUE, f"unknown field{nearest(name, field_names())}")


def _check_student(config: Config) -> list[Problem]:
    student = config.student
    found = []
    if student.name not in STUDENTS and not student.name.startswith("timm:"):
        found.append(
            Problem(
                "student.name",
                student.name,
                f"should be one of {', '.join(STUDENTS)}, or timm:NAME"
                + nearest(student.name, STUDENTS),
            )
        )
    elif is_transformer(student):
        if student.image_size % student.patch_size:
            found.append(
                Problem(
                    "student.patch_size",
                    student.patch_size,
                    f"should divide student.image_size ({student.image_size})",
                )
            )
        if student.embed_dim and student.num_heads and student.embed_dim % student.num_heads:
            found.append(
                Problem(
                    "student.num_heads",
                    student.num_heads,
                    f"should divide student.embed_dim ({student.embed_dim})",
                )
            )
    else:
        only = f"only deit_* and vit_* take it, student.name is {student.name!r}"
        shape = ("patch_size", "embed_dim", "depth", "num_heads", "initialisation")
        found += _without_effect("student", student, shape, only)
    return found


def _without_effect(
    section: str, values: Any, leaves: tuple[str, ...], advice: str
) -> list[Problem]:
    """A problem for each field that was changed although it cannot take effect."""
    defaults = type(values)()
    return [
        Problem(f"{section}.{leaf}", getattr(values, leaf), advice)
        for leaf in leaves
        if getattr(values, leaf) != getattr(defaults, leaf)
    ]


def _check_data(config: Config) -> list[Problem]:
    data, found = config.data, []
    if data.source == "reader":
        if data.reader is None:
            advice = "data.source 'reader' needs one: folder, tar, hfds/NAME or torch/NAME"
            found.append(Problem("data.reader", None, advice))
    else:
        advice = f"only data.source 'reader' takes it, data.source is {data.source!r}"
        found += _without_effect("data", data, ("reader",), advice)
    if data.source not in ("cifar10", "cifar100", "reader"):
        advice = "only cifar10 and cifar100, or what data.reader names, can be downloaded"
        found += _without_effect("data", data, ("download",), advice)
    if data.source not in ("folder", "shards", "reader"):
        advice = f"only image files take it, data.source {data.source!r} is always in memory"
        found += _without_effect("data", data, ("storage", "workers", "quarantine"), advice)
    elif data.storage == "memory":
        advice = "has no effect, data.storage is 'memory'"
        found += _without_effect("data", data, ("workers",), advice)
    return found


def _check_objective(config: Config) -> list[Problem]:
    loss, student = config.loss, config.student
    if loss.kind == "none":
        teaching = ("through", "distillation_weight", "temperature")
        advice = "has no effect, loss.kind is 'none'; --objective none clears it"
        return _without_effect("loss", loss, teaching, advice)
    found = []
    if config.teacher.source is None:
        found.append(
            Problem(
                "teacher.source",
                None,
                f"loss.kind {loss.kind!r} needs a teacher; give one, or --objective none",
            )
        )
    if student.name not in STUDENTS and not student.name.startswith("timm:"):
        return found  # which heads an unknown name has, nobody knows
    token = has_distillation_token(student)
    if loss.through == "distillation" and not token:
        twin = student.name.replace("vit_", "deit_")
        suggestion = f"student.name {twin}" if twin in STUDENTS else "a deit_* student"
        found.append(
            Problem(
                "student.name",
                student.name,
                "has no distillation token to distil through; use "
                f"{suggestion}, or loss.through class",
            )
        )
    if loss.through == "class" and token:
        twin = student.name.replace("deit_", "vit_")
        suggestion = f"student.name {twin}" if twin in STUDENTS else "a student without the token"
        found.append(
            Problem(
                "loss.through",
                "class",
                f"would leave the distillation head of {student.name} untrained; use "
                f"{suggestion}, or loss.through distillation",
            )
        )
    if loss.distillation_weight == 0:
        found.append(
            Problem(
                "loss.distillation_weight", 0, "leaves the teacher no say; use --objective none"
            )
        )
    if loss.distillation_weight == 1 and token:
        found.append(
            Problem(
                "loss.distillation_weight",
                1,
                f"would leave the class head of {student.name} untrained; use less than 1, or a "
                "vit_* student with loss.through class",
            )
        )
    if loss.kind == "hard" and loss.temperature != 1:
        found.append(
            Problem("loss.temperature", loss.temperature, "has no effect on a hard label; use 1")
        )
    return found


def _check_views(config: Config) -> list[Problem]:
    views = config.views
    found = []
    for leaf in ("crop_scale", "crop_ratio", "erasing_scale", "erasing_ratio"):
        low, high = getattr(views, leaf)
        if low > high:
            found.append(Problem(f"views.{leaf}", (low, high), "should go from low to high"))
    for leaf in ("crop_scale", "erasing_scale"):
        if getattr(views, leaf)[1] > 1:
            advice = "a box cannot exceed the image (1.0)"
            found.append(Problem(f"views.{leaf}", getattr(views, leaf), advice))
    for leaves, on, advice in _effects(views):
        if not on:
            found += _without_effect("views", views, leaves, advice)
    for leaf in ("views", "teacher"):
        section = getattr(config, leaf)
        if (section.mean is None) != (section.std is None):
            found.append(Problem(f"{leaf}.mean", section.mean, f"goes together with {leaf}.std"))
        if section.std is not None and min(section.std) <= 0:
            found.append(Problem(f"{leaf}.std", section.std, "should be positive"))
    return found


def _effects(views: ViewsConfig) -> list[tuple[tuple[str, ...], bool, str]]:
    """Fields of the views, whether they take effect, and why they would not."""
    return [
        (
            ("magnitude", "magnitude_std", "layers", "layer_probability"),
            views.policy == "randaugment",
            "has an effect with views.policy randaugment only",
        ),
        (
            ("erasing_fill", "erasing_scale", "erasing_ratio"),
            views.erasing > 0,
            "has no effect, views.erasing is 0",
        ),
    ]


def _check_optim(config: Config) -> list[Problem]:
    optim = config.optim
    found = []
    if optim.batch_size % optim.accumulate:
        found.append(
            Problem(
                "optim.accumulate",
                optim.accumulate,
                f"should divide optim.batch_size ({optim.batch_size})",
            )
        )
    elif mixes(config.views) and (optim.batch_size // optim.accumulate) % 2:
        found.append(
            Problem(
                "optim.batch_size",
                optim.batch_size,
                "mixing takes pairs: each micro-batch should be even",
            )
        )
    if optim.warmup_epochs >= optim.epochs:
        found.append(
            Problem(
                "optim.warmup_epochs",
                optim.warmup_epochs,
                f"should be less than optim.epochs ({optim.epochs}); 0 is no warm-up",
            )
        )
    for leaf in ("min_lr", "warmup_lr"):
        if getattr(optim, leaf) > peak_lr(optim):
            found.append(
                Problem(
                    f"optim.{leaf}",
                    getattr(optim, leaf),
                    f"should not exceed the peak learning rate ({peak_lr(optim):.3g} = "
                    "optim.lr * optim.batch_size / optim.lr_reference_batch)",
                )
            )
    if optim.ema_epochs > optim.epochs:
        found.append(
            Problem(
                "optim.ema_epochs",
                optim.ema_epochs,
                "an average longer than the run keeps the initial weights; "
                f"should be at most optim.epochs ({optim.epochs})",
            )
        )
    return found


_CHECKS = {
    _check_data: {"data"},
    _check_student: {"student"},
    _check_objective: {"loss", "student", "teacher"},
    _check_views: {"views", "teacher"},
    _check_optim: {"optim", "views"},
}
"""What single fields cannot say, and the sections each check reads."""
