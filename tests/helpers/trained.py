"""Finished runs that tests start from: each configuration is trained once per test process."""

import atexit
import functools
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from deit.config.schema import Config, to_dict
from deit.training.train import train

_RUNS: dict[str, Path] = {}


def trained(config: Config, out: Path) -> Path:
    """Write a finished run of this configuration to the folder `out`, and return that folder."""
    key = repr(to_dict(config))
    if key not in _RUNS:
        run = Path(_folder().name) / str(len(_RUNS))
        train(config, run)
        _RUNS[key] = run
    return Path(shutil.copytree(_RUNS[key], out, dirs_exist_ok=True))


@functools.cache
def _folder() -> TemporaryDirectory:
    """Return the folder of all runs, with a reference that multiprocessing cannot drop.

    From Python 3.13 on, a fork by multiprocessing forgets the references of `atexit`.
    """
    folder = TemporaryDirectory(prefix="deit-trained-")
    atexit.register(folder.cleanup)
    return folder
