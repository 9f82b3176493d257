"""Run programs in processes of their own, and wait for what they do."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SETTINGS = (
    *("--student.depth", "1", "--student.embed_dim", "16", "--student.num_heads", "2"),
    *("--views.mixup_alpha", "0.8", "--views.cutmix_alpha", "1", "--optim.batch_size", "64"),
    *("--optim.epochs", "2", "--optim.warmup_epochs", "1", "--run.eval_every_epochs", "1"),
    *("--data.train_fraction", "0.25"),  # 324 images, five batches
    # 143 validation images: two chunks in the first of two processes, one in the second.
    *("--run.eval_batch_size", "71"),
    # The same kernels on every processor.
    *("--run.linear_backend", "torch", "--teacher.memory_format", "contiguous"),
)


def output_of(command_server, num_processes, script, *arguments, cwd):
    """Return the standard output of a script that runs in processes with torchrun's environment."""
    ends = command_server.run_processes(
        *arguments, processes=num_processes, script=str(script), cwd=cwd
    )
    assert [end.code for end in ends] == [0] * num_processes, "".join(end.err for end in ends)
    return "".join(end.out for end in ends)


def fake_datasets_package(site: Path) -> str:
    """Write a package `datasets` that prints when it is imported, in place of Hugging Face's.

    Returns the folder to put on the path.
    """
    package, metadata = site / "datasets", site / "datasets-9.9.9.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").write_text(
        "print('stand-in imported')\nclass Dataset: pass\nclass IterableDataset: pass\n"
    )
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 9.9.9\n")
    return str(site)


STUCK_TEACHER = """
import ctypes
from torch import nn

class Stuck(nn.Module):
    def forward(self, images):
        lock = ctypes.create_string_buffer(256)
        system = ctypes.CDLL(None)
        print("stuck", flush=True)
        for _ in range(2):
            system.pthread_mutex_lock(lock)

def teacher():
    return Stuck()
"""


def wait_until(condition: Callable[[], object], *, timeout: float = 300) -> None:
    """Wait until a condition holds that another process brings about; fail after `timeout` [s]."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"the condition does not hold after {timeout} s"
        time.sleep(0.02)


ROOT = Path(__file__).parents[2]


class Completed(NamedTuple):
    """The end of a command. code: its exit code, or minus the signal that killed it."""

    code: int
    out: str
    err: str


def last_json(text: str) -> Any:
    """Return the last line that is a JSON object; libraries may print other lines."""
    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])


def run_python(source: str, *arguments: object, path: Path | None = None) -> Completed:
    """Run a Python program in a new interpreter. path: a further folder to import from."""
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *([path] if path else ())))),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Completed(done.returncode, done.stdout, done.stderr)
