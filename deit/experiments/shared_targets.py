"""Runs that ask their teachers the same share one store of the answers."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from deit.config.schema import RESUMABLE_FIELDS, Config, to_dict
from deit.config.teachers import teacher_slots
from deit.config.validation import load_config
from deit.core import run_folder
from deit.distill.losses import needs_logits
from deit.distill.target_checks import check_records
from deit.distill.write_targets import write_targets
from deit.experiments.runner import RunSpec

DIGITS = 12


def content_hash(values: dict[str, Any]) -> str:
    """The first hexadecimal digits of SHA-256 over plain values, the same for the same ones."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def result_fields(config: Config) -> dict[str, Any]:
    """What decides the result of a run, by field: the names of its teachers, and all but what a
    resumed run may change. Without defaults, so that a field of a later release changes nothing.
    Ready for JSON."""
    defaults = to_dict(Config())
    return {
        f"{section}.{leaf}": value
        for section, values in to_dict(config).items()
        for leaf, value in values.items()
        if value != defaults[section][leaf]
        and (f"{section}.{leaf}" not in RESUMABLE_FIELDS or f"{section}.{leaf}" == "teacher.source")
    }


def teacher_query_key(config: Config) -> dict[str, Any]:
    """What the answers of its teachers may depend on, as far as a configuration tells: where two
    are equal so are the answers. Ready for JSON."""
    asked = {
        name: value
        for name, value in result_fields(config).items()
        if name.startswith(("data.", "views.", "teacher."))
        and name not in ("views.seed", "teacher.allow_near_chance")
    }
    asked["seed"] = config.views_seed
    asked["student"] = config.student.image_size
    asked["precision"] = config.run.precision
    if config.views.mean is None or config.views.std is None:
        asked["init"] = config.init.weights  # whose mean and deviation those of the views may be
    if config.views.aug_repeats > 1:
        asked["batch"] = config.optim.batch_size
    return asked


class TargetStorePlan(NamedTuple):
    """A store that is to be written.

    config: a run that asks; the others ask the same. content: hard, full or top-K.
    teacher_index: which one of several teachers, from 1; None: the only one.
    """

    path: Path
    config: Config
    epochs: int
    content: str
    teacher_index: int | None


def plan_shared_stores(
    runs: list[RunSpec], folder: Path, *, content: str | None
) -> tuple[list[TargetStorePlan], list[RunSpec]]:
    """The stores that two or more of the runs can share, or that one cannot do without; and the
    same runs, taught by them. A run that has begun keeps to how it was taught.

    content: of every store; None: what the objectives need. Raises ConfigError where an objective
    cannot be had from them.
    """
    asking: dict[str, list[RunSpec]] = {}
    for run in runs:
        config = run.config
        if (
            config.loss.kind != "none"
            and config.teacher.source
            and not config.teacher.target_stores
        ):
            asking.setdefault(content_hash(teacher_query_key(config)), []).append(run)
    stores, taught = [], {}
    for key, together in asking.items():
        needed = any(run.config.views.teacher_view == "crops" for run in together)
        if len(together) < 2 and not needed:
            continue
        longest = max((run.config for run in together), key=lambda one: one.optim.epochs)
        if any(run.config.teacher.allow_near_chance for run in together):
            longest = longest.replace(
                teacher={"allow_near_chance": True}
            )  # the others see for themselves
        # A view that is always the same is asked once.
        epochs = 1 if longest.views.has_fixed_teacher_view else longest.optim.epochs
        kept = content or ("full" if any(map(_needs_probabilities, together)) else "hard")
        for run in together if content else ():
            check_records(content, run.config, None, where=f"{run.name}, content: {content}")
        number = len(longest.teacher.source)
        paths = []
        for teacher_index in range(1, number + 1) if number > 1 else (None,):
            name = "-".join(
                str(part) for part in (key, f"{epochs}-epochs", kept, teacher_index) if part
            )
            paths.append(folder / name)
            stores.append(TargetStorePlan(folder / name, longest, epochs, kept, teacher_index))
        targets = tuple(str(path) for path in paths)
        taught |= {
            run.out: run.config.replace(teacher={"target_stores": targets}) for run in together
        }
    told = [
        run._replace(config=_as_originally_trained(taught.get(run.out, run.config), run, folder))
        for run in runs
    ]
    used = {target for run in told for target in run.config.teacher.target_stores}
    return [store for store in stores if str(store.path) in used], told


def _needs_probabilities(run: RunSpec) -> bool:
    """Whether an objective needs more than the teacher's first choice."""
    together = len(teacher_slots(run.config.teacher)) > 1 and run.config.teacher.combine != "tokens"
    return together or needs_logits(run.config.loss)


def _as_originally_trained(config: Config, run: RunSpec, folder: Path) -> Config:
    """Taught from a store, or not, as the run was when it began; of a store in `folder` only the
    name counts, for the sweep may have been moved since."""
    saved = run.out / run_folder.CONFIG
    if not saved.is_file() or not run_folder.list_checkpoints(run.out):
        return config
    before = load_config(saved).teacher.target_stores
    planned = {Path(target).name for target in config.teacher.target_stores}
    here = [
        str(folder / Path(target).name)
        if Path(target).name in planned or (folder / Path(target).name).is_dir()
        else target
        for target in before
    ]
    return config.replace(teacher={"target_stores": tuple(here)})


def write(store: TargetStorePlan) -> None:
    """Write a store, or what is missing of it. Raises the errors of deit.core.errors."""
    write_targets(
        store.config,
        store.path,
        epochs=store.epochs,
        content=store.content,
        teacher_index=store.teacher_index,
    )
