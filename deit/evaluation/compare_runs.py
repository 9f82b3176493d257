"""Several evaluations beside each other: one table, throughput against accuracy, who disagrees."""

from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit.core.console import format_percent, info, is_main_process, table
from deit.core.errors import ConfigError
from deit.core.filesystem import write_json
from deit.core.metrics import agreement
from deit.core.run_folder import is_checkpoint_dir
from deit.datasets.imagenet_variants import check_known
from deit.evaluation.evaluate import EvaluationResult, evaluate_run
from deit.evaluation.load_run import resolve_run, student_at_resolution
from deit.evaluation.tables import print_disagreement
from deit.models.surgery.token_merging import check_merging
from deit.viz.plots import draw_throughput
from deit.viz.tables import HEADS


def compare_evaluations(
    runs: list[Path],
    *,
    resolutions: tuple[int, ...],
    crops: tuple[float, ...],
    merges: tuple[int, ...],
    plot: Path | None,
    json_file: Path | None,
    command: str,
    checkpoint: str = "best",
    **asked: Any,
) -> dict[str, Any]:
    """Evaluate runs at resolutions, crops and numbers of merged tokens, each with each; print one
    table, and of several runs on the same images who disagrees with whom.

    resolutions, crops: empty: each run's own. merges: numbers of tokens a block; empty: no
    merging. plot: a PNG of throughput against accuracy. command: as it was typed, for the file. The
    others: as deit.evaluation.evaluate.examine takes them. Returns `rows`, what evaluation found,
    `agreement`, shares of equal answers by name, and `command`. Raises the errors of
    deit.core.errors."""
    _check(runs, checkpoint, resolutions, merges, asked.get("test_set"))
    examined: dict[str, EvaluationResult] = {}
    changes = (values or (None,) for values in (resolutions, crops, merges))
    for run, side, crop, merge_tokens in product(runs, *changes):
        name = _name(run, runs, side, crop, merge_tokens)
        info(f"{name}")
        examined[name] = evaluate_run(
            run,
            checkpoint=checkpoint,
            resolution=side,
            crop=crop,
            merge_tokens=merge_tokens,
            cost=True,
            **asked,
        )
    rows = {name: one.found for name, one in examined.items()}
    _print(rows)
    result: dict[str, Any] = {"rows": rows, "command": command}
    voices = _voices(examined)
    if len(voices) > 1:
        shares = {a: {b: agreement(x, y) for b, y in voices.items()} for a, x in voices.items()}
        print_disagreement(shares, [name for name in voices if name != "truth"])
        result["agreement"] = shares
    if is_main_process() and plot is not None:
        draw_throughput(rows, plot)
        info(f"drew {plot}")
    if is_main_process() and json_file is not None:
        write_json(json_file, result)
        info(f"wrote {json_file}")
    return result


def _check(
    runs: list[Path],
    checkpoint: str,
    resolutions: tuple[int, ...],
    merges: tuple[int, ...],
    test_set: str | None,
) -> None:
    """What can be wrong with the runs, before the first is evaluated."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is named twice; once is enough")
    for run in runs:
        _, saved = resolve_run(run, checkpoint)
        for side in resolutions or (None,):
            student, facts = student_at_resolution(saved, side)
            for merge_tokens in merges:
                check_merging(student.network, merge_tokens)
        if test_set is not None:
            check_known(test_set, facts.class_names)


def _name(
    run: Path, runs: list[Path], side: int | None, crop: float | None, merge_tokens: int | None
) -> str:
    """A row's name: the run's folder, in full where two are called the same; what was changed."""
    short = [_folder(one).name for one in runs]
    own = _folder(run).name
    # "truth" and "teacher" are others' names in the table of disagreement.
    clear = short.count(own) == 1 and not own.startswith(("truth", "teacher"))
    told = [own if clear else str(run)]
    told += [f"{side} px"] if side is not None else []
    told += [f"crop {crop:g}"] if crop is not None else []
    told += [f"merge {merge_tokens}"] if merge_tokens is not None else []
    return ", ".join(told)


def _folder(run: Path) -> Path:
    return run.resolve().parent if is_checkpoint_dir(run) else run.resolve()


def _voices(examined: dict[str, EvaluationResult]) -> dict[str, Tensor]:
    """Final answers by name, with the truth and the teacher, where all are of the same images."""
    first, *others = examined.values()
    same = all(one.labels is not None for one in examined.values()) and all(
        one.images == first.images and torch.equal(one.labels, first.labels) for one in others
    )
    if not same:
        return {}
    voices = {"truth": first.labels}
    for name, one in examined.items():
        said = one.answers.get("teacher")
        if said is not None and not any(torch.equal(said, other) for other in voices.values()):
            voices[f"teacher of {name}"] = said
    for name, one in examined.items():
        voices[name] = one.answers.get("fused", one.answers["class"])
    return voices


def _print(rows: dict[str, dict[str, Any]]) -> None:
    cells = []
    for name, found in rows.items():
        cost, heads = found["cost"], found["heads"]
        two = heads["distillation"] is not None
        shares = [heads[head] if two or head == "class" else None for head in HEADS]
        cells.append(
            (
                name,
                f"{found['image_size']}",
                *("-" if share is None else format_percent(share["top1"]) for share in shares),
                f"{cost['parameters'] / 1e6:.2f}",
                f"{cost['gmacs']:.3g}",
                f"{cost['memory_mb']:.0f}",
                f"{cost['images_per_s']:.0f}",
            )
        )
    number = {found["num_samples"] for found in rows.values()}
    images = f"{number.pop()} images" if len(number) == 1 else "images of each"
    split = next(iter(rows.values()))["split"]
    table(
        f"top-1 % on the {images} of {split}",
        ("", "px", *HEADS, "M parameters", "GMACs", "MB", "images/s"),
        cells,
    )
