"""Log metrics to TensorBoard, wandb, mlflow or trackio through Accelerate; to none by default."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from deit.config.schema import Config, to_dict
from deit.core.console import info, warn
from deit.core.errors import SystemFault, first_line
from deit.core.file_reading import read_text
from deit.core.filesystem import write_once

PROJECT = "deit"
FOLDER = "trackers"
"""In the run folder: what trackers write there, and the run's names for them."""

_RUN_ID, _MLFLOW_RUN_ID = "run-id", "mlflow-run-id"


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise SystemFault if a tracker's package is missing, which Accelerate would ignore."""
    for name in names:
        if find_spec(name) is None:
            raise SystemFault(
                f"run.trackers {name}: the package is missing; pip install {name}, or leave it out "
                "(metrics.jsonl in the run folder has everything)"
            )


@contextmanager
def tracked(accelerator: Accelerator, config: Config, out: Path) -> Iterator[None]:
    """Start the trackers of a configuration for the block, in which `track` logs to them.

    Raises SystemFault if one cannot start.
    """
    names = list(config.run.trackers)
    if names:
        folder = out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)  # processes can be on other machines
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.log_with = filter_trackers(names, str(folder))
        settings = _settings(out, folder)
        values: dict[str, Any] = _flat(config)
        if "mlflow" in names and accelerator.is_main_process and (known := _mlflow_run(folder)):
            settings["mlflow"]["run_id"] = known
            values = {}  # mlflow has them already and refuses changed ones
        try:
            accelerator.init_trackers(PROJECT, values, settings)
        except Exception as error:  # each library raises its own, for keys, servers and disks
            raise SystemFault(f"run.trackers {', '.join(names)}: {first_line(error)}") from None
        for tracker in accelerator.trackers:
            if tracker.name == "mlflow" and accelerator.is_main_process:
                (folder / _MLFLOW_RUN_ID).write_text(tracker.tracker.info.run_id, encoding="utf-8")
        info(f"trackers  {', '.join(_where(name, folder) for name in names)}")
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                warn(f"the tracker {tracker.name} failed at its end: {first_line(error)}")
        accelerator.trackers = []


def track(accelerator: Accelerator, row: dict[str, Any]) -> None:
    """Log the metrics of an epoch, such as `validation/fused_top1`, at its step.

    A tracker that fails is disabled with a warning; training continues.
    """
    values: dict[str, float] = {"epoch": row["epoch"], "seconds": row["seconds"]}
    for group in ("train", "validation"):
        for name, value in row.get(group, {}).items():
            if value is not None:
                values[f"{group}/{name}"] = value
    if "loader" in row:
        values["speed/images_per_s"] = row["images_per_s"]
        values["speed/loader_share"] = row["loader"]["share"]
        values["speed/memory_mb"] = row["memory_mb"]
    for tracker in list(accelerator.trackers):
        try:
            tracker.log(values, step=row["step"])
        except Exception as error:
            warn(f"the tracker {tracker.name} failed and is disabled: {first_line(error)}")
            accelerator.trackers.remove(tracker)


def _flat(config: Config) -> dict[str, bool | int | float | str]:
    """Return the configuration by `section.field`, in types that every tracker supports."""
    return {
        f"{section}.{leaf}": value if isinstance(value, bool | int | float | str) else _text(value)
        for section, values in to_dict(config).items()
        for leaf, value in values.items()
    }


def _text(value: Any) -> str:
    return "none" if value is None else ",".join(map(str, value))


def _settings(out: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the start options of trackers: the run's name, and an identifier to resume with."""
    name = out.resolve().name
    write_once(folder / _RUN_ID, uuid.uuid4().hex.encode())
    run_id = read_text(folder / _RUN_ID)
    return {
        "wandb": {"name": name, "dir": str(folder), "id": run_id, "resume": "allow"},
        "mlflow": {"run_name": name},
        # trackio identifies runs by name.
        "trackio": {"name": f"{name}-{run_id[:6]}", "resume": "allow"},
    }


def _mlflow_run(folder: Path) -> str | None:
    """Return mlflow's identifier of this run; None if its current store has no such run."""
    path = folder / _MLFLOW_RUN_ID
    if not path.is_file():
        return None
    import mlflow

    try:
        return mlflow.get_run(read_text(path)).info.run_id
    except mlflow.exceptions.MlflowException:  # missing: start a new one
        return None


def _where(name: str, folder: Path) -> str:
    """Return a tracker's name and where it writes."""
    if name == "mlflow":
        import mlflow

        return f"mlflow ({mlflow.get_tracking_uri()})"
    return f"trackio (project {PROJECT})" if name == "trackio" else f"{name} ({folder})"
