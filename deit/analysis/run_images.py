"""The pictures of a run for its report: what its tokens look at, its views, its hardest images."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from deit.analysis.view_sheet import draw_view_sheet
from deit.config.presets import LOSS_PRESETS
from deit.config.schema import Config, TeacherConfig
from deit.config.student_section import InitConfig
from deit.core.errors import ConfigError
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.sources import LISTINGS
from deit.datasets.splits import load_split, load_splits
from deit.distill.inference import evaluation_batches
from deit.evaluation.cache import CachedEvaluation
from deit.evaluation.load_run import evaluation_config, resolve_run, student_at_resolution
from deit.models.attention import check_attention, rollout
from deit.models.saved import ModelInfo
from deit.viz.attention_plot import draw_attention

_LOOKED_AT = 4
_HARDEST = 12
_SIDE = 160  # of a picture in a gallery, at most [px]


class Hard(NamedTuple):
    """An image that was answered wrongly: its picture, and lines on who said what."""

    picture: Path
    lines: tuple[str, ...]


class Pictures(NamedTuple):
    """attention: None for a student without such tokens. views: None where they cannot be drawn."""

    attention: Path | None
    views: Path | None
    hardest: list[Hard]


def draw_run(
    run: Path, said: CachedEvaluation, folder: Path, name: str, *, root: str | None = None
) -> Pictures:
    """Draw the pictures of a finished run into a folder. name: what their files begin with. root:
    where its images lie now, if not where it found them.

    Raises the errors of deit.core.errors; DataError where the images are gone.
    """
    config, saved = resolve_run(run, "best")
    if root is not None:
        config = config.replace(data={"root": root})
    if config.data.source in LISTINGS:  # a few of the images are looked at, not all decoded
        config = config.replace(data={"storage": "files"})
    student, facts = student_at_resolution(saved, None)
    splits = load_splits(config.data)
    images = splits.test
    if isinstance(images, InMemoryImages):  # of the size that views are cut from
        _, images = load_split(evaluation_config(config).data, "test")
    hardest = hardest_of(said, _HARDEST)
    wrong = hardest[: _LOOKED_AT // 2]
    chosen = wrong + _of_each_class(said, _LOOKED_AT - len(wrong))
    attention = None
    try:
        check_attention(student.network)
    except ConfigError:
        pass  # a ConvNet
    else:
        attention = folder / f"{name}-attention.png"
        views = next(
            evaluation_batches(
                images, (torch.tensor(chosen),), evaluation_config(config).evaluation, device=_CPU
            )
        )
        looks = rollout(student.network.eval(), (views - student.mean) / student.std)
        draw_attention(
            [view.permute(1, 2, 0).numpy() for view in views],
            [one.numpy() for one in looks.maps],
            looks.names,
            [_answers(said, place) for place in chosen],
            [f"truth: {facts.class_names[said.labels[place]]}" for place in chosen],
            attention,
            clear=True,
        )
    listed = [
        Hard(
            _thumbnail(images, place, folder / f"{name}-hard-{at}.png", config), _lines(said, place)
        )
        for at, place in enumerate(hardest)
    ]
    sheet = folder / f"{name}-views.png"
    draw_view_sheet(_as_trained(config, facts), sheet, number=12, splits=splits, clear=True)
    return Pictures(attention and _lighter(attention), _lighter(sheet), listed)


_CPU = torch.device("cpu")


def hardest_of(said: CachedEvaluation, number: int) -> list[int]:
    """The images that the final answer gets wrong, those first that the teacher gets right, and
    among these the most confident; places in the split."""
    final = said.predictions.get("fused", said.predictions["class"])
    sure = said.confidence.get("fused", said.confidence["class"])
    teacher = said.predictions.get("teacher", final)
    wrong = [place for place, label in enumerate(said.labels) if final[place] != label]
    wrong.sort(key=lambda place: (teacher[place] != said.labels[place], -sure[place]))
    return wrong[:number]


def _of_each_class(said: CachedEvaluation, number: int) -> list[int]:
    """The first image that is answered rightly, of the first classes."""
    final = said.predictions.get("fused", said.predictions["class"])
    found: dict[int, int] = {}
    for place, label in enumerate(said.labels):
        if final[place] == label:
            found.setdefault(label, place)
    return [found[label] for label in sorted(found)][:number]


def _answers(said: CachedEvaluation, place: int) -> dict[str, str]:
    names = said.metrics["class_names"]
    return {
        voice: f"{names[answers[place]]} ({100 * said.confidence[voice][place]:.0f} %)"
        for voice, answers in said.predictions.items()
        if voice != "fused_softmax"
    }


def _lines(said: CachedEvaluation, place: int) -> tuple[str, ...]:
    names = said.metrics["class_names"]
    answers = _answers(said, place)
    final = answers.get("fused", answers["class"])
    told = [f"truth: {names[said.labels[place]]}", f"student: {final}"]
    return (*told, f"teacher: {answers['teacher']}") if "teacher" in answers else tuple(told)


def _thumbnail(
    images: InMemoryImages | EncodedImages, place: int, path: Path, config: Config
) -> Path:
    side = min(config.student.image_size, _SIDE)
    view = next(
        evaluation_batches(
            *(images, (torch.tensor([place]),), evaluation_config(config).evaluation), device=_CPU
        )
    )[0]
    levels = (view * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(levels))
    if picture.width > side:
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    picture.save(path)
    return path


def _as_trained(config: Config, facts: ModelInfo) -> Config:
    """With what a start said when the run began: it may be gone by now. Without teachers that are
    somebody's code: no saved file may have that run."""
    config = config.replace(views={"mean": facts.mean, "std": facts.std})
    config = replace(config.replace(optim={"trainable": "all"}), init=InitConfig())
    if not config.teacher.code_sources:
        return config
    return config.replace(teacher=TeacherConfig(), loss=LOSS_PRESETS["none"])


def _lighter(path: Path) -> Path:
    """The picture as WebP beside it, where that is smaller; photographs are, by far."""
    smaller = path.with_suffix(".webp")
    with Image.open(path) as picture:
        picture.convert("RGBA").save(smaller, quality=82)
    if smaller.stat().st_size < path.stat().st_size:
        return smaller
    smaller.unlink()
    return path
