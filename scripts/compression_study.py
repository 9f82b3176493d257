"""What compression costs: a recipe's run, all that is made smaller of it, and the controls."""

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
TEACHER, RUN, PRUNED, SHARED, ROUNDED = "teacher", "run", "pruned", "shared", "rounded"


def deit(*words: str) -> None:
    """A command, in a process of its own. Raises CalledProcessError where it fails."""
    info(f"deit {' '.join(words)}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "deit", *words], check=True, env=environment)


def train(recipe: str, out: Path, *words: str) -> None:
    """A run of a recipe; one that is finished, and of this configuration, stays."""
    deit("train", recipe, *words, "--out", str(out), "--resume")


def quantized(run: Path, methods: Iterable[str] = METHODS) -> dict[str, Any]:
    """What each way of quantizing came to, by its name, with files that the ladder finds; whatever
    it costs stays, to be told."""
    found = {}
    for method in methods:
        told = run / f"quantized-{method}" / "quantization.json"
        if not told.is_file():
            deit("quantize", str(run), f"--method={method}", "--max-drop=100")
        found[method] = json.loads(told.read_text(encoding="utf-8"))
    return found


def study(recipe: str, seed: int, place: Path, rest: list[str], asked: argparse.Namespace) -> Any:
    """Everything of one seed: files, controls, ladder."""
    run, pruned, shared, rounded = (place / name for name in (RUN, PRUNED, SHARED, ROUNDED))
    words = [f"--teacher.source={place.parent / TEACHER}", f"--run.seed={seed}", *rest]
    whole = [] if asked.epochs is None else [f"--optim.epochs={asked.epochs}"]
    train(recipe, run, *words, *whole)
    if not (run / "export-onnx").is_dir():
        deit("export", str(run), "--format=onnx")
    found = {"quantize": quantized(run)}
    # Each of its controls is a student of the pruned shape (docs/compression.md).
    deit("prune", str(run), "--ratio=0.5", "--controls=short,long", f"--out={pruned}")
    found["prune"] = json.loads((pruned / "results.json").read_text(encoding="utf-8"))
    quantized(pruned / RECOVERED)
    train(recipe, shared, *words, *whole, "--student.shared_block_size=2")
    begun = ("--from", str(run), "--schedule=int8")
    deit("finetune", *begun, *words, "--out", str(rounded), "--resume")
    quantized(rounded, ["static"])
    merge = [] if asked.merge is None else [f"--merge-tokens={asked.merge}"]
    deit("variants", str(run), str(shared), str(rounded), *merge, "--force")
    found["variants"] = json.loads((run / "variants" / "variants.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Train, make smaller, measure; the same command goes on. What is not known here is a field of
    the configuration, of teacher and students."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="of students; its teacher's is RECIPE-teacher")
    parser.add_argument("--seeds", default="0", help="of students, with commas (0)")
    parser.add_argument("--epochs", type=int, help="of students (the recipe's)")
    parser.add_argument(
        "--merge-tokens", help="tokens that are merged in a block, with commas (none)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--json", type=Path, required=True, help="file for the numbers")
    asked, rest = parser.parse_known_args()
    train(f"{asked.recipe}-teacher", asked.out / TEACHER, *rest)
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    found = {
        str(seed): study(asked.recipe, seed, asked.out / f"seed-{seed}", rest, asked)
        for seed in seeds
    }
    command = shlex.join(["python", "scripts/compression_study.py", *sys.argv[1:]])
    write_json(asked.json, {"recipe": asked.recipe, "command": command, "seeds": found})
    info(f"wrote {asked.json}")


if __name__ == "__main__":
    main()
