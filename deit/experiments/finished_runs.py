"""Check that finished runs were trained on the current images and by the current teachers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from deit.config.schema import Config
from deit.config.sections.data import DataConfig
from deit.config.sections.student import StudentConfig
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import teacher_slots
from deit.core import run_folder
from deit.core.console import warn
from deit.core.errors import CheckpointError, ConfigError, DataError
from deit.datasets.splits import load_splits
from deit.distill.run_teachers import digest_of_teachers
from deit.experiments.parallel_runs import RunSpec
from deit.models.teacher_sources import teacher_from_spec

_REMEDY = "restore them, or give another folder"


class _Images(NamedTuple):
    """The current images: class names and digest of all splits. class_names: None if the images
    cannot be read."""

    class_names: tuple[str, ...] | None
    fingerprint: str


class FinishedRunChecker:
    """Checks finished runs; reads each data set and each teacher once."""

    def __init__(self) -> None:
        self._images: dict[DataConfig, _Images] = {}
        self._teachers: dict[tuple[TeacherConfig, StudentConfig, DataConfig], list[str]] = {}

    def check(self, runs: Iterable[RunSpec]) -> None:
        """Raise DataError if a finished run had other images or teachers than the current ones.

        Its results could not be compared with those of new runs. Images and teachers that no longer
        exist are not checked. Skips unfinished runs.
        """
        for run in runs:
            if (result := run_folder.read_result(run.out)) is not None:
                self._check(run, result)

    def _check(self, run: RunSpec, result: dict[str, Any]) -> None:
        images = self._images_of(run.config.data)
        if images.class_names is None:
            return
        if images.fingerprint != result["fingerprint"]:
            raise DataError(
                f"{run.out}: this finished run was trained on other images (class names, pixels or "
                f"labels) than those now in {_data_path(run.config.data)}; {_REMEDY}"
            )
        if "teachers" not in result or run.config.loss.kind == "none":
            return
        digests = self._teachers_of(run.config, images.class_names)
        for current, recorded in zip(digests, result["teachers"]):
            if current and recorded and current != recorded:
                teachers = ", ".join(source or "a store" for source in run.config.teacher.source)
                raise DataError(
                    f"{run.out}: this finished run had a teacher with other weights than those now "
                    f"in {teachers}; {_REMEDY}"
                )

    def _images_of(self, data: DataConfig) -> _Images:
        if data not in self._images:
            try:
                splits = load_splits(data)
                self._images[data] = _Images(splits.class_names, splits.fingerprint)
            except DataError as error:
                warn(f"the images of finished runs are not checked: {error}")
                self._images[data] = _Images(None, "")
        return self._images[data]

    def _teachers_of(self, config: Config, class_names: tuple[str, ...]) -> list[str]:
        """Return the digests of the teachers as a run records them; "" for a missing teacher."""
        key = config.teacher, config.student, config.data
        digests = self._teachers.get(key, [""])
        if "" in digests:  # a missing teacher may have been trained since
            digests = [
                _digest(slot.members, class_names, config.student.image_size)
                for slot in teacher_slots(config.teacher)
            ]
            self._teachers[key] = digests
        return digests


def _digest(members: Iterable[Any], class_names: tuple[str, ...], image_size: int) -> str:
    """Return the digest of the teachers of a slot; "" if one is missing or unfinished."""
    if any(_is_unfinished(member.source) for member in members):
        return ""
    try:
        return digest_of_teachers(
            [teacher_from_spec(member, class_names, image_size=image_size) for member in members]
        )
    except (DataError, CheckpointError, ConfigError):
        return ""


def _is_unfinished(source: str | None) -> bool:
    """Return whether a teacher is an unfinished run, whose weights will still change."""
    folder = Path(source or "").expanduser()
    return (folder / run_folder.CONFIG).is_file() and run_folder.read_result(folder) is None


def _data_path(data: DataConfig) -> str:
    return "digits" if data.source == "digits" else str(Path(data.root))
