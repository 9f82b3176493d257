"""Verifies a store: every checksum, and a sample of its views and answers made anew."""

from pathlib import Path

from deit.config.teachers import teacher_specs
from deit.config.validation import config_from_dict, validate
from deit.core.console import count_noun, format_percent, info
from deit.core.errors import CheckpointError, ConfigError
from deit.datasets.splits import load_splits
from deit.distill.build import (
    build_accelerator,
    build_online_ensemble,
    build_teachers,
    build_train_loader,
)
from deit.distill.target_checks import teacher_query, verify_store
from deit.distill.target_store import open_store
from deit.models.teacher_sources import resolve_source
from deit.models.teachers import Teacher


def verify_targets(
    store_path: Path, *, root: str | None, teacher: str | None, num_queries: int
) -> None:
    """Prove a store, or raise what it fails by: DataError for other data, views or teachers,
    CheckpointError for damaged files.

    root, teacher: where images and teachers lie now, if not where the store was written; teacher
    `none` leaves the answers unasked. num_queries: how many teacher outputs to recompute.
    """
    store = open_store(store_path)
    layout = store.layout
    store.verify_checksums()
    info(f"checksums {layout.num_shards} units, {layout.rows} {layout.content} answers: whole")
    try:
        config = config_from_dict(store.provenance["config"], live_teacher=False)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        # Of another release, or edited by hand.
        raise CheckpointError(
            f"{store_path}: its configuration is not readable ({error})"
        ) from None
    if root is not None:
        config = config.replace(data={"root": root})
    if teacher not in (None, "none"):
        config = config.replace(teacher={"source": tuple(teacher.split(","))})
        config = validate(config, live_teacher=False)
    if teacher is None and config.teacher.code_sources:
        raise ConfigError(
            f"{store_path}: its teacher {', '.join(config.teacher.code_sources)} is code; name it "
            "with "
            "--teacher if you trust it, or leave the answers unasked with --teacher none"
        )
    accelerator = build_accelerator(config.run)
    teachers: list[Teacher] | None = None
    if teacher != "none":
        for member in teacher_specs(config.teacher):
            resolve_source(member.source)
    splits = load_splits(config.data)
    if teacher != "none":
        teachers = build_teachers(config, splits, accelerator)
    # Not the teachers' own: several may have been shown one view, and each be smaller than it.
    size = store.fingerprint["teacher_size"]
    loader = build_train_loader(config, splits, accelerator, teacher_size=size, all_ranks=True)
    answer = None
    if teachers is not None:
        answer = teacher_query(
            config, loader, build_online_ensemble(config, splits, teachers, accelerator)
        )
    checked = verify_store(
        store, config, splits, loader, teachers=teachers, answer=answer, number=num_queries
    )
    epochs = count_noun(layout.epochs, "epoch")
    made = f"{checked.views} views of {epochs} made anew: the same pixels"
    info(f"data      fingerprint as stored; {made}")
    if checked.num_queried:
        share = format_percent(checked.num_agreed / checked.num_queried)
        info(f"teacher   the same weights; {share} % of {checked.num_queried} answers as stored")
    else:
        info("teacher   not asked")
