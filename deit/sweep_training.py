"""The runs of a sweep trained, after what they build on and share; a failure bars whom it must."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from deit import checkpoint, shared_targets
from deit.at_once import FailedRun, RunProgress, RunSpec, is_retryable, run_parallel
from deit.console import info
from deit.datasets.splits import load_splits
from deit.errors import DeitError
from deit.finished import FinishedRunChecker
from deit.sweep_runs import SweepPlan


class SweepFailures(NamedTuple):
    """What went wrong. failed: runs, teachers and stores that could not be made. barred: by the
    folder of a run that could not even begin, the reason."""

    failed: list[FailedRun]
    blocked: dict[Path, str]

    def reasons(self) -> dict[Path, str]:
        """By the folder of each run that is not there, why."""
        return {one.run.out: one.reason for one in self.failed} | self.blocked


def train_all(
    work: SweepPlan,
    *,
    finished: FinishedRunChecker,
    parallel: int,
    retries: int,
    progress: RunProgress | None = None,
) -> SweepFailures:
    """Train what is not finished: what runs build on, then the answers they share, then the runs,
    so many at once; again, so often, where the reason may pass. progress: of these and what else
    there is; None: of these alone.

    What fails stops nothing but the runs that need it. Raises DataError where a teacher is trained
    anew and becomes another than the one that taught finished runs.
    """
    mishaps, gone = SweepFailures([], {}), dict[str, str]()
    left = unfinished(work.runs)
    if len(left) < len(work.runs) and progress is None:
        info(f"{len(work.runs) - len(left)} of {len(work.runs)} runs are finished already")
    if not left:
        return mishaps
    for data in dict.fromkeys(run.config.data for run in left if run.config.data.download):
        load_splits(data)  # fetched once, before runs beside each other all would
    anew = unfinished(work.base_runs)
    progress = progress or RunProgress(len(anew) + len(left))
    for one in anew:  # one may build on another
        for ready in _able([one], gone, mishaps, progress):
            failed = train_with_retries([ready], parallel=1, retries=retries, progress=progress)
            _note(failed, gone, mishaps)
        if one.out in mishaps.blocked:
            gone[str(one.out)] = mishaps.blocked[one.out]
    if anew:
        finished.check(work.runs)
    used = {target for run in left for target in run.config.teacher.target_stores}
    for store in work.stores:
        asking = RunSpec(store.path.name, store.config, store.path)
        if str(store.path) in used and _able([asking], gone, mishaps, None):
            info(f"answers that runs share: {store.path}")
            _note(_written(store, asking), gone, mishaps)
        if store.path in mishaps.blocked:
            gone[str(store.path)] = mishaps.blocked.pop(store.path)
    able = _able(left, gone, mishaps, progress)
    mishaps.failed.extend(
        train_with_retries(able, parallel=parallel, retries=retries, progress=progress)
    )
    return mishaps


def unfinished(runs: Iterable[RunSpec]) -> list[RunSpec]:
    """Those that are still to be trained, or to go on."""
    return [run for run in runs if checkpoint.read_result(run.out) is None]


def _able(
    runs: list[RunSpec], gone: dict[str, str], mishaps: SweepFailures, progress: RunProgress | None
) -> list[RunSpec]:
    """The runs that lack nothing; the others are noted. gone: what could not be made, and why.
    progress: what counts them."""
    able = []
    for run in runs:
        teacher, start = run.config.teacher, run.config.init.weights
        needed = [*teacher.target_stores, *teacher.source, *([start] if start else [])]
        if run.config.loss.kind == "none":
            needed = [start] if start else []
        lacking = next((one for one in needed if one in gone), None)
        if lacking is None:
            able.append(run)
        else:
            if progress is not None:
                progress.total -= 1
            mishaps.blocked[run.out] = f"needs {lacking}, which failed: {gone[lacking]}"
    return able


def _note(failed: list[FailedRun], gone: dict[str, str], mishaps: SweepFailures) -> None:
    mishaps.failed.extend(failed)
    gone.update({str(one.run.out): one.reason for one in failed})


def train_with_retries(
    runs: list[RunSpec], *, parallel: int, retries: int, progress: RunProgress
) -> list[FailedRun]:
    """Train runs, those that fail again so often. Returns those that failed each time."""
    failed = run_parallel(runs, number=parallel, progress=progress) if runs else []
    for _ in range(retries):
        again = [one for one in failed if is_retryable(one.code)]
        if not again:
            break
        for one in again:
            info(f"{one.run.name}: once more ({one.reason.splitlines()[0]})")
        kept = [one for one in failed if not is_retryable(one.code)]
        progress.total += len(again)
        failed = kept + run_parallel([one.run for one in again], number=parallel, progress=progress)
    return failed


def _written(store: shared_targets.TargetStorePlan, asking: RunSpec) -> list[FailedRun]:
    try:
        shared_targets.write(store)
    except DeitError as error:
        return [FailedRun(asking, error.exit_code, str(error), store.path)]
    return []
