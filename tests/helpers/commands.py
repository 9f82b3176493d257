"""Run commands as a user does, and check how they are refused."""

import re
import subprocess
from pathlib import Path

import torch

from deit.config.sections.student import StudentConfig
from deit.models.saved_student import ModelInfo, student_from_info, write_student
from tests.helpers.command_server import shared_server

TEN = tuple("0123456789")


ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}


def run_in(folder: Path, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a root script or `deit` in a folder, with no GPU visible, by the command server."""
    script = None if program == "deit" else program
    done = shared_server().run(*arguments, cwd=folder, script=script, **ENVIRONMENT)
    return subprocess.CompletedProcess([program, *arguments], done.code, done.out, done.err)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return the contents of a folder by relative path: the bytes of a file, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *fragments: str) -> None:
    """Assert an exit code and one error message that contains `fragments`, without a traceback.

    Only the first line of the message is not indented.
    """
    assert done.returncode == code, done.stdout + done.stderr
    first, *more = done.stderr.splitlines()
    assert first.startswith("deit: error: "), done.stderr
    assert all(line.startswith("  ") for line in more), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


def fake_teacher(folder: Path, class_names: tuple[str, ...]) -> Path:
    """Save a small_convnet that predicts the first class for every image."""
    student = StudentConfig(name="small_convnet", image_size=8)
    info = ModelInfo(student, class_names, (0.5,) * 3, (0.5,) * 3, 1.0)
    weights = student_from_info(info).network.state_dict()
    folder.mkdir(parents=True)
    write_student(folder, {name: torch.zeros_like(value) for name, value in weights.items()}, info)
    return folder


def runs_over(text: str) -> list[tuple[int, int]]:
    """Return (finished runs, all runs) for each line that reports them with an ETA."""
    counts = re.findall(r"(\d+)[^\d\n|]+(\d+)[^\d\n|]+ETA", text)
    return [(int(finished), int(total)) for finished, total in counts]


# A run of seconds: two steps on a fifth of the training digits.
QUICK = (
    *("--optim.epochs=1", "--optim.warmup_epochs=0", "--optim.batch_size=128"),
    "--data.train_fraction=0.2",
)
SMALL = ("--student.embed_dim=16", "--student.depth=1", "--student.num_heads=2")

COMMANDS_WITH_CONFIG = {
    "train": ("", ""),
    "finetune": ("from resolution schedule", ""),
    "compare": ("study arms seeds parallel retries", "resume"),
    "sweep": ("recipe seeds parallel retries top", "resume"),
    "prune": (
        "ratio heads hidden macs scope criterion images checkpoint schedule controls parallel",
        "resume",
    ),
    "lottery": (
        "rounds prune-rate scope rewind-epoch controls control-rounds tolerance seeds parallel "
        "retries",
        "resume",
    ),
    "show-views": ("out force epoch num-views", "resume dry-run print-config"),
    "targets write": ("out epochs content part teacher-index", "resume dry-run"),
    "profile": ("steps trace json force", "out resume dry-run print-config"),
}
"""Each command that takes a configuration: its own options, and shared options it does not take."""
