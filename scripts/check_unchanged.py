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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from deit.core.console import info  # noqa: E402
from deit.datasets.splits import load_splits  # noqa: E402
from deit.deploy.export import split_normalization  # noqa: E402
from deit.deploy.formats import FORMATS  # noqa: E402
from deit.evaluation.load_run import load_run_config  # noqa: E402
from deit.models.saved import load_student  # noqa: E402

_EXACT = ("--run.device", "cpu", "--run.linear_backend", "torch")
_TWO_EPOCHS = ("--optim.epochs", "2", "--optim.warmup_epochs", "1", *_EXACT)
_TAUGHT = (
    "--teacher.source",
    "teacher",
    "--teacher.memory_format",
    "contiguous",
    "--teacher.allow_near_chance",
)


def main() -> None:
    """Record, and compare with a record where one is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="the record of the version before"
    )
    options = parser.parse_args()
    before = None if options.against is None else json.loads(options.against.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, digest in found["digests"].items():
        info(f"{digest[:16]}  {name}")
    if before is not None:
        compare(before["digests"], found["digests"])


def record(place: Path) -> dict[str, Any]:
    """Compute all there is to record, in a folder."""
    deit(place, "train", "digits-teacher", *_TWO_EPOCHS, "--out", "teacher")
    train = ("train", "digits", *_TWO_EPOCHS, *_TAUGHT, "--run.save_every_steps", "2")
    deit(place, *train, "--out", "straight")
    deit(place, *train, "--out", "killed", fault="update:5:kill")
    deit(place, *train, "--out", "killed", "--resume")
    words = ("targets", "write", "digits", *_TWO_EPOCHS, *_TAUGHT, "--loss", "deit-hard")
    deit(place, *words, "--content", "hard", "--out", "store")
    found: dict[str, str] = {}
    for run in ("straight", "killed"):
        for weights in sorted((place / run).rglob("*.safetensors")):
            found[f"{run}: {weights.relative_to(place / run)}"] = digest_of(weights)
        found[f"{run}: hash chain"] = digest_of(place / run / "state_hashes.jsonl")
    for file in sorted((place / "store").rglob("*.bin")):
        found[f"store: {file.relative_to(place / 'store')}"] = digest_of(file)
    found |= exports(place)
    words = ("sweep", "table-8", *_EXACT, "--optim.epochs", "1", "--out", "table-8")
    deit(place, *words)
    rows = json.loads((place / "table-8" / "results.json").read_bytes())["rows"]
    for name, row in rows.items():
        accuracies = json.dumps([row[key] for key in ("top1", "agreement", "validation")])
        found[f"table 8: {name}"] = hashlib.sha256(accuracies.encode()).hexdigest()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "digests": found,
    }


def exports(place: Path) -> dict[str, str]:
    """The digests of what the straight run's exports compute, by format, package and output."""
    found = {}
    student, _ = load_student(place / "straight" / "best")
    _, normalize = split_normalization(student)
    images = load_splits(load_run_config(place / "straight").data).test.pixels
    inputs = normalize(images.float() / 255)
    for name, form in FORMATS.items():
        folder = place / f"export-{name}"
        deit(place, "export", "straight", "--format", name, "--out", folder.name)
        for package, load in form.load.items():
            torch.set_num_threads(1)
            for output, logits in load(folder)(inputs).items():
                digest = hashlib.sha256(logits.detach().numpy().tobytes()).hexdigest()
                found[f"{name} by {package}: {output}"] = digest
    return found


def deit(place: Path, *words: str, fault: str | None = None) -> None:
    """Run a command in a folder; killed by itself at a fault."""
    info(f"$ deit {' '.join(words)}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if fault is not None:
        environment["DEIT_FAULT"] = fault
    command = [sys.executable, "-m", "deit", *words]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode != (0 if fault is None else -signal.SIGKILL):
        raise SystemExit(f"{done.stdout}{done.stderr}\nexit code {done.returncode}")


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def compare(before: dict[str, str], after: dict[str, str]) -> None:
    """Exit with 1 and the names of what differs."""
    names = before | after
    differing = [name for name in names if before.get(name) != after.get(name)]
    if differing:
        raise SystemExit("\n".join(["different:", *differing]))
    info(f"unchanged: all {len(names)}")


if __name__ == "__main__":
    main()
