"""Predict the classes of image files with a finished run; draw the attention of its tokens."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from deit.config.command_choices import TOP_K, check_at_least
from deit.config.input_paths import unreadable_error
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import given_sources, teacher_specs
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.console import format_percent, info, progress, table
from deit.core.errors import ConfigError
from deit.core.filesystem import to_paths, write_json
from deit.distill.teacher_check import log_class_order
from deit.evaluation.attention import plot_attention
from deit.evaluation.load_run import find_student
from deit.evaluation.predictions import (
    find_files,
    image_batches,
    image_logits,
    student_heads,
    to_predictions,
)
from deit.models.attention_rollout import check_attention
from deit.models.metadata import ModelInfo
from deit.models.saved_student import load_student
from deit.models.student import Student
from deit.models.teacher_sources import teacher_from_spec
from deit.models.teachers import Teacher
from deit.viz.plots import save_figure
from deit.viz.tables import head_name

_BATCH = 32
_MAX_DRAWN = 16


def predict(
    run: str | Path,
    paths: str | Path | Sequence[str | Path],
    *,
    checkpoint: str = "best",
    teacher: str | None = None,
    top_k: int = TOP_K,
    attention: str | Path | None = None,
    json_file: str | Path | None = None,
) -> dict[str, Any]:
    """Predict image files, print the top classes, and return them as plain values, ready for JSON.

    run: a run folder, or a folder with a saved student. paths: image files or folders of them, or
    one of these. checkpoint: best or last. teacher: source of a teacher to predict with as well;
    "run": the run's own; "none": no teacher. top_k: number of classes per head. attention: a PNG
    file to draw the attention to. json_file: a file to write the result to.

    The result has `images`, a dict per image, and `unreadable`, the reason by file; see
    `raise_if_unreadable`. Raises the errors of deit.core.errors; DataError if no image is readable.

    >>> from deit.core.console import quiet
    >>> with quiet():
    ...     result = predict("checkpoints/digits", "pets/cat/0.png", top_k=3)
    >>> (image,) = result["images"]
    >>> image["file"], list(image["heads"]), len(image["heads"]["fused"])
    ('pets/cat/0.png', ['class', 'distillation', 'fused'], 3)
    """
    check_at_least("top_k", top_k, 1)
    run, paths = Path(run), to_paths(paths)
    saved = find_student(run, checkpoint)
    unreadable: dict[str, str] = {}
    files = find_files(paths, unreadable)
    if not files:
        raise unreadable_error(unreadable, 0)
    student, model_info = load_student(saved)
    if attention is not None:
        check_attention(student.network)
    loaded_teacher = _load_teacher(run, teacher, model_info)
    heads_of = partial(student_heads, student.eval())
    images = progress(files, total=len(files), title="predicting")
    heads, read = image_logits(
        heads_of, images, model_info, batch_size=_BATCH, unreadable=unreadable
    )
    if not read:
        raise unreadable_error(unreadable, 0)
    heads.pop("fused_softmax", None)
    if loaded_teacher is not None:
        heads["teacher"] = _teacher_logits(loaded_teacher, read, model_info)
    rows = _to_rows(heads, read, model_info.class_names, top_k)
    result = {"run": str(run), "checkpoint": saved.name, "images": rows, "unreadable": unreadable}
    for row in rows:
        _print_row(row)
    if json_file is not None:
        write_json(Path(json_file), result)
        info(f"wrote {Path(json_file)}")
    if attention is not None:
        _draw(student, heads, read, model_info, Path(attention))
    return result


def raise_if_unreadable(result: dict[str, Any]) -> None:
    """Raise DataError with every file that could not be read. result: of `predict`."""
    if result["unreadable"]:
        raise unreadable_error(result["unreadable"], len(result["images"]))


def _load_teacher(run: Path, source: str | None, model_info: ModelInfo) -> Teacher | None:
    sources = () if source is None else given_sources(source)
    if not sources:
        return None
    if len(sources) > 1:
        raise ConfigError(f"teacher = {source}: give the source of one teacher")
    config = TeacherConfig(source=sources)
    if sources == ("run",):
        folder = run.parent if run_folder.is_checkpoint_dir(run) else run
        config = load_config(folder / run_folder.CONFIG).teacher
        if len(config.source) != 1:
            raise ConfigError(
                f"teacher = run: the run has {len(config.source)} teachers; give the source of one"
            )
        if config.code_sources:
            raise ConfigError(
                f"teacher = run: the run's teacher {config.source[0]} is code; give its source as "
                "teacher if you trust it"
            )
    (spec,) = teacher_specs(config)
    teacher = teacher_from_spec(
        spec, model_info.class_names, image_size=model_info.student.image_size
    )
    log_class_order(teacher, model_info.class_names)
    return teacher


def _teacher_logits(teacher: Teacher, files: list[str], model_info: ModelInfo) -> Tensor:
    """Return the teacher's logits [images, C]; its views are never smaller than the student's."""
    side = max(model_info.student.image_size, teacher.image_size or 0)
    model_info = replace(model_info, student=replace(model_info.student, image_size=side))
    images = progress(files, total=len(files), title="teacher")
    heads, _ = image_logits(
        lambda views: {"teacher": teacher(views)}, images, model_info, batch_size=_BATCH
    )
    return heads["teacher"]


def _to_rows(
    heads: dict[str, Tensor], files: list[str], class_names: tuple[str, ...], top_k: int
) -> list[dict[str, Any]]:
    """Return the top classes of each head with their probabilities, as plain values per image."""
    rows: list[dict[str, Any]] = [{"file": file, "heads": {}} for file in files]
    for head, logits in heads.items():
        predictions = to_predictions(logits, class_names, files, top_k=top_k)
        for row, prediction in zip(rows, predictions, strict=True):
            row["heads"][head] = [
                {"class": name, "probability": share} for name, share in prediction.top
            ]
    return rows


def _print_row(row: dict[str, Any]) -> None:
    heads = row["heads"]
    cells = [
        [f"{top['class']}  {format_percent(top['probability'])} %" for top in ranked]
        for ranked in zip(*heads.values())
    ]
    rows = [(str(rank), *line) for rank, line in enumerate(cells, start=1)]
    table(row["file"], ("", *map(head_name, heads)), rows)


def _draw(
    student: Student,
    heads: dict[str, Tensor],
    files: list[str],
    model_info: ModelInfo,
    path: Path,
) -> None:
    drawn = files[:_MAX_DRAWN]
    views, _ = next(image_batches(drawn, model_info, batch_size=_MAX_DRAWN))
    heads = {name: logits[:_MAX_DRAWN] for name, logits in heads.items()}
    figure = plot_attention(student, views, heads, model_info.class_names, drawn)
    save_figure(figure, path, dpi=120)
    is_partial = len(files) > _MAX_DRAWN
    suffix = f" with the first {_MAX_DRAWN} of {len(files)} images" if is_partial else ""
    info(f"wrote {path}{suffix}")
