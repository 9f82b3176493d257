"""Results of a sweep as files for other programs: CSV by run, CSV by point, a table in LaTeX."""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from deit.core.errors import single_line
from deit.viz.tables import HEADS

CLASS_GROUPS = ("seen", "unseen")
"""The classes that were trained, and those held out."""


def has_unseen_classes(result: dict[str, Any]) -> bool:
    """Return whether some run of a sweep held out classes."""
    return any(row.get("classes") for row in result["rows"].values())


def runs_csv(result: dict[str, Any]) -> str:
    """Return a line for each run: its values, seed and metrics [%], or why it failed or stopped.

    result: content of results.json.
    """
    metrics = _metric_names(result)
    names = ["point", *result["fields"], "seed", "status", *metrics, "seconds", "folder", "reason"]
    lines = []
    for name, row in result["rows"].items():
        if not row["values"]:
            continue
        point = {"point": name, **row["values"]}
        by_seed = zip(row["seeds"], row["seconds"], row["folders"], *_metrics(result, row).values())
        for seed, seconds, folder, *values in by_seed:
            run = {"seed": seed, "status": "finished", "seconds": round(seconds, 3)}
            lines.append({**point, **run, "folder": folder, **dict(zip(metrics, values))})
        for seed, reason in row["failed"].items():
            lines.append({**point, "seed": seed, "status": "failed", "reason": reason})
    for name, trial in result.get("stopped", {}).items():
        point = {"point": name, **trial["values"], "seed": result["seeds"][0], "status": "stopped"}
        reason = f"below the median at epoch {trial['epoch']}"
        lines.append({**point, metrics[0]: _percent(trial["top1"]), "reason": reason})
    return _csv(names, lines)


def points_csv(result: dict[str, Any]) -> str:
    """Return a line for each point and teacher: its values, its number of finished and failed
    seeds, and mean and sample standard deviation (n - 1) of each metric [%]; empty for one seed.

    result: content of results.json.
    """
    metrics = [*_metric_names(result), "seconds"]
    spread = [f"{name}_{kind}" for name in metrics for kind in ("mean", "std")]
    lines = []
    for name, row in result["rows"].items():
        line = {"point": name, **row["values"]}
        line |= {"seeds": len(row["seeds"]), "failed_seeds": len(row["failed"])}
        for metric, values in {**_metrics(result, row), "seconds": row["seconds"]}.items():
            if values and None not in values:
                line[f"{metric}_mean"] = round(statistics.mean(values), 4)
                if len(values) > 1:
                    line[f"{metric}_std"] = round(statistics.stdev(values), 4)
        lines.append(line)
    return _csv(["point", *result["fields"], "seeds", "failed_seeds", *spread], lines)


def _metric_names(result: dict[str, Any]) -> list[str]:
    """Return the columns of the metrics; each name ends in its unit."""
    groups = CLASS_GROUPS if has_unseen_classes(result) else ()
    top1 = [f"{name}_top1_percent" for name in ("validation", *HEADS, *groups)]
    return [*top1[:4], "agreement_percent", *top1[4:]]


def _metrics(result: dict[str, Any], row: dict[str, Any]) -> dict[str, list[float | None]]:
    """Return each metric of a row in %, one value per seed; None if a run has no such value."""
    shares = [row["validation"], *([top1[head] for top1 in row["top1"]] for head in HEADS)]
    shares.append(row["agreement"])
    if has_unseen_classes(result):
        classes = row.get("classes") or [{}] * len(row["seeds"])
        shares += ([run.get(group) for run in classes] for group in CLASS_GROUPS)
    percent = ([_percent(share) for share in values] for values in shares)
    return dict(zip(_metric_names(result), percent))


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 4)


def _csv(names: Sequence[str], lines: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def latex_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, label: str
) -> str:
    r"""Return a table in LaTeX, with the lines of the package booktabs; the first column is aligned
    left, the others right. The texts may have any characters.

    A cell `97.5 +- 0.7` becomes `97.5 $\pm$ 0.7`, and an empty value, `-`, a dash.

    >>> rows = [("class_a", "97.5 +- 0.7")]
    >>> print(latex_table(["head", "top-1 %"], rows, caption="A", label="b"))
    \begin{table}
      \centering
      \caption{A}
      \label{b}
      \begin{tabular}{lr}
        \toprule
        head & top-1 \% \\
        \midrule
        class\_a & 97.5 $\pm$ 0.7 \\
        \bottomrule
      \end{tabular}
    \end{table}
    """
    header, *body = (
        "    " + " & ".join(map(_latex_cell, line)) + r" \\" for line in (columns, *rows)
    )
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_latex_text(caption)}}}",
            rf"  \label{{{label}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
            r"    \toprule",
            header,
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )


def _latex_cell(cell: str) -> str:
    if cell == "-":
        return "--"
    if cell[:1] in ("+", "-") and cell[1:].replace(".", "").isdigit():
        return f"${cell}$"  # the sign of a number, not a hyphen
    return _latex_text(cell)


def _latex_text(text: str) -> str:
    return " $\\pm$ ".join(
        "".join(_LATEX.get(character, character) for character in part)
        for part in single_line(text).split(" +- ")
    )


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
