"""Evaluation of a finished run: metrics of every head and of the teacher on the same images."""

import time
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from deit.config.arguments import checks_types
from deit.config.command_choices import check_choice, check_test_set
from deit.config.schema import Config
from deit.config.sections.data import DataConfig
from deit.core.accelerator import environment_info, hardware_summary, own_accelerate_state
from deit.core.console import format_percent, obeys_verbose
from deit.core.errors import DataError
from deit.core.host_memory import check_inference_memory
from deit.core.metrics import agreement, calibration_error, confusion, topk_accuracy
from deit.core.rng import unchanged_generators
from deit.core.run_folder import NAMES
from deit.core.signals import GracefulStop
from deit.core.types import logits_by_head
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.splits import digest_of_images, unseen_labels
from deit.distill.build import build_accelerator
from deit.distill.inference import predict_split, views_of_chunks
from deit.evaluation.load_run import (
    EvaluationSet,
    evaluation_config,
    evaluation_images,
    resolve_run,
    student_at_resolution,
)
from deit.evaluation.teacher_logits import combine_logits, largest_batch, teacher_logits
from deit.models.attention_rollout import token_cosines
from deit.models.cost import cost_of
from deit.models.metadata import ModelInfo
from deit.models.onednn_linear import use_onednn
from deit.models.student import Student, has_distillation_head
from deit.models.surgery.token_merging import num_tokens_per_block, with_merging

HEADS = ("class", "distillation", "fused", "fused_softmax")


class EvaluationResult(NamedTuple):
    """The metrics of a run, and the predictions behind them.

    metrics: plain values, ready for JSON (see `evaluate`). predictions: int64 [images] by head and
    `teacher`. confidence: the probability of each prediction, float32 [images]. labels: int64
    [images]; None where an image has several correct classes. split_key: identifies the images and
    the order of the classes; equal for equal ones. digest: of the images as they were evaluated.
    """

    metrics: dict[str, Any]
    predictions: dict[str, Tensor]
    confidence: dict[str, Tensor]
    labels: Tensor | None
    split_key: tuple[Any, ...]
    digest: str = ""

    def __repr__(self) -> str:
        values = self.metrics
        heads = ", ".join(f"{name} {top1}" for name, top1 in self._top1().items())
        images = f"{values['num_samples']} {values['split']} images"
        return f"EvaluationResult({values['run']}, {images}, top-1 %: {heads})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{top1}</td></tr>" for name, top1 in self._top1().items()
        )
        head = "<tr><th>head</th><th>top-1 %</th></tr>"
        return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"

    def _top1(self) -> dict[str, str]:
        """Return the accuracy of each head and of the teacher, in %."""
        rows = {**self.metrics["heads"], "teacher": self.metrics["teacher"]}
        return {name: format_percent(row["top1"]) for name, row in rows.items() if row}


@checks_types
@obeys_verbose
@unchanged_generators()
@own_accelerate_state()
def evaluate(
    run: str | PathLike,
    *,
    checkpoint: str = "best",
    split: str = "test",
    root: str | PathLike | None = None,
    teacher: str | Sequence[str] | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    resolution: int | None = None,
    crop: float | None = None,
    merge_tokens: int | None = None,
    test_set: str | None = None,
    cost: bool = False,
    verbose: bool = True,
    command: str = "",
) -> EvaluationResult:
    """Evaluate a run's student on a split.

    run: a run folder, or a checkpoint folder in it. checkpoint: `best` or `last`. root: the folder
    of the images, if they were moved. teacher: source or sources of the teachers to compare with;
    default: the run's own; "none": no teacher. device: auto, cpu or cuda; batch_size: images per
    step; default: the run's. resolution: side [px] of the input; the position embedding is resized.
    crop: as views.eval_crop_pct. merge_tokens: tokens merged in each block. test_set: a test set of
    ImageNet (TEST_SETS), read from `root`, without a teacher. cost: also measure it. verbose: show
    messages and progress; warnings are always shown. command: recorded in the metrics.

    `heads` of the metrics holds class, distillation, fused (mean of logits) and fused_softmax (mean
    of softmax) with top1, top5 and calibration_error in [0, 1]; with one head, `fused` equals it,
    and the others are None. Raises the errors of deit.core.errors.

    >>> result = evaluate("checkpoints/digits", verbose=False)
    >>> sorted(result.metrics["heads"]["fused"]), sorted(result.predictions)[:2]
    (['calibration_error', 'top1', 'top5'], ['class', 'distillation'])
    """
    check_choice("checkpoint", checkpoint, NAMES)
    check_test_set(test_set, split=split, root=root, teacher=teacher)
    config, saved = resolve_run(run, checkpoint)
    student, model_info = student_at_resolution(saved, resolution)
    if merge_tokens is not None:
        student.network = with_merging(student.network, merge_tokens)
    config = evaluation_config(
        config, root=root, device=device, resolution=resolution, crop=crop, batch_size=batch_size
    )
    accelerator = build_accelerator(config.run)
    eval_set = evaluation_images(config, model_info, run, split, test_set, root)
    student = _to_device(student, config, accelerator)
    _check_images(student, config, eval_set, accelerator)
    teacher = "none" if test_set else teacher
    outputs = _run_networks(accelerator, config, student, teacher, model_info.class_names, eval_set)
    environment = environment_info(accelerator, command)
    metrics = {"run": str(Path(run)), "checkpoint": saved.name, "environment": environment}
    metrics |= _describe_images(config, model_info, eval_set)
    metrics |= _measure(config, student, eval_set, outputs)
    if merge_tokens is not None:
        metrics |= {"merge": merge_tokens, "tokens": num_tokens_per_block(student.network)}
    if cost:
        metrics["cost"] = _cost(student, config)
    return _result(config, model_info, eval_set, outputs, metrics)


def _describe_images(
    config: Config, model_info: ModelInfo, eval_set: EvaluationSet
) -> dict[str, Any]:
    note = {"note": eval_set.note} if eval_set.note else {}
    return {
        **note,
        "split": eval_set.name,
        "image_size": config.student.image_size,
        "eval_crop_pct": config.views.eval_crop_pct,
        "num_samples": len(eval_set.images.labels),
        "class_names": [model_info.class_names[column] for column in eval_set.columns],
    }


def _measure(
    config: Config, student: Student, eval_set: EvaluationSet, outputs: "_Outputs"
) -> dict[str, Any]:
    """Return the metrics by head, token cosines and throughput."""
    return {
        "heads": _metrics_by_head(outputs.heads, eval_set.labels),
        "teacher": None,
        "token_cosine": _token_cosine(student, _first_batch(config, eval_set), config),
        "throughput_img_s": len(eval_set.images.labels) / outputs.seconds,
    }


class _Outputs(NamedTuple):
    """Logits, float32 [images, classes], of the student by head and of the teachers by name.

    seconds: the time of the student.
    """

    heads: dict[str, Tensor]
    teachers: dict[str, Tensor]
    seconds: float


def _first_batch(config: Config, eval_set: EvaluationSet) -> InMemoryImages | EncodedImages:
    return eval_set.images.select(slice(config.run.eval_batch_size))


def _run_networks(
    accelerator: Accelerator,
    config: Config,
    student: Student,
    teacher: str | Sequence[str] | None,
    class_names: tuple[str, ...],
    eval_set: EvaluationSet,
) -> _Outputs:
    """Run student and teachers on all images; a first batch of the student is not timed."""
    warm_up = _first_batch(config, eval_set)
    with GracefulStop(accelerator) as interruption, interruption.interruptible():
        if len(warm_up.labels) >= accelerator.num_processes:
            predict_split(accelerator, student, warm_up, config.evaluation, "warming up")
        started = time.perf_counter()
        title = f"evaluating {eval_set.name}"
        outputs = predict_split(
            accelerator,
            student,
            eval_set.images,
            config.evaluation,
            title,
            interruption=interruption,
        )
        seconds = time.perf_counter() - started
        teachers = teacher_logits(
            accelerator, config, teacher, class_names, eval_set.images, interruption
        )
        interruption.raise_if_stopped(now=True)
    heads = {name: logits[:, eval_set.columns] for name, logits in logits_by_head(outputs).items()}
    return _Outputs(heads, teachers, seconds)


def _metrics_by_head(heads: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
    """Return the metrics of every head; with one head, `fused` is that head."""
    metrics = {name: head_metrics(heads.get(name), labels) for name in HEADS}
    tokens = [name for name in heads if name.startswith("distillation_")]
    metrics |= {name: head_metrics(heads[name], labels) for name in tokens}
    if "fused" not in heads:
        metrics["fused"] = metrics["class"]
    return metrics


def _result(
    config: Config,
    model_info: ModelInfo,
    eval_set: EvaluationSet,
    outputs: _Outputs,
    metrics: dict[str, Any],
) -> EvaluationResult:
    """Add to `metrics` the teachers, agreement, accuracy by class and confusion matrix."""
    predictions = {name: logits.argmax(dim=1) for name, logits in outputs.heads.items()}
    confidence = {name: _confidence(logits) for name, logits in outputs.heads.items()}
    if outputs.teachers:
        combined = combine_logits(config, list(outputs.teachers.values()))
        metrics["teacher"] = head_metrics(combined, eval_set.labels)
        predictions["teacher"] = combined.argmax(dim=1)
        confidence["teacher"] = _confidence(combined)
        if len(outputs.teachers) > 1:
            metrics["teachers"] = {
                name: head_metrics(logits, eval_set.labels)
                for name, logits in outputs.teachers.items()
            }
    if eval_set.labels.dtype == torch.bool:
        return EvaluationResult(metrics, predictions, confidence, None, ())
    metrics["agreement"] = _agreements(predictions, eval_set.labels)
    final = predictions.get("fused", predictions["class"])
    labels = unseen_labels(config.data, model_info.class_names)
    unseen = {model_info.class_names[label] for label in labels}
    class_names = metrics["class_names"]
    if unseen & set(class_names):
        metrics |= _seen_and_unseen(predictions, eval_set.labels, unseen, class_names)
    metrics["per_class"] = _per_class(predictions, eval_set.labels, tuple(class_names))
    metrics["confusion"] = confusion(final, eval_set.labels, len(eval_set.columns)).tolist()
    split_key = _split_key(config.data, eval_set.name, class_names)
    digest = digest_of_images(model_info.class_names, (eval_set.images,))
    return EvaluationResult(metrics, predictions, confidence, eval_set.labels, split_key, digest)


@own_accelerate_state()
def cost_of_run(run: str | Path) -> dict[str, Any]:
    """Return what `evaluate` puts under `cost`, without evaluating the run.

    Raises the errors of deit.core.errors.
    """
    config, saved = resolve_run(run, "best")
    student, _ = student_at_resolution(saved, None)
    accelerator = build_accelerator(config.run)
    return _cost(_to_device(student, config, accelerator), config)


def _to_device(student: Student, config: Config, accelerator: Accelerator) -> Student:
    """Move a student to its device, with the linear layers that the run uses."""
    if config.run.linear_backend == "onednn":
        use_onednn(student)
    return student.to(accelerator.device)


def _check_images(
    student: Student, config: Config, eval_set: EvaluationSet, accelerator: Accelerator
) -> None:
    """Check that each process has an image and that the largest batch fits into memory.

    Raises DataError, or as `check_inference_memory`.
    """
    if len(eval_set.images.labels) < accelerator.num_processes:
        raise DataError(f"the {eval_set.name} split has fewer images than processes")
    side, num_images = config.student.image_size, largest_batch(config, eval_set.images)
    check_inference_memory(student, student.forward, side, accelerator, num_images)


def _cost(student: Student, config: Config) -> dict[str, Any]:
    side, batch = config.student.image_size, min(config.run.eval_batch_size, 64)
    cost = cost_of(student, side=side, batch=batch)._asdict()
    device = next(student.parameters()).device
    return cost | {"measured_on": hardware_summary(device)}


def _confidence(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=1).amax(dim=1)


def _split_key(data: DataConfig, split: str, class_names: list[str]) -> tuple[Any, ...]:
    root = None if data.source == "digits" else Path(data.root).resolve()
    fractions = (data.validation_fraction, data.test_fraction, data.split_seed)
    selection = (data.classes, data.exclude_list)
    return (data.source, root, data.reader, *fractions, *selection, split, *class_names)


def _token_cosine(
    student: Student, images: InMemoryImages | EncodedImages, config: Config
) -> list[float] | None:
    """Return the mean cosine of class and distillation token, before and after each block.

    The mean is over `images`. None for a student without both tokens.
    """
    if not has_distillation_head(student.network):
        return None
    device = next(student.parameters()).device
    chunks = torch.arange(len(images.labels)).split(64)
    cosines = [
        token_cosines(student.network, (views - student.mean) / student.std)
        for views in views_of_chunks(images, chunks, config.evaluation, device=device)
    ]
    return torch.cat(cosines).mean(dim=0).tolist()


def head_metrics(logits: Tensor | None, labels: Tensor) -> dict[str, float] | None:
    """Return top1, top5 and calibration_error in [0, 1] of logits [images, classes].

    labels: int64 [images], or bool [images, classes] where an image has several correct classes.
    None for logits None.

    >>> head_metrics(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))["top1"]
    0.5
    """
    if logits is None:
        return None
    return {
        "top1": topk_accuracy(logits, labels),
        "top5": topk_accuracy(logits, labels, k=5),
        "calibration_error": calibration_error(logits, labels),
    }


def _agreements(predictions: dict[str, Tensor], labels: Tensor) -> dict[str, dict[str, float]]:
    """Return the share of equal predictions for each pair of heads, teacher and truth."""
    classes = {**predictions, "truth": labels}
    return {a: {b: agreement(classes[a], classes[b]) for b in classes} for a in classes}


def _seen_and_unseen(
    predictions: dict[str, Tensor], labels: Tensor, unseen: set[str], class_names: list[str]
) -> dict[str, Any]:
    """Return the unseen classes (`held_out`), and accuracy on `seen` and `unseen` classes by head.

    Unseen classes are those without training images.
    """
    names = [name for name in class_names if name in unseen]
    is_unseen = torch.isin(labels, torch.tensor([class_names.index(name) for name in names]))
    groups = {"seen": ~is_unseen, "unseen": is_unseen}
    accuracy = {
        group: {
            name: agreement(classes[rows], labels[rows]) for name, classes in predictions.items()
        }
        for group, rows in groups.items()
    }
    return {"held_out": names, **accuracy}


def _per_class(
    predictions: dict[str, Tensor], labels: Tensor, class_names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Return for each class its number of samples and the accuracy of each head on them."""
    per_class = {}
    for label, name in enumerate(class_names):
        rows = labels == label
        num_samples = int(rows.sum())
        per_class[name] = {"num_samples": num_samples}
        for head, classes in predictions.items():
            correct = int((classes[rows] == label).sum())
            per_class[name][head] = correct / num_samples if num_samples else None
    return per_class
