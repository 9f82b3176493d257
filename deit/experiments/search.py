"""Search a space of configurations with optuna: trials are stored in SQLite and can be pruned."""

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
from deit.core.errors import (
    CheckpointError,
    ConfigError,
    SystemFault,
    first_line,
    raise_if_transient,
)
from deit.experiments.parallel_runs import RunProgress, RunSpec, is_retryable
from deit.experiments.sweep_grid import Point, with_fields
from deit.experiments.sweep_spec import SearchSpace, text_of
from deit.training.save import selection_metric

DATABASE = "optuna.db"
_NUM_STARTUP_TRIALS = 10  # random trials before the model is used: optuna's default
_NUM_UNPRUNED_TRIALS = 5  # trials that are never pruned, to estimate the median from
# Attributes of a trial in the database: the number of the trial that it retries, why it failed, and
# whether another trial has the same point.
_RETRY_OF, _FAILURE_REASON, _IS_DUPLICATE = "retry_of", "failure_reason", "is_duplicate"
_SEARCH_HASH = "search_hash"  # an attribute of the study
_MAX_DUPLICATES = 30  # duplicate proposals in a row before the search ends
_TRANSIENT_ERRORS = (
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM),
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_NOMEM),
)
"""Errors of SQLite that do not mean that the database is damaged."""

Result = TypeVar("Result")


def check_optuna() -> None:
    """Raise SystemFault if optuna is not installed."""
    if find_spec("optuna") is None:
        raise SystemFault("a search needs optuna; install it with pip install 'deit[search]'")


class PrunedTrial(NamedTuple):
    """A trial that was stopped early.

    epoch, top1: its last evaluated epoch, and its validation top-1 in [0, 1] at that epoch.
    """

    point: Point
    epoch: int
    top1: float


def _sqlite_cause(error: BaseException) -> BaseException:
    """Return the error of SQLite behind an error of SQLAlchemy or optuna."""
    while not isinstance(error, sqlite3.Error):
        cause = getattr(error, "orig", None) or error.__cause__ or error.__context__
        if cause is None:
            break
        error = cause
    return error


def _with_translated_errors(method: Callable[..., Result]) -> Callable[..., Result]:
    """Return a method of Search that raises database errors as SystemFault."""

    @functools.wraps(method)
    def inner(search: "Search", *arguments: Any) -> Result:
        with search._translate_errors():
            return method(search, *arguments)

    return inner


class Search:
    """A resumable search; the RunObserver of its runs.

    Points are proposed by a tree-structured Parzen estimator (Bergstra et al. 2011). After each
    evaluation of a run its validation top-1 is reported, and the run is stopped if that is below
    the median of the other trials at the same epoch. All trials are stored in a database next to
    the runs.

    seed: of the proposals. search_hash: identifies the space and the base configuration. run_of:
    returns the run of a point. retries: how often a trial is retried at once after a transient
    failure; the next command retries all failed trials.

    Attribute `progress` counts the remaining trials, and the base runs before them.
    """

    def __init__(
        self,
        space: SearchSpace,
        base: Config,
        out: Path,
        *,
        name: str,
        seed: int,
        search_hash: str,
        run_of: Callable[[Point], RunSpec],
        retries: int = 0,
    ) -> None:
        """Open or create the database in `out`. Raises SystemFault if it cannot be read or written,
        CheckpointError if it is damaged, ConfigError if it has another search hash."""
        check_optuna()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space, self._base, self._name = optuna, space, base, name
        self._run_of, self._retries = run_of, retries
        self._num_retries: Counter[Path] = Counter()
        self._proposed: set[Path] | None = None
        # _ending: nothing more is proposed, but trials may still run. _exhausted: nor does any run,
        # so the space has no other points.
        self._exhausted = self._ending = False
        self._reported: dict[Path, int] = {}
        self.progress = RunProgress(0)
        self._database = Path(out) / DATABASE
        self._running: dict[Path, Any] = {}
        self._stopped: dict[Path, str] = {}
        try:
            self._study = self._open_study(name, space, base)
            # A resumed search needs another random stream, or it would repeat its proposals.
            self._study.sampler = optuna.samplers.TPESampler(
                seed=seed + len(self._study.get_trials()), n_startup_trials=_NUM_STARTUP_TRIALS
            )
            stored_hash = self._study.user_attrs.get(_SEARCH_HASH, search_hash)
            self._study.set_user_attr(_SEARCH_HASH, stored_hash)
            if stored_hash == search_hash:
                self._requeue()
        except Exception as error:  # optuna, SQLAlchemy and sqlite raise many types
            raise_if_transient(error, self._database)
            cause = _sqlite_cause(error)
            # The low byte is the primary error code.
            if (getattr(cause, "sqlite_errorcode", 0) & 0xFF) in _TRANSIENT_ERRORS:
                raise self._system_fault(cause) from None
            raise CheckpointError(
                f"{self._database}: cannot be read ({first_line(error)})"
            ) from None
        if stored_hash != search_hash:
            raise ConfigError(
                f"{self._database}: holds another search: its fields, settings or first seed "
                "differ (only `trials` and the later seeds may change); give another folder"
            )

    def _open_study(self, name: str, space: SearchSpace, base: Config) -> Any:
        """Open the study in the database, or create it."""
        from sqlalchemy.pool import NullPool

        optuna = self._optuna
        num_warmup_epochs = max(base.optim.epochs // 4, 1)
        pruner = optuna.pruners.MedianPruner(_NUM_UNPRUNED_TRIALS, n_warmup_steps=num_warmup_epochs)
        return optuna.create_study(
            # NullPool: each connection is closed after its use.
            storage=optuna.storages.RDBStorage(
                f"sqlite:///{self._database}", engine_kwargs={"poolclass": NullPool}
            ),
            study_name=name,
            pruner=pruner if space.prune else optuna.pruners.NopPruner(),
            direction="maximize",
            load_if_exists=True,
        )

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise SystemFault if the database cannot be read or written."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (self._optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
            raise self._system_fault(_sqlite_cause(error)) from None

    def _system_fault(self, cause: BaseException) -> SystemFault:
        return SystemFault(
            f"{self._database}: cannot be read or written ({first_line(cause)}); its trials are "
            "kept; run the same command again to continue"
        )

    def _requeue(self) -> None:
        """Propose again the trials that failed, and those that a killed command left open."""
        state = self._optuna.trial.TrialState
        for trial in self._study.get_trials(states=(state.RUNNING,)):
            self._study.tell(trial.number, state=state.FAIL)
            self._study.enqueue_trial(trial.params, user_attrs={_RETRY_OF: trial.number})
        for trial in self._failed():
            self._study.enqueue_trial(trial.params, user_attrs={_RETRY_OF: trial.number})

    def _failed(self) -> list[Any]:
        """Return the trials whose runs failed and that were not proposed again."""
        state = self._optuna.trial.TrialState
        retried = self._retried()
        failed = self._study.get_trials(states=(state.FAIL,))
        return [
            trial
            for trial in failed
            if _FAILURE_REASON in trial.user_attrs and trial.number not in retried
        ]

    def _retried(self) -> set[int]:
        """Return the numbers of the failed trials that were proposed again."""
        trials = self._study.get_trials()
        return {trial.user_attrs[_RETRY_OF] for trial in trials if _RETRY_OF in trial.user_attrs}

    @_with_translated_errors
    def num_done(self) -> int:
        """Return the number of trials that finished, were stopped, or failed."""
        state = self._optuna.trial.TrialState
        ended = self._study.get_trials(states=(state.COMPLETE, state.PRUNED, state.FAIL))
        retried = self._retried()
        return sum(
            trial.number not in retried and _IS_DUPLICATE not in trial.user_attrs for trial in ended
        )

    def num_left(self) -> int:
        """Return the number of trials that have not ended; 0 if the space has no other points."""
        return 0 if self._exhausted else max(self._space.trials - self.num_done(), 0)

    @_with_translated_errors
    def counts(self) -> dict[str, int]:
        """Return the number of trials, in all and by outcome."""
        state = self._optuna.trial.TrialState
        complete, pruned = (
            len(self._study.get_trials(states=(outcome,)))
            for outcome in (state.COMPLETE, state.PRUNED)
        )
        return {
            "trials": self.num_done(),
            "finished": complete,
            "stopped": pruned,
            "failed": self.num_done() - complete - pruned,
        }

    def runs(self) -> Iterator[RunSpec]:
        """Yield the runs to train, without duplicates. Each is proposed when it is requested."""
        with self._translate_errors():
            yield from self._proposals()

    def _proposals(self) -> Iterator[RunSpec]:
        if self._proposed is None:
            self._proposed = set(self._folders())
        num_duplicates = 0
        while self.num_left() > len(self._running):
            trial = self._study.ask(self._distributions())
            try:
                point = self._point(trial)
            except ConfigError as error:  # fields that are valid alone, but not together
                info(f"trial {trial.number} is invalid: {error}")
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                continue
            run = self._run_of(point)
            was_proposed = run.out in self._proposed and _RETRY_OF not in trial.user_attrs
            if run.out in self._running or was_proposed:
                trial.set_user_attr(_IS_DUPLICATE, value=True)
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                num_duplicates += 1
                self._exhausted = num_duplicates == _MAX_DUPLICATES and not self._running
                if num_duplicates >= _MAX_DUPLICATES:
                    info(f"no new trials: the last {num_duplicates} proposals were duplicates")
                    self._ending = True
                    return
                continue
            num_duplicates = 0
            self._proposed.add(run.out)
            self._running[run.out] = trial
            yield run

    def _folders(self) -> Iterator[Path]:
        """Yield the run folders of all trials so far."""
        for trial in self._study.get_trials():
            try:
                yield self._run_of(self._point(trial)).out
            except ConfigError:
                continue

    def _distributions(self) -> dict[str, Any]:
        types = self._optuna.distributions
        distributions = {}
        for name, values in self._space.fields.items():
            if isinstance(values, tuple):
                choices = [text_of(value) for value in values]
                distributions[name] = types.CategoricalDistribution(choices)
            else:
                range_type = types.IntDistribution if values.is_integer else types.FloatDistribution
                distributions[name] = range_type(values.low, values.high, log=values.log)
        return distributions

    def _point(self, trial: Any) -> Point:
        values = {
            name: f"{value:.4g}" if isinstance(value, float) else str(value)
            for name, value in trial.params.items()
        }
        name = f"trial {self._original_number(trial)}"
        config = with_fields(self._base, trial.params, where=f"sweep {self._name}, {name}")
        return Point(name, {"run": name, **values}, config)

    def _original_number(self, trial: Any) -> int:
        """Return the number of a trial; for a retried trial the number of its first proposal."""
        trials, original = self._study.get_trials(deepcopy=False), trial.number
        while _RETRY_OF in trials[original].user_attrs:
            original = trials[original].user_attrs[_RETRY_OF]
        return original

    @_with_translated_errors
    def should_stop(self, run: RunSpec) -> bool:
        """Report the last evaluation of an active run; return whether to stop the run."""
        trial = self._running[run.out]
        rows = [row for row in run_log.read_metrics(run.out) if "validation" in row]
        if not rows:
            return False
        last = rows[-1]
        if self._reported.get(run.out) == last["epoch"]:
            return False  # no new evaluation
        self._reported[run.out] = last["epoch"]
        if last["epoch"] >= run.config.optim.epochs:
            return False  # its last epoch: stopping would save no time
        trial.report(selection_metric(last["validation"]), last["epoch"])
        if not trial.should_prune():
            return False
        reached = format_percent(selection_metric(last["validation"]))
        self._stopped[run.out] = f"stopped at epoch {last['epoch']} with {reached} %"
        info(f"{run.name}: {self._stopped[run.out]}, below the median")
        return True

    @_with_translated_errors
    def on_end(self, run: RunSpec, code: int, reason: str) -> None:
        """Store the outcome of a run; propose it again after a transient failure."""
        state, trial = self._optuna.trial.TrialState, self._running.pop(run.out)
        # The result counts, also if the run finished while it was being stopped.
        if (result := run_folder.read_result(run.out)) is not None:
            self._study.tell(trial, result["best"]["top1"])
        elif run.out in self._stopped:
            self._study.tell(trial, state=state.PRUNED)
        else:
            trial.set_user_attr(_FAILURE_REASON, reason)
            self._study.tell(trial, state=state.FAIL)
            if is_retryable(code) and self._num_retries[run.out] < self._retries:
                self._num_retries[run.out] += 1
                self._study.enqueue_trial(trial.params, user_attrs={_RETRY_OF: trial.number})
                info(f"{run.name}: retrying ({reason.splitlines()[0]})")
        num_left = len(self._running) if self._ending else self.num_left()
        self.progress.total = (
            self.progress.done + 1 + num_left
        )  # `done` does not count this run yet

    @_with_translated_errors
    def failed(self) -> list[Point]:
        """Return the points of the trials that failed."""
        return [self._point(trial) for trial in self._failed()]

    @_with_translated_errors
    def stopped(self) -> list[PrunedTrial]:
        """Return the trials that were stopped early, the best first."""
        stopped = []
        for trial in self._study.get_trials(states=(self._optuna.trial.TrialState.PRUNED,)):
            epoch = max(trial.intermediate_values)
            stopped.append(PrunedTrial(self._point(trial), epoch, trial.intermediate_values[epoch]))
        return sorted(stopped, key=lambda trial: -trial.top1)

    @_with_translated_errors
    def finished(self) -> list[Point]:
        """Return the points of the finished trials, the best on the validation split first."""
        state = self._optuna.trial.TrialState
        trials = self._study.get_trials(states=(state.COMPLETE,))
        return [self._point(trial) for trial in sorted(trials, key=lambda trial: -trial.value)]
