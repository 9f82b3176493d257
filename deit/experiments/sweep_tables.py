"""Write the results of a sweep as JSON, CSV, Markdown and LaTeX, and read them; no torch."""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deit.core.errors import CheckpointError, single_line
from deit.core.filesystem import atomic_write, write_json
from deit.core.json_io import load_json_as
from deit.experiments.arm_difference import difference_line
from deit.experiments.lottery_tables import lottery_table
from deit.viz.result_files import (
    CLASS_GROUPS,
    has_unseen_classes,
    latex_table,
    points_csv,
    runs_csv,
)
from deit.viz.tables import (
    HEADS,
    SAMPLE_STD,
    final_top1,
    markdown_table,
    mean_std,
    prediction_name,
    short_names,
)

MANIFEST = "sweep.json"
RESULTS = "results.json"
_METRICS = (
    "class head",
    "distillation head",
    "fused",
    "gain",
    "validation",
    "agreement with teacher %",
    "seconds",
)


def read_results(sweep: str | Path) -> dict[str, Any]:
    """Return the results in the folder of a sweep. Raises CheckpointError if there are none yet.

    Their fields are not checked: read them within `translate_value_errors`.
    """
    path = Path(sweep) / RESULTS
    if not path.is_file():
        raise CheckpointError(f"{sweep}: no results yet; run the command of this sweep to continue")
    return load_json_as(path, dict[str, Any])


def points(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of points, without those of base runs."""
    return {name: row for name, row in result["rows"].items() if row["values"]}


def best_of(rows: dict[str, dict[str, Any]], top: int) -> list[str]:
    """Return the names of the `top` points with the best validation top-1, the best first.

    Points are ranked by their mean over seeds. Points with fewer seeds than others are left out,
    since one seed can be lucky. The test split is not used for selection. Returns none if points
    held out different classes, since their validation splits then have different classes.

    >>> rows = {"a": {"values": {"lr": "1"}, "validation": [0.7]},
    ...         "b": {"values": {"lr": "2"}, "validation": [0.9]}}
    >>> best_of(rows, top=1)
    ['b']
    """
    finished = [name for name, row in rows.items() if row["values"] and row["validation"]]
    most = max((len(rows[name]["validation"]) for name in finished), default=0)
    finished = [name for name in finished if len(rows[name]["validation"]) == most]
    if len({held_out_of(rows[name]) for name in finished}) > 1:
        return []
    ranked = sorted(finished, key=lambda name: -_validation(rows[name]))
    return ranked[:top]


def _validation(row: dict[str, Any]) -> float:
    """Return the mean over seeds, rounded so that the order of the sum does not matter."""
    return round(statistics.mean(row["validation"]), 9)


def held_out_of(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the classes that the runs of a row did not see in training."""
    return tuple(row["classes"][0]["held_out"]) if row.get("classes") else ()


def best_summary(result: dict[str, Any]) -> str:
    """Return the heading of the best points with the number of ties, or why there are none."""
    if result["best"]:
        rows = points(result)
        first = rows[result["best"][0]]
        num_tied = sum(
            len(row["validation"]) == len(first["validation"])
            and _validation(row) == _validation(first)
            for row in rows.values()
        )
        tied = f" ({num_tied} points are tied for first, in table order)" * (num_tied > 1)
        return f"best on the validation split{tied}:"
    return (
        "no best points: they held out different classes, so their validation splits are not "
        "comparable"
    )


def best_lines(result: dict[str, Any]) -> list[str]:
    """Return a numbered line for each of the best points, with its validation top-1 in %."""
    return [
        f"{rank}. {label_of(result, name)} "
        f"({mean_std(result['rows'][name]['validation'], scale=100)})"
        for rank, name in enumerate(result["best"], start=1)
    ]


def label_of(result: dict[str, Any], name: str) -> str:
    """Return the name of a point, with its values if it is the trial of a search."""
    if not result.get("search"):
        return name
    return f"{name}: {_values_of(result, result['rows'][name]['values'])}"


def _values_of(result: dict[str, Any], values: dict[str, str]) -> str:
    short = short_names(result["fields"])
    return ", ".join(f"{short[field]} {value}" for field, value in values.items() if field != "run")


def columns(result: dict[str, Any]) -> list[str]:
    """Return the column names of the table: the fields that vary, then the metrics."""
    varied = ["" if name == "run" else name for name in short_names(result["fields"]).values()]
    return [*varied, *_metric_columns(result)]


def _metric_columns(result: dict[str, Any]) -> list[str]:
    """Return the metrics; if classes were held out, with the accuracy on seen and unseen ones."""
    groups = CLASS_GROUPS if has_unseen_classes(result) else ()
    return [*_METRICS[:3], *groups, *_METRICS[3:]]


def cells(result: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table, with mean and standard deviation over the seeds.

    The gain is the difference of the mean final top-1 to that of the first point, in percentage
    points.
    """
    first = next((final_top1(row) for row in points(result).values()), [])
    lines = []
    for name, row in result["rows"].items():
        values = [row["values"].get(field, "") for field in result["fields"]]
        if not row["values"]:
            values[0] = name
        groups = [_of_group(row, group) for group in CLASS_GROUPS if has_unseen_classes(result)]
        lines.append([*values, *_metric_cells(row, first if row["values"] else [], groups)])
    return lines


def _of_group(row: dict[str, Any], group: str) -> str:
    return mean_std([run[group] for run in row.get("classes", [])] or [None], scale=100)


def _metric_cells(row: dict[str, Any], first: list[float], groups: list[str]) -> list[str]:
    seeds = len(row["seeds"])
    if not seeds:
        return ["failed", *["-"] * (len(_METRICS) + len(groups) - 1)]
    final = final_top1(row)
    gain = f"{100 * (statistics.mean(final) - statistics.mean(first)):+.1f}" if first else "-"
    heads = [mean_std([top1[head] for top1 in row["top1"]], scale=100) for head in HEADS]
    seconds = mean_std(row["seconds"], digits=0)
    if row["failed"]:
        seconds += f" ({len(row['failed'])} of {seeds + len(row['failed'])} seeds failed)"
    rest = [mean_std(row[name], scale=100) for name in ("validation", "agreement")]
    return [*heads, *groups, gain, *rest, seconds]


def write_results(result: dict[str, Any], out: str | Path) -> list[Path]:
    """Write results.json, results.csv (one line per run), points.csv (one line per point),
    results.md and results.tex into a folder. Returns their paths. Raises SystemFault."""
    out = Path(out)
    write_json(out / RESULTS, result)
    texts = {
        "results.csv": runs_csv(result),
        "points.csv": points_csv(result),
        "results.md": markdown(result),
        "results.tex": latex(result),
    }
    for name, text in texts.items():
        atomic_write(out / name, text.encode())
    return [out / name for name in (RESULTS, *texts)]


def latex(result: dict[str, Any]) -> str:
    """Return the test accuracies of a sweep as a table in LaTeX.

    It leaves out columns without a value, and what is not measured on the test split.
    """
    keep = (*short_names(result["fields"]).values(), *_METRICS[:4], *CLASS_GROUPS)
    names = ["run" if name == "" else name for name in columns(result)]
    table = dict(zip(names, zip(*cells(result))))
    table = {
        name: values
        for name, values in table.items()
        if name in keep and any(value != "-" for value in values)
    }
    seeds = {name: len(row["seeds"]) for name, row in result["rows"].items()}
    if len({seeds[name] for name in points(result)}) > 1:
        table["seeds"] = tuple(map(str, seeds.values()))
    caption = (
        f"{result['sweep']}, recipe {result['recipe']}: top-1 in % on {result['num_samples']} "
        f"{result['split']} images, {spread_note(result)}"
    )
    label = re.sub(r"[^a-z0-9]+", "-", result["sweep"].lower()).strip("-")
    note = f"% \\usepackage{{booktabs}}; written by: {single_line(result['command'])}"
    body = latex_table(list(table), zip(*table.values()), caption=caption, label=f"tab:{label}")
    return f"{note}\n{body}\n"


def spread_note(result: dict[str, Any]) -> str:
    """Return what a cell of the table is over the seeds, and what the gain is, for a caption."""
    seeds = ", ".join(map(str, result["seeds"]))
    spread = f"mean +- {SAMPLE_STD} over the seeds" if len(result["seeds"]) > 1 else "seed"
    return (
        f"{spread} {seeds}. The gain is that of the fused heads (or the only head) over the first "
        "point, in percentage points."
    )


def markdown(result: dict[str, Any]) -> str:
    """Return the page of a sweep: the table, the best points, the failures and the environment."""
    environment = result["environment"]
    torch = environment["packages"]["torch"]
    provenance = f"{environment['device_name']}, torch {torch}, commit {environment['commit']}"
    rows = [[_escaped(cell) for cell in row] for row in cells(result)]
    ranking = f"{best_summary(result).capitalize()}\n\n" + "\n".join(best_lines(result)) + "\n\n"
    ranking = "" if "lottery" in result else ranking  # a lottery is not about the best accuracy
    reasons = [
        f"- {name}, seed {seed}: {' '.join(reason.split())}"
        for name, row in result["rows"].items()
        for seed, reason in row["failed"].items()
    ]
    failed = "\n".join(["Failed:\n", *reasons, "\n"]) if reasons else ""
    stopped_lines = [
        f"- {name}: {_values_of(result, trial['values'])}; {100 * trial['top1']:.1f} at epoch "
        f"{trial['epoch']}"
        for name, trial in result.get("stopped", {}).items()
    ]
    stopped = "Stopped, below the median:\n"
    stopped = "\n".join([stopped, *stopped_lines, "\n"]) if stopped_lines else ""
    counts = ", ".join(f"{count} {name}" for name, count in (result["search"] or {}).items())
    searched = f"{counts}; only the best points have more than the first seed.\n\n"
    searched = searched if counts else ""
    difference = difference_line(result)
    difference = f"{_escaped(difference)}\n\n" if difference else ""
    return (
        f"# {result['sweep']}\n\n"
        f"Recipe `{result['recipe']}`. Top-1 in % on {result['num_samples']} {result['split']} "
        f"images, {spread_note(result)}\n\n"
        f"{markdown_table(map(_escaped, columns(result)), rows)}\n\n{difference}"
        f"{class_by_class(result)}"
        f"{changes_table(result)}{lottery_table(result)}"
        f"{searched}{ranking}"
        f"{stopped}{failed}{disagreement_table(result)}"
        f"`{result['command']}`\n\n{provenance}\n"
    )


def class_by_class(result: dict[str, Any], row_names: list[str] | None = None) -> str:
    """Return the accuracy of each class in % as Markdown, with unseen classes marked.

    row_names: the rows to list. Default: all. Returns "" if no class was held out, and for more
    than MAX_LISTED_CLASSES classes.
    """
    names, rows = class_shares(result, list(result["rows"]) if row_names is None else row_names)
    if not 0 < len(names) <= MAX_LISTED_CLASSES:
        return ""
    heads, mark = unseen_marks(result, names)
    table = [
        [
            _escaped(point),
            *(mean_std(share, scale=100) + mark(point, name) for name, share in zip(names, row)),
        ]
        for point, row in rows.items()
    ]
    title = "Accuracy in % of each class, by the fused logits or the only head"
    title += "; *: not seen by this point" if any(map(mark, rows, names)) else ""
    return f"{title}:\n\n{markdown_table(map(_escaped, ['', *heads]), table)}\n\n"


def class_shares(
    result: dict[str, Any], points: list[str]
) -> tuple[list[str], dict[str, list[list[float | None]]]]:
    """Return the class names and, for each point with held-out classes, the accuracy in [0, 1] of
    each class, one value per seed; None for a class without images."""
    rows = {name: result["rows"][name].get("classes") for name in points}
    rows = {name: classes for name, classes in rows.items() if classes}
    names = list(dict.fromkeys(name for row in rows.values() for name in row[0]["per_class"]))
    return names, {
        point: [[run["per_class"].get(name) for run in row] for name in names]
        for point, row in rows.items()
    }


def unseen_marks(
    result: dict[str, Any], names: list[str]
) -> tuple[list[str], Callable[[str, str], str]]:
    """Return column names for the classes, and the mark of a cell by point and class.

    If all points held out the same classes, the column names have the marks; otherwise the cells.
    """
    held = {name: held_out_of(row) for name, row in result["rows"].items() if row.get("classes")}
    if len(set(held.values())) == 1:
        (unseen,) = set(held.values())
        return [f"{name} (unseen)" if name in unseen else name for name in names], lambda *_: ""
    return names, lambda point, name: "*" if name in held.get(point, ()) else ""


MAX_LISTED_CLASSES = 20


def changes(result: dict[str, Any]) -> dict[str, str]:
    """Return the fields that each named run or arm sets, as `field value, field value` by its name;
    {} if no run sets a field. The fields of a grid have columns instead."""
    fields_of: dict[str, dict[str, str]] = {}
    for row in points(result).values():
        if row.get("sets") is not None:
            known = fields_of.setdefault(row["values"]["run"], dict(row["sets"]))
            for field in known.keys() | row["sets"].keys():  # an arm's value can depend on the grid
                same = known.get(field) == row["sets"].get(field)
                known[field] = known[field] if same else "by the grid"
    if not any(fields_of.values()):
        return {}
    return {
        name: ", ".join(f"{field} {value}" for field, value in fields.items()) or "nothing"
        for name, fields in fields_of.items()
    }


def changes_table(result: dict[str, Any]) -> str:
    """Return the fields that each named run sets as Markdown; "" if no run sets a field."""
    fields_of = changes(result)
    if not fields_of:
        return ""
    rows = [[_escaped(name), _escaped(fields)] for name, fields in fields_of.items()]
    return f"What each run sets:\n\n{markdown_table(['run', 'sets'], rows)}\n\n"


def disagreement_table(result: dict[str, Any]) -> str:
    """Return the pairwise disagreement in % of the images as Markdown; "" for less than three
    predictors."""
    shares = result["disagreement"]
    if len(shares) < 3:
        return ""
    table = [
        [_escaped(prediction_name(name)), *(f"{100 * share:.1f}" for share in row.values())]
        for name, row in shares.items()
    ]
    title = f"Disagreement in % of the images, seed {result['seeds'][0]}:"
    header = ["", *(row[0] for row in table)]
    return f"{title}\n\n{markdown_table(header, table)}\n\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
