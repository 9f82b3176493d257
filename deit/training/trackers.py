"""Metrics handed on to TensorBoard, wandb, mlflow or trackio, by Accelerate; none by default."""

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

_OURS, _MLFLOW = "run-id", "mlflow-run-id"


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers whose package is not there, before the work: Accelerate would drop them
    without a word. Raises SystemFault."""
    for name in names:
        if find_spec(name) is None:
            raise SystemFault(
                f"run.trackers {name}: the package is missing; pip install {name}, or leave it out "
                "(metrics.jsonl in the run folder has everything)"
            )


@contextmanager
def tracked(accelerator: Accelerator, config: Config, out: Path) -> Iterator[None]:
    """While it is entered, `track` reaches the trackers of a configuration.

    Raises SystemFault where one of them cannot begin.
    """
    names = list(config.run.trackers)
    if names:
        folder = out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)  # in every process: it may be another machine
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.log_with = filter_trackers(names, str(folder))
        settings = _settings(out, folder)
        told: dict[str, Any] = _flat(config)
        if "mlflow" in names and accelerator.is_main_process and (known := _mlflow_run(folder)):
            settings["mlflow"]["run_id"] = known
            told = {}  # it has them, and refuses any that was changed since
        try:
            accelerator.init_trackers(PROJECT, told, settings)
        except Exception as error:  # each library raises its own, for keys, servers and disks
            raise SystemFault(f"run.trackers {', '.join(names)}: {first_line(error)}") from None
        for tracker in accelerator.trackers:
            if tracker.name == "mlflow" and accelerator.is_main_process:
                (folder / _MLFLOW).write_text(tracker.tracker.info.run_id, encoding="utf-8")
        info(f"trackers  {', '.join(_where(name, folder) for name in names)}")
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                warn(f"the tracker {tracker.name} did not end well: {first_line(error)}")
        accelerator.trackers = []


def track(accelerator: Accelerator, row: dict[str, Any]) -> None:
    """Hand on the numbers of an epoch, `validation/fused_top1` for instance, at its update. A
    tracker that fails is left alone from then on: training does not depend on it."""
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
            warn(f"the tracker {tracker.name} failed and is left alone now: {first_line(error)}")
            accelerator.trackers.remove(tracker)


def _flat(config: Config) -> dict[str, bool | int | float | str]:
    """The configuration by `section.field`, in the types that every tracker takes."""
    return {
        f"{section}.{leaf}": value if isinstance(value, bool | int | float | str) else _text(value)
        for section, values in to_dict(config).items()
        for leaf, value in values.items()
    }


def _text(value: Any) -> str:
    return "none" if value is None else ",".join(map(str, value))


def _settings(out: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What trackers take at their start: a run is called by its folder, and a resumed one goes on
    as the same run."""
    name = out.resolve().name
    write_once(folder / _OURS, uuid.uuid4().hex.encode())
    known = read_text(folder / _OURS)
    return {
        "wandb": {"name": name, "dir": str(folder), "id": known, "resume": "allow"},
        "mlflow": {"run_name": name},
        # It knows runs by their names alone.
        "trackio": {"name": f"{name}-{known[:6]}", "resume": "allow"},
    }


def _mlflow_run(folder: Path) -> str | None:
    """The identifier of the run that mlflow has of this folder; None where it has none, or not in
    the store that it writes to now."""
    path = folder / _MLFLOW
    if not path.is_file():
        return None
    import mlflow

    try:
        return mlflow.get_run(read_text(path)).info.run_id
    except mlflow.exceptions.MlflowException:  # not there: then it is a run of its own
        return None


def _where(name: str, folder: Path) -> str:
    """A tracker, and where its numbers are to be found."""
    if name == "mlflow":
        import mlflow

        return f"mlflow ({mlflow.get_tracking_uri()})"
    return f"trackio (project {PROJECT})" if name == "trackio" else f"{name} ({folder})"
