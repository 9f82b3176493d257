"""The sections of a run about its classes: accuracy, confusions and calibration."""

import math
from pathlib import Path

import torch

from deit.analysis.run_report import RunReport, write_csv
from deit.core.metrics import confusion
from deit.viz import charts, html

_HEADS = ("class", "distillation", "fused", "teacher")
_MAX_CONFUSION_CLASSES = 20  # with more classes there is no confusion matrix
_MAX_SIDE_BY_SIDE_CLASSES = 12  # of two confusion matrices
_PAPER_COSINES = "DeiT-B in the paper: 0.06 to 0.93"


def class_sections(report: RunReport, folder: Path) -> list[str]:
    """Return the accuracy of each class and the confusions; write their charts and tables."""
    evaluation = report.evaluation
    class_names = evaluation.metrics["class_names"]
    _write_class_csv(report, folder / f"{report.slug}-classes.csv")
    counts = _confusion_counts(report, report.final_head)
    content = [_class_accuracies(report, folder)]
    pairs = _confused_pairs(counts, class_names)
    if pairs:
        columns = ("true class", "predicted class", "images", "% of the true class")
        csv_path = folder / f"{report.slug}-confusions.csv"
        content.append(
            html.table(columns, pairs, caption="Most frequent confusions.", csv_path=csv_path)
        )
    parts = [html.side_by_side(*content)]
    if len(class_names) <= _MAX_CONFUSION_CLASSES:
        matrices = _confusion_matrices(report, counts, folder)
        narrow = len(class_names) <= _MAX_SIDE_BY_SIDE_CLASSES
        parts += [html.side_by_side(*matrices)] if narrow else matrices
    return parts


def _write_class_csv(report: RunReport, path: Path) -> None:
    """Write the accuracy of each class by head and `teacher` as CSV."""
    results = report.evaluation.metrics
    unseen = set(results.get("held_out", ()))
    heads = [name for name in _HEADS if name in report.evaluation.predictions]
    lines = []
    for name in results["class_names"]:
        row = results["per_class"][name]
        line = {"class": name, "unseen": name in unseen, "num_samples": row["num_samples"]}
        lines.append(line | {f"{head}_top1": row[head] for head in heads})
    write_csv(path, ["class", "unseen", "num_samples", *(f"{head}_top1" for head in heads)], lines)


def _class_accuracies(report: RunReport, folder: Path) -> str:
    """Return a chart of the accuracy in each class, or in the weakest ones of many."""
    results, head = report.evaluation.metrics, report.final_head
    names, per_class = results["class_names"], results["per_class"]
    unseen = set(results.get("held_out", ()))
    weakest = sorted(names, key=lambda name: per_class[name][head] or 0.0)
    weakest = weakest[: 2 * _MAX_CONFUSION_CLASSES]
    series = {"student": [per_class[name][head] or 0.0 for name in weakest]}
    if "teacher" in report.evaluation.predictions:
        series["teacher"] = [per_class[name]["teacher"] or 0.0 for name in weakest]
    labels = [f"{name} (unseen)" if name in unseen else name for name in weakest]
    svg = charts.chart(
        charts.per_class(labels, series),
        folder / f"{report.slug}-classes.png",
        height=1.1 + 0.24 * len(weakest),
    )
    caption = "Accuracy in each class"
    if len(weakest) < len(names):
        caption = f"Accuracy in the {len(weakest)} weakest of {len(names)} classes"
    return html.figure(svg, f"{caption}, the weakest on top.")


def _confusion_matrices(report: RunReport, counts: list[list[int]], folder: Path) -> list[str]:
    """Return the confusion matrix of the student, and its difference to that of a teacher."""
    evaluation = report.evaluation
    names = evaluation.metrics["class_names"]
    student = _row_percent(counts)
    matrices = [
        html.heat_table(
            names,
            names,
            _zeros_as_none(student),
            cell_format="{:.0f}",
            corner="true class",
            caption="Confusion matrix of the student: predictions in % of each true class (row).",
            csv_path=folder / f"{report.slug}-confusion.csv",
        )
    ]
    if "teacher" in evaluation.predictions:
        teacher = _row_percent(_confusion_counts(report, "teacher"))
        difference = [
            [a - b for a, b in zip(student_row, teacher_row)]
            for student_row, teacher_row in zip(student, teacher)
        ]
        matrices.append(
            html.heat_table(
                names,
                names,
                _zeros_as_none(difference),
                cell_format="{:+.0f}",
                corner="true class",
                caption="Confusion matrix of the student minus that of the teacher, in percentage "
                "points.",
                signed=True,
                csv_path=folder / f"{report.slug}-minus-teacher.csv",
            )
        )
    return matrices


def _confusion_counts(report: RunReport, head: str) -> list[list[int]]:
    """Return the confusion matrix of a head as counts, [true class][predicted class]."""
    evaluation = report.evaluation
    predictions = torch.tensor(evaluation.predictions[head])
    labels = torch.tensor(evaluation.labels)
    return confusion(predictions, labels, len(evaluation.metrics["class_names"])).tolist()


def _row_percent(counts: list[list[int]]) -> list[list[float]]:
    return [[100 * count / (sum(row) or 1) for count in row] for row in counts]


def _zeros_as_none(values: list[list[float]]) -> list[list[float | None]]:
    return [[value or None for value in row] for row in values]


def _confused_pairs(
    counts: list[list[int]], names: list[str], max_pairs: int = 10
) -> list[list[str]]:
    """Return true class, predicted class, images and share of the most frequent confusions."""
    pairs = [
        (count, label, prediction)
        for label, row in enumerate(counts)
        for prediction, count in enumerate(row)
        if label != prediction and count
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    return [
        [names[label], names[prediction], str(count), f"{100 * count / sum(counts[label]):.1f}"]
        for count, label, prediction in pairs[:max_pairs]
    ]


def reliability_bins(
    predictions: list[int], confidence: list[float], labels: list[int], bins: int = 15
) -> list[tuple[float, float, int]]:
    """Return (mean confidence, accuracy, samples) of each non-empty bin (Guo et al. 2017).

    predictions, confidence, labels: one per sample. bins: number of equal intervals of confidence.
    Confidence and accuracy are in [0, 1].
    """
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for prediction, sure, label in zip(predictions, confidence, labels, strict=True):
        index = min(max(math.ceil(sure * bins), 1), bins) - 1
        members[index].append((sure, prediction == label))
    return [
        (
            sum(sure for sure, _ in samples) / len(samples),
            sum(correct for _, correct in samples) / len(samples),
            len(samples),
        )
        for samples in members
        if samples
    ]


def calibration_section(report: RunReport, folder: Path) -> str:
    """Return the reliability diagram and, of a distilled student, the similarity of its tokens."""
    evaluation = report.evaluation
    heads = {"student": report.final_head}
    if "teacher" in evaluation.predictions:
        heads["teacher"] = "teacher"
    bins = {
        name: reliability_bins(
            evaluation.predictions[head], evaluation.confidence[head], evaluation.labels
        )
        for name, head in heads.items()
    }
    svg = charts.chart(
        charts.reliability(bins), folder / f"{report.slug}-calibration.png", width=5, height=3.8
    )
    caption = (
        "Reliability diagram. Below the gray diagonal the network is overconfident. Larger points "
        "have more images."
    )
    figures = [html.figure(svg, caption)]
    cosines = evaluation.metrics["token_cosine"]
    if cosines:
        svg = charts.chart(
            charts.token_cosine_chart(cosines),
            folder / f"{report.slug}-tokens.png",
            width=5,
            height=3.8,
        )
        caption = f"Cosine similarity of class and distillation token ({_PAPER_COSINES})."
        figures.append(html.figure(svg, caption))
    return html.side_by_side(*figures)
