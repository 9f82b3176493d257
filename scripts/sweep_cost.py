"""What a sweep saves: twelve runs that share their teacher's answers, against each by itself."""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deit.config.schema import RunConfig
from deit.core.accelerator import environment_info
from deit.core.console import info
from deit.core.filesystem import write_json
from deit.distill.build import build_accelerator

ROOT = Path(__file__).resolve().parents[1]
GRID = {"loss.temperature": [1, 3, 10], "loss.distillation_weight": [0.3, 0.5, 0.7, 0.9]}


def deit(*words: str, folder: Path) -> float:
    """Seconds of a command, in a process of its own. Raises where it fails."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "deit", *words],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return time.perf_counter() - started


def alone(name: str, common: list[str], folder: Path) -> float:
    """Seconds of the runs one after the other, each asking the teacher itself."""
    total = 0.0
    for number, values in enumerate(itertools.product(*GRID.values())):
        fields = [f"--{field}={value}" for field, value in zip(GRID, values)]
        total += deit("train", "digits", *common, *fields, f"--out={name}-{number}", folder=folder)
    return total


def together(name: str, common: list[str], folder: Path) -> float:
    """Seconds of the same as a sweep, two at a time, with evaluation and tables."""
    (folder / f"{name}.json").write_text(
        json.dumps({"recipe": "digits", "grid": GRID}), encoding="utf-8"
    )
    return deit("sweep", f"{name}.json", *common, "--parallel=2", f"--out={name}", folder=folder)


def main() -> None:
    """Print the ratio of each turn; with --json also write them, with command, machine, commit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (3)")
    parser.add_argument("--epochs", type=int, default=20, help="of each run (20)")
    options = parser.parse_args()
    pairs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        deit("train", "digits-teacher", "--out=teacher", folder=folder)
        common = ["--teacher.source=teacher", f"--optim.epochs={options.epochs}"]
        common.append("--run.linear_backend=torch")  # not chosen anew by each
        for turn in range(options.rounds):
            sides = {"runs": alone, "sweep": together}
            order = list(sides) if turn % 2 else list(reversed(sides))
            took = {side: sides[side](f"{side}-{turn}", common, folder) for side in order}
            pairs.append((took["sweep"], took["runs"]))
            info(
                f"turn {turn + 1}: sweep {took['sweep']:.1f} s, runs {took['runs']:.1f} s, ratio "
                f"{took['sweep'] / took['runs']:.2f}"
            )
    ratios = [sweep / runs for sweep, runs in pairs]
    found: dict[str, Any] = {"pairs_s": pairs, "ratio": statistics.median(ratios), "n": len(pairs)}
    info(f"ratio {found['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n = {len(pairs)})")
    if options.json is not None:
        found["command"] = " ".join(["python", "scripts/sweep_cost.py", *sys.argv[1:]])
        found["environment"] = environment_info(build_accelerator(RunConfig(device="cpu")))
        write_json(options.json, found)
        info(f"wrote {options.json}")


if __name__ == "__main__":
    main()
