"""Plan shared target stores: runs that need the same teacher outputs share one store of them."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from deit.config.schema import RESUMABLE_FIELDS, Config, to_dict
from deit.config.teachers import teacher_slots
from deit.config.validation import load_config
from deit.core import run_folder
from deit.distill.losses import needs_logits
from deit.distill.target_content import check_content
from deit.distill.write_targets import write_targets
from deit.experiments.parallel_runs import RunSpec

HASH_LENGTH = 12
_BY_CONTENT = ("data.exclude_list", "teacher.source")
"""Fields that a resumed run can change only if the content is the same."""


def content_hash(values: dict[str, Any]) -> str:
    """Return the first hexadecimal digits of SHA-256 over plain values; their order does not
    matter."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def result_fields(config: Config) -> dict[str, Any]:
    """Return the fields that determine the result of a run, with their values, ready for JSON.

    They are the names of its teachers and exclude list, and all fields that a resumed run must not
    change. Fields with default values are left out, so that a field of a later release does not
    change the hash.
    """
    defaults = to_dict(Config())
    return {
        f"{section}.{leaf}": value
        for section, values in to_dict(config).items()
        for leaf, value in values.items()
        if value != defaults[section][leaf]
        and (f"{section}.{leaf}" not in RESUMABLE_FIELDS or f"{section}.{leaf}" in _BY_CONTENT)
    }


def teacher_query_key(config: Config) -> dict[str, Any]:
    """Return what the outputs of the teachers depend on, by field, ready for JSON.

    Configurations with equal keys have equal teacher outputs.
    """
    key = {
        name: value
        for name, value in result_fields(config).items()
        if name.startswith(("data.", "views.", "teacher."))
        and name not in ("views.seed", "teacher.allow_near_chance")
    }
    key["seed"] = config.views_seed
    key["student"] = config.student.image_size
    key["precision"] = config.run.precision
    if config.views.mean is None or config.views.std is None:
        # The views may take mean and standard deviation from the initial weights.
        key["init"] = config.init.weights
    if config.views.aug_repeats > 1:
        key["batch"] = config.optim.batch_size
    return key


class TargetStorePlan(NamedTuple):
    """A store to write.

    config: one of the runs that share it. content: hard, full or top-K. teacher_index: the 1-based
    index of its teacher; None if there is one teacher only.
    """

    path: Path
    config: Config
    epochs: int
    content: str
    teacher_index: int | None


def plan_shared_stores(
    runs: list[RunSpec], folder: str | Path, *, content: str | None
) -> tuple[list[TargetStorePlan], list[RunSpec]]:
    """Return the stores to write in `folder`, and the runs, which read them.

    Two or more runs with the same teacher outputs share a store. A run whose teacher sees crops
    needs a store in any case. A run that was started before keeps its stores, or its live teacher.

    content: of every store. Default: what the losses need. Raises ConfigError if a loss cannot be
    computed from that content.
    """
    folder = Path(folder)
    runs_by_key: dict[str, list[RunSpec]] = {}
    for run in runs:
        if _has_only_live_teachers(run.config):
            runs_by_key.setdefault(content_hash(teacher_query_key(run.config)), []).append(run)
    stores, with_stores = [], {}
    for key, sharing in runs_by_key.items():
        needs_store = any(run.config.views.teacher_view == "crops" for run in sharing)
        if len(sharing) < 2 and not needs_store:
            continue
        longest = max((run.config for run in sharing), key=lambda config: config.optim.epochs)
        if any(run.config.teacher.allow_near_chance for run in sharing):
            # The other runs check the teacher's accuracy themselves.
            longest = longest.replace(teacher={"allow_near_chance": True})
        # The teacher's outputs for a fixed view are the same in every epoch.
        epochs = 1 if longest.views.has_fixed_teacher_view else longest.optim.epochs
        stored = content or ("full" if any(map(_needs_probabilities, sharing)) else "hard")
        for run in sharing if content else ():
            check_content(
                content,
                run.config.teacher,
                run.config.loss,
                combine=None,
                where=f"{run.name}, content: {content}",
            )
        num_teachers = len(longest.teacher.source)
        paths = []
        for teacher_index in range(1, num_teachers + 1) if num_teachers > 1 else (None,):
            name = "-".join(
                str(part) for part in (key, f"{epochs}-epochs", stored, teacher_index) if part
            )
            paths.append(folder / name)
            stores.append(TargetStorePlan(folder / name, longest, epochs, stored, teacher_index))
        targets = tuple(str(path) for path in paths)
        with_stores |= {
            run.out: run.config.replace(teacher={"target_stores": targets}) for run in sharing
        }
    runs = [
        run._replace(
            config=_as_originally_trained(with_stores.get(run.out, run.config), run, folder)
        )
        for run in runs
    ]
    used = {target for run in runs for target in run.config.teacher.target_stores}
    return [store for store in stores if str(store.path) in used], runs


def _has_only_live_teachers(config: Config) -> bool:
    teacher = config.teacher
    return config.loss.kind != "none" and bool(teacher.source) and not teacher.target_stores


def _needs_probabilities(run: RunSpec) -> bool:
    """Return whether a run's loss needs more than the teacher's top-1 class."""
    averages = len(teacher_slots(run.config.teacher)) > 1 and run.config.teacher.combine != "tokens"
    return averages or needs_logits(run.config.loss)


def _as_originally_trained(config: Config, run: RunSpec, folder: Path) -> Config:
    """Return the configuration with the stores with which a resumed run was started.

    Stores in `folder` are found by name only, since the sweep may have been moved.
    """
    saved = run.out / run_folder.CONFIG
    if not saved.is_file() or not run_folder.list_checkpoints(run.out):
        return config
    before = load_config(saved).teacher.target_stores
    planned = {Path(target).name for target in config.teacher.target_stores}
    stores = [
        str(folder / Path(target).name)
        if Path(target).name in planned or (folder / Path(target).name).is_dir()
        else target
        for target in before
    ]
    return config.replace(teacher={"target_stores": tuple(stores)})


def write(store: TargetStorePlan) -> None:
    """Write a store, or complete an incomplete one. Raises the errors of deit.core.errors."""
    write_targets(
        store.config,
        store.path,
        epochs=store.epochs,
        content=store.content,
        teacher_index=store.teacher_index,
    )
