"""Runs that finished before, held against the images and the teachers that are there now."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from deit.config.data_section import DataConfig
from deit.config.schema import Config, TeacherConfig
from deit.config.student_section import StudentConfig
from deit.config.teachers import teacher_slots
from deit.core import run_folder
from deit.core.console import warn
from deit.core.errors import CheckpointError, ConfigError, DataError
from deit.datasets.splits import load_splits
from deit.distill.run_teachers import digest_of_teachers
from deit.experiments.runner import RunSpec
from deit.models.teacher_sources import load_teacher

_AN_OTHER = "give back what it was, or another --out"


class _Images(NamedTuple):
    """What is there now: names of the classes, the digest of all splits; nothing of images that are
    gone."""

    class_names: tuple[str, ...] | None
    fingerprint: str


class FinishedRunChecker:
    """Looks at each data set and at each teacher once, for however many runs."""

    def __init__(self) -> None:
        self._images: dict[DataConfig, _Images] = {}
        self._teachers: dict[tuple[TeacherConfig, StudentConfig, DataConfig], list[str]] = {}

    def check(self, runs: Iterable[RunSpec]) -> None:
        """Refuse a finished run whose images or teachers are others now: its numbers would stand
        beside those of other ones. Of what is gone nothing is known, so it is taken as it is.
        Raises DataError."""
        for run in runs:
            if (result := run_folder.read_result(run.out)) is not None:
                self._check(run, result)

    def _check(self, run: RunSpec, result: dict[str, Any]) -> None:
        images = self._images_of(run.config.data)
        if images.class_names is None:
            return
        if images.fingerprint != result["fingerprint"]:
            raise DataError(
                f"{run.out}: is finished, and its images were others (class names, pixels or "
                f"labels) than those in {_where(run.config.data)}; {_AN_OTHER}"
            )
        if "teachers" not in result or run.config.loss.kind == "none":
            return
        now = self._teachers_of(run.config, images.class_names)
        for there, before in zip(now, result["teachers"]):
            if there and before and there != before:
                raise DataError(
                    f"{run.out}: is finished, and was taught by other weights than those in "
                    f"{', '.join(map(_shown, run.config.teacher.source))}; {_AN_OTHER}"
                )

    def _images_of(self, data: DataConfig) -> _Images:
        if data not in self._images:
            try:
                splits = load_splits(data)
                self._images[data] = _Images(splits.class_names, splits.fingerprint)
            except DataError as error:
                warn(f"finished runs are taken as they are: {error}")
                self._images[data] = _Images(None, "")
        return self._images[data]

    def _teachers_of(self, config: Config, class_names: tuple[str, ...]) -> list[str]:
        """Digests of the teachers, as a run notes them; "" for those that are not here."""
        key = config.teacher, config.student, config.data
        now = self._teachers.get(key, [""])
        if "" in now:  # it may be there by now
            now = [
                _digest(seat.members, class_names, config.student.image_size)
                for seat in teacher_slots(config.teacher)
            ]
            self._teachers[key] = now
        return now


def _digest(members: Iterable[Any], class_names: tuple[str, ...], side: int) -> str:
    if any(_is_under_way(one.source) for one in members):
        return ""
    try:
        return digest_of_teachers(
            [load_teacher(one, class_names, image_size=side) for one in members]
        )
    except (DataError, CheckpointError, ConfigError):
        return ""


def _is_under_way(source: str | None) -> bool:
    """Whether a teacher is a run that has not come to its end: it will be another."""
    folder = Path(source or "").expanduser()
    return (folder / run_folder.CONFIG).is_file() and run_folder.read_result(folder) is None


def _where(data: DataConfig) -> str:
    return "digits" if data.source == "digits" else str(Path(data.root))


def _shown(source: str | None) -> str:
    return source or "a store"
