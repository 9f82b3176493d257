"""Measures teachers on the validation split before anything is built on their answers."""

import itertools
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from deit.config.schema import CLASS_ORDERS, Config
from deit.core.console import format_count, format_percent, info, table, warn
from deit.core.errors import DataError
from deit.core.metrics import (
    agreement,
    binomial_tail,
    could_be_chance,
    is_near_chance,
    majority_accuracy,
    topk_accuracy,
)
from deit.datasets.splits import Splits
from deit.distill.inference import predict_split
from deit.distill.teacher_ensemble import combine_teachers, error_overlap
from deit.models.parameters import count_parameters
from deit.models.teacher_sources import arranged
from deit.models.teachers import ASSUMED, BY_NAME, Teacher

_MORE = 512  # training images that decide about an order where too few validation images can
_BY_CHANCE = 1e-3  # how likely any order may seem better by luck alone, and the run still stops
_GAIN = 0.1  # of the top-1 over the classes that an order places otherwise


def check_teachers(
    config: Config,
    splits: Splits,
    accelerator: Accelerator,
    teachers: list[Teacher],
    *,
    weights: tuple[float, ...],
    size: int,
) -> Tensor:
    """What the teachers answer on the validation split, int64 [number]: the class that their
    combination holds most likely. Says how good each is; of several also how their errors overlap.

    weights: one a teacher. size: side [px] at which they are shown the images.
    Raises DataError where one is near chance, answers with something that is not finite, or names
    no classes and fits those of the data far better in another order.
    """
    validation = splits.validation
    guess = majority_accuracy(validation.labels, len(splits.class_names))
    logits = []
    for teacher in teachers:
        answers = predict_split(accelerator, teacher, validation, config, "teacher", size=size)
        logits.append(answers.class_logits)
        _introduce(teacher, answers.class_logits, splits, guess)
        said, labels = answers.class_logits.argmax(dim=1), validation.labels
        rows = _undecided(teacher, said, splits)
        if len(rows) >= accelerator.num_processes:
            more = splits.train.select(rows)
            shown = predict_split(accelerator, teacher, more, config, "class order", size=size)
            said = torch.cat([said, shown.class_logits.argmax(dim=1)])
            labels = torch.cat([labels, more.labels])
        refuse_order(
            teacher, said, labels, splits.class_names, allowed=config.teacher.allow_near_chance
        )
        check_accuracy(config, teacher, answers.class_logits, validation.labels, guess)
    together = torch.stack(logits, dim=1)
    # One token a teacher: the mean of what they say is what the fused heads could learn.
    how = "probabilities" if config.teacher.combine == "tokens" else config.teacher.combine
    combined = combine_teachers(together, weights, how, temperature=1.0).labels[:, 0]
    if len(teachers) > 1:
        _compare(teachers, together.argmax(dim=2), combined, validation.labels)
    return combined


def _introduce(teacher: Teacher, logits: Tensor, splits: Splits, chance: float) -> None:
    """Say how good a teacher is, and what it takes its classes for. Raises DataError."""
    if not logits.isfinite().all():
        raise DataError(f"teacher {teacher.description}: its logits are not finite")
    accuracy = topk_accuracy(logits, splits.validation.labels)
    size = "any" if teacher.image_size is None else f"{teacher.image_size} px"
    if _enlarged(teacher):
        size += f" (trained at {teacher.trained_size} px)"
    if teacher.memory_format == "channels_last":
        size += ", channels_last in memory"
    info(
        f"teacher   {teacher.description}: {format_count(count_parameters(teacher))} parameters, "
        f"input {size}, "
        f"validation top-1 {format_percent(accuracy)} % (chance {format_percent(chance)} %)"
    )
    announce_order(teacher, splits.class_names)


def _enlarged(teacher: Teacher) -> bool:
    return teacher.trained_size not in (None, teacher.image_size)


def check_accuracy(
    config: Config, teacher: Teacher, logits: Tensor, labels: Tensor, chance: float
) -> None:
    """Refuse a teacher that is near chance; warn where so few images cannot tell. Raises DataError.

    logits: [number, classes], of the validation images with these labels, int64 [number]. guess:
    the accuracy of guessing, in [0, 1].
    """
    accuracy, number = topk_accuracy(logits, labels), len(labels)
    if is_near_chance(accuracy, chance):
        message = (
            f"teacher {teacher.description}: {format_percent(accuracy)} % top-1 on the validation "
            "split "
            f"is near chance ({format_percent(chance)} %): wrong weights, normalisation or class "
            "order?"
        )
        if _enlarged(teacher):
            message += (
                f" Or the size: it was trained at {teacher.trained_size} px; fit it to "
                f"{teacher.image_size} px first (finetune_deit.py --from TEACHER --resolution "
                f"{teacher.image_size}), or --teacher.image_size none."
            )
        if not config.teacher.allow_near_chance:
            raise DataError(f"{message} --teacher.allow_near_chance goes on all the same")
        warn(message)
    elif could_be_chance(accuracy, chance, number):
        warn(
            f"teacher {teacher.description}: {format_percent(accuracy)} % top-1 on {number} "
            "validation "
            f"images may be chance ({format_percent(chance)} %): so few cannot tell, more would"
        )


def _undecided(teacher: Teacher, answers: Tensor, splits: Splits) -> Tensor:
    """Training images, int64, that tell whether another order of the classes fits better, where the
    validation images hint at it and are too few to tell; else none."""
    none = torch.empty(0, dtype=torch.long)
    if teacher.class_order != ASSUMED:
        return none
    names = splits.class_names
    better = better_order(answers, splits.validation.labels, names)
    if better is None or better.luck <= _BY_CHANCE:
        return none
    moved = torch.tensor([a != b for a, b in zip(names, arranged(better.order, names))])
    rows = moved[splits.train.labels].nonzero().flatten()
    return rows[:: max(len(rows) // _MORE, 1)]


def announce_order(teacher: Teacher, class_names: tuple[str, ...]) -> None:
    """Say how a teacher's answers are matched to the classes, where it names none itself."""
    if teacher.class_order == BY_NAME:
        return
    said = f"          its classes: {teacher.class_order}"
    if teacher.class_order == ASSUMED:
        shown = ", ".join(class_names[:3]) + (", ..." if class_names[3:] else "")
        said += f" ({shown}), for it names none; --teacher.classes sets another"
    info(said)


class Better(NamedTuple):
    """An order of the classes that fits a teacher's answers better than the assumed one.

    images: of the classes that it places otherwise. before, after: mean over these classes of the
    share of right answers, in [0, 1]. luck: probability of as many images in its favor if both
    orders were as good, times the number of orders tried.
    """

    order: str
    images: int
    before: float
    after: float
    luck: float


def better_order(answers: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> Better | None:
    """The usual order of classes that fits a teacher's answers best; None where none fits better.

    answers, labels: int64 [number], classes in the assumed order. An order is judged by the images
    of the classes that it places otherwise: a sign test over those that are right by one order
    alone (McNemar 1947), and the mean over classes of the share of right answers, which a teacher
    that answers always the same cannot raise.
    """
    orders: dict[tuple[str, ...], str] = {}
    for name in CLASS_ORDERS:
        orders.setdefault(arranged(name, class_names), name)
    orders.pop(class_names)
    found = []
    for names, order in orders.items():
        place = {name: index for index, name in enumerate(class_names)}
        meant = torch.tensor([place[name] for name in names])
        moved = (meant != torch.arange(len(meant)))[labels]
        truth = labels[moved]
        before, after = answers[moved] == truth, meant[answers[moved]] == truth
        wins, losses = int((after & ~before).sum()), int((before & ~after).sum())
        if wins <= losses:
            continue
        luck = min(binomial_tail(wins, wins + losses, 0.5) * len(orders), 1.0)
        shares = [_mean_over_classes(right, truth) for right in (before, after)]
        found.append(Better(order, len(truth), *shares, luck))
    return max(found, key=lambda one: one.after - one.before, default=None)


def _mean_over_classes(right: Tensor, labels: Tensor) -> float:
    """Mean over the classes that are there of the share of right answers, in [0, 1]."""
    number = labels.bincount().double()
    share = labels.bincount(right.double()) / number.clamp(min=1)
    return share[number > 0].mean().item()


def refuse_order(
    teacher: Teacher,
    answers: Tensor,
    labels: Tensor,
    class_names: tuple[str, ...],
    *,
    allowed: bool = False,
) -> None:
    """Stop where another usual order of the classes fits an unnamed teacher's answers far better
    than the assumed one; warn where it fits better. Raises DataError.

    answers: its classes for images with known labels, int64 [number] both. allowed: whether a weak
    teacher is accepted as it is (teacher.allow_near_chance), with a warning alone.
    """
    if teacher.class_order != ASSUMED:
        return
    better = better_order(answers, labels, class_names)
    if better is None or better.luck > 0.01:
        return
    names = arranged(better.order, class_names)
    first = next(place for place, name in enumerate(names) if name != class_names[place])
    shown = ", ".join(names[first : first + 3])
    message = (
        f"teacher {teacher.description}: of the {better.images} images whose classes the order "
        f"{better.order!r} places otherwise ({shown}, ... from place {first} on) it answers "
        f"{format_percent(better.after)} % right by that order, {format_percent(better.before)} % "
        "by the assumed "
        f"one: --teacher.classes {better.order} (data: the assumed order after all)"
    )
    if allowed or better.luck > _BY_CHANCE or better.after - better.before < _GAIN:
        warn(message)
        return
    raise DataError(message)


def _compare(teachers: list[Teacher], answers: Tensor, combined: Tensor, labels: Tensor) -> None:
    """Each teacher alone and all together; and for each pair how often they agree and err alike."""
    top1 = [format_percent(agreement(theirs, labels)) for theirs in answers.unbind(dim=1)]
    described = [f"{place}: {one.description}" for place, one in enumerate(teachers, start=1)]
    rows = [*zip(described, top1), ("together", format_percent(agreement(combined, labels)))]
    table(f"teachers on {len(labels)} validation images", ("", "top-1 %"), rows)
    pairs = []
    for one, other in itertools.combinations(range(len(teachers)), 2):
        first, second = answers[:, one], answers[:, other]
        overlap = format_percent(error_overlap(first, second, labels))
        pairs.append(
            (f"{one + 1} and {other + 1}", format_percent(agreement(first, second)), overlap)
        )
    table("pairs of teachers", ("", "same answer %", "of all errors, shared %"), pairs)
