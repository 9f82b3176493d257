"""A finished run's answers to pictures of one's own: top classes by head, and what it looked at."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from deit.config.schema import TeacherConfig
from deit.config.teachers import teacher_specs
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.console import format_percent, info, progress, table
from deit.core.errors import CheckpointError, ConfigError, DataError, first_line
from deit.core.file_reading import no_file, read_bytes
from deit.core.filesystem import write_json
from deit.core.types import logits_by_head
from deit.datasets.decoding import EXTENSIONS, open_image, square_of
from deit.datasets.listing import PassedOver, find_images, opened
from deit.datasets.views import evaluation_views
from deit.distill.teacher_check import announce_order
from deit.models.attention import AttentionMaps, check_attention, rollout
from deit.models.metadata import ModelInfo, find_saved_model
from deit.models.saved import load_student
from deit.models.student import Student
from deit.models.teacher_sources import load_teacher
from deit.models.teachers import Teacher
from deit.viz.attention_plot import draw_attention

_BLOCK = 32
_MOST_DRAWN = 16


class Prediction(NamedTuple):
    """A picture and what was answered to it.

    views: float32 [3, side, side] in [0, 1], as the student sees it. heads: logits [classes] by
    head, the teacher's as `teacher`. looks: float32 [tokens, side, side]. Views and looks are None
    unless they will be drawn.
    """

    path: Path
    views: Tensor | None
    heads: dict[str, Tensor]
    attention: Tensor | None


def predict(
    run: Path,
    paths: list[Path],
    *,
    name: str = "best",
    teacher: str | None = None,
    top_k: int = 5,
    attention: Path | None = None,
    json_file: Path | None = None,
) -> dict[str, Any]:
    """Answer pictures, print the answers, and write what was asked for; plain values as in JSON.

    paths: pictures, or folders of them. name: best or last. teacher: whom to ask as well; "run":
    the run's own. top_k: classes to show. attention: a PNG to draw.
    Raises the errors of deit.core.errors. Pictures that cannot be read are named by a DataError
    after all others are answered, printed and written."""
    saved = _saved(run, name)
    bad: dict[str, str] = {}
    files = _files(paths, bad)
    if not files:
        _refuse(bad, 0)
    student, facts = load_student(saved)
    if attention is not None:
        check_attention(student.network)
    other = _teacher(run, teacher, facts)
    pictures, names = [], ()
    for part in progress(_blocks(files), total=-(-len(files) // _BLOCK), title="predicting"):
        look = attention is not None and len(pictures) < _MOST_DRAWN
        found, looked = _answer(part, student.eval(), facts, other, look, bad)
        names = names or looked
        pictures += found
    if not pictures:
        _refuse(bad, 0)
    rows = [_plain(picture, facts, top_k) for picture in pictures]
    result = {"run": str(run), "checkpoint": saved.name, "pictures": rows, "unreadable": bad}
    for row in rows:
        _print(row)
    if json_file is not None:
        write_json(json_file, result)
        info(f"wrote {json_file}")
    if attention is not None:
        _draw(pictures, rows, names, attention)
    if bad:
        _refuse(bad, len(pictures))
    return result


def _refuse(bad: dict[str, str], answered: int) -> NoReturn:
    """Raise DataError with every picture that has no answer, and why."""
    lines = [f"{name}: {reason}" for name, reason in bad.items()]
    if len(lines) == 1 and not answered:
        raise DataError(lines[0])
    number = f"{len(lines)} of {len(lines) + answered} pictures have no answer"
    raise DataError("\n  ".join([f"{number}:", *lines]))


def _saved(run: Path, name: str) -> Path:
    """The folder with the student. Raises CheckpointError."""
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run folder")
    saved = run_folder.find_checkpoint(run, name) or run
    if find_saved_model(saved) != saved:
        raise CheckpointError(f"{run}: holds no finished checkpoint {name!r} of ours")
    return saved


def _files(paths: list[Path], bad: dict[str, str]) -> list[Path]:
    """The pictures, those in folders in the order of their names, by the rules of `folder` data.

    bad: takes each path without one, and why.
    """
    found: list[Path] = []
    passed = PassedOver()

    def complain(problem: str) -> None:
        name, _, reason = problem.partition(": ")
        bad[name] = reason

    for path in paths:
        if path.is_dir():
            inside = find_images(opened(path), passed, complain)
            found += [path / name for name in inside]
            if not inside:
                bad.setdefault(str(path), f"holds no pictures ({', '.join(sorted(EXTENSIONS))})")
        elif path.is_file():
            found.append(path)
        else:
            bad[str(path)] = "no such picture" if not path.exists() else no_file(path)
    for note in passed.notes():
        info(note)
    return found


def _blocks(files: list[Path]) -> Iterator[list[Path]]:
    for start in range(0, len(files), _BLOCK):
        yield files[start : start + _BLOCK]


def _teacher(run: Path, source: str | None, facts: ModelInfo) -> Teacher | None:
    if source is None:
        return None
    asked = TeacherConfig(source=(source,))
    if source == "run":
        file = (run.parent if run_folder.is_checkpoint_dir(run) else run) / run_folder.CONFIG
        asked = load_config(file).teacher
        if len(asked.source) != 1:
            raise ConfigError(
                f"--teacher run: the run has {len(asked.source)} teachers; name one to ask"
            )
        if asked.code_sources:
            raise ConfigError(
                f"--teacher run: the run's teacher {asked.source[0]} is code; name it yourself if "
                "you trust it"
            )
    (member,) = teacher_specs(asked)
    teacher = load_teacher(member, facts.class_names, image_size=facts.student.image_size)
    announce_order(teacher, facts.class_names)
    return teacher


@torch.no_grad()
def _answer(
    files: list[Path],
    student: Student,
    facts: ModelInfo,
    teacher: Teacher | None,
    look: bool,
    bad: dict[str, str],
) -> tuple[list[Prediction], tuple[str, ...]]:
    """The answers to a block of pictures, and the names of the tokens that looked. bad: takes each
    picture that cannot be read, and why."""
    side, crop = facts.student.image_size, facts.evaluation_crop
    larger = 0 if teacher is None or teacher.image_size is None else teacher.image_size
    sides = (side, larger) if larger > side else (side,)
    read: dict[Path, tuple[Tensor, ...]] = {}
    for file in files:
        try:
            read[file] = _squares(file, tuple(round(one / crop) for one in sides))
        except DataError as error:
            bad[str(file)] = str(error).removeprefix(f"{file}: ")
    files = [file for file in files if file in read]
    if not files:
        return [], ()
    squares = [torch.stack(cuts) for cuts in zip(*(read[file] for file in files))]
    views = evaluation_views(squares[0], size=side, crop=crop)
    heads = {
        k: v.float() for k, v in logits_by_head(student(views)).items() if k != "fused_softmax"
    }
    if teacher is not None:
        shown = views
        if larger > side:
            shown = evaluation_views(squares[1], size=larger, crop=crop)
        heads["teacher"] = teacher(shown)
    looks: AttentionMaps | None = None
    if look:
        looks = rollout(student.network, (views - student.mean) / student.std)
    pictures = [
        Prediction(
            file,
            views[row] if look else None,
            {name: logits[row] for name, logits in heads.items()},
            None if looks is None else looks.maps[row],
        )
        for row, file in enumerate(files)
    ]
    return pictures, () if looks is None else looks.names


def _squares(file: Path, sides: tuple[int, ...]) -> tuple[Tensor, ...]:
    """A picture as uint8 [3, side, side] for each side. Raises DataError."""
    try:
        picture = open_image(read_bytes(file), str(file))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or first_line(error)}") from None
    return tuple(square_of(picture, side) for side in sides)


def _plain(picture: Prediction, facts: ModelInfo, top_k: int) -> dict[str, Any]:
    """A picture's answers as plain values: for each head its classes, the likeliest first."""
    heads = {}
    for name, logits in picture.heads.items():
        shares, classes = logits.softmax(dim=0).topk(min(top_k, len(logits)))
        heads[name] = [
            {"class": facts.class_names[label], "probability": share}
            for share, label in zip(shares.tolist(), classes.tolist())
        ]
    return {"file": str(picture.path), "heads": heads}


def _print(row: dict[str, Any]) -> None:
    heads = row["heads"]
    cells = [
        [f"{one['class']}  {format_percent(one['probability'])} %" for one in ranked]
        for ranked in zip(*heads.values())
    ]
    rows = [(str(rank), *line) for rank, line in enumerate(cells, start=1)]
    table(row["file"], ("", *heads), rows)


def _draw(
    pictures: list[Prediction], rows: list[dict[str, Any]], names: tuple[str, ...], path: Path
) -> None:
    said = []
    for row in rows[:_MOST_DRAWN]:
        best = {head: ranked[0] for head, ranked in row["heads"].items()}
        said.append(
            {h: f"{b['class']} {format_percent(b['probability'])} %" for h, b in best.items()}
        )
    draw_attention(
        [picture.views.permute(1, 2, 0).numpy() for picture in pictures[:_MOST_DRAWN]],
        [picture.attention.numpy() for picture in pictures[:_MOST_DRAWN]],
        names,
        said,
        [picture.path.name for picture in pictures[:_MOST_DRAWN]],
        path,
    )
    more = len(pictures) - _MOST_DRAWN
    info(f"drew {path}" + (f": the first {_MOST_DRAWN} of {len(pictures)}" if more > 0 else ""))
