"""A run as parts of a page: numbers, curves, classes, calibration, tokens, its card."""

import csv
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deit.config.schema import Config
from deit.core.console import format_duration, format_percent
from deit.core.run_folder import RecordedEnvironment
from deit.distill.losses import teacher_weight_ramp
from deit.evaluation.cache import CachedEvaluation
from deit.training.optimizer import ema_decay
from deit.viz import charts, html

_HEADS = ("class", "distillation", "fused", "teacher")
_FEW_CLASSES = 20
_BESIDE = 12  # classes of two confusions beside each other


@dataclass(frozen=True)
class RunReport:
    """A finished run as a report reads it. name: what it is called; slug: what its files begin
    with. rows: of its metrics. told: as deit.training.summary.summary_of returns it."""

    name: str
    slug: str
    config: Config
    environment: RecordedEnvironment
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    evaluation: CachedEvaluation


def final_top1(evaluation: CachedEvaluation) -> float:
    """Test top-1 in [0, 1] of the fused answer or the only head."""
    return evaluation.metrics["heads"]["fused"]["top1"]


def headline(view: RunReport) -> str:
    """The few numbers that matter, large."""
    found, told = view.evaluation.metrics, view.summary
    values = {f"{found['split']} top-1": f"{format_percent(final_top1(view.evaluation))} %"}
    if found["teacher"]:
        values["the teacher's"] = f"{format_percent(found['teacher']['top1'])} %"
    values["calibration error"] = (
        f"{format_percent(found['heads']['fused']['calibration_error'])} %"
    )
    values["training"] = format_duration(told["seconds"])
    if told["images_per_s"] is not None:
        values["images/s in training"] = f"{told['images_per_s']:,.0f}"
    if "cost" in found:
        values["M parameters"] = f"{found['cost']['parameters'] / 1e6:.2f}"
    return html.stat_tiles(values)


def sections_of(view: RunReport, folder: Path) -> list[str]:
    """The parts of a run from its numbers; charts and tables are files in the folder as well."""
    return [
        headline(view),
        html.subsection("Heads", [_heads(view, folder)]),
        html.subsection("Training", [_training(view, folder)]),
        html.subsection("Classes", _classes(view, folder)),
        html.subsection("Calibration and tokens", [_calibration(view, folder)]),
        html.subsection("Who answers otherwise than whom", [_disagreement(view, folder)]),
    ]


def card_of(view: RunReport) -> str:
    """What the run was: settings, hardware, time."""
    config, environment, found = view.config, view.environment, view.evaluation.metrics
    optim, loss = config.optim, config.loss
    told = view.summary
    loader = ""
    if told["loader_share"] is not None:
        stages = [row["loader"]["images_per_s"] for row in view.rows if "loader" in row][-1]
        listed = ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in stages.items())
        loader = f"{format_percent(told['loader_share'])} % of the time ({listed})"
    values = {
        "student": f"{config.student.name} at {config.student.image_size} px",
        "teacher": ", ".join(config.teacher.source) or "none",
        "objective": f"{loss.kind}, through {loss.head}, weight {loss.distillation_weight:g}, "
        f"temperature {loss.temperature:g}"
        if loss.kind != "none"
        else f"labels, smoothing {loss.label_smoothing:g}",
        "data": f"{config.data.source}, {config.data.root}"
        if config.data.source != "digits"
        else "digits",
        "optimizer": f"{optim.name}, {optim.epochs} epochs, batch {optim.batch_size}, peak "
        f"rate {optim.peak_lr:.3g}, decay {optim.weight_decay:g}",
        "seed": str(config.run.seed),
        "device": f"{environment.device_name}, {environment.processes} processes, "
        f"{environment.threads} threads, {environment.precision}",
        "versions": f"deit {environment.deit}, torch {environment.packages.torch}, timm "
        f"{environment.packages.timm}, commit {environment.commit}",
        "time": f"{format_duration(told['seconds'])}, best weights of epoch {told['best_epoch']}",
        "memory": "" if told["memory_mb"] is None else f"{told['memory_mb']:,.0f} MB at most",
        "loading": loader,
        "command": _command(environment.command, told["run"]),
    }
    if "cost" in found:
        cost = found["cost"]
        values["cost"] = (
            f"{cost['parameters']:,} parameters, {cost['gmacs']:.3g} GMACs an image, "
            f"{cost['memory_mb']:.0f} MB, {cost['images_per_s']:,.0f} images/s on "
            f"{cost['measured_on']}"
        )
    return html.key_values({name: value for name, value in values.items() if value})


def _command(command: str, run: str) -> str:
    """The words of a run; of one that another command started, from a file that is gone, those that
    repeat it."""
    words = shlex.split(command)
    file = next((word for word in words[1:3] if word.endswith(".json")), None)
    if file is not None and not Path(file).exists():
        return shlex.join(["deit", "train", f"{run}/config.json"])
    return command


def _heads(view: RunReport, folder: Path) -> str:
    found = view.evaluation.metrics
    rows = {name: one for name, one in found["heads"].items() if one}
    if found["heads"]["distillation"] is None:
        rows.pop("fused")  # the only head once more
    if found["teacher"]:
        rows["teacher"] = found["teacher"]
    groups = [group for group in ("seen", "unseen") if group in found]
    shown = {"top1": "top-1 %", "top5": "top-5 %", "calibration_error": "calibration error %"}
    if len(found["class_names"]) <= 5:
        del shown["top5"]  # always right
    cells = [
        [
            name.replace("_", " "),
            *(format_percent(one[key]) for key in shown),
            *(format_percent(found[group].get(name)) for group in groups),
        ]
        for name, one in rows.items()
    ]
    columns = ["head", *shown.values(), *(f"{group} classes %" for group in groups)]
    number = f"{found['num_samples']} {found['split']} images at {found['image_size']} px"
    return html.table(columns, cells, caption=number, file=folder / f"{view.slug}-heads.csv")


def curves_of(view: RunReport) -> dict[str, list[tuple[float, float]]]:
    """Validation top-1 by epoch of every head, averages of weights too."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in view.rows:
        for name, value in row.get("validation", {}).items():
            if name.endswith("_top1") and value is not None:
                called = name.removesuffix("_top1").replace("_", " ")
                lines.setdefault(called, []).append((row["epoch"], value))
    return lines


def schedules_of(view: RunReport) -> dict[str, list[tuple[float, float]]]:
    """Every schedule as it was applied, by epoch, in % of its largest value, which its name tells:
    the learning rate, and what else changes: the weight of the teacher's term, the decay of the
    weight average."""
    optim, loss = view.config.optim, view.config.loss
    values = {"learning rate": [(row["epoch"], row["train"]["lr"]) for row in view.rows]}
    if loss.kind != "none" and loss.distillation_warmup_epochs > 0:
        weight = loss.distillation_weight
        values["weight of the teacher's term"] = [
            (row["epoch"], weight * teacher_weight_ramp(loss, row["epoch"])) for row in view.rows
        ]
    if optim.ema_epochs > 0:
        steps = view.rows[0]["step"] / view.rows[0]["epoch"]
        values["decay of the weight average"] = [
            (
                row["epoch"],
                ema_decay(torch.tensor(row["step"] - 1), horizon=optim.ema_epochs * steps),
            )
            for row in view.rows
        ]
    shares = {}
    for name, points in values.items():
        peak = max(float(value) for _, value in points) or 1.0
        shares[f"{name} ({peak:.3g})"] = [(at, 100 * float(one) / peak) for at, one in points]
    return shares


def _training(view: RunReport, folder: Path) -> str:
    if not view.rows:
        return html.paragraph("No numbers of its epochs are there (metrics.jsonl).", "note")
    lines = curves_of(view)
    levels = {} if view.summary["teacher"] is None else {"teacher": view.summary["teacher"]}
    accuracy = charts.chart(charts.curves(lines, levels), folder / f"{view.slug}-accuracy.png")
    losses = {
        name.replace("_", " "): [(row["epoch"], row["train"][name]) for row in view.rows]
        for name in view.rows[-1]["train"]
        if name.startswith("loss") and all(row["train"].get(name) is not None for row in view.rows)
    }
    loss = charts.chart(charts.over_epochs(losses, "loss"), folder / f"{view.slug}-loss.png")
    schedules = charts.chart(
        charts.over_epochs(schedules_of(view), "% of the largest", named=True),
        folder / f"{view.slug}-schedules.png",
        height=2.4,
    )
    speed = {"": [(row["epoch"], row["images_per_s"]) for row in view.rows if "loader" in row]}
    _write_curves(view, folder / f"{view.slug}-curves.csv")
    drawn = [
        html.figure(
            accuracy, "Validation accuracy by head" + "; dotted: the teacher." * bool(levels)
        ),
        html.figure(loss, "Training loss, whole and by term."),
        html.figure(
            schedules,
            "Schedules as applied, after each epoch, in % of the largest value (in brackets). "
            "Weight decay follows the learning rate.",
        ),
    ]
    if speed[""]:
        fast = charts.chart(
            charts.over_epochs(speed, "images/s"), folder / f"{view.slug}-speed.png", height=2.4
        )
        drawn.append(html.figure(fast, "Images a second in training."))
    return html.side_by_side(*drawn)


def _write_curves(view: RunReport, path: Path) -> None:
    """Every number of every epoch, a line an epoch."""
    flat = []
    for row in view.rows:
        line = {"epoch": row["epoch"], "step": row["step"], "seconds": row["seconds"]}
        for group in ("train", "validation"):
            line |= {f"{group}_{name}": value for name, value in row.get(group, {}).items()}
        line |= {name: row.get(name) for name in ("images_per_s", "memory_mb")}
        flat.append(line)
    write_csv(path, list(dict.fromkeys(name for line in flat for name in line)), flat)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """A table as a file, columns that a row does not have empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, columns, lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)


def _classes(view: RunReport, folder: Path) -> list[str]:
    said = view.evaluation
    found, names = said.metrics, said.metrics["class_names"]
    final = "fused" if "fused" in said.predictions else "class"
    unseen = set(found.get("held_out", ()))
    shares = {name: found["per_class"][name] for name in names}
    voices = [name for name in _HEADS if name in said.predictions]
    columns = ["class", "unseen", "num_samples", *(f"{voice}_top1" for voice in voices)]
    lines = []
    for name, row in shares.items():
        line = {"class": name, "unseen": name in unseen, "num_samples": row["num_samples"]}
        lines.append(line | {f"{voice}_top1": row[voice] for voice in voices})
    write_csv(folder / f"{view.slug}-classes.csv", columns, lines)
    shown = sorted(names, key=lambda name: shares[name][final] or 0.0)[: 2 * _FEW_CLASSES]
    bars = {"student": [shares[name][final] or 0.0 for name in shown]}
    if "teacher" in said.predictions:
        bars["teacher"] = [shares[name]["teacher"] or 0.0 for name in shown]
    called = [f"{name} (unseen)" if name in unseen else name for name in shown]
    height = 1.1 + 0.24 * len(shown)
    drawn = charts.chart(
        charts.per_class(called, bars), folder / f"{view.slug}-classes.png", height=height
    )
    told = (
        "Right answers in each class"
        if len(shown) == len(names)
        else (f"Right answers in the {len(shown)} weakest of {len(names)} classes")
    )
    beside = [html.figure(drawn, f"{told}, the weakest on top.")]
    counts = confusion(said.predictions[final], said.labels, len(names))
    pairs = _confused(counts, names)
    if pairs:
        columns = ("truth", "taken for", "images", "of the class %")
        told = "The commonest confusions."
        file = folder / f"{view.slug}-confusions.csv"
        beside.append(html.table(columns, pairs, caption=told, file=file))
    parts = [html.side_by_side(*beside)]
    if len(names) <= _FEW_CLASSES:
        file = folder / f"{view.slug}-confusion.csv"
        maps = [_map(counts, names, "Answers in % of each class (a row): the student.", file)]
        if "teacher" in said.predictions:
            theirs = confusion(said.predictions["teacher"], said.labels, len(names))
            both = [
                [mine - other for mine, other in zip(own, others)]
                for own, others in zip(_percent(counts), _percent(theirs))
            ]
            told = "Student minus teacher, in points: where one answers oftener than the other."
            maps.append(
                html.heat_table(
                    names,
                    names,
                    [[one or None for one in row] for row in both],
                    shown="{:+.0f}",
                    corner="truth",
                    caption=told,
                    signed=True,
                    file=folder / f"{view.slug}-minus-teacher.csv",
                )
            )
        parts += [html.side_by_side(*maps)] if len(names) <= _BESIDE else maps
    return parts


def confusion(answers: list[int], labels: list[int], number: int) -> list[list[int]]:
    """Counts [classes][classes]: row the truth, column the answer."""
    counts = [[0] * number for _ in range(number)]
    for answer, label in zip(answers, labels, strict=True):
        counts[label][answer] += 1
    return counts


def _percent(counts: list[list[int]]) -> list[list[float]]:
    return [[100 * one / (sum(row) or 1) for one in row] for row in counts]


def _map(counts: list[list[int]], names: list[str], caption: str, file: Path) -> str:
    shares = [[one or None for one in row] for row in _percent(counts)]
    return html.heat_table(
        names, names, shares, shown="{:.0f}", corner="truth", caption=caption, file=file
    )


def _confused(counts: list[list[int]], names: list[str], most: int = 10) -> list[list[str]]:
    found = [
        (number, truth, answer)
        for truth, row in enumerate(counts)
        for answer, number in enumerate(row)
        if truth != answer and number
    ]
    found.sort(key=lambda one: (-one[0], one[1:]))
    return [
        [names[truth], names[answer], str(number), f"{100 * number / sum(counts[truth]):.1f}"]
        for number, truth, answer in found[:most]
    ]


def reliability_bins(
    answers: list[int], confidence: list[float], labels: list[int], bins: int = 15
) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and samples of each of `bins` equal steps of confidence that has
    any (Guo et al. 2017), all in [0, 1]."""
    held: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for answer, sure, label in zip(answers, confidence, labels, strict=True):
        held[min(max(math.ceil(sure * bins), 1), bins) - 1].append((sure, answer == label))
    return [
        (
            sum(sure for sure, _ in one) / len(one),
            sum(right for _, right in one) / len(one),
            len(one),
        )
        for one in held
        if one
    ]


def _calibration(view: RunReport, folder: Path) -> str:
    said = view.evaluation
    final = "fused" if "fused" in said.predictions else "class"
    voices = {"student": final} | ({"teacher": "teacher"} if "teacher" in said.predictions else {})
    bins = {
        name: reliability_bins(said.predictions[voice], said.confidence[voice], said.labels)
        for name, voice in voices.items()
    }
    drawn = charts.chart(
        charts.reliability(bins), folder / f"{view.slug}-calibration.png", width=5, height=3.8
    )
    told = "On the grey line confidence is deserved; below it, too high. Larger: more images."
    figures = [html.figure(drawn, told)]
    cosines = said.metrics["token_cosine"]
    if cosines:
        deep = charts.chart(
            charts.token_cosine_chart(cosines),
            folder / f"{view.slug}-tokens.png",
            width=5,
            height=3.8,
        )
        told = "How alike class and distillation token become (DeiT-B of the paper: 0.06 to 0.93)."
        figures.append(html.figure(deep, told))
    return html.side_by_side(*figures)


def _disagreement(view: RunReport, folder: Path) -> str:
    agreement = view.evaluation.metrics["agreement"]
    names = [
        "truth",
        *(name for name in ("teacher", "class", "distillation", "fused") if name in agreement),
    ]
    values = [[100 * (1 - agreement[a][b]) if a != b else None for b in names] for a in names]
    told = "Different answers in % of the images (the DeiT paper's Table 4)."
    file = folder / f"{view.slug}-disagreement.csv"
    return html.heat_table(names, names, values, caption=told, file=file)
