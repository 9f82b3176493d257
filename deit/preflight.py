"""Measures teachers on the validation split before anything is built on their answers."""

import itertools

import torch
from accelerate import Accelerator
from torch import Tensor

from deit.announce import size_of
from deit.config import Config
from deit.console import percent, say, table, warn
from deit.datasets.splits import Splits
from deit.ensembles import combine, error_overlap
from deit.errors import DataError
from deit.metrics import agreement, chance, near_chance, topk_accuracy
from deit.models.teachers import Teacher
from deit.prediction import answers_of


def measure(
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
    Raises DataError where one is near chance, or answers with something that is not finite.
    """
    validation = splits.validation
    guess = chance(validation.labels, len(splits.class_names))
    logits = []
    for teacher in teachers:
        answers = answers_of(accelerator, teacher, validation, config, "teacher", size=size)
        logits.append(answers.class_logits)
        _judge(config, teacher, answers.class_logits, validation.labels, guess)
    together = torch.stack(logits, dim=1)
    # One token a teacher: the mean of what they say is what the fused heads could learn.
    how = "probabilities" if config.teacher.combine == "tokens" else config.teacher.combine
    combined = combine(together, weights, how, temperature=1.0).labels[:, 0]
    if len(teachers) > 1:
        _compare(teachers, together.argmax(dim=2), combined, validation.labels)
    return combined


def _judge(config: Config, teacher: Teacher, logits: Tensor, labels: Tensor, guess: float) -> None:
    """Say how good a teacher is; refuse one that is not."""
    if not logits.isfinite().all():
        raise DataError(f"teacher {teacher.description}: its logits are not finite")
    accuracy = topk_accuracy(logits, labels)
    size = "any" if teacher.image_size is None else f"{teacher.image_size} px"
    enlarged = teacher.trained_size not in (None, teacher.image_size)
    if enlarged:
        size += f" (trained at {teacher.trained_size} px)"
    if teacher.layout == "channels_last":
        size += ", channels last in memory"
    say(
        f"teacher   {teacher.description}: {size_of(teacher)} parameters, input {size}, "
        f"validation top-1 {percent(accuracy)} % (chance {percent(guess)} %)"
    )
    if near_chance(accuracy, guess, len(labels)):
        message = (
            f"teacher {teacher.description}: {percent(accuracy)} % top-1 on the validation split "
            f"is near chance ({percent(guess)} %): wrong weights, normalisation or class order?"
        )
        if enlarged:
            message += (
                f" Or the size: it was trained at {teacher.trained_size} px; fit it to "
                f"{teacher.image_size} px first (finetune_deit.py --from TEACHER --resolution "
                f"{teacher.image_size}), or --teacher.image_size none."
            )
        if not config.teacher.allow_weak:
            raise DataError(f"{message} --teacher.allow_weak goes on all the same")
        warn(message)


def _compare(teachers: list[Teacher], answers: Tensor, combined: Tensor, labels: Tensor) -> None:
    """Each teacher alone and all together; and for each pair how often they agree and err alike."""
    top1 = [percent(agreement(theirs, labels)) for theirs in answers.unbind(dim=1)]
    described = [f"{place}: {one.description}" for place, one in enumerate(teachers, start=1)]
    rows = [*zip(described, top1), ("together", percent(agreement(combined, labels)))]
    table(f"teachers on {len(labels)} validation images", ("", "top-1 %"), rows)
    pairs = []
    for one, other in itertools.combinations(range(len(teachers)), 2):
        first, second = answers[:, one], answers[:, other]
        overlap = percent(error_overlap(first, second, labels))
        pairs.append((f"{one + 1} and {other + 1}", percent(agreement(first, second)), overlap))
    table("pairs of teachers", ("", "same answer %", "of all errors, shared %"), pairs)
