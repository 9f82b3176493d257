"""Verify a target store: every checksum, and a sample of views and teacher outputs recomputed."""

from pathlib import Path

from accelerate import Accelerator

from deit.config.schema import Config
from deit.config.teachers import teacher_specs
from deit.config.validation import config_from_dict, validate
from deit.core.console import count_noun, format_percent, info
from deit.core.errors import CheckpointError, ConfigError
from deit.datasets.splits import Splits, load_splits
from deit.distill.build import (
    build_accelerator,
    build_online_ensemble,
    build_teachers,
    build_train_loader,
)
from deit.distill.target_checks import StoreCheck, teacher_query, verify_store
from deit.distill.target_store import TargetStore, open_store
from deit.models.teacher_sources import resolve_source


def verify_targets(
    store_path: str | Path,
    *,
    root: str | None = None,
    teacher: str | None = None,
    num_queries: int = 2048,
) -> StoreCheck:
    """Verify a store and log what was compared; return the numbers of views and outputs.

    root: folder of the images, if they moved since. teacher: sources of the teachers separated by
    commas, if they moved; "none" recomputes no output. num_queries: outputs to recompute.
    Raises DataError for other data, views or teachers, and CheckpointError for damaged files.

    Example:
        >>> from deit.core.console import quiet
        >>> with quiet():
        ...     checked = verify_targets("checkpoints/digits-targets", num_queries=64)
        >>> checked.views > 0, checked.num_agreed / checked.num_queried > 0.99
        (True, True)
    """
    store = open_store(Path(store_path))
    record_format = store.record_format
    store.verify_checksums()
    info(
        f"checksums {record_format.num_shards} shards, {record_format.rows} "
        f"{record_format.content} targets: intact"
    )
    config = _config_of(store, root=root, teacher=teacher)
    accelerator = build_accelerator(config.run)
    with_teachers = teacher != "none"
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


def _config_of(store: TargetStore, *, root: str | None, teacher: str | None) -> Config:
    """Return the configuration a store was written with, with new paths. Raises CheckpointError if
    it cannot be read, ConfigError if it would run a teacher's code without permission."""
    try:
        config = config_from_dict(store.provenance["config"], live_teacher=False)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        # Written by another release, or edited.
        raise CheckpointError(
            f"{store.path}: its configuration is not readable ({error})"
        ) from None
    if root is not None:
        config = config.replace(data={"root": root})
    if teacher not in (None, "none"):
        config = config.replace(teacher={"source": tuple(teacher.split(","))})
        config = validate(config, live_teacher=False)
    if teacher is None and config.teacher.code_sources:
        raise ConfigError(
            f"{store.path}: its teacher {', '.join(config.teacher.code_sources)} is Python code; "
            "give it as --teacher if you trust it, or skip the teacher check with --teacher none"
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
