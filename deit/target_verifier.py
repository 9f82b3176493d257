"""Verifies a store: every checksum, and a sample of its views and answers made anew."""

from pathlib import Path

from deit.config import code_of
from deit.console import percent, say
from deit.datasets.splits import load_splits
from deit.environment import create_accelerator
from deit.errors import CheckpointError, ConfigError
from deit.models.teachers import Teacher, locate
from deit.preparation import chorus, lay_out, loader_of, teachers_of
from deit.seats import members
from deit.stored import answer_to, check_store
from deit.targets import open_store
from deit.validation import build, validate


def verify_targets(store_path: Path, *, root: str | None, teacher: str | None, rows: int) -> None:
    """Prove a store, or raise what it fails by: DataError for other data, views or teachers,
    CheckpointError for damaged files.

    root, teacher: where images and teachers lie now, if not where the store was written; teacher
    `none` leaves the answers unasked. rows: how many answers to ask for anew.
    """
    store = open_store(store_path)
    layout = store.layout
    store.check_sums()
    say(f"checksums {layout.units} units, {layout.rows} {layout.records} answers: whole")
    try:
        config = build(store.about["config"], online=False)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        # Of another release, or edited by hand.
        raise CheckpointError(
            f"{store_path}: its configuration is not readable ({error})"
        ) from None
    if root is not None:
        config = config.replace(data={"root": root})
    if teacher not in (None, "none"):
        config = config.replace(teacher={"source": tuple(teacher.split(","))})
        config = validate(config, online=False)
    if teacher is None and code_of(config.teacher):
        raise ConfigError(
            f"{store_path}: its teacher {', '.join(code_of(config.teacher))} is code; name it with "
            "--teacher if you trust it, or leave the answers unasked with --teacher none"
        )
    accelerator = create_accelerator(config.run)
    teachers: list[Teacher] | None = None
    if teacher != "none":
        for member in members(config.teacher):
            locate(member.source)
    splits = load_splits(config.data)
    if teacher != "none":
        teachers = teachers_of(config, splits, accelerator)
        lay_out(teachers, store.layouts, accelerator, images=0)
    # Not the teachers' own: several may have been shown one view, and each be smaller than it.
    size = store.fingerprint["teacher_size"]
    loader = loader_of(config, splits, accelerator, teacher_size=size, alone=True)
    answer = None
    if teachers is not None:
        answer = answer_to(config, loader, chorus(config, splits, teachers, accelerator))
    checked = check_store(
        store, config, splits, loader, teachers=teachers, answer=answer, number=rows
    )
    epochs = f"{layout.epochs} epoch{'s' * (layout.epochs > 1)}"
    made = f"{checked.views} views of {epochs} made anew: the same pixels"
    say(f"data      fingerprint as stored; {made}")
    if checked.asked:
        share = percent(checked.agreed / checked.asked)
        say(f"teacher   the same weights; {share} % of {checked.asked} answers as stored")
    else:
        say("teacher   not asked")
