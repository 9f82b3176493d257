"""Predict the classes of image files with a finished run; draw the attention of its tokens."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit.config.command_choices import TOP_K, check_at_least
from deit.config.input_paths import raise_unreadable
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import given_sources, teacher_specs
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.console import format_percent, info, progress, table
from deit.core.errors import CheckpointError, ConfigError, DataError, first_line
from deit.core.file_reading import missing_file_reason, read_bytes
from deit.core.filesystem import to_paths, write_json
from deit.core.types import logits_by_head
from deit.datasets.decoding import EXTENSIONS, center_square, open_image
from deit.datasets.sources.listing import SkippedFiles, find_images, open_folder
from deit.datasets.views import evaluation_views
from deit.distill.teacher_check import log_class_order
from deit.models.attention_rollout import AttentionMaps, check_attention, rollout
from deit.models.metadata import ModelInfo, find_saved_model
from deit.models.saved_student import load_student
from deit.models.student import Student
from deit.models.teacher_sources import teacher_from_spec
from deit.models.teachers import Teacher
from deit.viz.attention_plot import draw_attention
from deit.viz.tables import head_name

_BATCH = 32
_MAX_DRAWN = 16


class Prediction(NamedTuple):
    """An image file and the logits of each head.

    views: float32 [3, side, side] in [0, 1], the student's input. heads: logits [classes] by head,
    the teacher's as `teacher`. attention: float32 [tokens, side, side]. Views and attention are
    None for images that are not drawn.
    """

    path: Path
    views: Tensor | None
    heads: dict[str, Tensor]
    attention: Tensor | None


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
    saved = _find_checkpoint(run, checkpoint)
    unreadable: dict[str, str] = {}
    files = _find_files(paths, unreadable)
    if not files:
        raise_unreadable(unreadable, 0)
    student, model_info = load_student(saved)
    if attention is not None:
        check_attention(student.network)
    loaded_teacher = _load_teacher(run, teacher, model_info)
    predictions: list[Prediction] = []
    token_names: tuple[str, ...] = ()
    num_batches = -(-len(files) // _BATCH)
    for batch in progress(_batches(files), total=num_batches, title="predicting"):
        draw = attention is not None and len(predictions) < _MAX_DRAWN
        predicted, names = _predict_batch(
            batch, student.eval(), model_info, loaded_teacher, draw, unreadable
        )
        token_names = token_names or names
        predictions += predicted
    if not predictions:
        raise_unreadable(unreadable, 0)
    rows = [_to_row(prediction, model_info, top_k) for prediction in predictions]
    result = {"run": str(run), "checkpoint": saved.name, "images": rows, "unreadable": unreadable}
    for row in rows:
        _print_row(row)
    if json_file is not None:
        write_json(Path(json_file), result)
        info(f"wrote {Path(json_file)}")
    if attention is not None:
        _draw(predictions, rows, token_names, Path(attention))
    return result


def raise_if_unreadable(result: dict[str, Any]) -> None:
    """Raise DataError with every file that could not be read. result: of `predict`."""
    if result["unreadable"]:
        raise_unreadable(result["unreadable"], len(result["images"]))


def _find_checkpoint(run: Path, name: str) -> Path:
    """Return the folder of the saved student. Raises CheckpointError."""
    run_folder.require_folder(run)
    saved = run_folder.find_checkpoint(run, name) or run
    if find_saved_model(saved) != saved:
        raise CheckpointError(f"{run}: has no finished checkpoint {name!r}")
    return saved


def _find_files(paths: list[Path], unreadable: dict[str, str]) -> list[Path]:
    """Return the image files; folders are listed in the order and by the rules of `folder` data.

    unreadable: takes each path without an image, and why.
    """
    files: list[Path] = []
    skipped = SkippedFiles()

    def on_problem(problem: str) -> None:
        name, _, reason = problem.partition(": ")
        unreadable[name] = reason

    for path in paths:
        if path.is_dir():
            names = find_images(open_folder(path), skipped, on_problem)
            files += [path / name for name in names]
            if not names:
                formats = ", ".join(sorted(EXTENSIONS))
                unreadable.setdefault(str(path), f"has no images ({formats})")
        elif path.is_file():
            files.append(path)
        else:
            unreadable[str(path)] = (
                "no such file" if not path.exists() else missing_file_reason(path)
            )
    for note in skipped.notes():
        info(note)
    return files


def _batches(files: list[Path]) -> Iterator[list[Path]]:
    for start in range(0, len(files), _BATCH):
        yield files[start : start + _BATCH]


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


@torch.no_grad()
def _predict_batch(
    files: list[Path],
    student: Student,
    model_info: ModelInfo,
    teacher: Teacher | None,
    draw: bool,
    unreadable: dict[str, str],
) -> tuple[list[Prediction], tuple[str, ...]]:
    """Return the predictions for a batch of files, and the names of the tokens that attend.

    draw: whether to keep views and attention. unreadable: takes each file that cannot be read, and
    why.
    """
    side, crop = model_info.student.image_size, model_info.evaluation_crop
    teacher_side = 0 if teacher is None or teacher.image_size is None else teacher.image_size
    sides = (side, teacher_side) if teacher_side > side else (side,)
    squares_by_file: dict[Path, tuple[Tensor, ...]] = {}
    for file in files:
        try:
            squares_by_file[file] = _read_squares(file, tuple(round(s / crop) for s in sides))
        except DataError as error:
            unreadable[str(file)] = str(error).removeprefix(f"{file}: ")
    files = [file for file in files if file in squares_by_file]
    if not files:
        return [], ()
    squares = [torch.stack(images) for images in zip(*(squares_by_file[file] for file in files))]
    views = evaluation_views(squares[0], size=side, crop_pct=crop)
    logits = logits_by_head(student(views))
    heads = {name: values.float() for name, values in logits.items() if name != "fused_softmax"}
    if teacher is not None:
        teacher_views = views
        if teacher_side > side:
            teacher_views = evaluation_views(squares[1], size=teacher_side, crop_pct=crop)
        heads["teacher"] = teacher(teacher_views)
    attention: AttentionMaps | None = None
    if draw:
        attention = rollout(student.network, (views - student.mean) / student.std)
    predictions = [
        Prediction(
            file,
            views[row] if draw else None,
            {name: values[row] for name, values in heads.items()},
            None if attention is None else attention.maps[row],
        )
        for row, file in enumerate(files)
    ]
    return predictions, () if attention is None else attention.names


def _read_squares(file: Path, sides: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Read an image as uint8 [3, side, side] for each side. Raises DataError."""
    try:
        image = open_image(read_bytes(file), str(file))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or first_line(error)}") from None
    return tuple(center_square(image, side) for side in sides)


def _to_row(prediction: Prediction, model_info: ModelInfo, top_k: int) -> dict[str, Any]:
    """Return the top classes of each head with their probabilities, as plain values."""
    heads = {}
    for name, logits in prediction.heads.items():
        shares, classes = logits.softmax(dim=0).topk(min(top_k, len(logits)))
        heads[name] = [
            {"class": model_info.class_names[label], "probability": share}
            for share, label in zip(shares.tolist(), classes.tolist())
        ]
    return {"file": str(prediction.path), "heads": heads}


def _print_row(row: dict[str, Any]) -> None:
    heads = row["heads"]
    cells = [
        [f"{top['class']}  {format_percent(top['probability'])} %" for top in ranked]
        for ranked in zip(*heads.values())
    ]
    rows = [(str(rank), *line) for rank, line in enumerate(cells, start=1)]
    table(row["file"], ("", *map(head_name, heads)), rows)


def _draw(
    predictions: list[Prediction],
    rows: list[dict[str, Any]],
    token_names: tuple[str, ...],
    path: Path,
) -> None:
    drawn = predictions[:_MAX_DRAWN]
    top_classes = []
    for row in rows[:_MAX_DRAWN]:
        top = {head: ranked[0] for head, ranked in row["heads"].items()}
        top_classes.append(
            {h: f"{t['class']} {format_percent(t['probability'])} %" for h, t in top.items()}
        )
    draw_attention(
        [prediction.views.permute(1, 2, 0).numpy() for prediction in drawn],
        [prediction.attention.numpy() for prediction in drawn],
        token_names,
        top_classes,
        [prediction.path.name for prediction in drawn],
        path,
    )
    is_partial = len(predictions) > _MAX_DRAWN
    suffix = f" with the first {_MAX_DRAWN} of {len(predictions)} images" if is_partial else ""
    info(f"wrote {path}{suffix}")
