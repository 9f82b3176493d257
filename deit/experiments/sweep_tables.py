"""The numbers of a sweep: tables for a person, CSV, JSON and Markdown, read again; no torch."""

import csv
import io
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deit.core.errors import CheckpointError
from deit.core.filesystem import atomic_write, write_json
from deit.core.json_io import load_json_as
from deit.experiments.lottery_tables import tickets_table
from deit.experiments.sweep_spec import short_names
from deit.viz.tables import HEADS, final_top1, markdown_table, mean_std

MANIFEST = "sweep.json"
RESULTS = "results.json"
_MEASURED = (
    "class head",
    "distillation head",
    "fused",
    "gain",
    "validation",
    "agrees with teacher %",
    "seconds",
)
_GROUPS = ("seen", "unseen")


def read_results(sweep: Path) -> dict[str, Any]:
    """Return the results of a sweep, from its folder. Raises CheckpointError where there are none
    yet. Their fields are not checked: read them within `translate_value_errors`."""
    path = sweep / RESULTS
    if not path.is_file():
        raise CheckpointError(f"{sweep}: no results yet; run the command of this sweep to continue")
    return load_json_as(path, dict[str, Any])


def points(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a sweep that are points of it: those of teachers and starts left out."""
    return {name: row for name, row in result["rows"].items() if row["values"]}


def best_of(rows: dict[str, dict[str, Any]], number: int) -> list[str]:
    """The points that did best on the validation split, the best first: by the mean over seeds, of
    those that have the most seeds (one lucky seed is no mean). The test split is for the final
    number alone. None where points held out different classes: their validation splits are of other
    classes then."""
    finished = [name for name, row in rows.items() if row["values"] and row["validation"]]
    most = max((len(rows[name]["validation"]) for name in finished), default=0)
    finished = [name for name in finished if len(rows[name]["validation"]) == most]
    if len({held_out_of(rows[name]) for name in finished}) > 1:
        return []
    ranked = sorted(finished, key=lambda name: -_validation(rows[name]))
    return ranked[:number]


def _validation(row: dict[str, Any]) -> float:
    """The mean over seeds, without the last bits that only the order of summing decides."""
    return round(statistics.mean(row["validation"]), 9)


def held_out_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The classes that the runs of a row did not see in training."""
    return tuple(row["classes"][0]["held_out"]) if row.get("classes") else ()


def best_summary(result: dict[str, Any]) -> str:
    """How the best are told, or why none is; how many there are that nothing tells apart."""
    if result["best"]:
        own = points(result)
        first = own[result["best"][0]]
        same = sum(
            len(row["validation"]) == len(first["validation"])
            and _validation(row) == _validation(first)
            for row in own.values()
        )
        tied = f" ({same} points are equal in front, in the order of the table)" * (same > 1)
        return f"best on the validation split{tied}:"
    return "none is best: the points held out different classes, so they select by other images"


def best_lines(result: dict[str, Any]) -> list[str]:
    """The best points, numbered, each with the validation accuracy that puts it there."""
    return [
        f"{place}. {label_of(result, name)} "
        f"({mean_std(result['rows'][name]['validation'], scale=100)})"
        for place, name in enumerate(result["best"], start=1)
    ]


def label_of(result: dict[str, Any], name: str) -> str:
    """A point by its name, with what it stands for where that is only a number."""
    if not result.get("search"):
        return name
    return f"{name}: {_values_of(result, result['rows'][name]['values'])}"


def _values_of(result: dict[str, Any], values: dict[str, str]) -> str:
    short = short_names(result["fields"])
    return ", ".join(f"{short[field]} {one}" for field, one in values.items() if field != "run")


def columns(result: dict[str, Any]) -> list[str]:
    """The heads of the table's columns: what varies, then what was measured."""
    varied = [_head(name) for name in short_names(result["fields"]).values()]
    return [*varied, *_measured_columns(result)]


def _measured_columns(result: dict[str, Any]) -> list[str]:
    """What was measured; where classes were held out, on the others and on these as well."""
    more = _GROUPS if _some_held_out(result) else ()
    return [*_MEASURED[:3], *more, *_MEASURED[3:]]


def _some_held_out(result: dict[str, Any]) -> bool:
    return any(row.get("classes") for row in result["rows"].values())


def _head(name: str) -> str:
    return "" if name == "run" else name


def cells(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows: mean and standard deviation over the seeds; the gain is that of the mean
    fused (or only) answer over the first point's, in percentage points."""
    own = points(result)
    first = next((final_top1(row) for row in own.values()), [])
    found = []
    for name, row in result["rows"].items():
        told = [row["values"].get(one, "") for one in result["fields"]]
        if not row["values"]:
            told[0] = name
        groups = [_of_group(row, group) for group in _GROUPS if _some_held_out(result)]
        found.append([*told, *_measured(row, first if row["values"] else [], groups)])
    return found


def _of_group(row: dict[str, Any], group: str) -> str:
    return mean_std([one[group] for one in row.get("classes", [])] or [None], scale=100)


def _measured(row: dict[str, Any], first: list[float], groups: list[str]) -> list[str]:
    seeds = len(row["seeds"])
    if not seeds:
        return ["failed", *["-"] * (len(_MEASURED) + len(groups) - 1)]
    final = final_top1(row)
    gain = f"{100 * (statistics.mean(final) - statistics.mean(first)):+.1f}" if first else "-"
    heads = [mean_std([top1[head] for top1 in row["top1"]], scale=100) for head in HEADS]
    seconds = mean_std(row["seconds"], digits=0)
    if row["failed"]:
        seconds += f" ({len(row['failed'])} of {seeds + len(row['failed'])} seeds failed)"
    rest = [mean_std(row[name], scale=100) for name in ("validation", "agreement")]
    return [*heads, *groups, gain, *rest, seconds]


def write_results(result: dict[str, Any], out: Path) -> list[Path]:
    """results.json, results.csv (a line a run) and results.md. Returns their paths. Raises
    SystemFault."""
    paths = [out / f"results.{kind}" for kind in ("json", "csv", "md")]
    write_json(paths[0], result)
    atomic_write(paths[1], _csv(result).encode())
    atomic_write(paths[2], markdown(result).encode())
    return paths


def _csv(result: dict[str, Any]) -> str:
    """A line for each run: what varies, its seed, what it came to; where it failed or was stopped,
    the reason."""
    text = io.StringIO()
    measured = ("validation_top1", *(f"{head}_top1" for head in HEADS), "agreement", "seconds")
    groups = tuple(f"{group}_top1" for group in _GROUPS if _some_held_out(result))
    names = ("point", *result["fields"], "seed", "status", *measured, *groups, "folder", "reason")
    lines = csv.DictWriter(text, names, lineterminator="\n")
    lines.writeheader()
    for name, row in points(result).items():
        same = {"point": name, **row["values"]}
        for place, seed in enumerate(row["seeds"]):
            heads = {f"{head}_top1": row["top1"][place][head] for head in HEADS}
            if row.get("classes"):
                heads |= {f"{group}_top1": row["classes"][place][group] for group in _GROUPS}
            lines.writerow(
                {
                    **same,
                    **heads,
                    "seed": seed,
                    "status": "finished",
                    "validation_top1": row["validation"][place],
                    "agreement": row["agreement"][place],
                    "seconds": round(row["seconds"][place], 3),
                    "folder": row["folders"][place],
                }
            )
        for seed, reason in row["failed"].items():
            lines.writerow({**same, "seed": seed, "status": "failed", "reason": reason})
    for name, one in result.get("stopped", {}).items():
        told = {"point": name, **one["values"], "seed": result["seeds"][0], "status": "stopped"}
        why = f"below the median at epoch {one['epoch']}"
        lines.writerow({**told, "validation_top1": one["top1"], "reason": why})
    return text.getvalue()


def markdown(result: dict[str, Any]) -> str:
    """The table, the best points and where the numbers come from."""
    seeds = ", ".join(map(str, result["seeds"]))
    environment = result["environment"]
    torch = environment["packages"]["torch"]
    where = f"{environment['device_name']}, torch {torch}, commit {environment['commit']}"
    rows = [[_escaped(cell) for cell in row] for row in cells(result)]
    ranking = f"{best_summary(result).capitalize()}\n\n" + "\n".join(best_lines(result)) + "\n\n"
    ranking = "" if "tickets" in result else ranking  # of tickets the sparsity is what one asks
    reasons = [
        f"- {name}, seed {seed}: {' '.join(reason.split())}"
        for name, row in result["rows"].items()
        for seed, reason in row["failed"].items()
    ]
    failed = "\n".join(["Failed:\n", *reasons, "\n"]) if reasons else ""
    below = [
        f"- {name}: {_values_of(result, one['values'])}; {100 * one['top1']:.1f} at epoch "
        f"{one['epoch']}"
        for name, one in result.get("stopped", {}).items()
    ]
    stopped = "\n".join(["Stopped, below the median:\n", *below, "\n"]) if below else ""
    counted = ", ".join(f"{number} {name}" for name, number in (result["search"] or {}).items())
    searched = f"{counted}; the others with the first seed alone.\n\n" if counted else ""
    return (
        f"# {result['sweep']}\n\n"
        f"Recipe `{result['recipe']}`, seeds {seeds}; top-1 % on {result['num_samples']} "
        f"{result['split']} images, mean +- standard deviation over seeds; the gain is in points "
        "over the first row.\n\n"
        f"{markdown_table(map(_escaped, columns(result)), rows)}\n\n{class_by_class(result)}"
        f"{changes_table(result)}{disagreement_table(result)}{tickets_table(result)}"
        f"{searched}{ranking}"
        f"{stopped}{failed}"
        f"`{result['command']}`\n\n{where}\n"
    )


def class_by_class(result: dict[str, Any], shown: list[str] | None = None) -> str:
    """Right answers in % of each class, those that training did not see marked; "" where it saw
    all of them, and of more than 20 classes. shown: of which rows; None: of all."""
    names, rows = class_shares(result, list(result["rows"]) if shown is None else shown)
    if not 0 < len(names) <= SHOWN_CLASSES:
        return ""
    heads, never = unseen_marks(result, names)
    table = [
        [
            _escaped(point),
            *(mean_std(share, scale=100) + never(point, name) for name, share in zip(names, row)),
        ]
        for point, row in rows.items()
    ]
    title = "Accuracy in % of each class, by the fused logits or the only head"
    title += "; *: not seen by this point" if any(map(never, rows, names)) else ""
    return f"{title}:\n\n{markdown_table(map(_escaped, ['', *heads]), table)}\n\n"


def class_shares(
    result: dict[str, Any], points: list[str]
) -> tuple[list[str], dict[str, list[list[float | None]]]]:
    """The names of the classes, and of those of the points where some were held out, for each class
    the shares of right answers, a value a seed; None of a class without images."""
    rows = {name: result["rows"][name].get("classes") for name in points}
    rows = {name: classes for name, classes in rows.items() if classes}
    names = list(dict.fromkeys(name for row in rows.values() for name in row[0]["per_class"]))
    return names, {
        point: [[one["per_class"].get(name) for one in row] for name in names]
        for point, row in rows.items()
    }


def unseen_marks(
    result: dict[str, Any], names: list[str]
) -> tuple[list[str], Callable[[str, str], str]]:
    """How classes are marked that training did not see: in their names where all points left out
    the same, else beside the numbers of a point. Returns the names, and the mark of a number by
    point and class."""
    held = {name: held_out_of(row) for name, row in result["rows"].items() if row.get("classes")}
    if len(set(held.values())) == 1:
        (unseen,) = set(held.values())
        return [f"{name} (unseen)" if name in unseen else name for name in names], lambda *_: ""
    return names, lambda point, name: "*" if name in held.get(point, ()) else ""


SHOWN_CLASSES = 20


def changes(result: dict[str, Any]) -> dict[str, str]:
    """What each named run or arm sets, by its name, as `field value, field value`; of a grid the
    columns say it. Nothing where none sets anything."""
    found: dict[str, dict[str, str]] = {}
    for row in points(result).values():
        if row.get("sets") is not None:
            known = found.setdefault(row["values"]["run"], dict(row["sets"]))
            for field in known.keys() | row["sets"].keys():  # an arm may follow the grid
                same = known.get(field) == row["sets"].get(field)
                known[field] = known[field] if same else "by the grid"
    if not any(found.values()):
        return {}
    return {
        name: ", ".join(f"{field} {value}" for field, value in own.items()) or "nothing"
        for name, own in found.items()
    }


def changes_table(result: dict[str, Any]) -> str:
    """What each named run sets, in Markdown; "" where there is none."""
    found = changes(result)
    if not found:
        return ""
    rows = [[_escaped(name), _escaped(told)] for name, told in found.items()]
    return f"What each run sets:\n\n{markdown_table(['run', 'sets'], rows)}\n\n"


def disagreement_table(result: dict[str, Any]) -> str:
    """Who answers otherwise than whom, in % of the images."""
    shares = result["disagreement"]
    if len(shares) < 3:
        return ""
    table = [
        [_escaped(one), *(f"{100 * share:.1f}" for share in row.values())]
        for one, row in shares.items()
    ]
    title = f"Disagreement in % of the images, seed {result['seeds'][0]}:"
    return f"{title}\n\n{markdown_table(['', *map(_escaped, shares)], table)}\n\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
