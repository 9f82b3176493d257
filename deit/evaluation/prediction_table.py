"""Write the predictions of an evaluation as CSV, one line per image."""

import csv
import io
from pathlib import Path

from deit.core.console import count_noun, info, is_main_process
from deit.core.filesystem import atomic_write
from deit.datasets.splits import load_split
from deit.evaluation.evaluate import EvaluationResult
from deit.evaluation.load_run import evaluation_config, resolve_run


def write_predictions(
    path: str | Path,
    result: EvaluationResult,
    run: str | Path,
    *,
    split: str = "test",
    root: str | None = None,
) -> None:
    """Write path, label, prediction and its probability of every image of a split, as CSV.

    The prediction is that of the fused heads, or of the only head; if there is a teacher, its
    prediction follows. Images that are no files have a number instead of a path. result: of
    evaluating this split of this run. root: the folder of the images, if they were moved. Raises
    SystemFault.
    """
    if not is_main_process():
        return
    config, _ = resolve_run(run, "best")
    # Images in memory have no names; those of a split in files are listed in the same order.
    config = evaluation_config(config.replace(data={"storage": "files"}), root=root)
    _, images = load_split(config.data, split)
    names = result.metrics["class_names"]
    final = "fused" if "fused" in result.predictions else "class"
    with_teacher = "teacher" in result.predictions
    columns = ["image", "label", "prediction", "probability", *["teacher"] * with_teacher]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for index, label in enumerate(result.labels.tolist()):
        predicted = int(result.predictions[final][index])
        row = [images.name(index), names[label], names[predicted]]
        row.append(f"{float(result.confidence[final][index]):.4f}")
        if with_teacher:
            row.append(names[int(result.predictions["teacher"][index])])
        writer.writerow(row)
    path = Path(path)
    atomic_write(path, text.getvalue().encode(errors="surrogateescape"))
    info(f"wrote {path}: {count_noun(len(result.labels), 'image')}")
