"""Evaluate several runs: one table, a plot of throughput against accuracy, and disagreement."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit.config.command_choices import check_test_set
from deit.core.console import format_percent, info, is_main_process, table
from deit.core.errors import ConfigError
from deit.core.filesystem import to_paths, write_json
from deit.core.metrics import agreement
from deit.core.run_folder import is_checkpoint_dir
from deit.datasets.sources.imagenet_test_sets import check_has_classes
from deit.evaluation.evaluate import EvaluationResult, evaluate
from deit.evaluation.load_run import resolve_run, student_at_resolution
from deit.evaluation.tables import print_disagreement
from deit.models.surgery.token_merging import check_merging
from deit.viz.plots import draw_throughput
from deit.viz.tables import HEADS, head_name


def compare_evaluations(
    runs: str | Path | Sequence[str | Path],
    *,
    resolutions: Sequence[int] = (),
    crops: Sequence[float] = (),
    merge_tokens: Sequence[int] = (),
    checkpoint: str = "best",
    split: str = "test",
    root: str | None = None,
    teacher: str | Sequence[str] | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    test_set: str | None = None,
    plot: str | Path | None = None,
    json_file: str | Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Evaluate each run at each resolution, crop and number of merged tokens; print one table, and
    the disagreement of each pair if all were evaluated on the same images.

    resolutions [px], crops, merge_tokens: empty: each run's own, and no merging. checkpoint, split,
    root, teacher, device, batch_size, test_set, command: as for deit.evaluation.evaluate.evaluate.
    plot: a PNG file to write, throughput against accuracy. json_file: a file for the result.
    Returns `rows`, the metrics by name; `agreement`, the share of equal predictions by name and by
    name, if the images are the same; and `command`. Raises the errors of deit.core.errors.

    >>> from deit.core.console import quiet
    >>> with quiet():
    ...     result = compare_evaluations(["checkpoints/digits", "checkpoints/digits-teacher"])
    >>> list(result["rows"])
    ['digits', 'digits-teacher']
    """
    runs = to_paths(runs)
    check_test_set(test_set, split=split, root=root, teacher=teacher)
    _check(runs, checkpoint, resolutions, merge_tokens, test_set)
    results: dict[str, EvaluationResult] = {}
    settings = (values or (None,) for values in (resolutions, crops, merge_tokens))
    for run, side, crop, merge in product(runs, *settings):
        name = _row_name(run, runs, side, crop, merge)
        info(name)
        results[name] = evaluate(
            run,
            checkpoint=checkpoint,
            split=split,
            root=root,
            teacher=teacher,
            device=device,
            batch_size=batch_size,
            resolution=side,
            crop=crop,
            merge_tokens=merge,
            test_set=test_set,
            cost=True,
            command=command,
        )
    rows = {name: result.metrics for name, result in results.items()}
    _print_rows(rows)
    report: dict[str, Any] = {"rows": rows, "command": command, **_agreement(results)}
    _write(report, plot, json_file)
    return report


def _write(report: dict[str, Any], plot: str | Path | None, json_file: str | Path | None) -> None:
    """Write the plot and the result to the files that are given, in the main process."""
    if is_main_process() and plot is not None:
        draw_throughput(report["rows"], Path(plot))
        info(f"wrote {Path(plot)}")
    if is_main_process() and json_file is not None:
        write_json(Path(json_file), report)
        info(f"wrote {Path(json_file)}")


def _agreement(results: dict[str, EvaluationResult]) -> dict[str, Any]:
    """Print the disagreement of each pair, and return their agreement; empty if the images differ
    or there is only one."""
    predictions = _comparable_predictions(results)
    if len(predictions) < 2:
        return {}
    shares = {
        a: {b: agreement(predictions[a], predictions[b]) for b in predictions} for a in predictions
    }
    print_disagreement(shares, [name for name in predictions if name != "truth"])
    return {"agreement": shares}


def _check(
    runs: list[Path],
    checkpoint: str,
    resolutions: Sequence[int],
    merge_tokens: Sequence[int],
    test_set: str | None,
) -> None:
    """Check all runs and settings before the first run is evaluated."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is given twice; give each run once")
    for run in runs:
        _, saved = resolve_run(run, checkpoint)
        for side in resolutions or (None,):
            student, model_info = student_at_resolution(saved, side)
            for merge in merge_tokens:
                check_merging(student.network, merge)
        if test_set is not None:
            check_has_classes(test_set, model_info.class_names)


def _row_name(
    run: Path, runs: list[Path], side: int | None, crop: float | None, merge: int | None
) -> str:
    """Return the name of the run's folder (its path if that is ambiguous) and the settings."""
    folder_names = [_run_dir(path).name for path in runs]
    name = _run_dir(run).name
    # The table of disagreement has rows "truth" and "teacher of RUN".
    unique = folder_names.count(name) == 1 and not name.startswith(("truth", "teacher"))
    parts = [name if unique else str(run)]
    parts += [f"{side} px"] if side is not None else []
    parts += [f"crop {crop:g}"] if crop is not None else []
    parts += [f"merge {merge}"] if merge is not None else []
    return ", ".join(parts)


def _run_dir(run: Path) -> Path:
    return run.resolve().parent if is_checkpoint_dir(run) else run.resolve()


def _comparable_predictions(results: dict[str, EvaluationResult]) -> dict[str, Tensor]:
    """Return truth, teachers and final predictions by name; empty if the images differ."""
    first, *rest = results.values()
    same_images = all(result.labels is not None for result in results.values()) and all(
        result.split_key == first.split_key and torch.equal(result.labels, first.labels)
        for result in rest
    )
    if not same_images:
        return {}
    predictions = {"truth": first.labels}
    for name, result in results.items():
        of_teacher = result.predictions.get("teacher")
        if of_teacher is None or any(torch.equal(of_teacher, p) for p in predictions.values()):
            continue
        predictions[f"teacher of {name}"] = of_teacher
    for name, result in results.items():
        predictions[name] = result.predictions.get("fused", result.predictions["class"])
    return predictions


def _print_rows(rows: dict[str, dict[str, Any]]) -> None:
    cells = []
    for name, metrics in rows.items():
        cost, heads = metrics["cost"], metrics["heads"]
        two_heads = heads["distillation"] is not None
        by_head = [heads[head] if two_heads or head == "class" else None for head in HEADS]
        cells.append(
            (
                name,
                f"{metrics['image_size']}",
                *("-" if head is None else format_percent(head["top1"]) for head in by_head),
                f"{cost['parameters'] / 1e6:.2f}",
                f"{cost['gmacs']:.3g}",
                f"{cost['memory_mb']:.0f}",
                f"{cost['images_per_s']:.0f}",
            )
        )
    num_samples = {metrics["num_samples"] for metrics in rows.values()}
    images = f"{num_samples.pop()} images" if len(num_samples) == 1 else "images of each run"
    split = next(iter(rows.values()))["split"]
    table(
        f"top-1 % ({split}, {images})",
        ("", "px", *map(head_name, HEADS), "M parameters", "GMACs", "MB", "images/s"),
        cells,
    )
