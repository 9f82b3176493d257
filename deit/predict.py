"""A finished run's answers to pictures of one's own: top classes by head, and what it looked at."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit import checkpoint
from deit.config import TeacherConfig, code_of
from deit.console import percent, progress, say, table
from deit.datasets.decoding import EXTENSIONS, decode_square
from deit.datasets.views import evaluation_views
from deit.disk import write_json
from deit.errors import CheckpointError, ConfigError, DataError, reason_of
from deit.models.attention import Looks, check_attention, rollout
from deit.models.facts import Facts, find_saved
from deit.models.saved import load_student
from deit.models.student import Student
from deit.models.teachers import Teacher, load_teacher
from deit.pictures import draw_attention
from deit.preflight import announce_order
from deit.records import head_logits
from deit.seats import members
from deit.validation import load

_BLOCK = 32
_MOST_DRAWN = 16


class Picture(NamedTuple):
    """A picture and what was answered to it.

    views: float32 [3, side, side] in [0, 1], as the student sees it. heads: logits [classes] by
    head, the teacher's as `teacher`. looks: float32 [tokens, side, side]. Views and looks are None
    unless they will be drawn.
    """

    path: Path
    views: Tensor | None
    heads: dict[str, Tensor]
    looks: Tensor | None


def predict(
    run: Path,
    paths: list[Path],
    *,
    name: str = "best",
    teacher: str | None = None,
    top: int = 5,
    attention: Path | None = None,
    json_file: Path | None = None,
) -> dict[str, Any]:
    """Answer pictures, print the answers, and write what was asked for; plain values as in JSON.

    paths: pictures, or folders of them. name: best or last. teacher: whom to ask as well; "run":
    the run's own. top: classes to show. attention: a PNG to draw.
    Raises the errors of deit.errors; a picture that cannot be read is named.
    """
    saved = _saved(run, name)
    student, facts = load_student(saved)
    if attention is not None:
        check_attention(student.network)
    files = _files(paths)
    other = _teacher(run, teacher, facts)
    pictures, names = [], ()
    for part in progress(_blocks(files), total=-(-len(files) // _BLOCK), title="predicting"):
        look = attention is not None and len(pictures) < _MOST_DRAWN
        found, looked = _answer(part, student.eval(), facts, other, look)
        names = names or looked
        pictures += found
    rows = [_plain(picture, facts, top) for picture in pictures]
    result = {"run": str(run), "checkpoint": saved.name, "pictures": rows}
    for row in rows:
        _print(row)
    if json_file is not None:
        write_json(json_file, result)
        say(f"wrote {json_file}")
    if attention is not None:
        _draw(pictures, rows, names, attention)
    return result


def _saved(run: Path, name: str) -> Path:
    """The folder with the student. Raises CheckpointError."""
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run folder")
    saved = checkpoint.at(run, name) or run
    if find_saved(saved) != saved:
        raise CheckpointError(f"{run}: holds no finished checkpoint {name!r} of ours")
    return saved


def _files(paths: list[Path]) -> list[Path]:
    """The pictures, those of folders in the order of their names. Raises DataError."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
            if not inside:
                raise DataError(f"{path}: holds no pictures ({', '.join(sorted(EXTENSIONS))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such picture")
    return found


def _blocks(files: list[Path]) -> Iterator[list[Path]]:
    for start in range(0, len(files), _BLOCK):
        yield files[start : start + _BLOCK]


def _teacher(run: Path, source: str | None, facts: Facts) -> Teacher | None:
    if source is None:
        return None
    asked = TeacherConfig(source=(source,))
    if source == "run":
        file = (run.parent if checkpoint.is_one(run) else run) / checkpoint.CONFIG
        asked = load(file).teacher
        if len(asked.source) != 1:
            raise ConfigError(
                f"--teacher run: the run has {len(asked.source)} teachers; name one to ask"
            )
        if code_of(asked):
            raise ConfigError(
                f"--teacher run: the run's teacher {asked.source[0]} is code; name it yourself if "
                "you trust it"
            )
    (member,) = members(asked)
    teacher = load_teacher(member, facts.class_names, image_size=facts.student.image_size)
    announce_order(teacher, facts.class_names)
    return teacher


@torch.no_grad()
def _answer(
    files: list[Path], student: Student, facts: Facts, teacher: Teacher | None, look: bool
) -> tuple[list[Picture], tuple[str, ...]]:
    """The answers to a block of pictures, and the names of the tokens that looked."""
    side, crop = facts.student.image_size, facts.evaluation_crop
    squares = torch.stack([_decoded(file, round(side / crop)) for file in files])
    views = evaluation_views(squares, size=side, crop=crop)
    heads = {k: v.float() for k, v in head_logits(student(views)).items() if k != "fused_softmax"}
    if teacher is not None:
        shown = views
        if teacher.image_size is not None and teacher.image_size > side:
            larger = teacher.image_size
            squares = torch.stack([_decoded(file, round(larger / crop)) for file in files])
            shown = evaluation_views(squares, size=larger, crop=crop)
        heads["teacher"] = teacher(shown)
    looks: Looks | None = None
    if look:
        looks = rollout(student.network, (views - student.mean) / student.std)
    pictures = [
        Picture(
            file,
            views[row] if look else None,
            {name: logits[row] for name, logits in heads.items()},
            None if looks is None else looks.maps[row],
        )
        for row, file in enumerate(files)
    ]
    return pictures, () if looks is None else looks.names


def _decoded(file: Path, size: int) -> Tensor:
    try:
        return decode_square(file.read_bytes(), str(file), size)
    except OSError as error:
        raise DataError(f"{file}: {reason_of(error)}") from None


def _plain(picture: Picture, facts: Facts, top: int) -> dict[str, Any]:
    """A picture's answers as plain values: for each head its classes, the likeliest first."""
    heads = {}
    for name, logits in picture.heads.items():
        shares, classes = logits.softmax(dim=0).topk(min(top, len(logits)))
        heads[name] = [
            {"class": facts.class_names[label], "probability": share}
            for share, label in zip(shares.tolist(), classes.tolist())
        ]
    return {"file": str(picture.path), "heads": heads}


def _print(row: dict[str, Any]) -> None:
    heads = row["heads"]
    cells = [
        [f"{one['class']}  {percent(one['probability'])} %" for one in ranked]
        for ranked in zip(*heads.values())
    ]
    rows = [(str(rank), *line) for rank, line in enumerate(cells, start=1)]
    table(row["file"], ("", *heads), rows)


def _draw(
    pictures: list[Picture], rows: list[dict[str, Any]], names: tuple[str, ...], path: Path
) -> None:
    said = []
    for row in rows[:_MOST_DRAWN]:
        best = {head: ranked[0] for head, ranked in row["heads"].items()}
        said.append({h: f"{b['class']} {percent(b['probability'])} %" for h, b in best.items()})
    draw_attention(
        [picture.views.permute(1, 2, 0).numpy() for picture in pictures[:_MOST_DRAWN]],
        [picture.looks.numpy() for picture in pictures[:_MOST_DRAWN]],
        names,
        said,
        [picture.path.name for picture in pictures[:_MOST_DRAWN]],
        path,
    )
    more = len(pictures) - _MOST_DRAWN
    say(f"drew {path}" + (f": the first {_MOST_DRAWN} of {len(pictures)}" if more > 0 else ""))
