"""Write the tables and plots of README.md and docs/ from the JSON files in docs/results/."""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deit.core.console import count_noun
from deit.experiments.lottery_tables import lottery_table
from deit.experiments.sweep_plots import finished_rows, ticket_curve
from deit.experiments.sweep_tables import cells, class_by_class, columns, disagreement_table
from deit.viz.charts import chart
from deit.viz.plots import draw_comparison
from deit.viz.tables import HEADS, markdown_table, mean_std
from scripts.benchmarks.plot import draw_benchmark
from scripts.compression_tables import compression_summary, compression_table, draw_compression
from scripts.landscape_tables import draw_landscape, draw_seeds, landscape_tables, seeds_tables

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "digits-few-labels": "Digits: 65 of 1295 training images have labels (the quickstart)",
    "digits": "Digits: mixup and cutmix, soft distillation",
    "digits-strong-views": "Digits: strong views (15 degrees, quarter-width shifts), soft labels",
    "digits-deit": "Digits: DeiT's whole augmentation (RandAugment, erasing, mixing, 3 repeats)",
    "digits-view-modes": "Digits: view modes (KL divergence only, temperature 3) and other losses",
    "digits-ensemble": "Digits: a ConvNet and an involution network as teachers, both and single",
    "digits-finetune": "Digits: fine-tuning from 8 to 16 px, 20 epochs, three teachers and none",
    "cifar10-view-modes": "CIFAR-10 (JPEG 75), a tenth of the images, 10 epochs: view modes",
    "cifar10-ensemble": "CIFAR-10 (JPEG 75), a tenth of the images, 10 epochs: two teachers",
    "cifar10-finetune": "CIFAR-10 (JPEG 75), a tenth of the images: from 32 to 48 px in 6 epochs",
    "tiny-imagenet-micro": "Tiny-ImageNet, 50 classes: the full recipe, 8 epochs on a CPU",
    "cifar10-micro": "CIFAR-10 (JPEG 75): RegNetY-200MF (12 epochs) into a micro DeiT (8 epochs)",
}
SWEEPS = {
    "digits-table-3": "Digits: ways of distilling (Table 3)",
    "digits-table-2": "Digits: different teachers (Table 2)",
    "digits-table-4": "Digits: disagreement between models (Table 4)",
    "digits-table-8": "Digits: ablation of DeiT's training (Table 8)",
    "digits-epochs": "Digits: 15 to 120 epochs, with the teacher and without",
    "digits-view-modes-sweep": "Digits: every view mode of teacher and student",
    "cifar10-table-3": "CIFAR-10 (JPEG 75), a fifth of the images, 8 epochs: ways of distilling",
    "tiny-imagenet-table-3": "Tiny-ImageNet, 20 classes, 8 epochs: ways of distilling (Table 3)",
    "digits-held-out": "Digits: classes 6, 7, 8 and 9 unseen (temperature, weight, learning rate)",
}
FIRST_TABLE = "digits-few-labels"
"""The result that README.md shows."""
PLOTTED_SWEEPS = ("digits-epochs",)
TICKETS = {"digits-tickets": "Digits: lottery tickets and their controls"}
COMPRESSION = {
    "digits-compression": "Digits: one student and its smaller variants",
    "cifar10-compression": "CIFAR-10 (JPEG 75), three tenths of the images, 10 epochs: the same",
}
LANDSCAPES = {"digits-landscape": "Digits: the loss around the levels of a lottery search, seed 0"}
SEEDS = {
    "digits-landscape-seeds": (
        "Digits: the loss around the levels of lottery searches, seeds 0, 1, 2",
        ("digits-landscape", "digits-landscape-1", "digits-landscape-2"),
    )
}
"""Landscapes of several seeds in one table."""
BENCHMARKS = ("benchmark-data", "benchmark-targets", "benchmark-train")


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    """Return a row of a comparison: name, top-1 % by head, agreement with the teacher, seconds."""
    shares = [[top1[head] for top1 in row["top1"]] for head in HEADS] + [row["agreement"]]
    return [
        name,
        *(mean_std(values, scale=100) for values in shares),
        mean_std(row["seconds"], digits=0),
    ]


COLUMNS = ("", "class head", "distillation head", "fused", "agreement with teacher %", "seconds")


def section(name: str, result: dict) -> str:
    """Return a comparison as Markdown: title, table, and how it was measured."""
    seeds = result["seeds"]
    environment = result["environment"]
    spread = f"mean +- standard deviation of seeds {', '.join(map(str, seeds))}"
    seeds_text = spread if len(seeds) > 1 else f"seed {seeds[0]}"
    threads = environment["threads"]
    rows = [_cells(row, values) for row, values in result["rows"].items()]
    return (
        f"### {TITLES[name]}\n\n{markdown_table(COLUMNS, rows)}\n\n"
        f"Test top-1 in %, {result['num_samples']} images, {seeds_text}; "
        f"{environment['device_name']}, {environment['precision']}, "
        f"{count_noun(threads, 'thread')}, torch {environment['packages']['torch']}, "
        f"commit {environment['commit']}. {_link(name)}\n\n"
        f"{_command_text(name, result['command'])}\n"
    )


def _link(*names: str) -> str:
    """Return links to files of docs/results/, as on a page of docs/."""
    return ", ".join(f"[{name}.json](results/{name}.json)" for name in names)


def _command_text(name: str, command: str, *extra: str) -> str:
    """Return the command of a result with general paths for its outputs and images.

    A command with its own teacher is not shown. extra: arguments to append.
    """
    if "--teacher.source" in command:
        return f"(The command uses a separately trained teacher: see {name}.json.)"
    arguments = shlex.split(command)
    for option in ("--out", "--json"):
        if option in arguments:
            index = arguments.index(option)
            del arguments[index : index + 2]
    # An absolute path exists on the machine of the measurement only.
    arguments = ["DIR" if argument.startswith("/") else argument for argument in arguments]
    arguments = ["@FILE" if argument.startswith("@/") else argument for argument in arguments]
    # checkpoints/NAME is the folder of the recipe's own run, so a comparison has another one.
    out = f"checkpoints/{'compare-' if arguments[1] == 'compare' else ''}{name}"
    return f"`{shlex.join([*arguments, '--out', out, *extra])}`"


def benchmark_section(name: str, result: dict) -> str:
    """Return a benchmark as Markdown."""
    environment = result["environment"]
    if result["rounds"] < 5 or environment["commit"].endswith("-dirty"):
        raise ValueError(f"{name}.json: a claim needs 5 rounds and a committed state")
    rows = [
        (
            row["name"].partition(", compared with ")[0],
            f"{row['ours_images_per_s']:,.0f}",
            f"{row['peer_images_per_s']:,.0f}",
            f"**{row['ratio']:.2f}** ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
            row["peer"],
        )
        for row in result["rows"]
    ]
    threads = {1: "one thread", 2: "two threads"}[result.get("threads", 1)]
    columns = (f"images/s, {threads} each", "deit", "baseline", "ratio (range)", "baseline is")
    return (
        f"{markdown_table(columns, rows)}\n\n{_training_details(result['rows'])}"
        f"Medians (also of the ratios) of {result['rounds']} alternating turns of "
        f"{result['seconds']:g} s, batches of {result['batch_size']}, views normalized on both "
        f"sides; {environment['device_name']}, "
        f"torch {environment['packages']['torch']}, commit {environment['commit']}. "
        f"{_link(name)}\n\n"
        f"`{_regenerating_command(name, result['command'])}`\n"
    )


def _training_details(rows: list[dict]) -> str:
    """Return startup time, memory and utilization of training benchmarks; "" for others."""
    whole = [row for row in rows if "ours_memory_mb" in row]
    if not whole:
        return ""
    columns = ["deit, baseline", "s to the first step", "memory [MB]", "share of peak"]
    keys = [("first_step_s", ".1f"), ("memory_mb", ",.0f")]
    cells = [
        (
            row["name"],
            *(
                f"{row[f'ours_{key}']:{number_format}}, {row[f'peer_{key}']:{number_format}}"
                for key, number_format in keys
            ),
            f"{100 * row['share_of_peak']:.0f} %",
        )
        for row in whole
    ]
    row = whole[0]
    deit_loss, timm_loss = row["losses_of_first_step"]
    limit = ""
    if "floor_images_per_s" in row:
        limit = (
            f"Arithmetic and memory traffic ({1e3 * row['gb_of_an_image']:.0f} MB an image, "
            f"{row['copy_gb_s']:.0f} GB/s) limit this machine to "
            f"{row['floor_images_per_s']:,.0f} images/s. "
        )
    return (
        f"{markdown_table(columns, cells)}\n\n"
        f"Loss of the first step: {deit_loss:.5f} and {timm_loss:.5f}. Share of peak: the "
        f"student's arithmetic ({row['gflop_of_an_image']:.2f} GFLOP an image, forward and "
        f"backward) at the speed of deit, as a share of the speed of matrix products on this "
        f"machine ({row['peak_gflop_s']:,.0f} GFLOP/s). {limit}"
    )


def _regenerating_command(name: str, command: str) -> str:
    """Return the command of a benchmark that overwrites its file in docs/results/."""
    arguments = [argument for argument in shlex.split(command) if argument != "--force"]
    if "--json" in arguments:
        arguments[arguments.index("--json") + 1] = f"docs/results/{name}.json"
        arguments.append("--force")
    return shlex.join(arguments)


def sweep_section(name: str, result: dict) -> str:
    """Return a sweep as Markdown: title, tables, and how it was measured."""
    environment = result["environment"]
    table = [[cell or " " for cell in row] for row in cells(result)]
    few = (
        disagreement_table(result) if len(result["disagreement"]) <= _MAX_DISAGREEMENT_ROWS else ""
    )
    seeds = ", ".join(map(str, result["seeds"]))
    return (
        f"### {(SWEEPS | TICKETS)[name]}\n\n"
        f"{markdown_table(columns(result), table)}\n\n{_classes(result)}{few}"
        f"{lottery_table(result)}"
        f"Test top-1 in %, {result['num_samples']} images, seeds {seeds}, gains over the first "
        f"point; {environment['device_name']}, torch {environment['packages']['torch']}, commit "
        f"{environment['commit']}. {_link(name)}\n\n{_command_text(name, result['command'])}\n"
    )


def compression_section(name: str, result: dict) -> str:
    """Return a compression study as Markdown."""
    variants = next(iter(result["seeds"].values()))["variants"]
    environment = variants["environment"]
    threads = environment["threads"]
    return (
        f"### {COMPRESSION[name]}\n\n"
        f"{compression_table(result)}\n\n{compression_summary(result)}\n\n"
        f"Test top-1 in %, {variants['num_samples']} images, seeds {', '.join(result['seeds'])}; "
        f"times: medians of turns, {count_noun(threads, 'thread')}, "
        f"{environment['device_name']}, torch {environment['packages']['torch']}, commit "
        f"{environment['commit']}. {_link(name)}\n\n"
        f"{_command_text(name, result['command'], '--json', f'docs/results/{name}.json')}\n"
    )


def landscape_section(name: str, result: dict) -> str:
    """Return a loss landscape as Markdown: points, lines, and how it was measured."""
    environment = result["environment"]
    return (
        f"### {LANDSCAPES[name]}\n\n"
        f"{landscape_tables(result)}\n\n"
        f"Cross-entropy of the fused logits, {result['images']} {result['options']['split']} "
        f"images; {environment['device_name']}, torch {environment['packages']['torch']}, commit "
        f"{environment['commit']}. {_link(name)}\n\n{_command_text(name, result['command'])}\n"
    )


def seeds_section(name: str) -> str:
    """Return the landscapes of several seeds as Markdown."""
    title, files = SEEDS[name]
    results = load(files)
    first, *others = [result["options"] for result in results.values()]
    options = [
        f"`--run-seed {request['run_seed']} --measure {','.join(request['measure'])}`"
        for request in others
    ]
    return (
        f"### {title}\n\n{seeds_tables(list(results.values()))}\n\nMean +- standard "
        f"deviation over the seeds; {first['images']} {first['split']} images. The command is that "
        f"of the table above, with {' and '.join(options)} for the other seeds. {_link(*files)}\n"
    )


_MAX_DISAGREEMENT_ROWS = 8


def _classes(result: dict) -> str:
    """Return the accuracy by class of a sweep with held-out classes, with the published baseline.

    For each distillation weight, the row is the point with the best accuracy on unseen classes.
    """
    rows = {
        name: row
        for name, row in result["rows"].items()
        if row["values"] and row.get("classes") and row["classes"][0]["held_out"]
    }
    if not rows:
        return ""

    def unseen_accuracy(name: str) -> float:
        return statistics.mean(run["unseen"] for run in rows[name]["classes"])

    weight = {name: row["values"]["loss.distillation_weight"] for name, row in rows.items()}
    best = [
        max((name for name in rows if weight[name] == value), key=unseen_accuracy)
        for value in dict.fromkeys(weight.values())
    ]
    table = class_by_class(result, best).rstrip("\n")
    baseline = "| AditMeh/Distillation, dense, MNIST, T 10 | " + " | ".join(
        ["-"] * 6 + ["98.6", "96.0", "97.3", "97.2"]
    )
    return (
        f"{table}\n{baseline} |\n\nFor each weight, the point that is best on the unseen classes "
        "of the test split: an upper bound, because a validation split without these classes "
        "cannot select it.\n\n"
    )


def renew_sections(page: str, texts: dict[str, str]) -> str:
    """Return a page with its marked sections replaced, by name. Raises ValueError if a mark is
    missing."""
    for name, text in texts.items():
        start_mark, end_mark = (
            f"<!-- {name}: written by scripts/results.py -->",
            f"<!-- end of {name} -->",
        )
        before, remainder = page.split(start_mark)
        _, after = remainder.split(end_mark)
        page = f"{before}{start_mark}\n\n{text}\n{end_mark}{after}"
    return page


def load(names: Iterable[str]) -> dict[str, dict]:
    """Return the content of files in docs/results/ by name."""
    folder = ROOT / "docs" / "results"
    return {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names
    }


def pages() -> dict[Path, dict[str, str]]:
    """Return the generated sections of each page, by the name of their marks."""
    results = {name: section(name, result) for name, result in load(TITLES).items()}
    sweeps = {name: sweep_section(name, result) for name, result in load(SWEEPS).items()}
    accuracy = {"results": "\n".join(results.values()), "sweeps": "\n".join(sweeps.values())}
    accuracy |= {name: benchmark_section(name, result) for name, result in load(BENCHMARKS).items()}
    smaller = {name: sweep_section(name, result) for name, result in load(TICKETS).items()}
    smaller |= {name: compression_section(name, r) for name, r in load(COMPRESSION).items()}
    smaller |= {name: landscape_section(name, r) for name, r in load(LANDSCAPES).items()}
    smaller |= {name: seeds_section(name) for name in SEEDS}
    docs = ROOT / "docs"
    return {
        ROOT / "README.md": {"results": _linked(results[FIRST_TABLE], "docs/results/")},
        docs / "results.md": accuracy,
        docs / "results" / "compression.md": {
            name: _linked(text, "") for name, text in smaller.items()
        },
    }


def _linked(text: str, folder: str) -> str:
    """Return a section with its links for a page from which docs/results/ is `folder`."""
    return text.replace("](results/", f"]({folder}")


def draw_images() -> None:
    """Draw the plot of each result."""
    folder = ROOT / "docs" / "images"
    for name, result in load(TITLES).items():
        draw_comparison(result, folder / f"{name}.png")
    for name, result in load(PLOTTED_SWEEPS).items():
        draw_comparison(finished_rows(result), folder / f"{name}.png")
    for name, result in load(TICKETS).items():
        chart(ticket_curve(result), folder / f"{name}.png")
    for name, result in load(COMPRESSION).items():
        draw_compression(result, folder / f"{name}.png")
    for name, result in load(LANDSCAPES).items():
        draw_landscape(result, folder / f"{name}.png")
    for name, (_, files) in SEEDS.items():
        draw_seeds(list(load(files).values()), folder / f"{name}.png")
    for name, result in load(BENCHMARKS).items():
        draw_benchmark(result, folder / f"{name}.png")


def main() -> None:
    """Write the pages and one plot for each result; `--check` only compares the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a page is not up to date")
    check = parser.parse_args().check
    new = {
        path: renew_sections(path.read_text(encoding="utf-8"), texts)
        for path, texts in pages().items()
    }
    if check:
        sys.exit(any(text != path.read_text(encoding="utf-8") for path, text in new.items()))
    for path, text in new.items():
        path.write_text(text, encoding="utf-8")
    draw_images()


if __name__ == "__main__":
    main()
