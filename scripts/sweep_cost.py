"""Compare the time of a sweep, whose runs share stored targets, with that of separate runs."""

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

from deit.config.sections.run import RunConfig
from deit.core.accelerator import environment_info
from deit.core.console import info
from deit.core.filesystem import write_json
from deit.distill.build import build_accelerator

ROOT = Path(__file__).resolve().parents[1]
GRID = {"loss.temperature": [1, 3, 10], "loss.distillation_weight": [0.3, 0.5, 0.7, 0.9]}


def deit(*arguments: str, folder: Path) -> float:
    """Run a command in its own process and return its seconds. Raises CalledProcessError."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "deit", *arguments],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return time.perf_counter() - started


def separate_runs(name: str, common: list[str], folder: Path) -> float:
    """Return the seconds of the runs one after another, each with a live teacher."""
    total = 0.0
    for index, values in enumerate(itertools.product(*GRID.values())):
        fields = [f"--{field}={value}" for field, value in zip(GRID, values)]
        total += deit("train", "digits", *common, *fields, f"--out={name}-{index}", folder=folder)
    return total


def one_sweep(name: str, common: list[str], folder: Path) -> float:
    """Return the seconds of the same runs as a sweep, two in parallel, with evaluation."""
    (folder / f"{name}.json").write_text(
        json.dumps({"recipe": "digits", "grid": GRID}), encoding="utf-8"
    )
    return deit("sweep", f"{name}.json", *common, "--parallel=2", f"--out={name}", folder=folder)


def main() -> None:
    """Print the ratio of each turn. --json writes them with command, machine and commit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each run (default: 20)")
    options = parser.parse_args()
    pairs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        deit("train", "digits-teacher", "--out=teacher", folder=folder)
        common = ["--teacher.source=teacher", f"--optim.epochs={options.epochs}"]
        common.append("--run.linear_backend=torch")  # the same for all runs
        for turn in range(options.rounds):
            sides = {"runs": separate_runs, "sweep": one_sweep}
            order = list(sides) if turn % 2 else list(reversed(sides))
            seconds = {side: sides[side](f"{side}-{turn}", common, folder) for side in order}
            pairs.append((seconds["sweep"], seconds["runs"]))
            info(
                f"turn {turn + 1}: sweep {seconds['sweep']:.1f} s, runs {seconds['runs']:.1f} s, "
                f"ratio {seconds['sweep'] / seconds['runs']:.2f}"
            )
    ratios = [sweep / runs for sweep, runs in pairs]
    results: dict[str, Any] = {
        "pairs_s": pairs,
        "ratio": statistics.median(ratios),
        "n": len(pairs),
    }
    info(f"ratio {results['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n = {len(pairs)})")
    if options.json is not None:
        results["command"] = " ".join(["python", "scripts/sweep_cost.py", *sys.argv[1:]])
        results["environment"] = environment_info(build_accelerator(RunConfig(device="cpu")))
        write_json(options.json, results)
        info(f"wrote {options.json}")


if __name__ == "__main__":
    main()
