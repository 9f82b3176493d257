"""Every part of a checkpoint matters: a run resumed without it differs or is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deit.config.schema import Config
from deit.core import fault_injection, run_folder
from deit.core.errors import DataError, DeitError
from deit.training import save
from deit.training.state import TrainState
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import results, rewrite_manifest, stop_at

SKIPPED_STEP = 6  # in the second epoch


@pytest.fixture(scope="module")
def eventful_run(live_config, tmp_path_factory) -> tuple[Config, Path, Path]:
    """Return a configuration, its uninterrupted and its stopped run, in which all state matters.

    Step 6 is skipped, and the first epoch is the best.
    """
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("eventful")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "selection_metric", falling_top1)
        fault_injection.install_faults(f"loss:{SKIPPED_STEP}:nan")
        train(live_config, folder / "uninterrupted")
        stop_at(
            live_config, folder / "stopped", f"loss:{SKIPPED_STEP}:nan,step:{SKIPPED_STEP}:term"
        )
    return live_config, folder / "uninterrupted", folder / "stopped"


def falling_top1(validation: dict) -> float:
    """Return a selection metric that falls in training, so that the first epoch is the best."""
    return 1 - validation["class_top1"]


def resumed(eventful_run, tmp_path, monkeypatch, change) -> dict | str:
    """Return the results of a resumed run after a change of its checkpoint, or its error's name."""
    config, _, stopped = eventful_run
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    folder = run_folder.latest_checkpoint(out)
    change(folder)
    rewrite_manifest(folder)
    monkeypatch.setattr(save, "selection_metric", falling_top1)
    try:
        train(config, out, resume=True)
    except DeitError as error:
        return type(error).__name__
    return results(out)


def test_resume_from_an_unchanged_checkpoint_is_bit_identical(eventful_run, tmp_path, monkeypatch):
    assert resumed(eventful_run, tmp_path, monkeypatch, lambda folder: None) == results(
        eventful_run[1]
    )
    result = results(eventful_run[1])["result"]
    assert (result["skipped"], result["best"]["epoch"]) == (1, 1)


# Fields with tests of their own, and `seconds`, which is a time.
TESTED_SEPARATELY = {"seconds", "scaler", "skipped_in_a_row", "targets"}


@pytest.mark.fault("B18")
@pytest.mark.parametrize(
    "name",
    [f.name for f in dataclasses.fields(TrainState) if f.name not in TESTED_SEPARATELY],
)
def test_resume_without_a_state_field_differs(name, eventful_run, tmp_path, monkeypatch):
    default = dataclasses.asdict(TrainState())[name]

    def drop(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        value = {"format_version": 1}.get(name, default)
        assert content[name] != value, "the run does not change this field, so the test cannot fail"
        content[name] = value
        (folder / "state.json").write_text(json.dumps(content))

    assert resumed(eventful_run, tmp_path, monkeypatch, drop) != results(eventful_run[1])


def test_resume_without_the_stores_in_the_state_is_refused(config, tmp_path):
    stop_at(config, tmp_path / "run", "step:1:term")
    folder = run_folder.latest_checkpoint(tmp_path / "run")
    content = json.loads((folder / "state.json").read_text())
    assert len(content["targets"]) == 1
    (folder / "state.json").write_text(json.dumps({**content, "targets": []}))
    rewrite_manifest(folder)
    with raises(DataError, tmp_path / "run", "teacher.target_stores"):
        train(config, tmp_path / "run", resume=True)


@pytest.mark.fault("B18")
@pytest.mark.parametrize("file", ["model", "average", "optimizer"])
def test_resume_with_zeroed_tensors_differs(file, eventful_run, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    def reset(folder: Path) -> None:
        path = folder / f"{file}.safetensors"
        metadata = {"format": "pt"}
        zeros = {name: torch.zeros_like(value) for name, value in load_file(path).items()}
        save_file(zeros, path, metadata=metadata)

    assert resumed(eventful_run, tmp_path, monkeypatch, reset) != results(eventful_run[1])


@pytest.mark.fault("B18")
@pytest.mark.parametrize(
    "file", ["model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"]
)
def test_resume_without_a_checkpoint_file_is_refused(file, eventful_run, tmp_path, monkeypatch):
    error = resumed(eventful_run, tmp_path, monkeypatch, lambda folder: (folder / file).unlink())
    assert error == "CheckpointError"


@pytest.mark.fault("B11")
@pytest.mark.parametrize("file", ["model", "average", "optimizer"])
def test_resume_from_nonfinite_tensors_is_refused(file, eventful_run, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    def write_infinity(folder: Path) -> None:
        path = folder / f"{file}.safetensors"
        tensors = load_file(path)
        next(reversed(tensors.values())).view(-1)[0] = float("inf")
        save_file(tensors, path, metadata={"format": "pt"})

    assert resumed(eventful_run, tmp_path, monkeypatch, write_infinity) == "CheckpointError"


@pytest.mark.fault("B10")
@pytest.mark.parametrize("change", ["missing", "shape", "unknown"])
def test_resume_with_the_state_of_another_optimizer_is_refused(
    change, eventful_run, tmp_path, monkeypatch
):
    from safetensors.torch import save_file

    def edit_optimizer(folder: Path) -> None:
        path = folder / "optimizer.safetensors"
        tensors = load_file(path)
        name = "exp_avg/head.weight"
        value = tensors.pop(name)
        if change == "shape":
            tensors[name] = value[:1].clone()
        if change == "unknown":
            tensors |= {name: value, "exp_avg/other": value.clone()}
        save_file(tensors, path)

    assert resumed(eventful_run, tmp_path, monkeypatch, edit_optimizer) == "CheckpointError"


@pytest.mark.fault("B18")
def test_resume_with_an_unexpected_fp16_scale_is_refused(eventful_run, tmp_path, monkeypatch):
    def change(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**content, "scaler": {"scale": 1.0}}))

    assert resumed(eventful_run, tmp_path, monkeypatch, change) == "CheckpointError"


@pytest.mark.fault("B18")
def test_resume_with_a_missing_state_field_is_refused(eventful_run, tmp_path, monkeypatch):
    def change(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        content.pop("average_updates")
        (folder / "state.json").write_text(json.dumps(content))

    assert resumed(eventful_run, tmp_path, monkeypatch, change) == "CheckpointError"
