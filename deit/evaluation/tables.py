"""Print the result of an evaluation: tables of heads, disagreement and classes, and the cost."""

from pathlib import Path
from typing import Any

from deit.core.console import format_percent, info, is_main_process, table
from deit.core.filesystem import write_json
from deit.core.metrics import SMALL_SPLIT, format_margin
from deit.viz.tables import HEADS, head_name, prediction_name

_MAX_CLASSES = 20


def write_evaluation(path: str | Path, metrics: dict[str, Any]) -> None:
    """Write the metrics as JSON, from the main process only. Raises SystemFault."""
    if is_main_process():
        path = Path(path)
        write_json(path, metrics)
        info(f"wrote {path}")


def print_evaluation(metrics: dict[str, Any]) -> None:
    """Print heads and teacher, disagreement, the weakest classes and their usual confusions.

    metrics: as deit.evaluation.evaluate.evaluate returns them.
    """
    rows = {name: values for name, values in metrics["heads"].items() if values}
    if metrics["heads"]["distillation"] is None:
        del rows["fused"]  # equals the class head
    if metrics["teacher"]:
        rows["teacher"] = metrics["teacher"]
    for name, values in metrics.get("teachers", {}).items():
        info(f"teacher {name}: top-1 {format_percent(values['top1'])} %")
    images = f"{metrics['num_samples']} {metrics['split']} images at {metrics['image_size']} px"
    if "merge" in metrics:
        images += f", {metrics['merge']} tokens merged in each block"
    if "note" in metrics:
        info(f"{metrics['split']}: {metrics['note']}")
    columns, cells = head_cells(rows, metrics["num_samples"], len(metrics["class_names"]))
    table(f"{metrics['run']} ({metrics['checkpoint']}), {images}", columns, cells)
    if "agreement" in metrics:
        print_disagreement(
            metrics["agreement"], [name for name in ("teacher", *HEADS) if name in rows]
        )
        _print_classes(metrics)
    cosines = metrics["token_cosine"]
    if cosines:
        info(
            "cosine of class and distillation token, before the first block and after each: "
            + " ".join(f"{value:.2f}" for value in cosines)
        )
    if "tokens" in metrics:
        info(f"tokens after each block: {', '.join(map(str, metrics['tokens']))}")
    if "cost" in metrics:
        info(_format_cost(metrics["cost"]))


def head_cells(
    heads: dict[str, dict[str, float]], num_images: int, num_classes: int
) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of a table of heads, one row per head.

    Top-1 on few images has its margin. Top-5 of five classes or fewer, always 100 %, is left out.
    heads: metrics of each head by its name.
    """
    with_margin = num_images < SMALL_SPLIT
    others = {"top5": "top-5 %"} if num_classes > 5 else {}
    others["calibration_error"] = "calibration error %"
    margin_columns = ["correct", "95 % interval"] if with_margin else []
    cells = []
    for name, row in heads.items():
        margin = format_margin(row["top1"], num_images) if with_margin else ()
        shares = (format_percent(row[key]) for key in others)
        cells.append([head_name(name), format_percent(row["top1"]), *margin, *shares])
    return ["head", "top-1 %", *margin_columns, *others.values()], cells


def print_disagreement(agreement: dict[str, dict[str, float]], names: list[str]) -> None:
    """Print the share of differing predictions of each pair (Table 4 of the DeiT paper).

    agreement: the share of equal predictions, by name and by name. names: all but "truth", which
    comes first.
    """
    names = ["truth", *names]
    if len(names) < 3:
        return
    table(
        "disagreement %",
        ("", *map(prediction_name, names)),
        [
            (prediction_name(a), *(format_percent(1 - agreement[a][b]) for b in names))
            for a in names
        ],
    )


def _format_cost(cost: dict[str, Any]) -> str:
    low, high = cost["spread"]
    return (
        f"{cost['parameters'] / 1e6:.2f} M parameters, {cost['gmacs']:.3g} GMACs per image, "
        f"{cost['memory_mb']:.0f} MB, {cost['images_per_s']:.0f} images/s ({low:.0f} to "
        f"{high:.0f}) on {cost['measured_on']}"
    )


def _print_classes(metrics: dict[str, Any]) -> None:
    names, per_class = metrics["class_names"], metrics["per_class"]
    final = "fused" if "fused" in metrics["agreement"] else "class"
    if len(names) <= _MAX_CLASSES:
        title, listed = "per class", names
    else:
        title = f"the {_MAX_CLASSES} weakest classes"
        listed = sorted(names, key=lambda name: per_class[name][final] or 0.0)[:_MAX_CLASSES]
    heads = [name for name in (*HEADS, "teacher") if name in metrics["agreement"]]
    unseen = metrics.get("held_out", ())
    rows = []
    for name in listed:
        row = per_class[name]
        label = f"{name} (unseen)" if name in unseen else name
        shares = (format_percent(row[head]) for head in heads)
        rows.append((label, str(row["num_samples"]), *shares, _most_confused_with(metrics, name)))
    for group in ("seen", "unseen") if "held_out" in metrics else ():
        members = [name for name in names if (name in unseen) == (group == "unseen")]
        num_samples = sum(per_class[name]["num_samples"] for name in members)
        shares = (format_percent(metrics[group][head]) for head in heads)
        rows.append((f"all {group} classes", str(num_samples), *shares, ""))
    columns = ("class", "images", *(f"{head_name(head)} %" for head in heads), "most confused with")
    table(title, columns, rows)


def _most_confused_with(metrics: dict[str, Any], name: str) -> str:
    """Return the class most often predicted wrongly for images of class `name`, with the count."""
    names = metrics["class_names"]
    label = names.index(name)
    counts = [
        0 if predicted == label else count
        for predicted, count in enumerate(metrics["confusion"][label])
    ]
    most = max(counts)
    return f"{names[counts.index(most)]} ({most})" if most else "-"
