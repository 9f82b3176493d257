"""Several runs at once on one machine: each a process of its own, with its share of the cores."""

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

from deit.config.schema import Config, to_dict
from deit.core import run_folder
from deit.core.console import count_noun, format_duration, info, warn
from deit.core.errors import CheckpointError, ConfigError, DataError, DeitError, NumericsError
from deit.core.filesystem import open_to_append, write_json
from deit.core.hardware import num_cores
from deit.core.parent_process import PARALLEL_RUNS_ENV

_OutputQueue: TypeAlias = "queue.Queue[tuple[_RunProcess, str | None]]"
"""Lines of runs as they come; None at a run's end."""


class RunSpec(NamedTuple):
    """A run that is to be trained. name: what messages call it."""

    name: str
    config: Config
    out: Path


def check_num_parallel(number: int, *, option: str) -> None:
    """Refuse a number of runs at once that cannot be. Raises ConfigError."""
    if number < 1:
        raise ConfigError(f"{option} {number}: should be at least 1")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if number > 1 and processes > 1:
        raise ConfigError(
            f"{option} {number}: each run is a process of its own then, so start it without "
            f"torchrun (there are {processes} processes)"
        )


class FailedRun(NamedTuple):
    """A run that ended with an error. code: its exit code, or minus the signal that killed it.
    reason: what it last complained of. log: all it said."""

    run: RunSpec
    code: int
    reason: str
    log: Path


_AS_BEFORE = {error.exit_code for error in (ConfigError, DataError, CheckpointError, NumericsError)}


def is_retryable(code: int) -> bool:
    """Whether a run that ended so may do better the next time: not where what was asked is wrong.
    code: as in Failed."""
    return code not in _AS_BEFORE


class RunObserver(Protocol):
    """Who follows runs: asked after each epoch whether one should be stopped, told of each end."""

    def should_stop(self, run: RunSpec) -> bool:
        """Whether to stop it."""

    def on_end(self, run: RunSpec, code: int, reason: str) -> None:
        """How it ended: its exit code, or minus the signal that killed it; its complaint."""


class RunProgress:
    """How many of some runs are over, and when the others will be. total: it may be changed, as
    where a run is tried again or cannot begin."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self._begun = total, 0, time.monotonic()

    def ended(self) -> str:
        """Count one that is over; what is told of it: `3 of 12 runs, ETA 2 min 05 s`."""
        self.done += 1
        each = (time.monotonic() - self._begun) / self.done
        left = each * max(self.total - self.done, 0)
        return f"{self.done} of {self.total} runs, ETA {format_duration(left)}"


def run_parallel(
    runs: Iterable[RunSpec],
    *,
    number: int,
    progress: RunProgress,
    watch: RunObserver | None = None,
) -> list[FailedRun]:
    """Train runs, so many at a time, each as `deit train --resume` would alone with its share of
    the cores, on the GPU that has the fewest. What they print is in NAME.log beside each.

    runs: each is asked for when there is room for it. progress: of these and what else there is.
    One that fails does not stop the others; returns those that did, without those that `watch`
    stopped. Raises Stopped, when those under way have saved, where that is asked.
    """
    waiting, failed = iter(runs), []
    with TemporaryDirectory(prefix="deit-") as folder, _LocalPool(number, Path(folder)) as here:
        while True:
            while len(here.children) < number and (run := next(waiting, None)) is not None:
                here.start(run)
            if not here.children:
                return failed
            child, line = here.output.get()
            if line is not None:
                child.handle_line(line)
                if line.startswith("epoch ") and watch is not None and not child.stopped_early:
                    child.stopped_early = watch.should_stop(child.run)
                    if child.stopped_early:
                        child.process.terminate()
                continue
            here.children.remove(child)
            code = child.process.wait()
            if code < 0 and run_folder.read_result(child.run.out) is not None:
                code = 0  # what killed it came too late
            if watch is not None:
                watch.on_end(child.run, code, child.error)
            if code and not child.stopped_early:
                failed.append(FailedRun(child.run, code, child.error, child.log))
            end = f"ended with exit code {code}" if code else "finished"
            end = "stopped" if code and child.stopped_early else end
            info(f"{child.run.name}: {end}; {progress.ended()}")


def run_parallel_or_raise(runs: list[RunSpec], *, number: int, progress: RunProgress) -> None:
    """As `run_parallel`; raises DeitError with the exit code of the first that failed when all
    have ended."""
    if failed := run_parallel(runs, number=number, progress=progress):
        raise combined_error(failed)


def combined_error(failed: list[FailedRun]) -> DeitError:
    """What is told of runs that failed, with the exit code of the first."""
    told = "".join(f"\n  {one.run.name} ({one.log}): {one.reason}" for one in failed)
    runs = count_noun(len(failed), "run")
    error = DeitError(f"{runs} failed; the same command goes on with the others:{told}")
    error.exit_code = failed[0].code if failed[0].code > 0 else 1
    return error


class _RunProcess:
    """A run under way. error: its last error message. gpu: the one it has, of several.
    stopped_early: whether it was stopped because its results promised nothing."""

    def __init__(
        self,
        run: RunSpec,
        log: Path,
        process: "subprocess.Popen[str]",
        output: _OutputQueue,
        gpu: str | None,
    ) -> None:
        self.run, self.log, self.process, self.gpu = run, log, process, gpu
        self.error, self._complaining = "it gave no reason", False
        self.stopped_early = False
        self.reader = threading.Thread(target=self._read_output, args=(output,), daemon=True)
        self.reader.start()

    def _read_output(self, output: _OutputQueue) -> None:
        """Keep every line in the log, as long as the disk has room, and hand it on; None at the
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
                    with contextlib.suppress(OSError):  # a full disk: the run itself tells of it
                        log.write(line)
                        log.flush()
        output.put((self, None))

    def handle_line(self, line: str) -> None:
        """Tell what is worth telling."""
        begun = line.startswith("deit: error: ")
        self._complaining = begun or (self._complaining and line.startswith("  "))
        if begun:
            self.error = line.removeprefix("deit: error: ")
        elif self._complaining:
            self.error += f"\n  {line}"
        elif line.startswith("deit: warning: "):
            warn(f"{self.run.name}: {line.removeprefix('deit: warning: ')}")
        elif line.startswith("epoch "):
            info(f"{self.run.name}: {line}")


class _LocalPool:
    """This machine and the runs under way on it. folder: for their configurations."""

    def __init__(self, number: int, folder: Path) -> None:
        here = num_cores()
        allowed = int(os.environ.get("OMP_NUM_THREADS") or here)
        self.number = number
        self.threads = max(min(allowed, here // number), 1)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        places = visible.split(",") if visible else [str(place) for place in range(count)]
        self.gpus = places if count else []
        self.folder = folder
        self.output: _OutputQueue = queue.Queue()
        self.children: list[_RunProcess] = []
        self._begun = 0

    def start(self, run: RunSpec) -> None:
        """Start a run."""
        run.out.parent.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{self._begun}.json"
        write_json(file, to_dict(run.config))
        arguments = ["train", str(file), "--out", str(run.out), "--resume"]
        if run.config.teacher.code_sources:  # who named it to us has said that it may run
            arguments += ["--teacher.source", ",".join(run.config.teacher.source)]
        environment = {
            **_find_package(os.environ),
            "PYTHONUNBUFFERED": "1",
            PARALLEL_RUNS_ENV: str(self.number),
            "OMP_NUM_THREADS": str(self.threads),
        }
        taken = [child.gpu for child in self.children]
        gpu = min(self.gpus, key=taken.count) if len(self.gpus) > 1 else None
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self._begun += 1
        log = run.out.with_name(f"{run.out.name}.log")
        process = subprocess.Popen(
            # -P: a folder `deit` in the working directory is not taken for this package.
            [sys.executable, "-P", "-m", "deit", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            errors="replace",
        )
        self.children.append(_RunProcess(run, log, process, self.output, gpu))
        info(f"{run.name}: {run.out}, all it says in {log}")

    def __enter__(self) -> "_LocalPool":
        return self

    def __exit__(self, *error: object) -> None:
        """Ask those still under way to save and stop, and wait until they have. A second signal to
        this process ends it at once, and the system then sends one to each that is stuck."""
        for child in self.children:
            child.process.terminate()
        for child in self.children:
            child.reader.join()


def _find_package(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python finds this package where this process found it."""
    root = Path(__file__).resolve().parents[2]
    if root.name == "site-packages":  # found in any case
        return dict(environment)
    path = filter(None, (str(root), environment.get("PYTHONPATH")))
    return {**environment, "PYTHONPATH": os.pathsep.join(path)}
