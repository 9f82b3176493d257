"""The errors of the package: `from deit.errors import ConfigError`, or `deit.errors.ConfigError`.

>>> from deit.errors import CheckpointError, DeitError
>>> issubclass(CheckpointError, DeitError)
True
"""

from deit.core.errors import (
    CheckpointError,
    ConfigError,
    ConfigProblem,
    DataError,
    DeitError,
    NotAllowedError,
    NotFoundError,
    NotReadableError,
    NumericsError,
    PeerError,
    StoppedBySignal,
    SystemFault,
    WorkerLost,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConfigProblem",
    "DataError",
    "DeitError",
    "NotAllowedError",
    "NotFoundError",
    "NotReadableError",
    "NumericsError",
    "PeerError",
    "StoppedBySignal",
    "SystemFault",
    "WorkerLost",
]
