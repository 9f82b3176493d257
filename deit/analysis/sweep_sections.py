"""The sections of a sweep in a report: table, heat maps, curves and scatter plots; no torch."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from deit.experiments.arm_difference import difference_line
from deit.experiments.base_runs import slugify
from deit.experiments.lottery_tables import (
    MASKS_NOTE,
    layer_densities,
    mask_cells,
    mask_columns,
    matching_line,
    sparsest,
)
from deit.experiments.sweep_plots import (
    curve,
    finished_rows,
    heat_map,
    heat_map_figure,
    scatter_trials,
    ticket_curve,
)
from deit.experiments.sweep_tables import (
    MAX_LISTED_CLASSES,
    best_summary,
    cells,
    changes,
    class_shares,
    columns,
    label_of,
    points,
    spread_note,
    unseen_marks,
)
from deit.viz import charts, html
from deit.viz.plots import draw_arms, draw_epoch_scaling, save_figure
from deit.viz.tables import SAMPLE_STD, final_top1, prediction_name, short_names

_MAX_SCATTER_POINTS = 24
_WHISKERS = f"Whiskers: {SAMPLE_STD}."


def sections_of_sweep(result: dict[str, Any], folder: Path, slug: str) -> list[str]:
    """Return the sections of a sweep; also write its charts and tables into the folder.

    result: content of its results.json. slug: prefix of the file names.
    """
    finished = {name: row for name, row in points(result).items() if row["seeds"]}
    body = [_headline(result, finished), _results_table(result, folder / f"{slug}-results.csv")]
    if difference := difference_line(result):
        body.append(html.paragraph(f"{difference}."))
    figures = _sparsity_figures(result, folder, slug) or _field_figures(result, folder, slug)
    if "lottery" not in result:  # all runs of a lottery search have the same cost
        figures += _cost_figures(result, finished, folder, slug)
    body.append(html.side_by_side(*figures))
    body += _masks(result, folder, slug)
    body += _classes(result, folder / f"{slug}-classes.csv")
    failed = {
        f"{name}, seed {seed}": reason
        for name, row in result["rows"].items()
        for seed, reason in row["failed"].items()
    }
    if failed:
        body.append(html.subsection("Failed runs", [html.key_values(failed)]))
    if result.get("stopped"):
        table = _stopped_table(result, folder / f"{slug}-stopped.csv")
        body.append(html.subsection("Stopped trials", [table]))
    if settings := changes(result):
        body.append(html.subsection("Settings of each run", [html.key_values(settings)]))
    if result["disagreement"]:
        table = _disagreement(result, folder / f"{slug}-disagreement.csv")
        body.append(html.subsection("Disagreement", [table]))
    environment = result["environment"]
    card = {
        "recipe": result["recipe"],
        "command": result["command"],
        "device": environment["device_name"],
        "versions": f"torch {environment['packages']['torch']}, commit {environment['commit']}",
    }
    return [*body, html.key_values(card)]


def _results_table(result: dict[str, Any], csv_path: Path) -> str:
    names = list(result["rows"])
    best = names.index(result["best"][0]) if result["best"] else None
    bold = " Bold: best on the validation split." if best is not None else ""
    caption = (
        f"Top-1 % on {result['num_samples']} {result['split']} images, {spread_note(result)}{bold}"
    )
    return html.table(columns(result), cells(result), caption=caption, best=best, csv_path=csv_path)


def _stopped_table(result: dict[str, Any], csv_path: Path) -> str:
    """Return the trials that were below the median, the best first."""
    rows = [
        [
            *(trial["values"].get(field, "") for field in result["fields"]),
            f"{100 * trial['top1']:.1f}",
            str(trial["epoch"]),
        ]
        for trial in result["stopped"].values()
    ]
    header = ["" if name == "run" else name for name in short_names(result["fields"]).values()]
    header += ["validation top-1 %", "at epoch"]
    caption = "Trials stopped because they were below the median validation accuracy at that epoch."
    return html.table(header, rows, caption=caption, csv_path=csv_path)


def _headline(result: dict[str, Any], finished: dict[str, Any]) -> str:
    values = {"points": str(len(points(result))), "seeds": str(len(result["seeds"]))}
    if result.get("search"):
        values |= {name: str(count) for name, count in result["search"].items() if count}
    values["runs finished"] = str(sum(len(row["seeds"]) for row in finished.values()))
    summary = html.paragraph(f"{best_summary(result).capitalize()}.", "note")
    if "lottery" in result:
        summary, values["sparsest ticket that matches"] = "", sparsest(result)
    num_failed = sum(len(row["failed"]) for row in result["rows"].values())
    if num_failed:
        values["runs failed"] = str(num_failed)
    if result["best"]:
        best = result["best"][0]
        top1 = 100 * statistics.mean(final_top1(finished[best]))
        values[f"{result['split']} top-1 of the best"] = f"{top1:.1f} %"
        summary = html.paragraph(f"{best_summary(result).capitalize()} {label_of(result, best)}.")
    return html.stat_tiles(values) + summary


def _cost_figures(
    result: dict[str, Any], finished: dict[str, Any], folder: Path, slug: str
) -> list[str]:
    """Return accuracy against training time and, if students differ, against throughput."""
    costs = {"seconds": ("seconds of training", "time", "Accuracy against training time")}
    if any(name.startswith("student.") for name in result["fields"]):
        costs["images_per_s"] = ("images/s", "throughput", "Accuracy against inference throughput")
    figures = []
    for key, (label, file_suffix, title) in costs.items():
        means = {
            row["values"]["run"] if result.get("search") else ", ".join(row["values"].values()): (
                statistics.mean(row[key]),
                100 * statistics.mean(final_top1(row)),
            )
            for row in finished.values()
            if row.get(key)
        }
        if 0 < len(means) <= _MAX_SCATTER_POINTS:
            draw = charts.scatter(means, label, f"{result['split']} top-1 %")
            svg = charts.chart(draw, folder / f"{slug}-{file_suffix}.png")
            figures.append(html.figure(svg, f"{title}: a dot per point, means over seeds."))
    return figures


def _sparsity_figures(result: dict[str, Any], folder: Path, slug: str) -> list[str]:
    """Return accuracy against sparsity for a lottery search, nothing for another sweep."""
    if "lottery" not in result:
        return []
    svg = charts.chart(ticket_curve(result), folder / f"{slug}-tickets.png")
    caption = f"Mean and {SAMPLE_STD} over the seeds. Gray band: matches the dense run."
    return [html.figure(svg, caption)]


def _masks(result: dict[str, Any], folder: Path, slug: str) -> list[str]:
    """Return the weights that each level of a lottery search keeps, in total and by layer."""
    if not result.get("lottery", {}).get("masks"):
        return []
    totals = html.table(
        mask_columns(),
        mask_cells(result),
        caption=f"Seed {result['seeds'][0]}. {MASKS_NOTE}",
        csv_path=folder / f"{slug}-masks.csv",
    )
    rows, header, values = layer_densities(result)
    layers = html.heat_table(
        rows,
        header,
        values,
        cell_format="{:.0f}",
        caption="Remaining weights in % of each layer.",
        csv_path=folder / f"{slug}-layers.csv",
    )
    matching = html.paragraph(f"Matching runs are {matching_line(result)}.")
    return [html.subsection("Remaining weights", [matching, totals, layers])]


def _field_figures(result: dict[str, Any], folder: Path, slug: str) -> list[str]:
    """Return the charts over the fields that vary.

    A search has a chart per field. Otherwise a sweep of one field has a curve, a sweep of several
    fields has a heat map of each pair, and a sweep of runs has a chart of the runs.
    """
    fields = [name for name in result["fields"] if name != "run"]
    short = short_names(result["fields"])
    if result.get("search"):
        figures = []
        for field in fields:
            path = folder / f"{slug}-{slugify(field)}.png"
            svg = charts.chart(scatter_trials(result, field), path, width=4.5)
            figures.append(html.figure(svg, f"{short[field]}: validation accuracy of each trial."))
        return figures
    if len(fields) == 1:
        path = folder / f"{slug}-{slugify(fields[0])}.png"
        svg = charts.chart(curve(result, fields[0]), path)
        marks = f"a dot per seed, a line through the means. {_WHISKERS}"
        caption = f"Accuracy over {short[fields[0]]}: {marks}"
        return [html.figure(svg, caption)]
    if not fields:
        finished = finished_rows(result)
        draw = draw_epoch_scaling if result["study"] == "epochs" else draw_arms
        height = 3.4 if draw is draw_epoch_scaling else 1.0 + 0.28 * len(finished["rows"])
        path = folder / f"{slug}-runs.png"
        svg = charts.chart(lambda axes: draw(axes, finished), path, height=height)
        return [html.figure(svg, f"Test accuracy: a dot per seed, a bar at the mean. {_WHISKERS}")]
    return [
        figure
        for down, across in itertools.combinations(fields, 2)
        for figure in _heat_maps(result, down, across, folder, slug)
    ]


def _heat_maps(
    result: dict[str, Any], down: str, across: str, folder: Path, slug: str
) -> list[str]:
    """Return the heat map of two fields and, with held-out classes, that of the unseen classes."""
    short = short_names(result["fields"])
    title = f"{short[down]} (rows) and {short[across]} (columns): mean top-1 %"
    note = "over all other settings and the seeds."
    stem = folder / f"{slug}-{slugify(down)}-{slugify(across)}"
    save_figure(heat_map_figure(result, down, across), stem.with_suffix(".png"), dpi=150)
    rows, header, means = heat_map(result, down, across)
    table = html.heat_table(rows, header, _nan_as_none(means), csv_path=stem.with_suffix(".csv"))
    figures = [html.figure(table, f"{title} {note}")]
    if any(row.get("classes") for row in points(result).values()):
        rows, header, means = heat_map(result, down, across, metric=_unseen_top1)
        csv_path = stem.with_name(f"{stem.name}-unseen.csv")
        table = html.heat_table(rows, header, _nan_as_none(means), csv_path=csv_path)
        figures.append(html.figure(table, f"{title} on the unseen classes {note}"))
    return figures


def _nan_as_none(values: list[list[float]]) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in values]


def _unseen_top1(row: dict[str, Any]) -> list[float]:
    """Return the top-1 on the unseen classes, a value per seed."""
    return [seed["unseen"] for seed in row.get("classes", []) if seed["unseen"] is not None]


def _classes(result: dict[str, Any], csv_path: Path) -> list[str]:
    """Return the accuracy of each point in each class, if classes were held out."""
    names, rows = class_shares(result, list(points(result)))
    if not 0 < len(names) <= MAX_LISTED_CLASSES:
        return []
    header, mark_of = unseen_marks(result, names)
    means = [[_mean_percent(top1) for top1 in row] for row in rows.values()]
    marks = [[mark_of(point, name) for name in names] for point in rows]
    caption = "Accuracy in % of each class, mean over the seeds"
    caption += "; *: a class that this point did not see." if any(map(any, marks)) else "."
    table = html.heat_table(
        list(rows),
        header,
        means,
        cell_format="{:.0f}",
        caption=caption,
        marks=marks,
        csv_path=csv_path,
    )
    return [html.subsection("Classes seen and unseen", [table])]


def _mean_percent(top1: list[float | None]) -> float | None:
    """Return the mean in %, or None for a class without images."""
    return None if None in top1 else 100 * statistics.mean(top1)


def _disagreement(result: dict[str, Any], csv_path: Path) -> str:
    rates = result["disagreement"]
    values = [[100 * rates[a][b] if a != b else None for b in rates] for a in rates]
    caption = f"Images with different predictions, in %, seed {result['seeds'][0]}."
    labels = [prediction_name(name) for name in rates]
    return html.heat_table(labels, labels, values, caption=caption, csv_path=csv_path)
