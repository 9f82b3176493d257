"""The sections of a run in a report: heads, training curves, disagreement and run card."""

import shlex
from pathlib import Path

import torch

from deit.analysis.class_sections import calibration_section, class_sections
from deit.analysis.run_report import RunReport, final_top1, write_csv
from deit.core.console import count_noun, format_duration, format_percent
from deit.distill.losses import teacher_weight_ramp
from deit.evaluation.tables import head_cells
from deit.training.optimizer import ema_decay
from deit.viz import charts, html
from deit.viz.tables import head_name, prediction_name


def headline(report: RunReport) -> str:
    """Return the most important numbers as tiles."""
    results, summary = report.evaluation.metrics, report.summary
    values = {f"{results['split']} top-1": f"{format_percent(final_top1(report.evaluation))} %"}
    if results["teacher"]:
        values["teacher top-1"] = f"{format_percent(results['teacher']['top1'])} %"
    values["calibration error"] = (
        f"{format_percent(results['heads']['fused']['calibration_error'])} %"
    )
    values["training time"] = format_duration(summary["seconds"])
    if summary["images_per_s"] is not None:
        values["images/s in training"] = f"{summary['images_per_s']:,.0f}"
    if "cost" in results:
        values["M parameters"] = f"{results['cost']['parameters'] / 1e6:.2f}"
    return html.stat_tiles(values)


def sections_of(report: RunReport, folder: Path) -> list[str]:
    """Return the sections of a run; also write its charts and tables into the folder."""
    return [
        headline(report),
        html.subsection("Heads", [_heads(report, folder)]),
        html.subsection("Training", [_training(report, folder)]),
        html.subsection("Classes", class_sections(report, folder)),
        html.subsection("Calibration and tokens", [calibration_section(report, folder)]),
        html.subsection("Disagreement", [_disagreement(report, folder)]),
    ]


def card_of(report: RunReport) -> str:
    """Return the run card: settings, hardware, time and cost."""
    config, environment, results = report.config, report.environment, report.evaluation.metrics
    optim, loss, summary = config.optim, config.loss, report.summary
    values = {
        "student": f"{config.student.name} at {config.student.image_size} px",
        "teacher": ", ".join(config.teacher.source) or "none",
        "loss": f"{loss.kind} distillation of head {loss.head}, weight "
        f"{loss.distillation_weight:g}, temperature {loss.temperature:g}"
        if loss.kind != "none"
        else f"labels only, label smoothing {loss.label_smoothing:g}",
        "data": f"{config.data.source}, {config.data.root}"
        if config.data.source != "digits"
        else "digits",
        "optimizer": f"{optim.name}, {optim.epochs} epochs, batch size {optim.batch_size}, peak "
        f"learning rate {optim.peak_lr:.3g}, weight decay {optim.weight_decay:g}",
        "seed": str(config.run.seed),
        "device": f"{environment.device_name}, {count_noun(environment.processes, 'process')}, "
        f"{count_noun(environment.threads, 'thread')}, {environment.precision}",
        "versions": f"deit {environment.deit}, torch {environment.packages.torch}, timm "
        f"{environment.packages.timm}, commit {environment.commit}",
        "time": f"{format_duration(summary['seconds'])}, best epoch {summary['best_epoch']}",
        "memory": ""
        if summary["memory_mb"] is None
        else f"{summary['memory_mb']:,.0f} MB at the peak",
        "data loading": _loader_share(report),
        "command": _command(environment.command, summary["run"]),
    }
    if "cost" in results:
        cost = results["cost"]
        values["cost"] = (
            f"{cost['parameters']:,} parameters, {cost['gmacs']:.3g} GMACs per image, "
            f"{cost['memory_mb']:.0f} MB, {cost['images_per_s']:,.0f} images/s on "
            f"{cost['measured_on']}"
        )
    return html.key_values({name: value for name, value in values.items() if value})


def _loader_share(report: RunReport) -> str:
    """Return the share of time spent on data loading and the rate of each stage, or ""."""
    share = report.summary["loader_share"]
    if share is None:
        return ""
    stages = [row["loader"]["images_per_s"] for row in report.rows if "loader" in row][-1]
    rates = ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in stages.items())
    return f"{format_percent(share)} % of the time ({rates})"


def _command(command: str, run: str) -> str:
    """Return the command of a run.

    If another command started the run from a configuration file that no longer exists, return the
    command that repeats the run.
    """
    arguments = shlex.split(command)
    file = next((argument for argument in arguments[1:3] if argument.endswith(".json")), None)
    if file is not None and not Path(file).exists():
        return shlex.join(["deit", "train", f"{run}/config.json"])
    return command


def _heads(report: RunReport, folder: Path) -> str:
    results = report.evaluation.metrics
    heads = {name: metrics for name, metrics in results["heads"].items() if metrics}
    if results["heads"]["distillation"] is None:
        heads.pop("fused")  # a copy of the only head
    if results["teacher"]:
        heads["teacher"] = results["teacher"]
    groups = [group for group in ("seen", "unseen") if group in results]
    columns, cells = head_cells(heads, results["num_samples"], len(results["class_names"]))
    for name, row in zip(heads, cells):
        row += [format_percent(results[group].get(name)) for group in groups]
    columns += [f"{group} classes, top-1 %" for group in groups]
    caption = f"{results['num_samples']} {results['split']} images at {results['image_size']} px"
    csv_path = folder / f"{report.slug}-heads.csv"
    return html.table(columns, cells, caption=caption, csv_path=csv_path)


def curves_of(report: RunReport) -> dict[str, charts.Points]:
    """Return the validation top-1 in [0, 1] by epoch, of every head and weight average."""
    lines: dict[str, charts.Points] = {}
    for row in report.rows:
        for name, value in row.get("validation", {}).items():
            if name.endswith("_top1") and value is not None:
                label = head_name(name.removesuffix("_top1"))
                lines.setdefault(label, []).append((row["epoch"], value))
    return lines


def schedules_of(report: RunReport) -> dict[str, charts.Points]:
    """Return every schedule by epoch, in % of its maximum, which is in brackets in the name.

    Schedules: the learning rate, the weight of the distillation loss, the decay of the EMA.
    """
    optim, loss = report.config.optim, report.config.loss
    values = {"learning rate": [(row["epoch"], row["train"]["lr"]) for row in report.rows]}
    if loss.kind != "none" and loss.distillation_warmup_epochs > 0:
        weight = loss.distillation_weight
        values["distillation weight"] = [
            (row["epoch"], weight * teacher_weight_ramp(loss, row["epoch"])) for row in report.rows
        ]
    if optim.ema_epochs > 0:
        steps = report.rows[0]["step"] / report.rows[0]["epoch"]
        values["EMA decay"] = [
            (
                row["epoch"],
                ema_decay(torch.tensor(row["step"] - 1), horizon=optim.ema_epochs * steps),
            )
            for row in report.rows
        ]
    schedules = {}
    for name, points in values.items():
        peak = max(float(value) for _, value in points) or 1.0
        schedules[f"{name} ({peak:.3g})"] = [
            (epoch, 100 * float(value) / peak) for epoch, value in points
        ]
    return schedules


def _training(report: RunReport, folder: Path) -> str:
    if not report.rows:
        return html.paragraph(
            "There are no metrics of this run (metrics.jsonl is missing).", "note"
        )

    def chart(draw: charts.Draw, name: str, height: float = 3.4) -> str:
        return charts.chart(draw, folder / f"{report.slug}-{name}.png", height=height)

    teacher = report.summary["teacher"]
    levels = {} if teacher is None else {"teacher": teacher}
    losses = {
        name.replace("_", " "): [(row["epoch"], row["train"][name]) for row in report.rows]
        for name in report.rows[-1]["train"]
        if "loss" in name and all(row["train"].get(name) is not None for row in report.rows)
    }
    schedules = charts.over_epochs(schedules_of(report), "% of the maximum", always_legend=True)
    speed = [(row["epoch"], row["images_per_s"]) for row in report.rows if "loader" in row]
    figures = [
        html.figure(
            chart(charts.curves(curves_of(report), levels), "accuracy"),
            "Validation accuracy by head" + "; dotted: the teacher." * bool(levels),
        ),
        html.figure(
            chart(charts.over_epochs(losses, "loss"), "loss"), "Training loss: total and terms."
        ),
        html.figure(
            chart(schedules, "schedules", height=2.4),
            "Schedules at the end of each epoch, in % of the maximum (in brackets). Weight decay "
            "follows the learning rate.",
        ),
    ]
    _write_curves(report, folder / f"{report.slug}-curves.csv")
    if speed:
        svg = chart(charts.over_epochs({"": speed}, "images/s"), "speed", height=2.4)
        figures.append(html.figure(svg, "Training throughput."))
    return html.side_by_side(*figures)


def _write_curves(report: RunReport, path: Path) -> None:
    """Write all metrics as CSV, a line per epoch."""
    flat = []
    for row in report.rows:
        line = {"epoch": row["epoch"], "step": row["step"], "seconds": row["seconds"]}
        for group in ("train", "validation"):
            line |= {f"{group}_{name}": value for name, value in row.get(group, {}).items()}
        line |= {name: row.get(name) for name in ("images_per_s", "memory_mb")}
        flat.append(line)
    write_csv(path, list(dict.fromkeys(name for line in flat for name in line)), flat)


def _disagreement(report: RunReport, folder: Path) -> str:
    agreement = report.evaluation.metrics["agreement"]
    names = [
        "truth",
        *(name for name in ("teacher", "class", "distillation", "fused") if name in agreement),
    ]
    values = [[100 * (1 - agreement[a][b]) if a != b else None for b in names] for a in names]
    caption = "Images with different predictions, in % (as in Table 4 of the DeiT paper)."
    csv_path = folder / f"{report.slug}-disagreement.csv"
    labels = [prediction_name(name) for name in names]
    return html.heat_table(labels, labels, values, caption=caption, csv_path=csv_path)
