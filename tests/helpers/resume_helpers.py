"""A run stopped on purpose in this process, and whether it went on to the same end."""

from pathlib import Path

import pytest

from deit.config.schema import Config
from deit.core import fault_injection, run_folder, run_log
from deit.core.errors import StoppedBySignal
from deit.training.train import train


def stop_at(config: Config, out: Path, fault: str, **options: object) -> None:
    """Begin a run that a fault of deit.core.fault_injection stops."""
    fault_injection.install_faults(fault)
    try:
        with pytest.raises(StoppedBySignal) as stop:
            train(config, out, **options)
    finally:
        fault_injection.install_faults(None)
    assert stop.value.exit_code == 143


def stop_and_go_on(config: Config, out: Path, fault: str) -> None:
    """Begin a run that a fault stops, and go on with it."""
    stop_at(config, out, fault)
    train(config, out, resume=True)


def same_end(out: Path, straight: Path) -> None:
    """Two runs ended with the same bits in every file of tensors, and were the same at every
    checkpoint before."""
    ours, theirs = (
        sorted(run_folder.latest_checkpoint(one).glob("*.safetensors")) for one in (out, straight)
    )
    assert [file.name for file in ours] == [file.name for file in theirs]
    for one, other in zip(ours, theirs):
        assert one.read_bytes() == other.read_bytes(), one.name
    chains = [(one / run_log.HASH_CHAIN).read_bytes() for one in (out, straight)]
    assert chains[0] == chains[1]
