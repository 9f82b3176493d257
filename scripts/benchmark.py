"""Measure our speed beside a peer's in turns: `benchmark.py data`, `targets` or `train`."""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deit.config.schema import RunConfig
from deit.core.accelerator import environment_info, raise_malloc_threshold
from deit.core.console import info, table
from deit.core.errors import SystemFault
from deit.core.filesystem import check_file
from deit.core.hardware import num_cores
from deit.distill.build import build_accelerator
from scripts.benchmarks.data import BATCH, data
from scripts.benchmarks.plot import draw_benchmark
from scripts.benchmarks.targets import targets
from scripts.benchmarks.train import train

WHAT = {"data": data, "targets": targets, "train": train}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what",
        choices=tuple(WHAT),
        help="data: loaders; targets: writing and reading a teacher's answers; train: training "
        "beside timm's parts",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (7)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn (3)")
    parser.add_argument(
        "--threads", type=int, help="of each side (1; with train as many as there are cores)"
    )
    parser.add_argument("--rows", default="", metavar="TEXT", help="only those whose name holds it")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    return parser


def main() -> None:
    """Print a table; with --json also write it, with command, machine and commit; --plot draws."""
    parser = _parser()
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0 or (options.threads or 1) < 1:
        given = f"{options.rounds}, {options.seconds:g}, {options.threads}"
        parser.error(f"--rounds, --seconds, --threads {given}: should be positive")
    try:
        for name in ("json", "plot"):
            check_file(getattr(options, name), option=f"--{name}", replace=options.force)
    except SystemFault as error:
        parser.error(str(error))
    if options.plot is not None and options.plot.suffix != ".png":
        parser.error(f"--plot {options.plot}: should end in .png")
    torch.set_num_threads(options.threads or (num_cores() if options.what == "train" else 1))
    threads = torch.get_num_threads()
    raise_malloc_threshold()  # for both sides
    rows = WHAT[options.what](options.rounds, options.seconds, options.rows)
    if not rows:
        parser.error(f"--rows {options.rows!r}: no row's name holds it")
    table(
        f"images/s of {threads} thread{'s' * (threads > 1)}, median ratio of the turns (least to "
        "greatest)",
        ("what", "ours", "peer", "ratio", "range", "beside"),
        [
            (
                row["name"],
                f"{row['ours_images_per_s']:.0f}",
                f"{row['peer_images_per_s']:.0f}",
                f"{row['ratio']:.2f}",
                f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}",
                row["peer"],
            )
            for row in rows
        ],
    )
    device = "auto" if options.what == "train" else "cpu"
    facts = {
        "command": " ".join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "threads": threads,
        "batch_size": rows[0].get("batch_size", BATCH),
        "rows": rows,
        "environment": environment_info(build_accelerator(RunConfig(device=device))),
    }
    if options.json is not None:
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        info(f"wrote {options.json}")
    if options.plot is not None:
        draw_benchmark(facts, options.plot)
        info(f"drew {options.plot}")


if __name__ == "__main__":
    main()
