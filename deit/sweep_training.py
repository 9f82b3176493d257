"""The runs of a sweep trained, after what they build on and share; a failure bars whom it must."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from deit import checkpoint, shared_targets
from deit.at_once import Failed, Planned, Progress, may_pass, train_beside
from deit.console import say
from deit.datasets.splits import load_splits
from deit.errors import DeitError
from deit.finished import Finished
from deit.sweep_runs import Work


class Mishaps(NamedTuple):
    """What went wrong. failed: runs, teachers and stores that could not be made. barred: by the
    folder of a run that could not even begin, the reason."""

    failed: list[Failed]
    barred: dict[Path, str]

    def reasons(self) -> dict[Path, str]:
        """By the folder of each run that is not there, why."""
        return {one.run.out: one.reason for one in self.failed} | self.barred


def train_all(
    work: Work,
    *,
    finished: Finished,
    at_once: int,
    retries: int,
    progress: Progress | None = None,
) -> Mishaps:
    """Train what is not finished: what runs build on, then the answers they share, then the runs,
    so many at once; again, so often, where the reason may pass. progress: of these and what else
    there is; None: of these alone.

    What fails stops nothing but the runs that need it. Raises DataError where a teacher is trained
    anew and becomes another than the one that taught finished runs.
    """
    mishaps, gone = Mishaps([], {}), dict[str, str]()
    left = unfinished(work.runs)
    if len(left) < len(work.runs) and progress is None:
        say(f"{len(work.runs) - len(left)} of {len(work.runs)} runs are finished already")
    if not left:
        return mishaps
    for data in dict.fromkeys(run.config.data for run in left if run.config.data.download):
        load_splits(data)  # fetched once, before runs beside each other all would
    anew = unfinished(work.below)
    progress = progress or Progress(len(anew) + len(left))
    for one in anew:  # one may build on another
        for ready in _able([one], gone, mishaps, progress):
            failed = trained([ready], at_once=1, retries=retries, progress=progress)
            _note(failed, gone, mishaps)
        if one.out in mishaps.barred:
            gone[str(one.out)] = mishaps.barred[one.out]
    if anew:
        finished.check(work.runs)
    used = {target for run in left for target in run.config.teacher.targets}
    for store in work.stores:
        asking = Planned(store.path.name, store.config, store.path)
        if str(store.path) in used and _able([asking], gone, mishaps, None):
            say(f"answers that runs share: {store.path}")
            _note(_written(store, asking), gone, mishaps)
        if store.path in mishaps.barred:
            gone[str(store.path)] = mishaps.barred.pop(store.path)
    able = _able(left, gone, mishaps, progress)
    mishaps.failed.extend(trained(able, at_once=at_once, retries=retries, progress=progress))
    return mishaps


def unfinished(runs: Iterable[Planned]) -> list[Planned]:
    """Those that are still to be trained, or to go on."""
    return [run for run in runs if checkpoint.result_of(run.out) is None]


def _able(
    runs: list[Planned], gone: dict[str, str], mishaps: Mishaps, progress: Progress | None
) -> list[Planned]:
    """The runs that lack nothing; the others are noted. gone: what could not be made, and why.
    progress: what counts them."""
    able = []
    for run in runs:
        teacher, start = run.config.teacher, run.config.start.source
        needed = [*teacher.targets, *teacher.source, *([start] if start else [])]
        if run.config.loss.kind == "none":
            needed = [start] if start else []
        lacking = next((one for one in needed if one in gone), None)
        if lacking is None:
            able.append(run)
        else:
            if progress is not None:
                progress.total -= 1
            mishaps.barred[run.out] = f"needs {lacking}, which failed: {gone[lacking]}"
    return able


def _note(failed: list[Failed], gone: dict[str, str], mishaps: Mishaps) -> None:
    mishaps.failed.extend(failed)
    gone.update({str(one.run.out): one.reason for one in failed})


def trained(runs: list[Planned], *, at_once: int, retries: int, progress: Progress) -> list[Failed]:
    """Train runs, those that fail again so often. Returns those that failed each time."""
    failed = train_beside(runs, number=at_once, progress=progress) if runs else []
    for _ in range(retries):
        again = [one for one in failed if may_pass(one.code)]
        if not again:
            break
        for one in again:
            say(f"{one.run.name}: once more ({one.reason.splitlines()[0]})")
        kept = [one for one in failed if not may_pass(one.code)]
        progress.total += len(again)
        failed = kept + train_beside([one.run for one in again], number=at_once, progress=progress)
    return failed


def _written(store: shared_targets.Store, asking: Planned) -> list[Failed]:
    try:
        shared_targets.write(store)
    except DeitError as error:
        return [Failed(asking, error.exit_code, str(error), store.path)]
    return []
