"""Measure compression: train a recipe, make all of its smaller variants, and their controls."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deit.core.console import info
from deit.core.filesystem import write_json
from deit.deploy.int8_layers import METHODS
from deit.deploy.prune_options import RECOVERED

ROOT = Path(__file__).resolve().parents[1]
TEACHER, RUN, PRUNED, SHARED, QAT = "teacher", "run", "pruned", "shared", "qat"


def deit(*arguments: str) -> None:
    """Run a command in its own process. Raises CalledProcessError if it fails."""
    info(f"deit {' '.join(arguments)}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "deit", *arguments], check=True, env=environment)


def train(recipe: str, out: Path, *arguments: str) -> None:
    """Train a recipe, or resume its run. A finished run of the same configuration is kept."""
    deit("train", recipe, *arguments, "--out", str(out), "--resume")


def quantize_with(run: Path, methods: Iterable[str] = METHODS) -> dict[str, Any]:
    """Quantize a run by each method; return the results by method. The files are written where
    `deit variants` finds them, whatever the loss of accuracy."""
    results = {}
    for method in methods:
        path = run / f"quantized-{method}" / "quantization.json"
        if not path.is_file():
            deit("quantize", str(run), f"--method={method}", "--max-drop=100")
        results[method] = json.loads(path.read_text(encoding="utf-8"))
    return results


def study(
    recipe: str, seed: int, folder: Path, rest: list[str], options: argparse.Namespace
) -> Any:
    """Return the results of one seed: quantization, pruning with its controls, and variants."""
    run, pruned, shared, qat = (folder / name for name in (RUN, PRUNED, SHARED, QAT))
    arguments = [f"--teacher.source={folder.parent / TEACHER}", f"--run.seed={seed}", *rest]
    epochs = [] if options.epochs is None else [f"--optim.epochs={options.epochs}"]
    train(recipe, run, *arguments, *epochs)
    if not (run / "export-onnx").is_dir():
        deit("export", str(run), "--format=onnx")
    results = {"quantize": quantize_with(run)}
    # The controls are students of the pruned shape (docs/results/compression.md).
    deit("prune", str(run), "--ratio=0.5", "--controls=short,long", f"--out={pruned}")
    results["prune"] = json.loads((pruned / "results.json").read_text(encoding="utf-8"))
    quantize_with(pruned / RECOVERED)
    train(recipe, shared, *arguments, *epochs, "--student.shared_block_size=2")
    start = ("--from", str(run), "--schedule=int8")
    deit("finetune", *start, *arguments, "--out", str(qat), "--resume")
    quantize_with(qat, ["static"])
    merge = [] if options.merge_tokens is None else [f"--merge-tokens={options.merge_tokens}"]
    deit("variants", str(run), str(shared), str(qat), *merge, "--force")
    results["variants"] = json.loads(
        (run / "variants" / "variants.json").read_text(encoding="utf-8")
    )
    return results


def main() -> None:
    """Train, compress, measure. The same command resumes. Unknown options are fields of the
    configuration, for the teacher and all students."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "recipe", help="recipe of the students; the teacher's recipe is RECIPE-teacher"
    )
    parser.add_argument("--seeds", default="0", help="seeds of the students, with commas (0)")
    parser.add_argument("--epochs", type=int, help="epochs of the students (the recipe's)")
    parser.add_argument(
        "--merge-tokens", help="numbers of tokens to merge in each block, with commas (none)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--json", type=Path, required=True, help="write the results to this file")
    options, rest = parser.parse_known_args()
    train(f"{options.recipe}-teacher", options.out / TEACHER, *rest)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    results = {
        str(seed): study(options.recipe, seed, options.out / f"seed-{seed}", rest, options)
        for seed in seeds
    }
    command = shlex.join(["python", "scripts/compression_study.py", *sys.argv[1:]])
    write_json(options.json, {"recipe": options.recipe, "command": command, "seeds": results})
    info(f"wrote {options.json}")


if __name__ == "__main__":
    main()
