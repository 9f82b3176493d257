"""Runs that tests begin with: each configuration is trained once in a test process."""

import atexit
import functools
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from deit.config.schema import Config, to_dict
from deit.training.train import train

_RUNS: dict[str, Path] = {}


def trained(config: Config, out: Path) -> Path:
    """Put a finished run of this configuration into the folder `out`; that folder."""
    key = repr(to_dict(config))
    if key not in _RUNS:
        run = Path(_folder().name) / str(len(_RUNS))
        train(config, run)
        _RUNS[key] = run
    return Path(shutil.copytree(_RUNS[key], out, dirs_exist_ok=True))


@functools.cache
def _folder() -> TemporaryDirectory:
    """Held here: a fork by multiprocessing forgets what `atexit` holds, from Python 3.13 on."""
    folder = TemporaryDirectory(prefix="deit-trained-")
    atexit.register(folder.cleanup)
    return folder
