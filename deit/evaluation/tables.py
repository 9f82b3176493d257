"""Print the result of an evaluation: tables of heads, disagreement and classes, and the cost."""

from pathlib import Path
from typing import Any

from deit.core.console import format_percent, info, is_main_process, table
from deit.core.filesystem import write_json
from deit.viz.tables import HEADS

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
    table(
        f"{metrics['run']} ({metrics['checkpoint']}), {images}",
        ("head", "top-1 %", "top-5 %", "calibration error %"),
        [
            (name, *(format_percent(row[key]) for key in ("top1", "top5", "calibration_error")))
            for name, row in rows.items()
        ],
    )
    if "agreement" in metrics:
        names = [name for name in ("teacher", *HEADS) if name in rows]
        print_disagreement(metrics["agreement"], names)
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
        ("", *names),
        [(a, *(format_percent(1 - agreement[a][b]) for b in names)) for a in names],
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
    columns = ("class", "images", *(f"{head} %" for head in heads), "most confused with")
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
