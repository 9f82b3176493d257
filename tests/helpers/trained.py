"""Finished runs and folders that tests start from, each made once."""

import atexit
import fcntl
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from deit.config.schema import Config, to_dict
from deit.training.train import train

_RUNS: dict[str, Path] = {}


def trained(config: Config, out: Path) -> Path:
    """Write a finished run of this configuration to the folder `out`, and return that folder.

    Each configuration is trained once per test process.
    """
    key = repr(to_dict(config))
    if key not in _RUNS:
        run = Path(_folder().name) / str(len(_RUNS))
        train(config, run)
        _RUNS[key] = run
    return Path(shutil.copytree(_RUNS[key], out, dirs_exist_ok=True))


def shared_folder(
    tmp_path_factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]
) -> Path:
    """Return a copy of a folder that `build` fills, once for all test files and workers.

    A copy, because a test may change it while another worker reads the folder.
    """
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    original, complete = session / f"shared-{name}", session / f"shared-{name}.complete"
    with (session / f"shared-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(original, ignore_errors=True)
            original.mkdir()
            build(original)
            complete.touch()
    return shutil.copytree(original, tmp_path_factory.mktemp(name), dirs_exist_ok=True)


@functools.cache
def _folder() -> TemporaryDirectory:
    """Return the folder of all runs, with a reference that multiprocessing cannot drop.

    From Python 3.13 on, a fork by multiprocessing forgets the references of `atexit`.
    """
    folder = TemporaryDirectory(prefix="deit-trained-")
    atexit.register(folder.cleanup)
    return folder
