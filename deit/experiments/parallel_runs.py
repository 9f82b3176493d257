"""Train runs in parallel on one machine, each in its own process with its share of the cores."""

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Protocol, TypeAlias

import torch

from deit.config.command_choices import check_at_least
from deit.config.schema import Config, to_dict
from deit.core import run_folder
from deit.core.console import count_noun, format_duration, info, warn
from deit.core.errors import CheckpointError, ConfigError, DataError, DeitError, NumericsError
from deit.core.filesystem import open_to_append, write_json
from deit.core.hardware import num_cores
from deit.core.parent_process import PARALLEL_RUNS_ENV

_OutputQueue: TypeAlias = "queue.Queue[tuple[_RunProcess, str | None]]"
"""Output lines of all runs, in the order of arrival; None marks the end of a run."""


class RunSpec(NamedTuple):
    """A run to train. name: its name in messages. out: its run folder."""

    name: str
    config: Config
    out: Path


def check_num_parallel(num_parallel: int, *, name: str) -> None:
    """Raise ConfigError for an invalid number of parallel runs. name: of the parameter."""
    check_at_least(name, num_parallel, 1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_parallel > 1 and processes > 1:
        raise ConfigError(
            f"{name} = {num_parallel}: starts one process per run, so start the command without "
            f"torchrun (which started {processes} processes)"
        )


class FailedRun(NamedTuple):
    """A run that ended with an error.

    code: its exit code, or the negative number of the signal that killed it. reason: its last error
    message. log: the file with its whole output.
    """

    run: RunSpec
    code: int
    reason: str
    log: Path


_PERMANENT = {error.exit_code for error in (ConfigError, DataError, CheckpointError, NumericsError)}


def is_retryable(code: int) -> bool:
    """Return whether a failure can be transient. code: as in FailedRun."""
    return code not in _PERMANENT


class RunObserver(Protocol):
    """Follows parallel runs and can stop them early."""

    def should_stop(self, run: RunSpec) -> bool:
        """Return whether to stop the run. Called after each of its epochs."""

    def on_end(self, run: RunSpec, code: int, reason: str) -> None:
        """Handle the end of a run. code, reason: as in FailedRun."""


class RunProgress:
    """Counts finished runs and estimates the remaining time. total: may be changed, for example if
    a run is retried or cannot start."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self._started = total, 0, time.monotonic()

    def ended(self) -> str:
        """Count a run that ended; return the progress as `3 of 12 runs, ETA 2 min 05 s`."""
        self.done += 1
        seconds_per_run = (time.monotonic() - self._started) / self.done
        left = seconds_per_run * max(self.total - self.done, 0)
        return f"{self.done} of {self.total} runs, ETA {format_duration(left)}"


def run_parallel(
    runs: Iterable[RunSpec],
    *,
    num_parallel: int,
    progress: RunProgress,
    observer: RunObserver | None = None,
) -> list[FailedRun]:
    """Train runs, `num_parallel` at a time, and return the failed ones.

    Each run is a process of `deit train --resume` with its share of the cores, on the GPU with the
    fewest runs. Its output is written to NAME.log next to its folder. A failed run does not stop
    the others.

    runs: an iterator is advanced when a process is free. progress: counts these runs. observer:
    runs that it stops are not returned as failed. Raises StoppedBySignal after a signal, once the
    active runs have saved a checkpoint.
    """
    waiting, failed = iter(runs), []
    with (
        TemporaryDirectory(prefix="deit-") as folder,
        _LocalPool(num_parallel, Path(folder)) as pool,
    ):
        while True:
            while len(pool.children) < num_parallel and (run := next(waiting, None)) is not None:
                pool.start(run)
            if not pool.children:
                return failed
            child, line = pool.output.get()
            if line is not None:
                child.handle_line(line)
                if line.startswith("epoch ") and observer is not None and not child.stopped_early:
                    child.stopped_early = observer.should_stop(child.run)
                    if child.stopped_early:
                        child.process.terminate()
                continue
            pool.children.remove(child)
            code = child.process.wait()
            if code < 0 and run_folder.read_result(child.run.out) is not None:
                code = 0  # it was killed after it had finished
            if observer is not None:
                observer.on_end(child.run, code, child.error)
            if code and not child.stopped_early:
                failed.append(FailedRun(child.run, code, child.error, child.log))
            end = f"ended with exit code {code}" if code else "finished"
            end = "stopped" if code and child.stopped_early else end
            info(f"{child.run.name}: {end}; {progress.ended()}")


def combined_error(failed: list[FailedRun]) -> DeitError:
    """Return one error for all failed runs, with the exit code of the first."""
    lines = "".join(f"\n  {run.run.name} ({run.log}): {run.reason}" for run in failed)
    runs = count_noun(len(failed), "run")
    error = DeitError(f"{runs} failed; run the same command again to train what is missing:{lines}")
    error.exit_code = failed[0].code if failed[0].code > 0 else 1
    return error


class _RunProcess:
    """An active run. error: its last error message. gpu: its GPU, if there are several.
    stopped_early: whether the observer stopped it."""

    def __init__(
        self,
        run: RunSpec,
        log: Path,
        process: "subprocess.Popen[str]",
        output: _OutputQueue,
        gpu: str | None,
    ) -> None:
        self.run, self.log, self.process, self.gpu = run, log, process, gpu
        self.error, self._in_error = "no error message", False
        self.stopped_early = False
        self.reader = threading.Thread(target=self._read_output, args=(output,), daemon=True)
        self.reader.start()

    def _read_output(self, output: _OutputQueue) -> None:
        """Write every line to the log, while the disk has space, and queue it; queue None at the
        end."""
        with contextlib.ExitStack() as stack:
            assert self.process.stdout is not None
            lines, log = stack.enter_context(self.process.stdout), None
            try:
                log = stack.enter_context(
                    open_to_append(self.log, "a", encoding="utf-8", errors="backslashreplace")
                )
            except OSError as error:
                output.put((self, f"deit: warning: {self.log}: not written ({error.strerror})"))
            for line in lines:
                output.put((self, line.rstrip("\n")))
                if log is not None:
                    with contextlib.suppress(OSError):  # the run itself reports a full disk
                        log.write(line)
                        log.flush()
        output.put((self, None))

    def handle_line(self, line: str) -> None:
        """Print epochs and warnings; keep the last error message."""
        starts_error = line.startswith("deit: error: ")
        self._in_error = starts_error or (self._in_error and line.startswith("  "))
        if starts_error:
            self.error = line.removeprefix("deit: error: ")
        elif self._in_error:
            self.error += f"\n  {line}"
        elif line.startswith("deit: warning: "):
            warn(f"{self.run.name}: {line.removeprefix('deit: warning: ')}")
        elif line.startswith("epoch "):
            info(f"{self.run.name}: {line}")


class _LocalPool:
    """The active runs on this machine. folder: for the files of their configurations."""

    def __init__(self, num_parallel: int, folder: Path) -> None:
        available = num_cores()
        allowed = int(os.environ.get("OMP_NUM_THREADS") or available)
        self.num_parallel = num_parallel
        self.threads = max(min(allowed, available // num_parallel), 1)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        gpus = visible.split(",") if visible else [str(index) for index in range(count)]
        self.gpus = gpus if count else []
        self.folder = folder
        self.output: _OutputQueue = queue.Queue()
        self.children: list[_RunProcess] = []
        self._num_started = 0

    def start(self, run: RunSpec) -> None:
        """Start the process of a run."""
        run.out.parent.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{self._num_started}.json"
        write_json(file, to_dict(run.config))
        arguments = ["train", str(file), "--out", str(run.out), "--resume"]
        if run.config.teacher.code_sources:  # the caller has allowed this code to run
            arguments += ["--teacher.source", ",".join(run.config.teacher.source)]
        environment = {
            **_find_package(os.environ),
            "PYTHONUNBUFFERED": "1",
            PARALLEL_RUNS_ENV: str(self.num_parallel),
            "OMP_NUM_THREADS": str(self.threads),
        }
        used = [child.gpu for child in self.children]
        gpu = min(self.gpus, key=used.count) if len(self.gpus) > 1 else None
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self._num_started += 1
        log = run.out.with_name(f"{run.out.name}.log")
        process = subprocess.Popen(
            # -P: do not import a folder `deit` in the working directory as this package.
            [sys.executable, "-P", "-m", "deit", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            errors="replace",
        )
        self.children.append(_RunProcess(run, log, process, self.output, gpu))
        info(f"{run.name}: {run.out} (log: {log})")

    def __enter__(self) -> "_LocalPool":
        return self

    def __exit__(self, *error: object) -> None:
        """Signal active runs to save and stop, and wait for them.

        A second signal to this process ends it at once; the operating system then sends a signal to
        each run that is left.
        """
        for child in self.children:
            child.process.terminate()
        for child in self.children:
            child.reader.join()


def _find_package(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables with which Python imports this package from the same path."""
    root = Path(__file__).resolve().parents[2]
    if root.name == "site-packages":  # it is on the path in any case
        return dict(environment)
    path = filter(None, (str(root), environment.get("PYTHONPATH")))
    return {**environment, "PYTHONPATH": os.pathsep.join(path)}
