"""The run folder: its file names, its checkpoints, and the latest valid one of them."""

import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deit.core import manifest
from deit.core.console import warn
from deit.core.errors import (
    CheckpointError,
    ConfigError,
    NotReadableError,
    SystemFault,
    did_you_mean,
)
from deit.core.fault_injection import fault_point
from deit.core.file_reading import NOT_PLAIN, is_plain
from deit.core.filesystem import ENVIRONMENT as ENVIRONMENT
from deit.core.filesystem import LOCK, REMOVED_PREFIX, is_temporary, replace_dir
from deit.core.filesystem import RESUMED as RESUMED
from deit.core.json_io import load_json_as

CONFIG = "config.json"
MODEL_INFO = "model.json"
RESULT = "result.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
BEST = "best"
NAMES = ("best", "last")
"""Names of checkpoints in options: the best so far, and the latest."""
_PREFIX, _DAMAGED_PREFIX = "checkpoint-", "damaged-"


@dataclass(frozen=True)
class Packages:
    """Versions of packages in a run's environment."""

    torch: str
    timm: str


@dataclass(frozen=True)
class RecordedEnvironment:
    """The fields of a run's environment.json that other commands read."""

    command: str
    deit: str
    commit: str | None
    packages: Packages
    device_name: str
    processes: int
    threads: int
    precision: str


@dataclass(frozen=True)
class Result:
    """The content of result.json, which marks a run as finished."""

    epochs: int
    step: int
    samples_seen: int
    seconds: float
    skipped: int
    teacher_top1: float | None
    best: dict[str, int | float | None]
    chain: str
    fingerprint: str
    targets: list[str]
    teachers: list[str]
    validation_images: int | None = None


def read_environment(run: str | Path) -> RecordedEnvironment:
    """Return the recorded environment of a run. Raises CheckpointError."""
    return load_json_as(Path(run) / ENVIRONMENT, RecordedEnvironment)


def check_run_dir(out: Path, *, resume: bool) -> None:
    """Check before any work that a run can be written to, or resumed in, a folder.

    Raises ConfigError if it is not empty and `resume` is false, or if it holds no run;
    CheckpointError if its run was written by an earlier release, or one of its files is a link;
    SystemFault if it is not a folder.
    """
    try:
        exists = out.exists()
    except OSError as error:  # a name that the file system does not allow
        raise SystemFault(f"out = {out}: {error.strerror}") from None
    if exists and not out.is_dir():
        raise SystemFault(f"out = {out}: is a file, not a folder")
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    if all(name == LOCK or is_temporary(name) for name in names):
        _check_entries(out, names)
        return
    if CONFIG not in names:
        raise ConfigError(f"out = {out}: is not empty and not a run (no {CONFIG}); give another")
    if not resume:
        raise ConfigError(
            f"out = {out}: the folder is not empty; resume the run in it with resume=True "
            "(--resume), or give another folder"
        )
    _check_entries(out, names)
    if not (out / CONFIG).is_file():
        raise ConfigError(f"out = {out}: its {CONFIG} is not a file; give another folder")
    if (out / "last").is_dir():
        raise CheckpointError(
            f"out = {out}: a run of an earlier release (it has a folder `last`), which cannot be "
            "resumed; its best/ can be evaluated and fine-tuned; give another folder"
        )


def _check_entries(out: Path, names: list[str]) -> None:
    """Raise CheckpointError for links, pipes and devices among the files of a run.

    Links can lead out of the folder; pipes and devices can block.
    """
    for name in names:
        is_run_file = (
            name == BEST
            or name.startswith((_PREFIX, _DAMAGED_PREFIX, "."))
            or name.endswith((".json", ".jsonl"))
        )
        if is_run_file and (out / name).is_symlink():
            raise CheckpointError(
                f"{out / name}: is a link (to {os.path.realpath(out / name)}); put the file or "
                "folder itself there"
            )
        if is_run_file and (out / name).exists() and not is_plain(out / name):
            raise CheckpointError(f"{out / name}: {NOT_PLAIN}; remove it")


def create_run_dir(out: Path) -> None:
    """Create the folder of a run. Raises SystemFault."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemFault(f"out = {out}: cannot be created ({error.strerror})") from None


def run_dir_of(path: str | Path) -> Path:
    """Return the folder of the run for a run folder or one of its checkpoints."""
    folder = Path(path).expanduser()
    return folder.parent if is_checkpoint_dir(folder) else folder


def require_folder(run: str | Path) -> None:
    """Raise CheckpointError if the folder of a run is missing."""
    run = Path(run)
    if not run.is_dir():
        siblings = [path.parent.name for path in run.absolute().parent.glob(f"*/{CONFIG}")]
        raise CheckpointError(f"{run}: no such run folder{did_you_mean(run.name, siblings)}")


def require_run(run: str | Path) -> None:
    """Raise CheckpointError if a path is not a run folder."""
    run = Path(run)
    require_folder(run)
    if not (run / CONFIG).is_file():
        if (run / MODEL_INFO).is_file():
            raise CheckpointError(
                f"{run}: a saved student, not a run (no {CONFIG}); it can be a teacher or "
                "init.weights, and deit.load_student loads it; to evaluate or export it, make a "
                "run of it with deit finetune (deit.finetune)"
            )
        runs_inside = sorted(str(path.parent) for path in run.glob(f"*/{CONFIG}"))
        hint = f"; it contains {runs_inside[0]}" if runs_inside else ""
        raise CheckpointError(f"{run}: not a run folder (no {CONFIG}){hint}")


def read_result(out: str | Path) -> dict[str, Any] | None:
    """Return the result of a finished run; None if the run is not finished.

    Raises CheckpointError if result.json is invalid.

    >>> result = read_result("checkpoints/digits")
    >>> result["epochs"], result["best"]["epoch"] in (1, 2), result["skipped"]
    (2, True, 0)
    """
    path = Path(out) / RESULT
    if not path.is_file():
        return None
    result = asdict(load_json_as(path, Result))
    for name in ("epoch", "top1", "class_top1"):
        if result["best"].get(name) is None:
            raise CheckpointError(f"{path}: best: no {name}")
    return result


def checkpoint_path(out: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` optimizer steps."""
    return out / f"{_PREFIX}{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix(_PREFIX))


def list_checkpoints(out: str | Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a run folder with their steps, the latest first.

    Ordered by name: file times change with clocks and copies.
    """
    out = Path(out)
    checkpoints = []
    for path in out.glob(f"{_PREFIX}*"):
        digits = path.name.removeprefix(_PREFIX)
        if digits.isdecimal() and path.is_dir() and path == checkpoint_path(out, int(digits)):
            checkpoints.append((int(digits), path))
    return sorted(checkpoints, reverse=True)


WriteFiles = Callable[[Path], dict[str, manifest.FileDigest] | None]
"""Writes files into a folder; returns the digests that it has already computed, by name."""


def save_checkpoint(
    out: Path,
    step: int,
    write_files: WriteFiles,
    *,
    keep: int,
    keep_steps: Collection[int] = (),
    bytes_needed: int = 0,
) -> None:
    """Write the checkpoint of a step atomically, verify it, and remove old checkpoints.

    keep: how many of the latest checkpoints to keep, in addition to those of `keep_steps`.
    bytes_needed: approximate size, for the message if the disk is full.
    Raises SystemFault if writing fails; then all earlier checkpoints are kept.
    """
    target = checkpoint_path(out, step)
    write_with_manifest(target, write_files, step=step, bytes_needed=bytes_needed)
    manifest.verify_dir(target)
    remove_old_checkpoints(out, keep=keep, keep_steps=keep_steps)


def write_with_manifest(
    target: Path, write_files: WriteFiles, *, step: int, bytes_needed: int = 0
) -> None:
    """Write a folder with a manifest, and replace `target` with it.

    Raises SystemFault if writing fails.
    """

    def write(folder: Path) -> None:
        known = write_files(folder) or {}
        names = {file.name for file in folder.iterdir()}
        files = known | manifest.digests(folder, names - known.keys())
        manifest.write_manifest(folder, files, step=step)
        fault_point("manifest")

    replace_dir(target, write, bytes_needed=bytes_needed)


def remove_old_checkpoints(out: Path, *, keep: int, keep_steps: Collection[int] = ()) -> None:
    """Remove all checkpoints except the `keep` latest and those of `keep_steps`.

    `clean_leftovers` removes what a killed process leaves of them.
    """
    removable = [path for step, path in list_checkpoints(out) if step not in keep_steps]
    for path in removable[keep:]:
        renamed = path.with_name(f"{REMOVED_PREFIX}{path.name}")
        path.rename(renamed)
        fault_point("rotate")
        shutil.rmtree(renamed, ignore_errors=True)


def latest_checkpoint(out: str | Path) -> Path | None:
    """Return the latest valid checkpoint; None if there is no checkpoint at all.

    Skips damaged ones, with a warning for each. Raises CheckpointError if all are damaged, or if
    the permissions forbid reading one; SystemFault for a transient error.
    """
    damages = []
    for step, path in list_checkpoints(out):
        try:
            verify_checkpoint(path, step)
        except NotReadableError:
            raise
        except CheckpointError as error:
            damages.append(str(error))
            continue
        for damage in damages:
            warn(f"skipped a damaged checkpoint: {damage}")
        for name in sorted(manifest.unlisted_files(path)):
            warn(f"{path / name}: not part of the checkpoint, ignored")
        return path
    if damages:
        raise CheckpointError(
            f"{out}: all checkpoints are damaged, so the run cannot be resumed:\n  "
            + "\n  ".join(damages)
        )
    return None


def verify_checkpoint(path: Path, step: int) -> None:
    """Verify a checkpoint against its manifest and its name. Raises CheckpointError."""
    actual = manifest.verify_dir(path).step
    if actual != step:
        raise CheckpointError(f"{path}: holds step {actual}, so the folder was renamed or moved")


def rename_damaged(out: Path, *, after: int) -> None:
    """Rename the damaged checkpoints of steps later than `after`, so that they are ignored."""
    for step, path in list_checkpoints(out):
        if step > after:
            renamed = path.with_name(f"{_DAMAGED_PREFIX}{path.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
            warn(f"{path} is damaged and was renamed to {renamed.name}")


def is_checkpoint_dir(folder: Path) -> bool:
    """Return whether a path has the name of a checkpoint in a run folder."""
    digits = folder.name.removeprefix(_PREFIX)
    return folder.name == BEST or (folder.name.startswith(_PREFIX) and digits.isdecimal())


def damaged_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints that `rename_damaged` has renamed."""
    return sorted(out.glob(f"{_DAMAGED_PREFIX}{_PREFIX}*"))


def find_checkpoint(out: str | Path, name: str) -> Path | None:
    """Return the folder of a checkpoint by name (one of NAMES); None if there is none.

    >>> find_checkpoint("checkpoints/digits", "best").as_posix()
    'checkpoints/digits/best'
    """
    if name == "last":
        return latest_checkpoint(out)
    path = Path(out) / name
    return path if path.is_dir() else None
