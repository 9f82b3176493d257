"""Compare the speed of deit with a baseline: `benchmark.py data`, `targets` or `train`."""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deit.cli.option_names import with_option
from deit.config.sections.run import RunConfig
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

BENCHMARKS = {"data": data, "targets": targets, "train": train}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what",
        choices=tuple(BENCHMARKS),
        help="data: loaders; targets: writing and reading stored targets; train: training, "
        "compared with timm",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the rows to this file")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="length of a turn in seconds (default: 3)"
    )
    parser.add_argument(
        "--threads", type=int, help="threads of each side (default: 1; for train all cores)"
    )
    parser.add_argument(
        "--rows", default="", metavar="TEXT", help="measure only rows whose name contains TEXT"
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    return parser


def main() -> None:
    """Print a table. --json writes it with command, machine and commit; --plot plots it."""
    parser = _parser()
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0 or (options.threads or 1) < 1:
        values = f"{options.rounds}, {options.seconds:g}, {options.threads}"
        parser.error(f"--rounds, --seconds, --threads {values}: should be positive")
    try:
        for name in ("json", "plot"):
            check_file(getattr(options, name), name=name, replace=options.force)
    except SystemFault as error:
        parser.error(with_option(str(error)))
    if options.plot is not None and options.plot.suffix != ".png":
        parser.error(f"--plot {options.plot}: should end in .png")
    torch.set_num_threads(options.threads or (num_cores() if options.what == "train" else 1))
    threads = torch.get_num_threads()
    raise_malloc_threshold()  # for both sides
    rows = BENCHMARKS[options.what](options.rounds, options.seconds, options.rows)
    if not rows:
        parser.error(f"--rows {options.rows!r}: no row has a name that contains it")
    table(
        f"images/s with {threads} thread{'s' * (threads > 1)}, median ratio of the turns (minimum "
        "to maximum)",
        ("row", "deit", "baseline", "ratio", "range", "baseline is"),
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
    result = {
        "command": " ".join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "threads": threads,
        "batch_size": rows[0].get("batch_size", BATCH),
        "rows": rows,
        "environment": environment_info(build_accelerator(RunConfig(device=device))),
    }
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        info(f"wrote {options.json}")
    if options.plot is not None:
        draw_benchmark(result, options.plot)
        info(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
