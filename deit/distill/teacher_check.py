"""Measure teachers on the validation split before training relies on their outputs."""

import itertools
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from deit.config.schema import EvalSettings
from deit.config.sections.teacher import CLASS_ORDERS, TeacherConfig
from deit.core.console import count_noun, format_count, format_percent, info, table, warn
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
from deit.models.teacher_sources import ordered_classes
from deit.models.teachers import ASSUMED, BY_NAME, Teacher

_FEW_IMAGES = 100  # below, guessing deviates by several points: sqrt(0.1 * 0.9 / 100) is 3
_ALLOWS = "teacher.allow_near_chance (--teacher.allow_near_chance)"
_NUM_TRAINING_IMAGES = 512  # to judge a class order if the validation images are too few
_MAX_LUCK = 1e-3  # probability that an order seems better by chance, below which the run stops
_MIN_GAIN = 0.1  # in accuracy over the classes that an order moves
_MIN_EVIDENCE = 0.01  # probability below which a better order is reported


def check_teachers(
    teachers: list[Teacher],
    config: TeacherConfig,
    splits: Splits,
    accelerator: Accelerator,
    evaluation: EvalSettings,
    *,
    weights: tuple[float, ...],
    size: int,
) -> Tensor:
    """Measure and log the teachers; return the classes that their ensemble predicts on the
    validation split, int64 [N].

    weights: one for each teacher, of sum 1. size: side of the teachers' images [px].
    Raises DataError if a teacher is near chance, if its logits are not finite, or if it states no
    class names and another usual order of the classes fits it far better.
    """
    validation = splits.validation
    chance = majority_accuracy(validation.labels, len(splits.class_names))
    logits = []
    for teacher in teachers:
        outputs = predict_split(
            accelerator, teacher, validation, evaluation, "teacher", size=size
        ).class_logits
        logits.append(outputs)
        _log_teacher(teacher, outputs, splits, chance)
        predictions, labels = outputs.argmax(dim=1), validation.labels
        rows = _undecided(teacher, predictions, splits)
        if len(rows) >= accelerator.num_processes:
            more = splits.train.select(rows)
            further = predict_split(
                accelerator, teacher, more, evaluation, "class order", size=size
            ).class_logits
            predictions = torch.cat([predictions, further.argmax(dim=1)])
            labels = torch.cat([labels, more.labels])
        check_class_order(
            teacher, predictions, labels, splits.class_names, allowed=config.allow_near_chance
        )
        check_accuracy(
            teacher, outputs, validation.labels, chance, allowed=config.allow_near_chance
        )
    stacked = torch.stack(logits, dim=1)
    # With a token for each teacher, the fused heads can learn the mean of their probabilities.
    mode = "probabilities" if config.combine == "tokens" else config.combine
    combined = combine_teachers(stacked, weights, mode, temperature=1.0).labels[:, 0]
    if len(teachers) > 1:
        _log_ensemble(teachers, stacked.argmax(dim=2), combined, validation.labels)
    return combined


def _log_teacher(teacher: Teacher, logits: Tensor, splits: Splits, chance: float) -> None:
    """Log a teacher's accuracy and class order. Raises DataError if a logit is not finite."""
    if not logits.isfinite().all():
        raise DataError(f"teacher {teacher.description}: its logits are not finite")
    accuracy = topk_accuracy(logits, splits.validation.labels)
    size = "any" if teacher.image_size is None else f"{teacher.image_size} px"
    if _is_resized(teacher):
        size += f" (trained at {teacher.trained_size} px)"
    if teacher.memory_format == "channels_last":
        size += ", channels_last in memory"
    info(
        f"teacher   {teacher.description}: {format_count(count_parameters(teacher))} parameters, "
        f"input {size}, validation top-1 {format_percent(accuracy)} % of "
        f"{count_noun(len(logits), 'image')} (chance {format_percent(chance)} %)"
    )
    log_class_order(teacher, splits.class_names)


def _is_resized(teacher: Teacher) -> bool:
    """Return whether a teacher runs at another size than it was trained at."""
    return teacher.trained_size not in (None, teacher.image_size)


def check_accuracy(
    teacher: Teacher, logits: Tensor, labels: Tensor, chance: float, *, allowed: bool = False
) -> None:
    """Raise DataError if a teacher is near chance; warn if the images are too few to judge.

    logits: float [N, C]. labels: int64 [N]. chance: the share of the largest class, in [0, 1].
    allowed: teacher.allow_near_chance, which turns the error into a warning.
    """
    accuracy = topk_accuracy(logits, labels)
    measured = (
        f"teacher {teacher.description}: {format_percent(accuracy)} % top-1 on "
        f"{count_noun(len(labels), 'validation image')}"
    )
    guessing = f"({format_percent(chance)} %, the share of the largest class)"
    if is_near_chance(accuracy, chance):
        relation = "is below chance" if accuracy < chance else "is near chance"
        message = f"{measured} {relation} {guessing}: wrong weights, normalization or class order?"
        if len(labels) < _FEW_IMAGES:
            deviation = format_percent((chance * (1 - chance) / len(labels)) ** 0.5)
            message += (
                f" So few images measure little (standard deviation of guessing: {deviation} "
                "points)."
            )
        if _is_resized(teacher):
            message += (
                f" Or the size: it was trained at {teacher.trained_size} px; fine-tune it at "
                f"{teacher.image_size} px first (finetune_deit.py --from TEACHER --resolution "
                f"{teacher.image_size}), or give teacher.image_size none."
            )
        if not allowed:
            raise DataError(f"{message} {_ALLOWS} trains with it all the same")
        warn(message)
    elif could_be_chance(accuracy, chance, len(labels)):
        warn(f"{measured} could be chance {guessing}; more images would decide")


def _undecided(teacher: Teacher, predictions: Tensor, splits: Splits) -> Tensor:
    """Return indices of training images, int64, that decide about the order of the classes.

    Empty unless the validation images suggest another order and are too few to decide.
    """
    none = torch.empty(0, dtype=torch.long)
    if teacher.class_order != ASSUMED:
        return none
    names = splits.class_names
    better = better_order(predictions, splits.validation.labels, names)
    if better is None or better.luck <= _MAX_LUCK:
        return none
    moved = torch.tensor([a != b for a, b in zip(names, ordered_classes(better.order, names))])
    rows = moved[splits.train.labels].nonzero().flatten()
    return rows[:: max(len(rows) // _NUM_TRAINING_IMAGES, 1)]


def log_class_order(teacher: Teacher, class_names: tuple[str, ...]) -> None:
    """Log how a teacher's outputs are matched to the classes, if it states no class names."""
    if teacher.class_order == BY_NAME:
        return
    line = f"          its classes: {teacher.class_order}"
    if teacher.class_order == ASSUMED:
        first = ", ".join(class_names[:3]) + (", ..." if class_names[3:] else "")
        line += f" ({first}); it states no names, --teacher.classes sets another order"
    info(line)


class BetterOrder(NamedTuple):
    """An order of the classes that fits a teacher's outputs better than the assumed one.

    order: its name, one of CLASS_ORDERS. images: number of images of the classes that it moves.
    before, after: accuracy on these classes by the assumed order and by this one, averaged over
    classes, in [0, 1]. luck: probability of this evidence if both orders fit equally well, times
    the number of orders tried.
    """

    order: str
    images: int
    before: float
    after: float
    luck: float


def better_order(
    predictions: Tensor, labels: Tensor, class_names: tuple[str, ...]
) -> BetterOrder | None:
    """Return the usual order of classes that fits a teacher best, None if the assumed one does.

    predictions, labels: int64 [N], classes in the assumed order. An order is judged by the images
    of the classes that it moves: by a sign test over the images that only one of the orders gets
    right (McNemar 1947), and by the accuracy averaged over classes, which a teacher that always
    predicts the same class cannot raise.

    Example:
        >>> labels = torch.tensor([1, 2] * 10)
        >>> predictions = torch.tensor([2, 1] * 10)  # always the other class
        >>> better = better_order(predictions, labels, ("1", "10", "2"))
        >>> better.order, better.before, better.after
        ('natural', 0.0, 1.0)
    """
    orders: dict[tuple[str, ...], str] = {}
    for name in CLASS_ORDERS:
        orders.setdefault(ordered_classes(name, class_names), name)
    orders.pop(class_names)
    candidates = []
    for names, order in orders.items():
        index_of = {name: index for index, name in enumerate(class_names)}
        permutation = torch.tensor([index_of[name] for name in names])
        moved = (permutation != torch.arange(len(permutation)))[labels]
        truth = labels[moved]
        before = predictions[moved] == truth
        after = permutation[predictions[moved]] == truth
        wins, losses = int((after & ~before).sum()), int((before & ~after).sum())
        if wins <= losses:
            continue
        luck = min(binomial_tail(wins, wins + losses, 0.5) * len(orders), 1.0)
        accuracies = [_mean_over_classes(correct, truth) for correct in (before, after)]
        candidates.append(BetterOrder(order, len(truth), *accuracies, luck))
    return max(candidates, key=lambda order: order.after - order.before, default=None)


def _mean_over_classes(correct: Tensor, labels: Tensor) -> float:
    """Return the accuracy averaged over the classes that occur, in [0, 1]."""
    counts = labels.bincount().double()
    accuracy = labels.bincount(correct.double()) / counts.clamp(min=1)
    return accuracy[counts > 0].mean().item()


def check_class_order(
    teacher: Teacher,
    predictions: Tensor,
    labels: Tensor,
    class_names: tuple[str, ...],
    *,
    allowed: bool = False,
) -> None:
    """Raise DataError if another usual order of the classes fits a teacher far better; warn if it
    fits better. Does nothing for a teacher that states its class names.

    predictions, labels: int64 [N], for images with known labels. allowed: whether to warn only
    (teacher.allow_near_chance).
    """
    if teacher.class_order != ASSUMED:
        return
    better = better_order(predictions, labels, class_names)
    if better is None or better.luck > _MIN_EVIDENCE:
        return
    names = ordered_classes(better.order, class_names)
    first = next(index for index, name in enumerate(names) if name != class_names[index])
    message = (
        f"teacher {teacher.description}: its classes seem to be in the order {better.order!r} "
        f"({', '.join(names[first : first + 3])}, ... from index {first} on): by it, "
        f"{format_percent(better.after)} % of the {better.images} images of the classes that move "
        f"are right, by the assumed order {format_percent(better.before)} %; give "
        f"--teacher.classes {better.order} (data: keep the assumed order)"
    )
    if allowed or better.luck > _MAX_LUCK or better.after - better.before < _MIN_GAIN:
        warn(message)
        return
    raise DataError(message)


def _log_ensemble(
    teachers: list[Teacher], predictions: Tensor, combined: Tensor, labels: Tensor
) -> None:
    """Log each teacher's accuracy and the ensemble's, and how often each pair agrees and errs
    together.

    predictions: int64 [N, teachers]. combined, labels: int64 [N].
    """
    top1 = [format_percent(agreement(column, labels)) for column in predictions.unbind(dim=1)]
    names = [f"{index}: {teacher.description}" for index, teacher in enumerate(teachers, 1)]
    rows = [*zip(names, top1), ("ensemble", format_percent(agreement(combined, labels)))]
    table(f"teachers on {len(labels)} validation images", ("", "top-1 %"), rows)
    pairs = []
    for a, b in itertools.combinations(range(len(teachers)), 2):
        first, second = predictions[:, a], predictions[:, b]
        overlap = format_percent(error_overlap(first, second, labels))
        pairs.append((f"{a + 1} and {b + 1}", format_percent(agreement(first, second)), overlap))
    table("pairs of teachers", ("", "agreement %", "shared errors %"), pairs)
