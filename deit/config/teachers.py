"""The teachers of a configuration one by one, and the slots whose outputs training combines."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from deit.config.sections.teacher import TeacherConfig
from deit.core.errors import ConfigError


class TeacherSpec(NamedTuple):
    """One teacher of an ensemble.

    source: None if only its stored targets are given.
    weight: in the ensemble; those of all teachers sum to 1.
    classes: names, @FILE or an order of names. Default: those stored with the teacher.
    """

    source: str | None
    architecture: str | None
    image_size: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    weight: float
    memory_format: str
    classes: tuple[str, ...] | None = None


class TeacherSlot(NamedTuple):
    """A source of outputs in training: one teacher, or a store of the outputs of one or more.

    weight: in the ensemble; those of all slots sum to 1.
    """

    members: tuple[TeacherSpec, ...]
    target_store: str | None
    weight: float


def teacher_specs(teacher: TeacherConfig) -> tuple[TeacherSpec, ...]:
    """Return the teachers of a configuration one by one; their weights sum to 1.

    >>> config = TeacherConfig(source=("resnet", "regnet"), weights=(3.0, 1.0), image_size=(224,))
    >>> [(spec.source, spec.weight, spec.image_size) for spec in teacher_specs(config)]
    [('resnet', 0.75, 224), ('regnet', 0.25, 224)]
    """
    num_teachers = max(len(teacher.source), len(teacher.target_stores))

    def per_teacher(values: tuple, default: Any) -> tuple:
        return (values or (default,)) * (num_teachers if len(values) < 2 else 1)

    def triples(values: tuple[float, ...]) -> tuple:
        grouped = tuple(values[start : start + 3] for start in range(0, len(values), 3))
        return per_teacher(grouped, None)

    weights = per_teacher(teacher.weights, 1.0)
    return tuple(
        TeacherSpec(*fields, weight / sum(weights), memory_format, classes)
        for *fields, weight, memory_format, classes in zip(
            teacher.source or (None,) * num_teachers,
            per_teacher(teacher.architecture, None),
            per_teacher(teacher.image_size, None),
            triples(teacher.mean),
            triples(teacher.std),
            weights,
            per_teacher(teacher.memory_format, "auto"),
            _classes_per_teacher(teacher.classes, num_teachers),
            strict=True,
        )
    )


def _classes_per_teacher(
    classes: tuple[str, ...], num_teachers: int
) -> tuple[tuple[str, ...] | None, ...]:
    """Return teacher.classes of each teacher: a list of names is possible for a single one only."""
    if num_teachers < 2:
        return (classes or None,) * num_teachers
    each = classes * num_teachers if len(classes) == 1 else classes or ("none",) * num_teachers
    return tuple(None if value == "none" else (value,) for value in each)


def given_sources(teacher: str | Sequence[str]) -> tuple[str, ...]:
    """Return the sources of one or several teachers: text with commas, or a sequence.

    "none" is no teacher. Raises ConfigError for an empty source, and for "none" next to others.

    >>> given_sources("runs/a, runs/b"), given_sources(["runs/a"]), given_sources("none")
    (('runs/a', 'runs/b'), ('runs/a',), ())
    """
    sources = tuple(teacher.split(",") if isinstance(teacher, str) else teacher)
    if not all(isinstance(source, str) for source in sources):
        raise ConfigError(f"teacher = {teacher!r}: should be text, or a list of text")
    sources = tuple(source.strip() for source in sources)
    if sources == ("none",):
        return ()
    for source, reason in (("", "a source is empty"), ("none", "none is next to other sources")):
        if source in sources:
            raise ConfigError(f"teacher = {teacher!r}: {reason}; for no teacher give none alone")
    return sources


def single_teacher(teacher: TeacherConfig, index: int) -> TeacherConfig:
    """Return the section for one teacher of an ensemble. index: from 0."""

    def select(values: tuple, size: int = 1) -> tuple:
        return values if len(values) <= size else values[index * size : (index + 1) * size]

    classes, target_stores = select(teacher.classes), select(teacher.target_stores)
    return TeacherConfig(
        source=select(teacher.source),
        architecture=select(teacher.architecture),
        classes=() if classes == ("none",) else classes,
        image_size=select(teacher.image_size),
        mean=select(teacher.mean, 3),
        std=select(teacher.std, 3),
        memory_format=select(teacher.memory_format),
        target_stores=() if target_stores == ("none",) else target_stores,
        allow_near_chance=teacher.allow_near_chance,
    )


def teacher_slots(teacher: TeacherConfig) -> tuple[TeacherSlot, ...]:
    """Return the slots of a configuration: one per teacher, or one if all share a store."""
    specs = teacher_specs(teacher)
    if len(specs) > 1 and len(teacher.target_stores) == 1:
        return (TeacherSlot(specs, teacher.target_stores[0], 1.0),)
    target_stores = teacher.target_stores or (None,) * len(specs)
    return tuple(
        TeacherSlot((spec,), None if store == "none" else store, spec.weight)
        for spec, store in zip(specs, target_stores)
    )
