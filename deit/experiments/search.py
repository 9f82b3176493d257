"""A search instead of a grid: optuna proposes, runs answer, the hopeless are stopped; on SQLite."""

import functools
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from deit.config.schema import Config
from deit.core import run_folder, run_log
from deit.core.console import format_percent, info
from deit.core.errors import CheckpointError, ConfigError, SystemFault, first_line, raise_transient
from deit.experiments.runner import RunProgress, RunSpec, is_retryable
from deit.experiments.sweep_grid import Point, with_fields
from deit.experiments.sweep_spec import SearchSpace, text_of
from deit.training.save import selection_metric

DATABASE = "optuna.db"
_RANDOM_FIRST = 10  # trials before the search learns from any: optuna's own number
_NEVER_STOPPED = 5  # trials that run to their end before one is held against them
# What a trial says: which one it is anew, why it failed, that it was there already.
_OF, _WHY, _AGAIN = "of", "reason", "again"
_MAX_DUPLICATES = 30  # proposals in a row that were there already
_OF_THE_DISK = (
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM),
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_NOMEM),
)
"""What SQLite answers that says nothing of the database."""

Result = TypeVar("Result")


def check_optuna() -> None:
    """Raises SystemFault where optuna is not installed."""
    if find_spec("optuna") is None:
        raise SystemFault("a search needs optuna; pip install 'deit[search]'")


class PrunedTrial(NamedTuple):
    """A trial that was stopped: at which epoch, with what share of right answers on the validation
    split."""

    point: Point
    epoch: int
    top1: float


def _cause(error: BaseException) -> BaseException:
    """What SQLite itself said: SQLAlchemy and optuna only say in which step."""
    while not isinstance(error, sqlite3.Error):
        below = getattr(error, "orig", None) or error.__cause__ or error.__context__
        if below is None:
            break
        error = below
    return error


def _guarded(method: Callable[..., Result]) -> Callable[..., Result]:
    """A method of a search that raises SystemFault where its database cannot be read or
    written."""

    @functools.wraps(method)
    def inner(search: "Search", *arguments: Any) -> Result:
        with search._storing():
            return method(search, *arguments)

    return inner


class Search:
    """The trials of a space: proposed by a tree-structured Parzen estimator (Bergstra et al. 2011),
    told of validation accuracy after each evaluation, stopped where it lies below the median of the
    others at that epoch. All of it is in a database beside the runs, from which it goes on.

    plan: makes a run of a point. seed: of the proposals. of: what is searched, and with what:
    trials of anything else are not to be learned from. retries: how often a trial that failed for a
    reason that may pass is tried again at once; the next call tries all that failed again.
    progress: of the trials that are left and what was trained before them.
    """

    def __init__(
        self,
        space: SearchSpace,
        base: Config,
        out: Path,
        *,
        name: str,
        seed: int,
        of: str,
        plan: Callable[[Point], RunSpec],
        retries: int = 0,
    ) -> None:
        """Open the database, or begin it. Raises SystemFault, CheckpointError, and ConfigError
        where it holds another search."""
        check_optuna()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space, self._base, self._name = optuna, space, base, name
        self._plan, self._retries = plan, retries
        self._tried: Counter[Path] = Counter()
        self._known: set[Path] | None = None
        self._exhausted = self._ending = False  # _ending: with what is under way
        self._reported: dict[Path, int] = {}
        self.progress = RunProgress(0)
        self._database = out / DATABASE
        self._running: dict[Path, Any] = {}
        self._stopped: dict[Path, str] = {}
        try:
            self._study = self._open_study(name, space, base)
            # Another stream of proposals each time: the same one would propose the same again.
            self._study.sampler = optuna.samplers.TPESampler(
                seed=seed + len(self._study.get_trials()), n_startup_trials=_RANDOM_FIRST
            )
            before = self._study.user_attrs.get("of", of)
            self._study.set_user_attr("of", before)
            if before == of:
                self._requeue()
        except Exception as error:  # of optuna, SQLAlchemy and sqlite
            raise_transient(error, self._database)
            cause = _cause(error)
            if (getattr(cause, "sqlite_errorcode", 0) & 0xFF) in _OF_THE_DISK:  # or a kind of it
                raise self._fault(cause) from None
            raise CheckpointError(
                f"{self._database}: cannot be read ({first_line(error)})"
            ) from None
        if before != of:
            raise ConfigError(
                f"{self._database}: holds a search of other fields, or with other settings or "
                "another first seed (only `trials` and later seeds may change); give another --out"
            )

    def _open_study(self, name: str, space: SearchSpace, base: Config) -> Any:
        """Open the study in the database, or create it."""
        from sqlalchemy.pool import NullPool

        optuna = self._optuna
        warmup = max(base.optim.epochs // 4, 1)
        pruner = optuna.pruners.MedianPruner(_NEVER_STOPPED, n_warmup_steps=warmup)
        return optuna.create_study(
            # Without a pool each connection is closed after its use, and none is left open.
            storage=optuna.storages.RDBStorage(
                f"sqlite:///{self._database}", engine_kwargs={"poolclass": NullPool}
            ),
            study_name=name,
            pruner=pruner if space.prune else optuna.pruners.NopPruner(),
            direction="maximize",
            load_if_exists=True,
        )

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Raises SystemFault where the database cannot be read or written."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (self._optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
            raise self._fault(_cause(error)) from None

    def _fault(self, cause: BaseException) -> SystemFault:
        return SystemFault(
            f"{self._database}: cannot be read or written ({first_line(cause)}); its "
            "trials are kept: run the same command again to continue"
        )

    def _requeue(self) -> None:
        """Trials that a kill left open, or that failed, are proposed anew; their runs go on."""
        state = self._optuna.trial.TrialState
        for trial in self._study.get_trials(states=(state.RUNNING,)):
            self._study.tell(trial.number, state=state.FAIL)
            self._study.enqueue_trial(trial.params, user_attrs={_OF: trial.number})
        for trial in self._failed():
            self._study.enqueue_trial(trial.params, user_attrs={_OF: trial.number})

    def _failed(self) -> list[Any]:
        """Trials whose runs failed, and are not proposed anew."""
        state = self._optuna.trial.TrialState
        again = self._proposed_anew()
        failed = self._study.get_trials(states=(state.FAIL,))
        return [one for one in failed if _WHY in one.user_attrs and one.number not in again]

    def _proposed_anew(self) -> set[int]:
        trials = self._study.get_trials()
        return {trial.user_attrs[_OF] for trial in trials if _OF in trial.user_attrs}

    @_guarded
    def done(self) -> int:
        """How many trials came to an end: finished, stopped or failed of themselves."""
        state = self._optuna.trial.TrialState
        ended = self._study.get_trials(states=(state.COMPLETE, state.PRUNED, state.FAIL))
        again = self._proposed_anew()
        return sum(trial.number not in again and _AGAIN not in trial.user_attrs for trial in ended)

    def left(self) -> int:
        """How many trials are still to be brought to an end; 0 where no other point is found."""
        return 0 if self._exhausted else max(self._space.trials - self.done(), 0)

    @_guarded
    def counts(self) -> dict[str, int]:
        """How many trials ended how."""
        state = self._optuna.trial.TrialState
        complete, pruned = (
            len(self._study.get_trials(states=(one,))) for one in (state.COMPLETE, state.PRUNED)
        )
        return {
            "trials": self.done(),
            "finished": complete,
            "stopped": pruned,
            "failed": self.done() - complete - pruned,
        }

    def runs(self) -> Iterator[RunSpec]:
        """The runs still to be trained, each proposed when it is asked for; none twice."""
        with self._storing():
            yield from self._proposals()

    def _proposals(self) -> Iterator[RunSpec]:
        if self._known is None:
            self._known = set(self._folders())
        repeated = 0
        while self.left() > len(self._running):
            trial = self._study.ask(self._distributions())
            try:
                point = self._point(trial)
            except ConfigError as error:  # two fields that each may be, and not together
                info(f"trial {trial.number} cannot be: {error}")
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                continue
            run = self._plan(point)
            if run.out in self._running or (run.out in self._known and _OF not in trial.user_attrs):
                trial.set_user_attr(_AGAIN, value=True)
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                repeated += 1
                self._exhausted = repeated == _MAX_DUPLICATES and not self._running
                if repeated >= _MAX_DUPLICATES:
                    info(f"{repeated} proposals in a row were tried before: no other is begun")
                    self._ending = True
                    return
                continue
            repeated = 0
            self._known.add(run.out)
            self._running[run.out] = trial
            yield run

    def _folders(self) -> Iterator[Path]:
        """Where the runs of all trials so far are."""
        for trial in self._study.get_trials():
            try:
                yield self._plan(self._point(trial)).out
            except ConfigError:
                continue

    def _distributions(self) -> dict[str, Any]:
        kinds = self._optuna.distributions
        found = {}
        for name, one in self._space.fields.items():
            if isinstance(one, tuple):
                found[name] = kinds.CategoricalDistribution([text_of(value) for value in one])
            else:
                kind = kinds.IntDistribution if one.whole else kinds.FloatDistribution
                found[name] = kind(one.low, one.high, log=one.log)
        return found

    def _point(self, trial: Any) -> Point:
        values = {
            name: f"{value:.4g}" if isinstance(value, float) else str(value)
            for name, value in trial.params.items()
        }
        name = f"trial {self._first(trial)}"
        config = with_fields(self._base, trial.params, where=f"sweep {self._name}, {name}")
        return Point(name, {"run": name, **values}, config)

    def _first(self, trial: Any) -> int:
        """The number of a trial; of one that is proposed anew, that of the first time."""
        trials, number = self._study.get_trials(deepcopy=False), trial.number
        while _OF in trials[number].user_attrs:
            number = trials[number].user_attrs[_OF]
        return number

    @_guarded
    def should_stop(self, run: RunSpec) -> bool:
        """Whether a run under way should be stopped, told of what it came to by now."""
        trial = self._running[run.out]
        rows = [row for row in run_log.read_metrics(run.out) if "validation" in row]
        if not rows:
            return False
        last = rows[-1]
        if self._reported.get(run.out) == last["epoch"]:
            return False  # an epoch without an evaluation
        self._reported[run.out] = last["epoch"]
        if last["epoch"] >= run.config.optim.epochs:
            return False  # it is at its end: nothing would be saved
        trial.report(selection_metric(last["validation"]), last["epoch"])
        if not trial.should_prune():
            return False
        reached = format_percent(selection_metric(last["validation"]))
        self._stopped[run.out] = f"stopped at epoch {last['epoch']} with {reached} %"
        info(f"{run.name}: {self._stopped[run.out]}, below the median")
        return True

    @_guarded
    def on_end(self, run: RunSpec, code: int, reason: str) -> None:
        """Tell how a run ended; propose it anew where it failed for a reason that may pass."""
        state, trial = self._optuna.trial.TrialState, self._running.pop(run.out)
        if (
            result := run_folder.read_result(run.out)
        ) is not None:  # also if asked to stop too late
            self._study.tell(trial, result["best"]["top1"])
        elif run.out in self._stopped:
            self._study.tell(trial, state=state.PRUNED)
        else:
            trial.set_user_attr(_WHY, reason)
            self._study.tell(trial, state=state.FAIL)
            if is_retryable(code) and self._tried[run.out] < self._retries:
                self._tried[run.out] += 1
                self._study.enqueue_trial(trial.params, user_attrs={_OF: trial.number})
                info(f"{run.name}: once more ({reason.splitlines()[0]})")
        left = len(self._running) if self._ending else self.left()
        self.progress.total = self.progress.done + 1 + left

    @_guarded
    def failed(self) -> list[Point]:
        """The points of the trials that failed, however often they were tried."""
        return [self._point(one) for one in self._failed()]

    @_guarded
    def stopped(self) -> list[PrunedTrial]:
        """The trials that lay below the median, the best first."""
        found = []
        for trial in self._study.get_trials(states=(self._optuna.trial.TrialState.PRUNED,)):
            epoch = max(trial.intermediate_values)
            found.append(PrunedTrial(self._point(trial), epoch, trial.intermediate_values[epoch]))
        return sorted(found, key=lambda one: -one.top1)

    @_guarded
    def finished(self) -> list[Point]:
        """The points of the trials that ran to their end, the best on validation first."""
        state = self._optuna.trial.TrialState
        trials = self._study.get_trials(states=(state.COMPLETE,))
        return [self._point(one) for one in sorted(trials, key=lambda one: -one.value)]
