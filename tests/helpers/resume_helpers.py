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
    """Start a run that a fault of deit.core.fault_injection stops."""
    fault_injection.install_faults(fault)
    try:
        with pytest.raises(StoppedBySignal) as stop:
            train(config, out, **options)
    finally:
        fault_injection.install_faults(None)
    assert stop.value.exit_code == 143


def stop_and_resume(config: Config, out: Path, fault: str) -> None:
    """Start a run that a fault stops, and resume it to its end."""
    stop_at(config, out, fault)
    train(config, out, resume=True)


def assert_same_end(out: Path, uninterrupted_run: Path) -> None:
    """Assert that two runs have the same last tensors, bit for bit, and the same state hashes."""
    files, expected = (
        sorted(run_folder.latest_checkpoint(run).glob("*.safetensors"))
        for run in (out, uninterrupted_run)
    )
    assert [file.name for file in files] == [file.name for file in expected]
    for file, expected_file in zip(files, expected):
        assert file.read_bytes() == expected_file.read_bytes(), file.name
    hashes = [(run / run_log.HASH_CHAIN).read_bytes() for run in (out, uninterrupted_run)]
    assert hashes[0] == hashes[1]


EPOCHS, STEPS = 3, 4
LAST = EPOCHS * STEPS
TIMING = ("seconds", "images_per_s", "memory_mb", "loader")


def results(out: Path) -> dict:
    """Return the results of a run without its times: metrics, hashes, weights and tensors."""
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


def resumes_after(step: int, out: Path, output: str) -> bool:
    """Return whether the output of a run reports that it resumes after this step."""
    prefix = re.escape(str(out))
    return re.search(rf"^{prefix}: .*\b{step}\b.*\b{LAST}\b", output, re.MULTILINE) is not None


def rewrite_manifest(folder: Path, step: int | None = None) -> None:
    """Write the manifest of a checkpoint again, after a change of its files."""
    from deit.core import manifest

    step = run_folder.checkpoint_step(folder) if step is None else step
    names = [path.name for path in folder.iterdir() if path.name != manifest.MANIFEST]
    manifest.write_manifest(folder, manifest.digests(folder, names), step=step)
