"""Who teaches, one by one: the teachers of a configuration, and which of them speak together."""

from typing import Any, NamedTuple

from deit.config.schema import TeacherConfig


class TeacherSpec(NamedTuple):
    """One teacher of an ensemble. source is None where only its stored targets are known."""

    source: str | None
    architecture: str | None
    image_size: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    weight: float
    memory_format: str
    classes: tuple[str, ...] | None = None


class TeacherSlot(NamedTuple):
    """What speaks with one voice in training: a teacher, or a store of what one or more said.

    weight: of the voice; those of all seats sum to 1.
    """

    members: tuple[TeacherSpec, ...]
    target_store: str | None
    weight: float


def teacher_specs(teacher: TeacherConfig) -> tuple[TeacherSpec, ...]:
    """The teachers one by one; their weights sum to 1."""
    number = max(len(teacher.source), len(teacher.target_stores))

    def spread(values: tuple, empty: Any) -> tuple:
        return (values or (empty,)) * (number if len(values) < 2 else 1)

    def triples(values: tuple[float, ...]) -> tuple:
        return spread(tuple(values[at : at + 3] for at in range(0, len(values), 3)), None)

    weights = spread(teacher.weights, 1.0)
    return tuple(
        TeacherSpec(source, architecture, size, mean, std, weight / sum(weights), layout, classes)
        for source, architecture, size, mean, std, weight, layout, classes in zip(
            teacher.source or (None,) * number,
            spread(teacher.architecture, None),
            spread(teacher.image_size, None),
            triples(teacher.mean),
            triples(teacher.std),
            weights,
            spread(teacher.memory_format, "auto"),
            _classes(teacher.classes, number),
            strict=True,
        )
    )


def _classes(words: tuple[str, ...], number: int) -> tuple[tuple[str, ...] | None, ...]:
    """What teacher.classes says of each teacher: of one alone it may be a list of names."""
    if number < 2:
        return (words or None,) * number
    each = words * number if len(words) == 1 else words or ("none",) * number
    return tuple(None if word == "none" else (word,) for word in each)


def single_teacher(teacher: TeacherConfig, place: int) -> TeacherConfig:
    """One of several teachers, with what was said of it."""

    def own(values: tuple, each: int = 1) -> tuple:
        return values if len(values) <= each else values[place * each : (place + 1) * each]

    return TeacherConfig(
        source=own(teacher.source),
        architecture=own(teacher.architecture),
        classes=() if (own(teacher.classes) or ("none",)) == ("none",) else own(teacher.classes),
        image_size=own(teacher.image_size),
        mean=own(teacher.mean, 3),
        std=own(teacher.std, 3),
        memory_format=own(teacher.memory_format),
        target_stores=() if own(teacher.target_stores) == ("none",) else own(teacher.target_stores),
        allow_near_chance=teacher.allow_near_chance,
    )


def teacher_slots(teacher: TeacherConfig) -> tuple[TeacherSlot, ...]:
    """The voices of a configuration: one for each teacher, or one store of several together."""
    everyone = teacher_specs(teacher)
    if len(everyone) > 1 and len(teacher.target_stores) == 1:
        return (TeacherSlot(everyone, teacher.target_stores[0], 1.0),)
    targets = teacher.target_stores or (None,) * len(everyone)
    return tuple(
        TeacherSlot((one,), None if stored == "none" else stored, one.weight)
        for one, stored in zip(everyone, targets)
    )
