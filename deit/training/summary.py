"""What a finished run came to, in ten seconds for a person and as plain values for a program."""

import shlex
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deit.config.choices import EXPORT_PACKAGES
from deit.config.schema import Config
from deit.config.student_section import StudentConfig
from deit.core import run_log
from deit.core.console import format_duration, format_percent, info
from deit.core.errors import ConfigError
from deit.models.timm_format import timm_name
from deit.training.save import selection_metric

SUMMARY = "summary.json"
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_USES = {
    "timm": "deit export {run} --format timm      for timm and transformers",
    "onnx": "deit export {run} --format onnx      for ONNX Runtime",
    "int8": "deit quantize {run}      the file it was trained for",
}


def summary_of(config: Config, out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """A finished run in plain values: time, speed, memory, the epoch of the best weights, their
    validation top-1 by head, that which selected them, the teacher's, its curve, and a use that
    takes its student.

    result: what its result.json holds.
    """
    rows = run_log.read_metrics(out)
    measured = [row for row in rows if "loader" in row]
    best = {name: value for name, value in result["best"].items() if name.endswith("_top1")}
    return {
        "run": str(out),
        "student": config.student.name,
        "use": _use_of(config.student),
        "epochs": result["epochs"],
        "seconds": result["seconds"],
        "images_per_s": _median(row["images_per_s"] for row in measured),
        "loader_share": _median(row["loader"]["share"] for row in measured),
        "memory_mb": max((row.get("memory_mb") or 0 for row in measured), default=0) or None,
        "skipped": result["skipped"],
        "best_epoch": result["best"]["epoch"],
        "selected": result["best"]["top1"],
        "best": {name.removesuffix("_top1"): value for name, value in best.items()},
        "agreement": result["best"].get("agreement"),
        "teacher": result.get("teacher_top1"),
        "curve": [
            [row["epoch"], selection_metric(row["validation"])]
            for row in rows
            if "validation" in row
        ],
    }


def _use_of(student: StudentConfig) -> str:
    """Of _USES one that takes the student."""
    if student.qat != "none":
        return "int8"
    try:
        timm_name(student)
    except ConfigError:
        return "onnx"
    return "timm"


def _median(values: Any) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def print_summary(told: dict[str, Any]) -> None:
    """The same for a person, with what could be done next. told: what `summary_of` returns."""
    run = shlex.quote(told["run"])
    speed = ""
    if told["images_per_s"] is not None:
        share = format_percent(told["loader_share"])
        speed = f", {told['images_per_s']:,.0f} images/s (loader {share} %)"
    if told["memory_mb"] is not None:
        speed += f", {told['memory_mb']:,.0f} MB"
    left_out = f", {told['skipped']} updates left out" if told["skipped"] else ""
    info(
        f"\nfinished in {format_duration(told['seconds'])}: {told['epochs']} "
        f"epochs{speed}{left_out}"
    )
    heads = [
        f"{name.replace('_', ' ')} {format_percent(top1)}" for name, top1 in told["best"].items()
    ]
    heads += [f"= teacher {format_percent(told['agreement'])}"] * (told["agreement"] is not None)
    heads += [f"the teacher itself {format_percent(told['teacher'])}"] * (
        told["teacher"] is not None
    )
    info(f"  validation top-1 %: {', '.join(heads)} (best weights: epoch {told['best_epoch']})")
    values = [value for _, value in told["curve"]]
    if len(values) > 1:
        low, high = min(values), max(values)
        info(
            f"  over the epochs: {sparkline(values)} {format_percent(low)} to "
            f"{format_percent(high)}"
        )
    use = _USES[told["use"]].format(run=run)
    if told["use"] != "timm" and not all(map(find_spec, EXPORT_PACKAGES["onnx"])):
        use += " (pip install 'deit[export]' first)"
    info(f"next:\n  deit evaluate {run}      the test split, head by head\n  {use}")


def sparkline(values: list[float], width: int = _WIDTH) -> str:
    """Values as a line of bars, the lowest flat and the highest full; of many the last of each of
    `width` stretches."""
    if len(values) > width:
        values = [values[(place + 1) * len(values) // width - 1] for place in range(width)]
    low, high = min(values), max(values)
    steps = len(_BARS) - 1
    return "".join(_BARS[round((value - low) / ((high - low) or 1) * steps)] for value in values)
