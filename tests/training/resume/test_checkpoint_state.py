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
from deit.core.errors import (
    DataError,
    DeitError,
)
from deit.training import save
from deit.training.state import TrainState
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import results, rewrite_manifest, stop_at

# the test has teeth: whatever is left out of a checkpoint, it notices

SKIPPED_STEP = 6  # in the middle of the second epoch, after a skipped update


@pytest.fixture(scope="module")
def eventful_run(live_config, tmp_path_factory) -> tuple[Config, Path, Path]:
    """A run in which every field of the state matters, whole and stopped: update 6 is skipped, and
    the best epoch is the first."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("hard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "selection_metric", falling_top1)
        fault_injection.install_faults(f"loss:{SKIPPED_STEP}:nan")
        train(live_config, folder / "uninterrupted")
        stop_at(
            live_config, folder / "stopped", f"loss:{SKIPPED_STEP}:nan,update:{SKIPPED_STEP}:term"
        )
    return live_config, folder / "uninterrupted", folder / "stopped"


def falling_top1(validation: dict) -> float:
    return 1 - validation["class_top1"]


def resumed(eventful_run, tmp_path, monkeypatch, change) -> dict | str:
    """What a resumed run leaves after a change of its checkpoint, or the name of its error."""
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


def test_an_unchanged_checkpoint_goes_on_to_the_bit(eventful_run, tmp_path, monkeypatch):
    assert resumed(eventful_run, tmp_path, monkeypatch, lambda folder: None) == results(
        eventful_run[1]
    )
    found = results(eventful_run[1])["result"]
    assert (found["skipped"], found["best"]["epoch"]) == (1, 1)


# Told apart by themselves below, or of no consequence: `seconds` is a time.
ALONE = {"seconds", "scaler", "skipped_in_a_row", "targets"}


@pytest.mark.fault("B18")
@pytest.mark.parametrize(
    "name", [one.name for one in dataclasses.fields(TrainState) if one.name not in ALONE]
)
def test_a_field_left_out_of_the_state_is_noticed(name, eventful_run, tmp_path, monkeypatch):
    default = dataclasses.asdict(TrainState())[name]

    def drop(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        value = {"format_version": 1}.get(name, default)
        assert content[name] != value, "the run does not use it: this test could not notice"
        content[name] = value
        (folder / "state.json").write_text(json.dumps(content))

    assert resumed(eventful_run, tmp_path, monkeypatch, drop) != results(eventful_run[1])


def test_stores_left_out_of_the_state_are_noticed(config, tmp_path):
    stop_at(config, tmp_path / "run", "update:1:term")
    folder = run_folder.latest_checkpoint(tmp_path / "run")
    content = json.loads((folder / "state.json").read_text())
    assert len(content["targets"]) == 1
    (folder / "state.json").write_text(json.dumps({**content, "targets": []}))
    rewrite_manifest(folder)
    with raises(DataError, tmp_path / "run", "teacher.target_stores"):
        train(config, tmp_path / "run", resume=True)


@pytest.mark.fault("B18")
@pytest.mark.parametrize("file", ["model", "average", "optimizer"])
def test_tensors_left_as_they_start_are_noticed(file, eventful_run, tmp_path, monkeypatch):
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
def test_a_file_left_out_is_an_error(file, eventful_run, tmp_path, monkeypatch):
    found = resumed(eventful_run, tmp_path, monkeypatch, lambda folder: (folder / file).unlink())
    assert found == "CheckpointError"


@pytest.mark.fault("B11")
@pytest.mark.parametrize("place", ["model", "average", "optimizer"])
def test_numbers_that_are_not_finite_are_not_gone_on_from(
    place, eventful_run, tmp_path, monkeypatch
):
    from safetensors.torch import save_file

    def spoil(folder: Path) -> None:
        path = folder / f"{place}.safetensors"
        tensors = load_file(path)
        next(reversed(tensors.values())).view(-1)[0] = float("inf")
        save_file(tensors, path, metadata={"format": "pt"})

    assert resumed(eventful_run, tmp_path, monkeypatch, spoil) == "CheckpointError"


@pytest.mark.fault("B10")
@pytest.mark.parametrize("how", ["missing", "shape", "unknown"])
def test_the_state_of_another_optimizer_is_refused(how, eventful_run, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    def change(folder: Path) -> None:
        path = folder / "optimizer.safetensors"
        tensors = load_file(path)
        name = "exp_avg/head.weight"
        value = tensors.pop(name)
        if how == "shape":
            tensors[name] = value[:1].clone()
        if how == "unknown":
            tensors |= {name: value, "exp_avg/other": value.clone()}
        save_file(tensors, path)

    assert resumed(eventful_run, tmp_path, monkeypatch, change) == "CheckpointError"


@pytest.mark.fault("B18")
def test_a_scale_of_fp16_belongs_to_both_or_to_none(eventful_run, tmp_path, monkeypatch):
    def change(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**content, "scaler": {"scale": 1.0}}))

    assert resumed(eventful_run, tmp_path, monkeypatch, change) == "CheckpointError"


@pytest.mark.fault("B18")
def test_a_field_that_is_not_there_is_an_error_not_a_default(eventful_run, tmp_path, monkeypatch):
    def change(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        content.pop("average_updates")
        (folder / "state.json").write_text(json.dumps(content))

    assert resumed(eventful_run, tmp_path, monkeypatch, change) == "CheckpointError"
