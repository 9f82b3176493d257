"""The run folder: what is written, in which order, and how it is found again."""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deit.errors import CheckpointError, ConfigError, EnvironmentFault

FORMAT_VERSION = 1
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
METRICS = "metrics.jsonl"
CONFIG = "config.json"
CHECKPOINTS = ("last", "best")
_ADAM_TENSORS = ("step", "exp_avg", "exp_avg_sq")


def check_folder(out: Path, *, resume: bool) -> None:
    """Refuse a folder that would be overwritten, before anything is written or loaded.

    Raises ConfigError if it is not empty and resuming was not asked for, or holds no run.
    """
    if out.exists() and not out.is_dir():
        raise EnvironmentFault(f"--out {out}: is a file, not a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not resume:
        raise ConfigError(
            f"--out {out}: the folder is not empty; add --resume to go on with the run in it, "
            "or give another --out"
        )
    if not (out / CONFIG).is_file():
        raise ConfigError(
            f"--out {out}: holds something, but no run to resume (no {CONFIG}); give another --out"
        )


def check_writable(out: Path, *, option: str) -> None:
    """Prove that a file can be written, synced and renamed where `out` is or will be.

    Leaves nothing behind. option: the flag that named it. Raises EnvironmentFault.
    """
    place = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    probe = place / f".probe-{uuid.uuid4().hex}"
    try:
        with probe.open("w") as file:
            file.write("probe")
            os.fsync(file.fileno())
        probe.rename(probe.with_suffix(".renamed")).unlink()
    except OSError as error:
        raise EnvironmentFault(f"{option} {out}: cannot be written ({error.strerror})") from None


def check_file(path: Path | None, *, option: str, replace: bool) -> None:
    """Refuse, before the long work, a file that could not be written or (unless it may be replaced)
    is there already. Raises EnvironmentFault."""
    if path is None:
        return
    if path.is_dir():
        raise EnvironmentFault(f"{option} {path}: is a folder, not a file")
    if path.exists() and not replace:
        raise EnvironmentFault(f"{option} {path}: exists already; --force replaces it")
    if not path.absolute().parent.is_dir():
        raise EnvironmentFault(f"{option} {path}: no folder {path.absolute().parent}")
    check_writable(path.absolute().parent, option=option)


def open_folder(out: Path) -> None:
    """Create the folder; finish or undo a save that was cut off. Raises EnvironmentFault."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"--out {out}: cannot be made ({error.strerror})") from None
    for name in CHECKPOINTS:
        target, new, old = out / name, out / f".new-{name}", out / f".old-{name}"
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder by `write` and put it in the place of `target`.

    The files are synced before the rename, and the old folder is removed only after it, so that
    at every moment a complete one exists. Raises EnvironmentFault if the disk refuses.
    """
    new = target.with_name(f".new-{target.name}")
    old = target.with_name(f".old-{target.name}")
    try:
        if new.exists():
            shutil.rmtree(new)
        new.mkdir()
        write(new)
        for file in new.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            target.rename(old)
        new.rename(target)
        if old.exists():
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentFault(
            f"{target}: could not be saved ({reason}); the one before is intact"
        ) from None
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def put_file(path: Path, content: bytes) -> None:
    """Write a file to the disk under another name and rename it: it is there whole or not at all.

    Raises FileNotFoundError where its folder is gone, EnvironmentFault where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            sync(file)
        temporary.replace(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EnvironmentFault(f"{path}: could not be written ({error.strerror})") from None
    sync_folder(path.parent)


def put_first(path: Path, content: bytes) -> bool:
    """Write a file as `put_file` does, unless there is one; whether there was none.

    Of several processes one is the first. Raises EnvironmentFault where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            sync(file)
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise EnvironmentFault(f"{path}: could not be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def sync(file: BinaryIO) -> None:
    """Bring what was written to the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring new names to the disk itself, where a folder can be opened for that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename. Raises EnvironmentFault."""
    try:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise EnvironmentFault(f"{path}: could not be written ({error.strerror})") from None


def append_metrics(out: Path, row: dict[str, Any]) -> None:
    """One line of JSON for an epoch; what is not finite becomes null. Raises EnvironmentFault."""
    try:
        with (out / METRICS).open("a") as file:
            file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
    except OSError as error:
        raise EnvironmentFault(f"{out / METRICS}: {error.strerror}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not torch.isfinite(torch.tensor(value)):
        return None
    return value


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, oldest first; an empty list without the file.

    A line that a kill cut off is left out.
    """
    path = out / METRICS
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cut_metrics(out: Path, epochs: int) -> None:
    """Drop rows of epochs that the checkpoint does not hold, so that none appears twice."""
    kept = [row for row in read_metrics(out) if row["epoch"] <= epochs]
    temporary = out / f".{METRICS}.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    temporary.replace(out / METRICS)


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """AdamW's state by parameter name, as tensors."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for kind in _ADAM_TENSORS:
            if kind in state:
                tensors[f"{kind}/{name}"] = state[kind].detach().cpu().contiguous()
    save_file(tensors, path)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Put AdamW's state back. Raises CheckpointError if names or shapes differ."""
    tensors = read_tensors(path)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found = {kind: tensors.pop(f"{kind}/{name}", None) for kind in _ADAM_TENSORS}
        if any(value is None for value in found.values()):
            raise CheckpointError(f"{path}: no optimizer state for {name}")
        if found["exp_avg"].shape != parameter.shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(found['exp_avg'].shape)} in the file, "
                f"{tuple(parameter.shape)} in the network"
            )
        optimizer.state[parameter] = {
            "step": found["step"],  # stays on the CPU: AdamW reads it there
            "exp_avg": found["exp_avg"].to(parameter.device),
            "exp_avg_sq": found["exp_avg_sq"].to(parameter.device),
        }
    if tensors:
        raise CheckpointError(f"{path}: state of an unknown parameter: {next(iter(tensors))}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises CheckpointError."""
    try:
        return load_file(path)
    except Exception as error:  # OSError or SafetensorError
        raise CheckpointError(f"{path}: not readable ({error})") from None
