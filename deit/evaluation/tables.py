"""What evaluation found, for a person: tables of heads, of disagreement, of classes, and costs."""

from pathlib import Path
from typing import Any

from deit.core.console import format_percent, info, is_main_process, table
from deit.core.filesystem import write_json
from deit.viz.tables import HEADS


def write_evaluation(path: Path, found: dict[str, Any]) -> None:
    """Write the numbers as JSON, from the main process. Raises SystemFault."""
    if is_main_process():
        write_json(path, found)
        info(f"wrote {path}")


_SHOWN_CLASSES = 20


def print_evaluation(found: dict[str, Any]) -> None:
    """Heads and teacher, who disagrees with whom, the weakest classes and the commonest confusions,
    for a person."""
    rows = {name: measured for name, measured in found["heads"].items() if measured}
    if found["heads"]["distillation"] is None:
        del rows["fused"]  # the class head once more
    if found["teacher"]:
        rows["teacher"] = found["teacher"]
    for name, measured in found.get("teachers", {}).items():
        info(f"teacher {name}: top-1 {format_percent(measured['top1'])} %")
    side = found["image_size"]
    where = f"{found['num_samples']} {found['split']} images at {side} px"
    if "merge" in found:
        where += f", {found['merge']} tokens merged a block"
    if "note" in found:
        info(f"{found['split']}: {found['note']}")
    table(
        f"{found['run']} ({found['checkpoint']}), {where}",
        ("head", "top-1 %", "top-5 %", "calibration error %"),
        [
            (name, *(format_percent(row[key]) for key in ("top1", "top5", "calibration_error")))
            for name, row in rows.items()
        ],
    )
    if "agreement" in found:
        print_disagreement(found["agreement"], [name for name in _VOICES if name in rows])
        _print_classes(found)
    cosines = found["token_cosine"]
    if cosines:
        info(
            "cosine of class and distillation token, before the first block and after each: "
            + " ".join(f"{value:.2f}" for value in cosines)
        )
    if "tokens" in found:
        info(f"tokens after each block: {', '.join(map(str, found['tokens']))}")
    if "cost" in found:
        info(told_cost(found["cost"]))


_VOICES = ("teacher", "class", "distillation", "fused")


def print_disagreement(agreement: dict[str, dict[str, float]], names: list[str]) -> None:
    """Share of different answers for each pair, the truth among them (the paper's Table 4)."""
    everyone = ["truth", *names]
    if len(everyone) < 3:
        return
    table(
        "disagreement, % of the images",
        ("", *everyone),
        [(one, *(format_percent(1 - agreement[one][o]) for o in everyone)) for one in everyone],
    )


def told_cost(cost: dict[str, Any]) -> str:
    """Parameters, arithmetic, memory and speed in a line."""
    low, high = cost["spread"]
    return (
        f"{cost['parameters'] / 1e6:.2f} M parameters, {cost['gmacs']:.3g} GMACs an image, "
        f"{cost['memory_mb']:.0f} MB, {cost['images_per_s']:.0f} images/s ({low:.0f} to "
        f"{high:.0f}) on {cost['measured_on']}"
    )


def _print_classes(found: dict[str, Any]) -> None:
    names = found["class_names"]
    head = "fused" if "fused" in found["agreement"] else "class"
    order = sorted(names, key=lambda name: found["per_class"][name][head] or 0.0)
    shown = names if len(names) <= _SHOWN_CLASSES else order[:_SHOWN_CLASSES]
    title = "per class" if len(shown) == len(names) else f"the {len(shown)} weakest classes"
    heads = [name for name in (*HEADS, "teacher") if name in found["agreement"]]
    counts = found["confusion"]
    rows = []
    for name in shown:
        row = found["per_class"][name]
        own = names.index(name)
        mistakes = [0 if place == own else count for place, count in enumerate(counts[own])]
        worst = mistakes.index(max(mistakes))
        taken = f"{names[worst]} ({mistakes[worst]})" if mistakes[worst] else "-"
        called = f"{name} (unseen)" if name in found.get("held_out", ()) else name
        rows.append(
            (called, str(row["num_samples"]), *(format_percent(row[h]) for h in heads), taken)
        )
    for group in ("seen", "unseen") if "held_out" in found else ():
        held = found["held_out"]
        ours = [name for name in names if (name in held) == (group == "unseen")]
        number = sum(found["per_class"][name]["num_samples"] for name in ours)
        shares = (format_percent(found[group][head]) for head in heads)
        rows.append((f"all {group} classes", str(number), *shares, ""))
    table(title, ("class", "images", *(f"{h} %" for h in heads), "most taken for"), rows)
