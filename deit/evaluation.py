"""Evaluation of a finished run: every head, the teacher beside it, each sample counted once."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit import checkpoint
from deit.config import Config, TeacherConfig, derive, members
from deit.console import is_main_process, percent, say, table, warn
from deit.datasets.images import Encoded, Images
from deit.datasets.splits import load_splits
from deit.ensembles import combine
from deit.environment import create_accelerator, describe
from deit.errors import CheckpointError, ConfigError, DataError
from deit.metrics import agreement, calibration_error, confusion, topk_accuracy
from deit.models.saved import find_saved, load_student
from deit.models.teachers import load_teacher
from deit.prediction import answers_of
from deit.preparation import sizes_of, teacher_input
from deit.records import head_logits
from deit.validation import load

HEADS = ("class", "distillation", "fused", "fused_softmax")


def evaluate(
    run: Path,
    *,
    checkpoint: str = "best",
    split: str = "test",
    root: str | None = None,
    teacher: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure a run's student on a split, as plain values ready for JSON.

    checkpoint: `best` or `last`. root: where the images lie now, if not where the run found them.
    teacher: whom to agree with; None: the run's own teacher, "none": nobody.

    `heads` holds class, distillation, fused (mean of logits) and fused_softmax (mean of softmax):
    top1, top5, calibration_error in [0, 1]. A student with one head has that head as `fused` too,
    and None for the others. Raises the errors of deit.errors.
    """
    config, saved = find_run(run, checkpoint)
    if root is not None:
        config = derive(config, data={"root": root})
    if device is not None:
        config = derive(config, run={"device": device})
    student, facts = load_student(saved)
    accelerator = create_accelerator(config.run)
    splits = load_splits(config.data)
    if splits.class_names != facts.class_names:
        raise DataError(
            f"{run}: was trained on other classes than the data has: "
            f"{_first_difference(facts.class_names, splits.class_names)}"
        )
    images: Images | Encoded = getattr(splits, split)
    if len(images.labels) < accelerator.num_processes:
        raise DataError(f"the {split} split has fewer images than processes")
    student = student.to(accelerator.device)
    few = images.select(slice(config.run.evaluation_batch))
    if len(few.labels) >= accelerator.num_processes:
        answers_of(accelerator, student, few, config, "warming up")
    started = time.perf_counter()
    outputs = answers_of(accelerator, student, images, config, f"evaluating {split}")
    elapsed_s = time.perf_counter() - started
    heads = head_logits(outputs)
    answers = {name: logits.argmax(dim=1) for name, logits in heads.items()}
    named_heads = {name: _measure(heads.get(name), images.labels) for name in HEADS}
    tokens = [name for name in heads if name.startswith("distillation_")]
    named_heads |= {name: _measure(heads[name], images.labels) for name in tokens}
    if "fused" not in heads:
        named_heads["fused"] = named_heads["class"]
    found: dict[str, Any] = {
        "run": str(run),
        "checkpoint": checkpoint,
        "split": split,
        "num_samples": len(images.labels),
        "class_names": list(facts.class_names),
        "heads": named_heads,
        "teacher": None,
        "throughput_img_s": len(images.labels) / elapsed_s,
        "environment": describe(accelerator, []),
    }
    said = _teacher_logits(accelerator, config, teacher, facts.class_names, images)
    if said:
        together = torch.stack(list(said.values()), dim=1)
        combined = _combined(config, together)
        found["teacher"] = _measure(combined, images.labels)
        answers["teacher"] = combined.argmax(dim=1)
        if len(said) > 1:
            found["teachers"] = {
                name: _measure(logits, images.labels) for name, logits in said.items()
            }
    found["agreement"] = _agreements(answers, images.labels)
    final = answers.get("fused", answers["class"])
    found["per_class"] = _per_class(answers, images.labels, facts.class_names)
    found["confusion"] = confusion(final, images.labels, len(facts.class_names)).tolist()
    return found


def find_run(run: Path, name: str) -> tuple[Config, Path]:
    """The configuration and the checkpoint folder of a run; also where `run` is that folder.

    name: best or last. Raises CheckpointError and ConfigError.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run folder")
    if not (run / checkpoint.CONFIG).is_file() and run.name in ("best", "last"):
        run, name = run.parent, run.name
    if not (run / checkpoint.CONFIG).is_file():
        raise CheckpointError(f"{run}: not a run folder (no {checkpoint.CONFIG})")
    saved = run / name
    if find_saved(saved) != saved:
        raise CheckpointError(f"{run}: has no finished checkpoint {name!r} yet")
    return load(run / checkpoint.CONFIG), saved


def _first_difference(trained: tuple[str, ...], found: tuple[str, ...]) -> str:
    if len(trained) != len(found):
        return f"{len(trained)} against {len(found)}"
    return next(f"{a!r} against {b!r}" for a, b in zip(trained, found) if a != b)


def _teacher_logits(
    accelerator: Any,
    config: Config,
    source: str | None,
    class_names: tuple[str, ...],
    images: Images | Encoded,
) -> dict[str, Tensor]:
    """The teachers' logits by description, none without one; the run's own may be gone, which only
    warns."""
    own = source is None
    asked = config.teacher
    if not own:
        sources = () if source == "none" else tuple(source.split(","))
        same = len(sources) == len(asked.source)  # moved: what the run says of it still holds
        asked = replace(asked, source=sources) if same else TeacherConfig(source=sources)
    if not asked.source:
        return {}
    side = config.student.image_size
    try:
        teachers = [load_teacher(one, class_names, image_size=side) for one in members(asked)]
    except (DataError, CheckpointError, ConfigError) as error:
        if not own:
            raise
        warn(f"the run's teacher is left out: {error}")
        return {}
    wanted = teacher_input([teacher.image_size for teacher in teachers])
    size = sizes_of(config, images, wanted).teacher
    found: dict[str, Tensor] = {}
    for teacher in teachers:
        outputs = answers_of(
            accelerator, teacher.to(accelerator.device), images, config, "teacher", size=size
        )
        name = teacher.description
        found[f"{name} ({len(found) + 1})" if name in found else name] = outputs.class_logits
    return found


def _combined(config: Config, logits: Tensor) -> Tensor:
    """What teachers [number, teachers, classes] say together, [number, classes]."""
    teachers = logits.shape[1]
    weights = tuple(member.weight for member in members(config.teacher))
    if len(weights) != teachers:
        weights = (1 / teachers,) * teachers
    how = "logits" if config.teacher.combine == "logits" else "probabilities"
    return combine(logits, weights, how, temperature=1.0).logits[:, 0]


def _measure(logits: Tensor | None, labels: Tensor) -> dict[str, float] | None:
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


def write_evaluation(path: Path, found: dict[str, Any]) -> None:
    """Write the numbers as JSON, from the main process. Raises EnvironmentFault."""
    if is_main_process():
        checkpoint.write_json(path, found)
        say(f"wrote {path}")


_SHOWN_CLASSES = 20


def print_evaluation(found: dict[str, Any]) -> None:
    """Heads and teacher, the weakest classes and the commonest confusions, for a person."""
    rows = {name: measured for name, measured in found["heads"].items() if measured}
    if found["heads"]["distillation"] is None:
        del rows["fused"]  # the class head once more
    if found["teacher"]:
        rows["teacher"] = found["teacher"]
    for name, measured in found.get("teachers", {}).items():
        say(f"teacher {name}: top-1 {percent(measured['top1'])} %")
    partners = [name for name in ("teacher", "truth") if name in found["agreement"]]
    table(
        f"{found['run']} ({found['checkpoint']}), {found['split']}: {found['num_samples']} images",
        ("head", "top-1 %", "top-5 %", "calibration error %", *(f"= {p} %" for p in partners)),
        [
            (
                name,
                percent(row["top1"]),
                percent(row["top5"]),
                percent(row["calibration_error"]),
                *(percent(found["agreement"][name][partner]) for partner in partners),
            )
            for name, row in rows.items()
        ],
    )
    if "distillation" in found["agreement"] and "distillation_1" not in found["agreement"]:
        same = found["agreement"]["class"]["distillation"]
        say(f"the two heads agree on {percent(same)} % of the images")
    _print_classes(found)
    say(f"{found['throughput_img_s']:.0f} images/s")


def _print_classes(found: dict[str, Any]) -> None:
    names = found["class_names"]
    head = "fused" if "fused" in found["agreement"] else "class"
    order = sorted(names, key=lambda name: found["per_class"][name][head] or 0.0)
    shown = names if len(names) <= _SHOWN_CLASSES else order[:_SHOWN_CLASSES]
    title = "per class" if len(shown) == len(names) else f"the {len(shown)} weakest classes"
    heads = [name for name in (*HEADS[:3], "teacher") if name in found["agreement"]]
    counts = torch.tensor(found["confusion"])
    rows = []
    for name in shown:
        row = found["per_class"][name]
        mistakes = counts[names.index(name)].clone()
        mistakes[names.index(name)] = 0
        worst = int(mistakes.argmax())
        taken = f"{names[worst]} ({int(mistakes[worst])})" if mistakes[worst] else "-"
        rows.append((name, str(row["num_samples"]), *(percent(row[h]) for h in heads), taken))
    table(title, ("class", "images", *(f"{h} %" for h in heads), "most taken for"), rows)
