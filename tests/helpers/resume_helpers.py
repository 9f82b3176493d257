"""Stop a run on purpose in this process, and compare what it leaves behind."""

import json
import re
from pathlib import Path

import pytest

from deit.config.schema import Config
from deit.core import fault_injection, run_folder, run_log
from deit.core.errors import (
    StoppedBySignal,
)
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


def same_end(out: Path, uninterrupted_run: Path) -> None:
    """Two runs ended with the same bits in every file of tensors, and were the same at every
    checkpoint before."""
    ours, theirs = (
        sorted(run_folder.latest_checkpoint(one).glob("*.safetensors"))
        for one in (out, uninterrupted_run)
    )
    assert [file.name for file in ours] == [file.name for file in theirs]
    for one, other in zip(ours, theirs):
        assert one.read_bytes() == other.read_bytes(), one.name
    chains = [(one / run_log.HASH_CHAIN).read_bytes() for one in (out, uninterrupted_run)]
    assert chains[0] == chains[1]


EPOCHS, STEPS = 3, 4
LAST = EPOCHS * STEPS
TIMING = ("seconds", "images_per_s", "memory_mb", "loader")


def results(out: Path) -> dict:
    """What a run leaves behind, without times."""
    rows = [
        {name: value for name, value in row.items() if name not in TIMING}
        for row in run_log.read(out / run_log.METRICS)
    ]
    result = json.loads((out / run_folder.RESULT).read_text())
    return {
        "rows": rows,
        "chain": (out / run_log.HASH_CHAIN).read_bytes(),
        "result": {name: value for name, value in result.items() if name not in TIMING},
        "best": (out / "best" / "model.safetensors").read_bytes(),
        "last": {
            path.name: path.read_bytes()
            for path in run_folder.latest_checkpoint(out).glob("*.safetensors")
        },
    }


def resumes_after(step: int, out: Path, said: str) -> bool:
    """Whether a run says that it goes on after this update of all of them."""
    begins = re.escape(str(out))
    return re.search(rf"^{begins}: .*\b{step}\b.*\b{LAST}\b", said, re.MULTILINE) is not None


def rewrite_manifest(folder: Path, step: int | None = None) -> None:
    """A manifest for files that were changed."""
    from deit.core import manifest

    step = run_folder.checkpoint_step(folder) if step is None else step
    names = [path.name for path in folder.iterdir() if path.name != manifest.MANIFEST]
    manifest.write_manifest(folder, manifest.digests(folder, names), step=step)
