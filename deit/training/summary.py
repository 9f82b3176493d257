"""Summary of a finished run, as plain values and as a few lines of text."""

import shlex
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deit.config.command_choices import EXPORT_PACKAGES
from deit.config.schema import Config
from deit.core import run_log
from deit.core.console import count_noun, format_duration, format_percent, info
from deit.core.metrics import SMALL_SPLIT, format_margin
from deit.training.save import selection_metric
from deit.viz.tables import head_name

SUMMARY = "summary.json"
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_USES = {
    "onnx": "deit export {run} --format onnx      for ONNX Runtime",
    "int8": "deit quantize {run}      the file it was trained for",
}


def summary_of(config: Config, out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return the content of summary.json.

    It has time, speed, memory, the best epoch with its validation top-1 by head and the accuracy
    that selected it, the teacher's accuracy, the curve over epochs, the training accuracy if it was
    low and still rising, and a command that can use the student. Accuracies are in [0, 1], times in
    seconds, memory in MiB. result: the content of result.json.

    Example:
        >>> from deit.config.validation import load_config
        >>> from deit.core.run_folder import read_result
        >>> run = Path("checkpoints/digits")
        >>> summary = summary_of(load_config(run / "config.json"), run, read_result(run))
        >>> summary["student"], summary["epochs"], sorted(summary["best"])
        ('deit_micro', 2, ['class', 'distillation', 'fused'])
    """
    rows = run_log.read_metrics(out)
    measured = [row for row in rows if "loader" in row]
    best = {name: value for name, value in result["best"].items() if name.endswith("_top1")}
    return {
        "run": str(out),
        "student": config.student.name,
        "use": "onnx" if config.student.qat == "none" else "int8",
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
        "validation_images": result.get("validation_images"),
        "rising": rising_accuracy(rows),
        "curve": [
            [row["epoch"], selection_metric(row["validation"])]
            for row in rows
            if "validation" in row
        ],
    }


def rising_accuracy(rows: list[dict[str, Any]]) -> float | None:
    """Return the training accuracy at the end of a run if it was low and clearly still rising.

    It was if it is below 80 %, and both this accuracy, on training views, and that on validation
    images are on average two points higher in the last fifth of the epochs than in as many measured
    epochs before it. None otherwise, and for fewer than ten epochs. rows: of metrics.jsonl.
    """
    count = len(rows) // 5
    if count < 2:
        return None
    head = "fused_top1" if "fused_top1" in rows[-1]["train"] else "class_top1"
    final = rows[-1]["train"].get(head)
    if final is None or final >= 0.8:
        return None

    def training(row: dict[str, Any]) -> float | None:
        return row["train"].get(head)

    def validation(row: dict[str, Any]) -> float | None:
        return selection_metric(row["validation"]) if "validation" in row else None

    for accuracy in (training, validation):
        earlier, last = (
            [value for row in part if (value := accuracy(row)) is not None]
            for part in (rows[:-count], rows[-count:])
        )
        before = earlier[-len(last) :]
        if not (before and last) or statistics.mean(last) - statistics.mean(before) < 0.02:
            return None
    return final


def _median(values: Any) -> float | None:
    listed = list(values)
    return statistics.median(listed) if listed else None


def print_summary(summary: dict[str, Any]) -> None:
    """Print a summary from `summary_of`, with commands to run next."""
    run = shlex.quote(summary["run"])
    speed = ""
    if summary["images_per_s"] is not None:
        share = format_percent(summary["loader_share"])
        speed = f", {summary['images_per_s']:,.0f} images/s ({share} % of time in loader)"
    if summary["memory_mb"] is not None:
        speed += f", peak memory {summary['memory_mb']:,.0f} MB"
    skipped = f", {summary['skipped']} steps skipped" if summary["skipped"] else ""
    info(
        f"\nfinished in {format_duration(summary['seconds'])}: "
        f"{count_noun(summary['epochs'], 'epoch')}{speed}{skipped}"
    )
    heads = [f"{head_name(name)} {format_percent(top1)}" for name, top1 in summary["best"].items()]
    for label, key in (("agreement with teacher", "agreement"), ("teacher", "teacher")):
        if summary[key] is not None:
            heads.append(f"{label} {format_percent(summary[key])}")
    info(f"  validation top-1 %: {', '.join(heads)} (best weights: epoch {summary['best_epoch']})")
    num_images = summary["validation_images"]
    if num_images is not None and num_images < SMALL_SPLIT:
        correct, interval = format_margin(summary["selected"], num_images)
        selected = format_percent(summary["selected"])
        info(f"  {selected} % is {correct} images; 95 % interval {interval}")
    values = [value for _, value in summary["curve"]]
    if len(values) > 1:
        low, high = min(values), max(values)
        info(
            f"  over the epochs: {sparkline(values)} {format_percent(low)} to "
            f"{format_percent(high)}"
        )
    if summary["rising"] is not None:
        info(
            f"  training accuracy {format_percent(summary['rising'])} % was still rising: more "
            "epochs may help (--optim.epochs)"
        )
    use = _USES[summary["use"]].format(run=run)
    if not all(map(find_spec, EXPORT_PACKAGES["onnx"])):
        use += " (pip install 'deit[export]' first)"
    info(
        f"next:\n  deit evaluate {run}      test accuracy by head\n"
        f"  deit predict {run} PHOTO.jpg      classes of your images\n  {use}"
    )


def sparkline(values: list[float], width: int = _WIDTH) -> str:
    """Return values as a line of bars scaled between their minimum and maximum.

    Of more than `width` values, the last of each of `width` equal ranges is shown.

    Example:
        >>> sparkline([1.0, 2.0, 3.0])
        '▁▅█'
    """
    if len(values) > width:
        values = [values[(index + 1) * len(values) // width - 1] for index in range(width)]
    low, high = min(values), max(values)
    steps = len(_BARS) - 1
    return "".join(_BARS[round((value - low) / ((high - low) or 1) * steps)] for value in values)
