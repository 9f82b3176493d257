"""Stored answers in a run: opened before the work, held against data, views and teacher."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deit.config.schema import Config
from deit.config.teachers import teacher_slots
from deit.core.errors import ConfigError, DataError
from deit.core.tensors import evenly_spaced
from deit.core.types import Batch, TeacherOutput
from deit.datasets.loader import TeacherInput, TrainLoader
from deit.datasets.splits import Splits
from deit.distill.losses import needs_logits
from deit.distill.target_fingerprint import fingerprint_of, teachers_fingerprint
from deit.distill.target_store import TargetStore, decode, differences, open_store, top_k_of
from deit.distill.teacher_ensemble import TeacherEnsemble
from deit.models.teachers import Teacher

TeacherQuery = Callable[[TeacherInput], TeacherOutput]
# Before training: places looked at, spread over all epochs, and answers asked at each of them.
_CHECKS = (16, 32)
_CHECKS_WITH_CROPS = (4, 2)  # each asks for teacher_crops answers
_AGREEMENT = 0.995
_VARIATION = 0.01
_TIE_MARGIN = 0.1  # two answers so close in log-probability may change places by rounding


def open_stores(config: Config) -> list[TargetStore | None]:
    """The store of each seat, None for a teacher that answers itself.

    Raises DataError and CheckpointError where a store is not there, not complete or damaged, and
    ConfigError where its records are not what the objective needs.
    """
    if config.loss.kind == "none":
        return []
    found: list[TargetStore | None] = []
    for seat in teacher_slots(config.teacher):
        store = (
            None if seat.target_store is None else open_store(Path(seat.target_store).expanduser())
        )
        if store is not None:
            where = f"teacher.target_stores {store.path}"
            check_records(
                store.layout.content, config, store.fingerprint.get("combine"), where=where
            )
        found.append(store)
    return found


def check_records(records: str, config: Config, combine: str | None, *, where: str) -> None:
    """Whether the objective can be had from these records. Raises ConfigError.

    records: hard, full or top-K. combine: how the answers in the store were combined; None: they
    are one teacher's.
    """
    loss = config.loss
    averaged = len(teacher_slots(config.teacher)) > 1 and config.teacher.combine != "tokens"
    if records == "hard" and (needs_logits(loss) or averaged):
        wanted = f"loss.kind {loss.kind!r}"
        instead = "the objective they are for (--loss deit-hard)"
        if averaged:
            wanted = f"a mean of several teachers (teacher.combine {config.teacher.combine!r})"
            instead = "--teacher.combine tokens, a token for each"
        raise ConfigError(
            f"{where}: holds hard labels, {wanted} needs probabilities; write a store with "
            f"--content full, or give {instead}"
        )
    inexact = loss.temperature != 1 or loss.standardize_logits or loss.kind == "dkd"
    inexact |= averaged and config.teacher.combine == "logits"
    kept = top_k_of(records)
    if kept is not None and needs_logits(loss) and inexact:
        raise ConfigError(
            f"{where}: holds the {kept} largest answers alone; the others count at a "
            "loss.temperature other than 1, with loss.standardize_logits, with loss.kind dkd and "
            "with "
            "teacher.combine logits; write the store with --content full"
        )
    mean = combine == "probabilities"
    if mean and needs_logits(loss) and loss.temperature != 1:
        raise ConfigError(
            f"{where}: holds a mean of probabilities, which is another at loss.temperature "
            f"{loss.temperature:g}; write a store for each teacher (--teacher-index 1, "
            "--teacher-index 2) and give "
            "all of them, or write one with --teacher.combine logits"
        )


def stored_epochs(config: Config, stores: list[TargetStore | None]) -> int | None:
    """How many epochs of views have answers; None where that sets no limit."""
    if config.views.has_fixed_teacher_view:
        return None
    return min((store.layout.epochs for store in stores if store is not None), default=None)


def teacher_query(config: Config, loader: TrainLoader, panel: TeacherEnsemble) -> TeacherQuery:
    """What the teachers say of what they are shown, as a store keeps it: of the mean over all crops
    of an image, where that is the teacher's view."""

    def ask(shown: TeacherInput) -> TeacherOutput:
        nothing = shown.images[:0]
        batch = Batch(
            nothing, shown.images, nothing, shown.sample_ids, shown.epoch, shown.target_rows
        )
        return panel(batch)

    def ask_for_crops(shown: TeacherInput) -> TeacherOutput:
        total = ask(shown).logits.log_softmax(dim=2)
        for crop in range(1, config.views.teacher_num_crops):
            (other,) = loader.teacher_inputs(
                0, shown.target_rows, block=len(shown.target_rows), repeat=crop
            )
            total = torch.logaddexp(total, ask(other).logits.log_softmax(dim=2))
        logits = total - math.log(config.views.teacher_num_crops)
        return TeacherOutput(logits.argmax(dim=2), logits)

    return ask_for_crops if config.views.teacher_view == "crops" else ask


class StoreCheck(NamedTuple):
    """What was held against a store: views made anew, answers asked anew, and how many agreed."""

    views: int
    num_queried: int
    num_agreed: int


def verify_store(
    store: TargetStore,
    config: Config,
    splits: Splits,
    loader: TrainLoader,
    *,
    teachers: list[Teacher] | None,
    answer: TeacherQuery | None,
    number: int | None = None,
) -> StoreCheck:
    """Hold a store against a run: fingerprints, canaries and, where the teacher is there, answers.

    teachers: those the store should be of, None where they are not there. answer: what they say of
    what they are shown. number: of answers to ask anew, some at each of so many canaries; None: as
    many as are soon had. Raises DataError naming what differs.
    """
    here = fingerprint_of(config, splits, loader, None)
    there = dict(store.fingerprint)
    about_teachers = {key: there.pop(key, None) for key in ("teacher", "combine", "weights")}
    found = differences(there, here)
    if teachers is not None:
        stored = {key: value for key, value in about_teachers.items() if value is not None}
        found += differences(stored, teachers_fingerprint(config, teachers))
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        hint = "\n  (views.seed sets the seed of the views apart from the run's)"
        raise DataError(
            f"teacher.target_stores {store.path}: holds answers to something else; "
            f"write a store for this, or train what it was written for:{lines}"
            + (hint if any(line.startswith("seed:") for line in found) else "")
        )
    crops = config.views.teacher_view == "crops"
    spots, rows = _CHECKS_WITH_CROPS if crops else _CHECKS
    if number is not None:
        spots = -(-number // rows)
    views = asked = agreed = 0
    for epoch, place in _sample_canaries(store, spots):
        last = min(place + rows, store.layout.rows_per_epoch)
        places = torch.arange(place, last)
        for shown in loader.teacher_inputs(epoch, places, block=len(places)):
            store.check_canary(shown, 0)
            views += 1
            if answer is not None:
                same = _agreeing(store, epoch, places, answer(shown))
                agreed, asked = agreed + int(same.sum()), asked + len(same)
    if agreed < _AGREEMENT * asked:
        raise DataError(
            f"teacher.target_stores {store.path}: the teacher answers otherwise now: of {asked} "
            "views, "
            f"{agreed} have the stored answer. It was asked in {store.query['precision']}; other "
            "code, another device or library? Write the store anew"
        )
    return StoreCheck(views, asked, agreed)


def _sample_canaries(store: TargetStore, number: int) -> list[tuple[int, int]]:
    """(epoch, place) of so many canaries, the first and the last among them."""
    layout = store.layout
    total = layout.epochs * len(layout.canary_rows)
    chosen = evenly_spaced(total, number).tolist()
    return [
        (
            index // len(layout.canary_rows),
            layout.canary_rows[index % len(layout.canary_rows)],
        )
        for index in chosen
    ]


def _agreeing(store: TargetStore, epoch: int, places: Tensor, now: TeacherOutput) -> Tensor:
    """Which stored answers are the teacher's now, bool [rows].

    A label that he holds almost as likely as his first counts as the same; probabilities, where
    they are stored, may differ by a hundredth in total (half the sum of the differences).
    """
    labels, scores = decode(store.layout, store.records(epoch)[places.numpy()])
    exact = now.logits[:, 0].float().cpu().log_softmax(dim=1)
    chosen = exact.gather(1, labels[:, None]).squeeze(1)
    same = exact.max(dim=1).values - chosen <= _TIE_MARGIN
    if scores is None:
        return same
    difference = (scores.exp() - exact.exp()).abs()
    if store.layout.top_k is not None:  # the others are not his, but what is left in equal parts
        difference = difference.gather(1, exact.topk(store.layout.top_k, dim=1).indices)
    return same & (difference.sum(dim=1) / 2 <= _VARIATION)
