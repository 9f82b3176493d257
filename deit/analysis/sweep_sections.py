"""A sweep as parts of a page: its table, heat maps, curves and scatter; no torch."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from deit.experiments.base_runs import slugify as slugged
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
    draw_heat_map,
    finished_rows,
    heat_map,
    scatter_trials,
    ticket_curve,
)
from deit.experiments.sweep_spec import short_names
from deit.experiments.sweep_tables import (
    MAX_LISTED_CLASSES,
    best_summary,
    cells,
    changes,
    class_shares,
    columns,
    label_of,
    points,
    unseen_marks,
)
from deit.viz import charts, html
from deit.viz.plots import draw_arms, draw_epoch_scaling
from deit.viz.tables import final_top1

_MOST_POINTS = 24


def sections_of_sweep(result: dict[str, Any], folder: Path, slug: str) -> list[str]:
    """The parts of a sweep from its results.json; charts are files in the folder as well."""
    own = {name: row for name, row in points(result).items() if row["seeds"]}
    rows = cells(result)
    names = list(result["rows"])
    best = names.index(result["best"][0]) if result["best"] else None
    seeds = ", ".join(map(str, result["seeds"]))
    spread = "mean +- standard deviation of seeds" if len(result["seeds"]) > 1 else "seed"
    bold = "in bold the best on the validation split; " if best is not None else ""
    told = (
        f"Top-1 % on {result['num_samples']} {result['split']} images, {spread} {seeds}; {bold}the "
        "gain is that of the fused (or only) answer over the first point, in points."
    )
    table = html.table(
        columns(result), rows, caption=told, best=best, file=folder / f"{slug}-results.csv"
    )
    body = [_headline(result, own), table]
    drawn = _of_tickets(result, folder, slug) or _of_fields(result, folder, slug)
    if "tickets" not in result:  # whose runs all cost the same
        drawn += _costs(result, own, folder, slug)
    body.append(html.side_by_side(*drawn))
    body += _masks(result, folder, slug)
    body += _classes(result, folder / f"{slug}-classes.csv")
    if result["disagreement"]:
        body.append(
            html.subsection(
                "Who answers otherwise than whom",
                [_disagreement(result, folder / f"{slug}-disagreement.csv")],
            )
        )
    failed = {
        f"{name}, seed {seed}": reason
        for name, row in result["rows"].items()
        for seed, reason in row["failed"].items()
    }
    if failed:
        body.append(html.subsection("Runs that failed", [html.key_values(failed)]))
    if result.get("stopped"):
        body.append(
            html.subsection(
                "Trials that were stopped", [_stopped(result, folder / f"{slug}-stopped.csv")]
            )
        )
    if found := changes(result):
        body.append(html.subsection("What each run sets", [html.key_values(found)]))
    environment = result["environment"]
    facts = {
        "recipe": result["recipe"],
        "command": result["command"],
        "device": environment["device_name"],
        "versions": f"torch {environment['packages']['torch']}, commit {environment['commit']}",
    }
    return [*body, html.key_values(facts)]


def _stopped(result: dict[str, Any], file: Path) -> str:
    """The trials that lay below the median, the best first."""
    rows = [
        [
            *(one["values"].get(field, "") for field in result["fields"]),
            f"{100 * one['top1']:.1f}",
            str(one["epoch"]),
        ]
        for one in result["stopped"].values()
    ]
    heads = ["" if one == "run" else one for one in short_names(result["fields"]).values()]
    heads += ["validation top-1 %", "at epoch"]
    told = "They lay below the median of the others at that epoch, on the validation split."
    return html.table(heads, rows, caption=told, file=file)


def _headline(result: dict[str, Any], own: dict[str, Any]) -> str:
    values = {"points": str(len(points(result))), "seeds": str(len(result["seeds"]))}
    if result.get("search"):
        values |= {name: str(number) for name, number in result["search"].items() if number}
    runs = sum(len(row["seeds"]) for row in own.values())
    values["runs finished"] = str(runs)
    told = html.paragraph(f"{best_summary(result).capitalize()}.", "note")
    if "tickets" in result:
        told, values["sparsest ticket that matches"] = "", sparsest(result)
    failed = sum(len(row["failed"]) for row in result["rows"].values())
    if failed:
        values["runs failed"] = str(failed)
    if result["best"]:
        best = result["best"][0]
        top1 = 100 * statistics.mean(final_top1(own[best]))
        values[f"{result['split']} top-1 of the best"] = f"{top1:.1f} %"
        told = html.paragraph(f"{best_summary(result).capitalize()} {label_of(result, best)}.")
    return html.stat_tiles(values) + told


def _costs(result: dict[str, Any], own: dict[str, Any], folder: Path, slug: str) -> list[str]:
    """Accuracy against the time that training took and, where students differ, against their speed
    in evaluation."""
    costs = {"seconds": ("seconds of training", "time", "What accuracy costs in training")}
    if any(name.startswith("student.") for name in result["fields"]):
        costs["images_per_s"] = ("images/s", "throughput", "Accuracy against speed in evaluation")
    drawn = []
    for key, (label, file, told) in costs.items():
        places = {
            row["values"]["run"] if result.get("search") else ", ".join(row["values"].values()): (
                statistics.mean(row[key]),
                100 * statistics.mean(final_top1(row)),
            )
            for row in own.values()
            if row.get(key)
        }
        if 0 < len(places) <= _MOST_POINTS:
            spots = charts.scatter(places, label, f"{result['split']} top-1 %")
            picture = charts.chart(spots, folder / f"{slug}-{file}.png")
            drawn.append(html.figure(picture, f"{told}: a dot a point, means over seeds."))
    return drawn


def _of_tickets(result: dict[str, Any], folder: Path, slug: str) -> list[str]:
    """Accuracy against sparsity; nothing where a sweep is no search for tickets."""
    if "tickets" not in result:
        return []
    drawn = charts.chart(ticket_curve(result), folder / f"{slug}-tickets.png")
    told = "Means and standard deviations over the seeds; in grey, what matches the dense run."
    return [html.figure(drawn, told)]


def _masks(result: dict[str, Any], folder: Path, slug: str) -> list[str]:
    """What the levels of a search for tickets leave, whole and layer by layer."""
    if not result.get("tickets", {}).get("masks"):
        return []
    told = f"Seed {result['seeds'][0]}. {MASKS_NOTE}"
    whole = html.table(
        mask_columns(), mask_cells(result), caption=told, file=folder / f"{slug}-masks.csv"
    )
    rows, heads, values = layer_densities(result)
    layers = html.heat_table(
        rows,
        heads,
        values,
        shown="{:.0f}",
        caption="Weights kept in % of each layer.",
        file=folder / f"{slug}-layers.csv",
    )
    matches = html.paragraph(f"{matching_line(result).capitalize()}.")
    return [html.subsection("What is left", [matches, whole, layers])]


def _of_fields(result: dict[str, Any], folder: Path, slug: str) -> list[str]:
    """A curve of one field, heat maps of each two."""
    fields = [name for name in result["fields"] if name != "run"]
    short = short_names(result["fields"])
    if result.get("search"):
        drawn = []
        for field in fields:
            drawing = charts.chart(
                scatter_trials(result, field), folder / f"{slug}-{slugged(field)}.png", width=4.5
            )
            told = f"{short[field]}: validation accuracy of each trial."
            drawn.append(html.figure(drawing, told))
        return drawn
    if len(fields) == 1:
        drawn = charts.chart(curve(result, fields[0]), folder / f"{slug}-{slugged(fields[0])}.png")
        told = f"Accuracy over {short[fields[0]]}: a dot a seed, a line through the means."
        return [html.figure(drawn, told)]
    if not fields:
        own = finished_rows(result)
        draw = draw_epoch_scaling if result["study"] == "epochs" else draw_arms
        height = 3.4 if draw is draw_epoch_scaling else 1.0 + 0.28 * len(own["rows"])
        drawn = charts.chart(
            lambda axes: draw(axes, own), folder / f"{slug}-runs.png", height=height
        )
        return [html.figure(drawn, "Test accuracy: a dot a seed, a line at the mean.")]
    maps = []
    for down, across in itertools.combinations(fields, 2):
        rows, heads, means = heat_map(result, down, across)
        values = [[None if one != one else one for one in row] for row in means]
        told = f"{short[down]} (down) and {short[across]} (across): mean top-1 %{{}} over the rest."
        name = folder / f"{slug}-{slugged(down)}-{slugged(across)}"
        draw_heat_map(result, down, across, name.with_suffix(".png"))
        drawn = html.heat_table(rows, heads, values, file=name.with_suffix(".csv"))
        maps.append(html.figure(drawn, told.format("")))
        if any(row.get("classes") for row in points(result).values()):
            rows, heads, means = heat_map(result, down, across, metric=_on_unseen)
            values = [[None if one != one else one for one in row] for row in means]
            unseen = name.with_name(f"{name.name}-unseen.csv")
            drawn = html.heat_table(rows, heads, values, file=unseen)
            maps.append(html.figure(drawn, told.format(" on the classes never seen")))
    return maps


def _on_unseen(row: dict[str, Any]) -> list[float]:
    return [one["unseen"] for one in row.get("classes", []) if one["unseen"] is not None]


def _classes(result: dict[str, Any], file: Path) -> list[str]:
    """Right answers in each class, of each point, where some were held out."""
    names, rows = class_shares(result, list(points(result)))
    if not 0 < len(names) <= MAX_LISTED_CLASSES:
        return []
    heads, never = unseen_marks(result, names)
    means = [[_mean(share) for share in row] for row in rows.values()]
    marks = [[never(point, name) for name in names] for point in rows]
    told = "Right answers in % of each class, mean over the seeds"
    told += "; *: a class that this point did not see." if any(map(any, marks)) else "."
    table = html.heat_table(
        list(rows), heads, means, shown="{:.0f}", caption=told, marks=marks, file=file
    )
    return [html.subsection("Classes seen and unseen", [table])]


def _mean(shares: list[float | None]) -> float | None:
    """In %; None where a class has no images."""
    return None if None in shares else 100 * statistics.mean(shares)


def _disagreement(result: dict[str, Any], file: Path) -> str:
    shares = result["disagreement"]
    values = [[100 * shares[a][b] if a != b else None for b in shares] for a in shares]
    told = f"Different answers in % of the images, seed {result['seeds'][0]}."
    return html.heat_table(list(shares), list(shares), values, caption=told, file=file)
