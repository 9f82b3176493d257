"""Record what this version of the project computes, or compare it with another version's record.

For changes that must not change any result, such as renaming. Run it in a checkout of the version
before with --out, and in the version after with --against, on the same machine:

    python scripts/check_unchanged.py --out before.json
    python scripts/check_unchanged.py --against before.json

The record holds SHA-256 digests of: the weights of `digits` after 2 epochs (seed 0) and the hash
chain of its states; the same of a run that is killed after its fifth step and resumed; the bytes
of a store of hard targets; the logits of the four exports on all test images; and the accuracies in
the table of `sweep table-8` at 1 epoch.
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deit.core.console import info
from deit.datasets.splits import load_splits
from deit.deploy.export import split_normalization
from deit.deploy.export_formats import FORMATS
from deit.evaluation.load_run import load_run_config
from deit.models.saved_student import load_student

ROOT = Path(__file__).resolve().parents[1]
_EXACT = ("--run.device", "cpu", "--run.linear_backend", "torch")
_TWO_EPOCHS = ("--optim.epochs", "2", "--optim.warmup_epochs", "1", *_EXACT)
_TEACHER = (
    "--teacher.source",
    "teacher",
    "--teacher.memory_format",
    "contiguous",
    "--teacher.allow_near_chance",
)


def main() -> None:
    """Compute and write the record; with --against compare it with another record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record to this file")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="compare with the record in this file"
    )
    options = parser.parse_args()
    before = None if options.against is None else json.loads(options.against.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        after = record(Path(folder))
    if options.out is not None:
        options.out.write_text(json.dumps(after, indent=1) + "\n", encoding="utf-8")
    for name, digest in after["digests"].items():
        info(f"{digest[:16]}  {name}")
    if before is not None:
        compare(before["digests"], after["digests"])


def record(folder: Path) -> dict[str, Any]:
    """Return the record. Runs are written into the folder."""
    deit(folder, "train", "digits-teacher", *_TWO_EPOCHS, "--out", "teacher")
    train = ("train", "digits", *_TWO_EPOCHS, *_TEACHER, "--run.save_every_steps", "2")
    deit(folder, *train, "--out", "straight")
    deit(folder, *train, "--out", "killed", fault="step:5:kill")
    deit(folder, *train, "--out", "killed", "--resume")
    arguments = ("targets", "write", "digits", *_TWO_EPOCHS, *_TEACHER, "--loss", "deit-hard")
    deit(folder, *arguments, "--content", "hard", "--out", "store")
    digests: dict[str, str] = {}
    for run in ("straight", "killed"):
        for weights in sorted((folder / run).rglob("*.safetensors")):
            digests[f"{run}: {weights.relative_to(folder / run)}"] = digest_of(weights)
        digests[f"{run}: hash chain"] = digest_of(folder / run / "state_hashes.jsonl")
    for file in sorted((folder / "store").rglob("*.bin")):
        digests[f"store: {file.relative_to(folder / 'store')}"] = digest_of(file)
    digests |= exports(folder)
    arguments = ("sweep", "table-8", *_EXACT, "--optim.epochs", "1", "--out", "table-8")
    deit(folder, *arguments)
    rows = json.loads((folder / "table-8" / "results.json").read_bytes())["rows"]
    for name, row in rows.items():
        accuracies = json.dumps([row[key] for key in ("top1", "agreement", "validation")])
        digests[f"table 8: {name}"] = hashlib.sha256(accuracies.encode()).hexdigest()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "digests": digests,
    }


def exports(folder: Path) -> dict[str, str]:
    """Return digests of the logits of the run's exports, by format, package and output."""
    digests = {}
    student, _ = load_student(folder / "straight" / "best")
    _, normalize = split_normalization(student)
    images = load_splits(load_run_config(folder / "straight").data).test.pixels
    inputs = normalize(images.float() / 255)
    for name, export_format in FORMATS.items():
        exported = folder / f"export-{name}"
        deit(folder, "export", "straight", "--format", name, "--out", exported.name)
        for package, load in export_format.load.items():
            torch.set_num_threads(1)
            for output, logits in load(exported)(inputs).items():
                digest = hashlib.sha256(logits.detach().numpy().tobytes()).hexdigest()
                digests[f"{name} by {package}: {output}"] = digest
    return digests


def deit(folder: Path, *arguments: str, fault: str | None = None) -> None:
    """Run a command in a folder. With a fault it has to be killed by that fault."""
    info(f"$ deit {' '.join(arguments)}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if fault is not None:
        environment["DEIT_FAULT"] = fault
    command = [sys.executable, "-m", "deit", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != (0 if fault is None else -signal.SIGKILL):
        raise SystemExit(f"{done.stdout}{done.stderr}\nexit code {done.returncode}")


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def compare(before: dict[str, str], after: dict[str, str]) -> None:
    """Exit with code 1 and the names of the digests that differ, if any."""
    names = before | after
    differing = [name for name in names if before.get(name) != after.get(name)]
    if differing:
        raise SystemExit("\n".join(["different:", *differing]))
    info(f"unchanged: all {len(names)}")


if __name__ == "__main__":
    main()
