"""Verify a target store: every checksum, and a sample of views and teacher outputs recomputed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from deit.config.command_choices import NUM_QUERIES, check_at_least
from deit.config.schema import Config
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import given_sources, teacher_specs
from deit.config.validation import config_from_dict, validate
from deit.core.accelerator import own_accelerate_state
from deit.core.console import count_noun, format_percent, info
from deit.core.errors import CheckpointError, ConfigError, DataError
from deit.core.tensors import evenly_spaced
from deit.core.types import TeacherOutput
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import Splits, load_splits
from deit.distill.build import (
    build_accelerator,
    build_online_ensemble,
    build_teachers,
    build_train_loader,
)
from deit.distill.target_fingerprint import (
    OF_TEACHERS,
    differences,
    fingerprint_of,
    teachers_fingerprint,
)
from deit.distill.target_format import decode
from deit.distill.target_store import TargetStore, mismatch_error, open_store
from deit.distill.teacher_ensemble import TeacherQuery, teacher_query
from deit.models.teacher_sources import resolve_source
from deit.models.teachers import Teacher

# Before training: number of views checked, over all epochs, and outputs recomputed at each.
_CHECKS = (16, 32)
_CHECKS_WITH_CROPS = (4, 2)  # each takes teacher_num_crops forward passes
_AGREEMENT = 0.995
_VARIATION = 0.01
_TIE_MARGIN = 0.1  # labels this close in log-probability can change places by rounding


class StoreCheck(NamedTuple):
    """What was recomputed of a store: the number of views, and of outputs, and how many agreed."""

    views: int
    num_queried: int
    num_agreed: int


@own_accelerate_state()
def verify_targets(
    store: str | Path,
    *,
    root: str | None = None,
    teacher: str | Sequence[str] | None = None,
    num_queries: int = NUM_QUERIES,
) -> StoreCheck:
    """Verify a store and log what was compared; return the numbers of views and outputs.

    store: its folder. root: folder of the images, if they moved since. teacher: source or sources
    of the teachers, if they moved; "none" recomputes no output. num_queries: outputs to recompute.
    Raises DataError for other data, views or teachers, and CheckpointError for damaged files.

    Example:
        >>> from deit.core.console import quiet
        >>> with quiet():
        ...     checked = verify_targets("checkpoints/digits-targets", num_queries=64)
        >>> checked.views > 0, checked.num_agreed / checked.num_queried > 0.99
        (True, True)
    """
    check_at_least("num_queries", num_queries, 1)
    store = open_store(Path(store))
    sources = None if teacher is None else given_sources(teacher)
    record_format = store.record_format
    store.verify_checksums()
    info(
        f"checksums {count_noun(record_format.num_shards, 'shard')}, {record_format.rows} "
        f"{record_format.content} targets: intact"
    )
    config = _config_of(store, root=root, teacher=sources)
    accelerator = build_accelerator(config.run)
    with_teachers = sources != ()
    if with_teachers:
        for spec in teacher_specs(config.teacher):
            resolve_source(spec.source)
    splits = load_splits(config.data)
    checked = _compare(store, config, splits, accelerator, with_teachers, num_queries)
    epochs = count_noun(record_format.epochs, "epoch")
    info(f"data      same fingerprint; {checked.views} views of {epochs} recomputed: same pixels")
    if checked.num_queried:
        share = format_percent(checked.num_agreed / checked.num_queried)
        info(f"teacher   same weights; {share} % of {checked.num_queried} recomputed outputs agree")
    else:
        info("teacher   not checked")
    return checked


def _config_of(store: TargetStore, *, root: str | None, teacher: tuple[str, ...] | None) -> Config:
    """Return the configuration a store was written with, with new paths. Raises CheckpointError if
    it cannot be read, ConfigError if it would run a teacher's code without permission."""
    if store.provenance.get("config", "") is None:
        raise ConfigError(
            f"{store.path}: was written from a loader in Python; TargetStore.open(path, loader) "
            "verifies it"
        )
    try:
        config = config_from_dict(store.provenance["config"], live_teacher=False)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        # Written by another release, or edited.
        raise CheckpointError(
            f"{store.path}: its configuration is not readable ({error})"
        ) from None
    if root is not None:
        config = config.replace(data={"root": root})
    if teacher:
        config = config.replace(teacher={"source": teacher})
        config = validate(config, live_teacher=False)
    if teacher is None and config.teacher.code_sources:
        raise ConfigError(
            f"{store.path}: its teacher {', '.join(config.teacher.code_sources)} is Python code; "
            "give it as teacher if you trust it, or skip the teacher check with teacher none"
        )
    return config


def _compare(
    store: TargetStore,
    config: Config,
    splits: Splits,
    accelerator: Accelerator,
    with_teachers: bool,
    num_queries: int,
) -> StoreCheck:
    """Build teachers and views as they were when the store was written, and compare."""
    teachers = None
    if with_teachers:
        teachers = build_teachers(
            config.teacher, splits.class_names, config.student.image_size, accelerator
        )
    # The size in the store, not the teachers': the view can be larger than some of them need.
    size = store.fingerprint["teacher_size"]
    loader = build_train_loader(config, splits, accelerator, teacher_size=size, all_processes=True)
    query = None
    if teachers is not None:
        ensemble = build_online_ensemble(teachers, config.teacher, splits, accelerator)
        query = teacher_query(loader, ensemble)
    return verify_store(
        store,
        splits,
        loader,
        config.teacher,
        teachers=teachers,
        query=query,
        num_queries=num_queries,
    )


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
            "change? Delete the store and write it again"
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
    of_teachers = {key: stored.pop(key, None) for key in OF_TEACHERS}
    lines = differences(stored, fingerprint_of(splits, loader))
    if teachers is not None:
        of_teachers = {key: value for key, value in of_teachers.items() if value is not None}
        lines += differences(of_teachers, teachers_fingerprint(config, teachers))
    if lines:
        raise mismatch_error(store.path, lines)


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
