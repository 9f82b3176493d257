"""Target stores of a run: open them, check what they hold, and verify views and teacher outputs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deit.config.sections.loss import LossConfig
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import teacher_slots
from deit.core.errors import ConfigError, DataError
from deit.core.tensors import evenly_spaced
from deit.core.types import Batch, TeacherOutput
from deit.datasets.loader import TeacherInput, TrainLoader
from deit.datasets.splits import Splits
from deit.distill.losses import needs_logits
from deit.distill.target_fingerprint import differences, fingerprint_of, teachers_fingerprint
from deit.distill.target_format import decode, top_k_of
from deit.distill.target_store import TargetStore, open_store
from deit.distill.teacher_ensemble import TeacherEnsemble
from deit.models.teachers import Teacher

TeacherQuery = Callable[[TeacherInput], TeacherOutput]
# Before training: number of views checked, over all epochs, and outputs recomputed at each.
_CHECKS = (16, 32)
_CHECKS_WITH_CROPS = (4, 2)  # each takes teacher_num_crops forward passes
_AGREEMENT = 0.995
_VARIATION = 0.01
_TIE_MARGIN = 0.1  # labels this close in log-probability can change places by rounding


def open_stores(teacher: TeacherConfig, loss: LossConfig) -> list[TargetStore | None]:
    """Return the store of each teacher slot, None for a live teacher.

    Raises DataError or CheckpointError if a store is missing, incomplete or damaged, and
    ConfigError if it does not hold what the loss needs.
    """
    if loss.kind == "none":
        return []
    stores: list[TargetStore | None] = []
    for slot in teacher_slots(teacher):
        if slot.target_store is None:
            stores.append(None)
            continue
        store = open_store(Path(slot.target_store).expanduser())
        where = f"teacher.target_stores {store.path}"
        combine = store.fingerprint.get("combine")
        check_content(store.record_format.content, teacher, loss, combine=combine, where=where)
        stores.append(store)
    return stores


def check_content(
    content: str, teacher: TeacherConfig, loss: LossConfig, *, combine: str | None, where: str
) -> None:
    """Raise ConfigError if a loss cannot be computed from what a store holds.

    content: hard, full or top-K. combine: how the stored outputs of several teachers were combined;
    None for those of one teacher. where: how the message begins.
    """
    averaged = len(teacher_slots(teacher)) > 1 and teacher.combine != "tokens"
    if content == "hard" and (needs_logits(loss) or averaged):
        consumer = f"loss.kind {loss.kind!r}"
        alternative = "use the loss for hard labels (--loss deit-hard)"
        if averaged:
            consumer = f"a mean of several teachers (teacher.combine {teacher.combine!r})"
            alternative = "give each teacher a token (--teacher.combine tokens)"
        raise ConfigError(
            f"{where}: holds hard labels, but {consumer} needs probabilities; write a store with "
            f"--content full, or {alternative}"
        )
    inexact = loss.temperature != 1 or loss.standardize_logits or loss.kind == "dkd"
    inexact |= averaged and teacher.combine == "logits"
    top_k = top_k_of(content)
    if top_k is not None and needs_logits(loss) and inexact:
        raise ConfigError(
            f"{where}: holds only the {top_k} largest probabilities; all of them are needed for a "
            "loss.temperature other than 1, loss.standardize_logits, loss.kind dkd and "
            "teacher.combine logits; write the store with --content full"
        )
    if combine == "probabilities" and needs_logits(loss) and loss.temperature != 1:
        raise ConfigError(
            f"{where}: holds a mean of probabilities, which differs at loss.temperature "
            f"{loss.temperature:g}; write a store for each teacher (--teacher-index 1, "
            "--teacher-index 2) and give all of them, or write one with --teacher.combine logits"
        )


def teacher_query(loader: TrainLoader, ensemble: TeacherEnsemble) -> TeacherQuery:
    """Return a function from a batch of teacher images to the outputs that a store keeps.

    With views.teacher_view crops, these are the mean probabilities over all crops of an image.
    """

    def query(inputs: TeacherInput) -> TeacherOutput:
        images, views = inputs
        empty = images[:0]
        return ensemble(
            Batch(empty, images, empty, views.sample_ids, views.epoch, views.target_rows)
        )

    def query_crops(inputs: TeacherInput) -> TeacherOutput:
        num_crops = loader.views.teacher_num_crops
        total = query(inputs).logits.log_softmax(dim=2)
        for crop in range(1, num_crops):
            rows = inputs.views.target_rows
            (other,) = loader.teacher_inputs(0, rows, batch_size=len(rows), repeat=crop)
            total = torch.logaddexp(total, query(other).logits.log_softmax(dim=2))
        logits = total - math.log(num_crops)
        return TeacherOutput(logits.argmax(dim=2), logits)

    return query_crops if loader.views.teacher_view == "crops" else query


class StoreCheck(NamedTuple):
    """What was recomputed of a store: the number of views, and of outputs, and how many agreed."""

    views: int
    num_queried: int
    num_agreed: int


def verify_store(
    store: TargetStore,
    splits: Splits,
    loader: TrainLoader,
    config: TeacherConfig,
    *,
    teachers: list[Teacher] | None,
    query: TeacherQuery | None,
    num_queries: int | None = None,
) -> StoreCheck:
    """Compare a store with a run: its fingerprint, some views and some teacher outputs.

    teachers: those that should have written it, None if they are not available. query: from
    `teacher_query`, None to recompute no output. num_queries: outputs to recompute; default: a
    number that takes little time. Raises DataError naming what differs.
    """
    _compare_fingerprints(store, splits, loader, config, teachers)
    crops = loader.views.teacher_view == "crops"
    num_views, rows = _CHECKS_WITH_CROPS if crops else _CHECKS
    if num_queries is not None:
        num_views = -(-num_queries // rows)
    views = num_queried = num_agreed = 0
    for epoch, first in _sample_checked_rows(store, num_views):
        target_rows = torch.arange(first, min(first + rows, store.record_format.rows_per_epoch))
        for inputs in loader.teacher_inputs(epoch, target_rows, batch_size=len(target_rows)):
            store.check_view(inputs.views, 0)
            views += 1
            if query is not None:
                agrees = _agreeing(store, epoch, target_rows, query(inputs))
                num_agreed, num_queried = num_agreed + int(agrees.sum()), num_queried + len(agrees)
    if num_agreed < _AGREEMENT * num_queried:
        raise DataError(
            f"teacher.target_stores {store.path}: only {num_agreed} of {num_queried} recomputed "
            f"teacher outputs agree with the store, which was written in "
            f"{store.inference['precision']}; did the teacher's code, the device or a library "
            "change? Write the store again"
        )
    return StoreCheck(views, num_queried, num_agreed)


def _compare_fingerprints(
    store: TargetStore,
    splits: Splits,
    loader: TrainLoader,
    config: TeacherConfig,
    teachers: list[Teacher] | None,
) -> None:
    """Raise DataError with all differences between a store's fingerprint and that of a run."""
    stored = dict(store.fingerprint)
    of_teachers = {key: stored.pop(key, None) for key in ("teacher", "combine", "weights")}
    lines = differences(stored, fingerprint_of(splits, loader))
    if teachers is not None:
        of_teachers = {key: value for key, value in of_teachers.items() if value is not None}
        lines += differences(of_teachers, teachers_fingerprint(config, teachers))
    if not lines:
        return
    hint = ""
    if any(line.startswith("seed:") for line in lines):
        hint = "\n  (views.seed sets the seed of the views independently of run.seed)"
    raise DataError(
        f"teacher.target_stores {store.path}: was written for other data, views or teachers; write "
        "a store for this configuration, or train the one it was written for:"
        + "".join(f"\n  {line}" for line in lines)
        + hint
    )


def _sample_checked_rows(store: TargetStore, count: int) -> list[tuple[int, int]]:
    """Return (epoch, row) of evenly spaced checked rows, the first and the last included."""
    rows = store.record_format.checked_rows
    chosen = evenly_spaced(store.record_format.epochs * len(rows), count).tolist()
    return [(index // len(rows), rows[index % len(rows)]) for index in chosen]


def _agreeing(
    store: TargetStore, epoch: int, target_rows: Tensor, recomputed: TeacherOutput
) -> Tensor:
    """Return which stored outputs agree with the recomputed ones, bool [rows].

    A label agrees if the teacher holds it almost as likely as its first. Probabilities agree if
    they differ by at most 0.01 in total variation.
    """
    labels, scores = decode(store.record_format, store.records(epoch)[target_rows.numpy()])
    log_probs = recomputed.logits[:, 0].float().cpu().log_softmax(dim=1)
    of_label = log_probs.gather(1, labels[:, None]).squeeze(1)
    agrees = log_probs.max(dim=1).values - of_label <= _TIE_MARGIN
    if scores is None:
        return agrees
    difference = (scores.exp() - log_probs.exp()).abs()
    if store.record_format.top_k is not None:  # the others share the remaining probability equally
        difference = difference.gather(1, log_probs.topk(store.record_format.top_k, dim=1).indices)
    return agrees & (difference.sum(dim=1) / 2 <= _VARIATION)
