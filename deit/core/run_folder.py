"""The run folder: its names, its checkpoints written whole, and the newest sound one found."""

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
RESULT = "result.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
BEST = "best"
NAMES = ("best", "last")
"""What a checkpoint may be asked for by: the best so far, the newest."""
_PREFIX, _ASIDE = "checkpoint-", "damaged-"


@dataclass(frozen=True)
class Packages:
    """The versions of what computes."""

    torch: str
    timm: str


@dataclass(frozen=True)
class RecordedEnvironment:
    """What a run has recorded of its environment, as far as others read it."""

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


def read_environment(run: Path) -> RecordedEnvironment:
    """Return the recorded environment of a run. Raises CheckpointError."""
    return load_json_as(run / ENVIRONMENT, RecordedEnvironment)


def check_run_dir(out: Path, *, resume: bool) -> None:
    """Refuse a folder that would be overwritten, before anything is written or loaded.

    Raises ConfigError if it is not empty and resuming was not asked for, or holds no run;
    CheckpointError where its run was made by an earlier release, or a name of ours is a link.
    """
    try:
        there = out.exists()
    except OSError as error:  # a name that no disk takes
        raise SystemFault(f"--out {out}: {error.strerror}") from None
    if there and not out.is_dir():
        raise SystemFault(f"--out {out}: is a file, not a folder")
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    if all(name == LOCK or is_temporary(name) for name in names):
        _check_entries(out, names)
        return
    if CONFIG not in names:
        raise ConfigError(
            f"--out {out}: holds something, but no run (no {CONFIG}); give another --out"
        )
    if not resume:
        raise ConfigError(
            f"--out {out}: the folder is not empty; add --resume to go on with the run in it, "
            "or give another --out"
        )
    _check_entries(out, names)
    if not (out / CONFIG).is_file():
        raise ConfigError(f"--out {out}: its {CONFIG} is no file; give another --out")
    if (out / "last").is_dir():
        raise CheckpointError(
            f"--out {out}: a run of an earlier release (it has a folder `last`), which this one "
            "does not resume; its best/ can be evaluated and fine-tuned; give another --out"
        )


def _check_entries(out: Path, names: list[str]) -> None:
    """Refuse links in a run folder, which lead out of it, and pipes and devices, which may block.
    Raises CheckpointError."""
    for name in names:
        ours = (
            name == BEST
            or name.startswith((_PREFIX, _ASIDE, "."))
            or name.endswith((".json", ".jsonl"))
        )
        if ours and (out / name).is_symlink():
            raise CheckpointError(
                f"{out / name}: is a link (to {os.path.realpath(out / name)}), and may lead "
                "anywhere; put what it leads to in its place"
            )
        if ours and (out / name).exists() and not is_plain(out / name):
            raise CheckpointError(f"{out / name}: {NOT_PLAIN}; remove it")


def create_run_dir(out: Path) -> None:
    """Create the folder of a run. Raises SystemFault."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemFault(f"--out {out}: cannot be made ({error.strerror})") from None


def require_run(run: Path) -> None:
    """Refuse what is no run folder. Raises CheckpointError."""
    if not run.is_dir():
        beside = run.absolute().parent
        others = [one.parent.name for one in beside.glob(f"*/{CONFIG}")]
        raise CheckpointError(f"{run}: no such run folder{did_you_mean(run.name, others)}")
    if not (run / CONFIG).is_file():
        inside = sorted(str(one.parent) for one in run.glob(f"*/{CONFIG}"))
        named = f"; in it is {inside[0]}" if inside else ""
        raise CheckpointError(f"{run}: not a run folder (no {CONFIG}){named}")


def read_result(out: Path) -> dict[str, Any] | None:
    """What a finished run came to; None of one that is not. Raises CheckpointError."""
    path = out / RESULT
    if not path.is_file():
        return None
    found = asdict(load_json_as(path, Result))
    for name in ("epoch", "top1", "class_top1"):
        if found["best"].get(name) is None:
            raise CheckpointError(f"{path}: best: no {name}")
    return found


def checkpoint_path(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return out / f"{_PREFIX}{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(folder.name.removeprefix(_PREFIX))


def list_checkpoints(out: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a run folder with their steps, the newest first; by name, for clocks and
    copies make times of files meaningless."""
    steps = []
    for path in out.glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if number.isdecimal() and path.is_dir() and path == checkpoint_path(out, int(number)):
            steps.append((int(number), path))
    return sorted(steps, reverse=True)


Fill = Callable[[Path], dict[str, manifest.FileDigest] | None]
"""Writes files into the folder it is given; returns what it knows of their digests already."""


def save_checkpoint(
    out: Path, step: int, fill: Fill, *, keep: int, keep_steps: Collection[int] = (), needs: int = 0
) -> None:
    """Write the checkpoint of a step, whole or not at all; then remove all but the newest `keep`,
    and those of the steps that `stay`.

    needs: about how many bytes, for the message of a full disk.
    Nothing is removed before the new one is
    held against its manifest. Raises SystemFault where the disk refuses; the checkpoints
    before are left then.
    """
    target = checkpoint_path(out, step)
    write_with_manifest(target, fill, step=step, needs=needs)
    manifest.verify_dir(target)
    remove_old_checkpoints(out, keep=keep, keep_steps=keep_steps)


def write_with_manifest(target: Path, fill: Fill, *, step: int, needs: int = 0) -> None:
    """Fill a new folder, with a manifest, and put it in the place of `target`.

    Raises SystemFault where the disk refuses.
    """

    def write(folder: Path) -> None:
        known = fill(folder) or {}
        names = {file.name for file in folder.iterdir()}
        files = known | manifest.digests(folder, names - known.keys())
        manifest.write_manifest(folder, files, step=step)
        fault_point("manifest")

    replace_dir(target, write, bytes_needed=needs)


def remove_old_checkpoints(out: Path, *, keep: int, keep_steps: Collection[int] = ()) -> None:
    """Remove all but the newest checkpoints and those of the steps that stay; what a kill leaves of
    that, the next start clears."""
    passing = [path for step, path in list_checkpoints(out) if step not in keep_steps]
    for path in passing[keep:]:
        aside = path.with_name(f"{REMOVED_PREFIX}{path.name}")
        path.rename(aside)
        fault_point("rotate")
        shutil.rmtree(aside, ignore_errors=True)


def latest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None where there is none at all.

    Damaged ones are named and passed over. Raises CheckpointError where all are damaged, or one may
    not be read; SystemFault where one cannot be read now.
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
            warn(f"passed over: {damage}")
        for stray in sorted(manifest.unlisted_files(path)):
            warn(f"{path / stray}: none of ours, and not read")
        return path
    if damages:
        raise CheckpointError(
            f"{out}: no checkpoint is sound, so the run cannot go on:\n  " + "\n  ".join(damages)
        )
    return None


def verify_checkpoint(path: Path, step: int) -> None:
    """Hold a checkpoint against its manifest and its name. Raises CheckpointError."""
    said = manifest.verify_dir(path).step
    if said != step:
        raise CheckpointError(f"{path}: holds step {said}, so it is not where it was written")


def rename_damaged(out: Path, *, after: int) -> None:
    """Rename the checkpoints of later steps, which are damaged, so that nothing counts them."""
    for step, path in list_checkpoints(out):
        if step > after:
            aside = path.with_name(f"{_ASIDE}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            warn(f"{path} is damaged and was set aside as {aside.name}")


def is_checkpoint_dir(folder: Path) -> bool:
    """Whether a path is named as a checkpoint in a run folder is."""
    number = folder.name.removeprefix(_PREFIX)
    return folder.name == BEST or (folder.name.startswith(_PREFIX) and number.isdecimal())


def damaged_checkpoints(out: Path) -> list[Path]:
    """The checkpoints that `rename_damaged` has put away."""
    return sorted(out.glob(f"{_ASIDE}{_PREFIX}*"))


def find_checkpoint(out: Path, name: str) -> Path | None:
    """The folder of the checkpoint asked for by one of NAMES; None where there is none."""
    if name == "last":
        return latest_checkpoint(out)
    return out / name if (out / name).is_dir() else None
