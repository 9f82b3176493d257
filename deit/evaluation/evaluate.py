"""Evaluation of a finished run: every head, the teacher beside it, each sample counted once."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from deit.config.data_section import DataConfig
from deit.config.schema import Config, TeacherConfig
from deit.config.teachers import teacher_specs
from deit.core.accelerator import environment_info, place_of_speed
from deit.core.console import warn
from deit.core.errors import CheckpointError, ConfigError, DataError
from deit.core.host_memory import check_answers
from deit.core.metrics import agreement, calibration_error, confusion, topk_accuracy
from deit.core.signals import GracefulStop
from deit.core.types import logits_by_head
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.splits import digest_of_images, held_out
from deit.distill.build import build_accelerator, image_sizes, teacher_input_size
from deit.distill.inference import evaluation_batches, predict_split
from deit.distill.teacher_check import announce_order, refuse_order
from deit.distill.teacher_ensemble import combine_teachers
from deit.evaluation.load_run import (
    EvaluationSet,
    evaluation_config,
    evaluation_images,
    resolve_run,
    student_at_resolution,
)
from deit.models.attention import token_cosines
from deit.models.cost import cost_of
from deit.models.metadata import ModelInfo
from deit.models.onednn_linear import use_onednn
from deit.models.student import Student, has_distillation_head
from deit.models.surgery.token_merging import token_numbers, with_merging
from deit.models.teacher_sources import load_teacher

HEADS = ("class", "distillation", "fused", "fused_softmax")


class EvaluationResult(NamedTuple):
    """What evaluation found, and the answers it counted, int64 [images], by head and `teacher`.

    confidence: the probability that each gave its answer, float32 [images]. labels: int64 [images];
    None where several answers are right. images: what picks the images and numbers the classes, the
    same for the same ones. digest: of the images, as they were shown.
    """

    found: dict[str, Any]
    answers: dict[str, Tensor]
    confidence: dict[str, Tensor]
    labels: Tensor | None
    images: tuple[Any, ...]
    digest: str = ""


def evaluate(run: Path, **asked: Any) -> dict[str, Any]:
    """Measure a run's student, as plain values ready for JSON. asked: as `evaluate_run` takes
    it."""
    return evaluate_run(run, **asked).found


def evaluate_run(
    run: Path,
    *,
    checkpoint: str = "best",
    split: str = "test",
    root: str | None = None,
    teacher: str | None = None,
    device: str | None = None,
    batch: int | None = None,
    resolution: int | None = None,
    crop: float | None = None,
    merge_tokens: int | None = None,
    test_set: str | None = None,
    cost: bool = False,
) -> EvaluationResult:
    """Measure a run's student on a split.

    checkpoint: `best` or `last`. root: where the images are now. teacher: source of the teacher to
    compare with; None: the run's own, "none": no teacher. batch: images per step. resolution: side
    [px] of the input; the position embedding is resized. crop: as views.eval_crop_pct.
    merge_tokens: tokens merged in each block. test_set: another test set of ImageNet, from `root`;
    without a teacher. cost: also measure parameters, arithmetic, memory and speed.

    `heads` holds class, distillation, fused (mean of logits) and fused_softmax (mean of softmax):
    top1, top5, calibration_error in [0, 1]. A student with one head has that head as `fused` too,
    and None for the others. Raises the errors of deit.core.errors.
    """
    config, saved = resolve_run(run, checkpoint)
    student, facts = student_at_resolution(saved, resolution)
    if merge_tokens is not None:
        student.network = with_merging(student.network, merge_tokens)
    config = evaluation_config(config, root=root, device=device, resolution=resolution, crop=crop)
    if batch is not None:
        config = config.replace(run={"eval_batch_size": batch})
    accelerator = build_accelerator(config.run)
    asked = evaluation_images(config, facts, run, split, test_set, root)
    if len(asked.images.labels) < accelerator.num_processes:
        raise DataError(f"the {split} split has fewer images than processes")
    if config.run.linear_backend == "onednn":
        use_onednn(student)
    student = student.to(accelerator.device)
    side = config.student.image_size
    check_answers(student, student.forward, side, accelerator, _at_once(config, asked.images))
    teacher = teacher if test_set is None else "none"
    measured = _measure(accelerator, config, student, teacher, facts.class_names, asked)
    found: dict[str, Any] = {
        "run": str(run),
        "checkpoint": saved.name,
        **_of_images(config, facts, asked),
        "heads": _named_heads(measured.heads, asked.labels),
        "teacher": None,
        "token_cosine": _token_cosine(student, _few(config, asked), config),
        "throughput_img_s": len(asked.images.labels) / measured.seconds,
        "environment": environment_info(accelerator),
    }
    if merge_tokens is not None:
        found |= {"merge": merge_tokens, "tokens": token_numbers(student.network)}
    if cost:
        found["cost"] = _cost(student, config)
    return _result(config, facts, asked, measured, found)


def _of_images(config: Config, facts: ModelInfo, asked: EvaluationSet) -> dict[str, Any]:
    note = {"note": asked.note} if asked.note else {}
    return {
        **note,
        "split": asked.name,
        "image_size": config.student.image_size,
        "eval_crop_pct": config.views.eval_crop_pct,
        "num_samples": len(asked.images.labels),
        "class_names": [facts.class_names[column] for column in asked.columns],
    }


class _Measured(NamedTuple):
    """Logits of the student by head and of each teacher by name, float32 [images, classes]; and the
    seconds that the student's took."""

    heads: dict[str, Tensor]
    teachers: dict[str, Tensor]
    seconds: float


def _few(config: Config, asked: EvaluationSet) -> InMemoryImages | EncodedImages:
    """The images of the first batch."""
    return asked.images.select(slice(config.run.eval_batch_size))


def _measure(
    accelerator: Accelerator,
    config: Config,
    student: Student,
    teacher: str | None,
    class_names: tuple[str, ...],
    asked: EvaluationSet,
) -> _Measured:
    """Run student and teachers on all images, after a first batch that is not timed."""
    few = _few(config, asked)
    with GracefulStop(accelerator) as interruption, interruption.parallel():
        if len(few.labels) >= accelerator.num_processes:
            predict_split(accelerator, student, few, config, "warming up")
        started = time.perf_counter()
        title = f"evaluating {asked.name}"
        outputs = predict_split(
            accelerator, student, asked.images, config, title, interruption=interruption
        )
        seconds = time.perf_counter() - started
        teachers = _teacher_logits(
            accelerator, config, teacher, class_names, asked.images, interruption
        )
        interruption.raise_if_stopped(now=True)
    heads = {name: logits[:, asked.columns] for name, logits in logits_by_head(outputs).items()}
    return _Measured(heads, teachers, seconds)


def _named_heads(heads: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
    """The metrics of every head; of a student with one head, that one is fused as well."""
    named = {name: head_metrics(heads.get(name), labels) for name in HEADS}
    tokens = [name for name in heads if name.startswith("distillation_")]
    named |= {name: head_metrics(heads[name], labels) for name in tokens}
    if "fused" not in heads:
        named["fused"] = named["class"]
    return named


def _result(
    config: Config,
    facts: ModelInfo,
    asked: EvaluationSet,
    measured: _Measured,
    found: dict[str, Any],
) -> EvaluationResult:
    """Add what follows from the logits to `found`: teachers, agreement, classes, confusion."""
    answers = {name: logits.argmax(dim=1) for name, logits in measured.heads.items()}
    confidence = {name: _confidence(logits) for name, logits in measured.heads.items()}
    if measured.teachers:
        combined = _combined(config, torch.stack(list(measured.teachers.values()), dim=1))
        found["teacher"] = head_metrics(combined, asked.labels)
        answers["teacher"] = combined.argmax(dim=1)
        confidence["teacher"] = _confidence(combined)
        if len(measured.teachers) > 1:
            found["teachers"] = {
                name: head_metrics(logits, asked.labels)
                for name, logits in measured.teachers.items()
            }
    if asked.labels.dtype == torch.bool:
        return EvaluationResult(found, answers, confidence, None, ())
    found["agreement"] = _agreements(answers, asked.labels)
    final = answers.get("fused", answers["class"])
    held = {facts.class_names[label] for label in held_out(config.data, facts.class_names)}
    if held & set(found["class_names"]):
        found |= _seen_and_unseen(answers, asked.labels, held, found["class_names"])
    found["per_class"] = _per_class(answers, asked.labels, tuple(found["class_names"]))
    found["confusion"] = confusion(final, asked.labels, len(asked.columns)).tolist()
    picks = _picks(config.data, asked.name, found)
    digest = digest_of_images(facts.class_names, (asked.images,))
    return EvaluationResult(found, answers, confidence, asked.labels, picks, digest)


def _at_once(config: Config, images: InMemoryImages | EncodedImages) -> int:
    """How many images a network answers at once, at most."""
    return min(config.run.eval_batch_size, len(images.labels))


def cost_of_run(run: Path) -> dict[str, Any]:
    """What `evaluate_run` puts under `cost`, without an evaluation. Raises the errors of
    deit.core.errors."""
    config, saved = resolve_run(run, "best")
    student, _ = student_at_resolution(saved, None)
    accelerator = build_accelerator(config.run)
    if config.run.linear_backend == "onednn":
        use_onednn(student)
    return _cost(student.to(accelerator.device), config)


def _cost(student: Student, config: Config) -> dict[str, Any]:
    side, batch = config.student.image_size, min(config.run.eval_batch_size, 64)
    cost = cost_of(student, side=side, batch=batch)._asdict()
    device = next(student.parameters()).device
    return cost | {"measured_on": place_of_speed(device)}


def _confidence(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=1).amax(dim=1)


def _picks(data: DataConfig, split: str, found: dict[str, Any]) -> tuple[Any, ...]:
    root = None if data.source == "digits" else Path(data.root).resolve()
    fractions = (data.validation_fraction, data.test_fraction, data.split_seed)
    chosen = (data.classes, data.exclude_list)
    return (data.source, root, data.reader, *fractions, *chosen, split, *found["class_names"])


def _token_cosine(
    student: Student, images: InMemoryImages | EncodedImages, config: Config
) -> list[float] | None:
    """Mean cosine of class and distillation token before the first block and after each, over the
    images of one evaluation step; None for a student without both."""
    if not has_distillation_head(student.network):
        return None
    device = next(student.parameters()).device
    chunks = torch.arange(len(images.labels)).split(64)
    cosines = [
        token_cosines(student.network, (views - student.mean) / student.std)
        for views in evaluation_batches(images, chunks, config, device=device)
    ]
    return torch.cat(cosines).mean(dim=0).tolist()


def _teacher_logits(
    accelerator: Any,
    config: Config,
    source: str | None,
    class_names: tuple[str, ...],
    images: InMemoryImages | EncodedImages,
    interruption: GracefulStop,
) -> dict[str, Tensor]:
    """The teachers' logits by description, none without one; the run's own may be gone, which only
    warns, and of one without a say in the training not even that."""
    own, quiet = source is None, config.loss.kind == "none"
    asked = config.teacher
    if not own:
        sources = () if source == "none" else tuple(source.split(","))
        same = len(sources) == len(asked.source)  # moved: what the run says of it still holds
        asked = replace(asked, source=sources) if same else TeacherConfig(source=sources)
    if not asked.source:
        return {}
    if own and asked.code_sources:
        if not quiet:
            warn(
                f"the run's teacher is left out: {', '.join(asked.code_sources)} is code; "
                "--teacher "
                "names it if you trust it"
            )
        return {}
    side = config.student.image_size
    try:
        teachers = [load_teacher(one, class_names, image_size=side) for one in teacher_specs(asked)]
    except (DataError, CheckpointError, ConfigError) as error:
        if not own:
            raise
        if not quiet:
            warn(f"the run's teacher is left out: {error}")
        return {}
    wanted = teacher_input_size([teacher.image_size for teacher in teachers])
    size = image_sizes(config, images, wanted).teacher
    found: dict[str, Tensor] = {}
    for teacher in teachers:
        network = teacher.to(accelerator.device)
        check_answers(network, network.forward, size, accelerator, _at_once(config, images))
        outputs = predict_split(
            accelerator, network, images, config, "teacher", size=size, interruption=interruption
        )
        announce_order(teacher, class_names)
        try:
            refuse_order(teacher, outputs.class_logits.argmax(dim=1), images.labels, class_names)
        except DataError as error:
            if not own:
                raise
            warn(str(error))  # what the run was taught is so
        name = teacher.description
        found[f"{name} ({len(found) + 1})" if name in found else name] = outputs.class_logits
    return found


def _combined(config: Config, logits: Tensor) -> Tensor:
    """What teachers [number, teachers, classes] say together, [number, classes]."""
    teachers = logits.shape[1]
    weights = tuple(member.weight for member in teacher_specs(config.teacher))
    if len(weights) != teachers:
        weights = (1 / teachers,) * teachers
    how = "logits" if config.teacher.combine == "logits" else "probabilities"
    return combine_teachers(logits, weights, how, temperature=1.0).logits[:, 0]


def head_metrics(logits: Tensor | None, labels: Tensor) -> dict[str, float] | None:
    """top1, top5 and calibration_error in [0, 1] of logits [images, classes]; None for None."""
    if logits is None:
        return None
    return {
        "top1": topk_accuracy(logits, labels),
        "top5": topk_accuracy(logits, labels, k=5),
        "calibration_error": calibration_error(logits, labels),
    }


def _agreements(answers: dict[str, Tensor], labels: Tensor) -> dict[str, dict[str, float]]:
    """Share of equal answers for each pair of the heads, the teacher and the truth."""
    everyone = {**answers, "truth": labels}
    return {
        one: {other: agreement(theirs, everyone[other]) for other in everyone}
        for one, theirs in everyone.items()
    }


def _seen_and_unseen(
    answers: dict[str, Tensor], labels: Tensor, held: set[str], class_names: list[str]
) -> dict[str, Any]:
    """`held_out`, the classes that training did not see, and the share of right answers of each
    head and the teacher on the images of those, and of the others."""
    names = [name for name in class_names if name in held]
    never = torch.isin(labels, torch.tensor([class_names.index(name) for name in names]))
    groups = {"seen": ~never, "unseen": never}
    shares = {
        group: {name: agreement(answer[rows], labels[rows]) for name, answer in answers.items()}
        for group, rows in groups.items()
    }
    return {"held_out": names, **shares}


def _per_class(
    answers: dict[str, Tensor], labels: Tensor, class_names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """For each class its number of samples and the top-1 of each head on them."""
    found = {}
    for label, name in enumerate(class_names):
        members = labels == label
        number = int(members.sum())
        found[name] = {"num_samples": number}
        for head, answer in answers.items():
            correct = int((answer[members] == label).sum())
            found[name][head] = correct / number if number else None
    return found
