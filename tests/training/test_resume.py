"""A run stopped at any update and resumed is the uninterrupted run, to the bit."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.schema import Config
from deit.core import fault_injection, run_folder, run_log
from deit.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeitError,
    NumericsError,
    StoppedBySignal,
    SystemFault,
)
from deit.distill.write_targets import write_targets
from deit.training import save
from deit.training.state import TrainState
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import stop_at

EPOCHS, STEPS = 3, 4
LAST = EPOCHS * STEPS
TIMING = ("seconds", "images_per_s", "memory_mb", "loader")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Everything that draws at random, a weight average and stored targets, on images in files."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("resume")
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 14), ("val", 3)):
        for label in range(3):
            place = folder / "pictures" / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(number):
                noise = torch.randint(0, 120, (12, 12, 3), generator=generator)
                noise[..., label] += 100
                Image.fromarray(noise.to(torch.uint8).numpy()).save(place / f"{index}.png")
    data = {
        "source": "folder",
        "root": str(folder / "pictures"),
        "image_size": 12,
        "num_workers": 0,
    }
    data |= {"storage": "files", "validation_fraction": 0.2}
    teacher = digits_teacher().replace(data=data, student={"image_size": 12}, optim={"epochs": 3})
    train(teacher.replace(optim={"batch_size": 8}), folder / "teacher")
    config = digits().replace(
        data=data,
        views={
            "auto_augment": "randaugment",
            "erasing_prob": 0.25,
            "mixup_alpha": 0.8,
            "cutmix_alpha": 1.0,
        },
        student={"image_size": 12, "depth": 2, "embed_dim": 32, "num_heads": 2, "drop_path": 0.3}
        | {"dropout": 0.1},
        teacher={"source": (str(folder / "teacher"),)},
        optim={"epochs": EPOCHS, "batch_size": 8, "warmup_epochs": 1, "ema_epochs": 1.0},
        run={"eval_every_epochs": 1, "linear_backend": "torch"},  # the same on every processor
    )
    write_targets(config, folder / "targets")
    return config.replace(teacher={"target_stores": (str(folder / "targets"),)})


@pytest.fixture(scope="module")
def alone(config) -> Config:
    """The same without stored targets, whose check takes as long as the training."""
    return config.replace(teacher={"target_stores": ()})


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train(config, out)["step"] == LAST
    return out


@pytest.fixture(autouse=True)
def _one_thread(_steady):
    torch.set_num_threads(1)  # with two threads the bits are others
    yield
    fault_injection.install_faults(None)


def results(out: Path) -> dict:
    """What a run leaves behind, without times."""
    rows = [
        {name: value for name, value in row.items() if name not in TIMING}
        for row in run_log.read(out / run_log.METRICS)
    ]
    result = json.loads((out / run_folder.RESULT).read_text())
    return {
        "rows": rows,
        "chain": (out / run_log.HASH_CHAIN).read_bytes(),
        "result": {name: value for name, value in result.items() if name not in TIMING},
        "best": (out / "best" / "model.safetensors").read_bytes(),
        "last": {
            path.name: path.read_bytes()
            for path in run_folder.latest_checkpoint(out).glob("*.safetensors")
        },
    }


def goes_on_after(step: int, out: Path, said: str) -> bool:
    """Whether a run says that it goes on after this update of all of them."""
    begins = re.escape(str(out))
    return re.search(rf"^{begins}: .*\b{step}\b.*\b{LAST}\b", said, re.MULTILINE) is not None


# The first, the last, the end of an epoch, and within one. All of them: test_with_any_number_...
@pytest.mark.fault("A1", "A10", "A19")
@pytest.mark.parametrize("step", [1, STEPS, STEPS + 2, STEPS + 3, LAST])
def test_stopped_at_any_update_and_resumed_is_the_same_run(step, config, straight, tmp_path):
    out = tmp_path / "run"
    stop_at(config, out, f"update:{step}:term")
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) == step
    torch.rand(17)  # a resumed process has another random state
    workers = 2 if step == 6 else 1 if step == 7 else 0
    train(config.replace(data={"num_workers": workers}), out, resume=True)
    assert results(out) == results(straight)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_goes_on_with_its_momentum(momentum, alone, tmp_path):
    alone = alone.replace(optim={"name": "sgd", "momentum": momentum})
    train(alone, tmp_path / "straight")
    stop_at(alone, tmp_path / "run", "update:5:term")
    train(alone, tmp_path / "run", resume=True)
    assert results(tmp_path / "run") == results(tmp_path / "straight")


@pytest.mark.fault("A19")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("step", range(1, LAST + 1))
def test_with_any_number_of_workers_too(step, workers, config, straight, tmp_path):
    out = tmp_path / "run"
    config = config.replace(data={"num_workers": workers})
    stop_at(config, out, f"update:{step}:term")
    train(config, out, resume=True)
    assert results(out) == results(straight)


# the test has teeth: whatever is left out of a checkpoint, it notices

HARD = 6  # in the middle of the second epoch, after a skipped update


@pytest.fixture(scope="module")
def hard(alone, tmp_path_factory) -> tuple[Config, Path, Path]:
    """A run in which every field of the state matters, whole and stopped: update 6 is skipped, and
    the best epoch is the first."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("hard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "selection_metric", falling)
        fault_injection.install_faults(f"loss:{HARD}:nan")
        train(alone, folder / "straight")
        stop_at(alone, folder / "stopped", f"loss:{HARD}:nan,update:{HARD}:term")
    return alone, folder / "straight", folder / "stopped"


def falling(validation: dict) -> float:
    return 1 - validation["class_top1"]


def reseal(folder: Path, step: int | None = None) -> None:
    """A manifest for files that were changed."""
    from deit.core import manifest

    step = run_folder.checkpoint_step(folder) if step is None else step
    names = [path.name for path in folder.iterdir() if path.name != manifest.MANIFEST]
    manifest.write_manifest(folder, manifest.digests(folder, names), step=step)


def resumed(hard, tmp_path, monkeypatch, change) -> dict | str:
    """What a resumed run leaves after a change of its checkpoint, or the name of its error."""
    config, _, stopped = hard
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    folder = run_folder.latest_checkpoint(out)
    change(folder)
    reseal(folder)
    monkeypatch.setattr(save, "selection_metric", falling)
    try:
        train(config, out, resume=True)
    except DeitError as error:
        return type(error).__name__
    return results(out)


def test_an_unchanged_checkpoint_goes_on_to_the_bit(hard, tmp_path, monkeypatch):
    assert resumed(hard, tmp_path, monkeypatch, lambda folder: None) == results(hard[1])
    found = results(hard[1])["result"]
    assert (found["skipped"], found["best"]["epoch"]) == (1, 1)


# Told apart by themselves below, or of no consequence: `seconds` is a time.
ALONE = {"seconds", "scaler", "skipped_in_a_row", "targets"}


@pytest.mark.fault("B18")
@pytest.mark.parametrize(
    "name", [one.name for one in dataclasses.fields(TrainState) if one.name not in ALONE]
)
def test_a_field_left_out_of_the_state_is_noticed(name, hard, tmp_path, monkeypatch):
    default = dataclasses.asdict(TrainState())[name]

    def drop(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        value = {"format_version": 1}.get(name, default)
        assert content[name] != value, "the run does not use it: this test could not notice"
        content[name] = value
        (folder / "state.json").write_text(json.dumps(content))

    assert resumed(hard, tmp_path, monkeypatch, drop) != results(hard[1])


def test_stores_left_out_of_the_state_are_noticed(config, tmp_path):
    stop_at(config, tmp_path / "run", "update:1:term")
    folder = run_folder.latest_checkpoint(tmp_path / "run")
    content = json.loads((folder / "state.json").read_text())
    assert len(content["targets"]) == 1
    (folder / "state.json").write_text(json.dumps({**content, "targets": []}))
    reseal(folder)
    with raises(DataError, tmp_path / "run", "teacher.target_stores"):
        train(config, tmp_path / "run", resume=True)


@pytest.mark.fault("B18")
@pytest.mark.parametrize("file", ["model", "average", "optimizer"])
def test_tensors_left_as_they_start_are_noticed(file, hard, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    def reset(folder: Path) -> None:
        path = folder / f"{file}.safetensors"
        metadata = {"format": "pt"}
        zeros = {name: torch.zeros_like(value) for name, value in load_file(path).items()}
        save_file(zeros, path, metadata=metadata)

    assert resumed(hard, tmp_path, monkeypatch, reset) != results(hard[1])


@pytest.mark.fault("B18")
@pytest.mark.parametrize(
    "file", ["model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"]
)
def test_a_file_left_out_is_an_error(file, hard, tmp_path, monkeypatch):
    found = resumed(hard, tmp_path, monkeypatch, lambda folder: (folder / file).unlink())
    assert found == "CheckpointError"


@pytest.mark.fault("D12")
def test_skipped_updates_are_counted_over_a_stop(alone, tmp_path):
    """The one field that only shows where a run fails: two in a row, one on each side of a stop."""
    alone = alone.replace(run={"max_nonfinite_steps": 2})
    fault_injection.install_faults("loss:5:nan,loss:6:nan")
    with raises(NumericsError, tmp_path / "straight" / run_log.NONFINITE_LOG):
        train(alone, tmp_path / "straight")
    stop_at(alone, tmp_path / "run", "loss:5:nan,update:5:term")
    fault_injection.install_faults("loss:1:nan")
    with raises(NumericsError, tmp_path / "run" / run_log.NONFINITE_LOG):
        train(alone, tmp_path / "run", resume=True)
    for name in ("straight", "run"):
        left_out = run_log.read(tmp_path / name / run_log.NONFINITE_LOG)
        assert [row["step"] for row in left_out] == [5, 6]


def test_a_run_that_ended_so_goes_on_where_more_are_allowed(alone, tmp_path):
    fault_injection.install_faults("loss:5:nan,loss:6:nan")
    with pytest.raises(NumericsError):
        train(alone.replace(run={"max_nonfinite_steps": 2}), tmp_path / "run")
    fault_injection.install_faults("loss:1:nan,loss:2:nan")
    alone = alone.replace(run={"max_nonfinite_steps": 3})
    assert train(alone, tmp_path / "run", resume=True)["skipped"] == 2


@pytest.mark.fault("A22", "A23")
def test_another_machine_is_told(begun, tmp_path, capsys):
    config, stopped = begun
    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run" / "environment.json"
    before = json.loads(path.read_text())
    packages = {**before["packages"], "pillow": "1.1.7"}
    other = {"threads": 7, "device_name": "an abacus", "packages": packages}
    path.write_text(json.dumps({**before, **other}))
    fault_injection.install_faults("update:1:term")
    with pytest.raises(StoppedBySignal):
        train(config, tmp_path / "run", resume=True)
    said = capsys.readouterr().err
    assert re.search(r"\bdevice_name\b[^;]*\ban abacus\b", said)
    assert re.search(r"\bthreads\b[^;]*\b7\b[^;]*\b1\b", said)
    pillow = re.escape(before["packages"]["pillow"])
    assert re.search(rf"\bpillow\b[^;]*\b1\.1\.7\b[^;]*\b{pillow}\b", said)
    assert "precision" not in said
    assert "torch" not in said


def test_where_nothing_was_saved_there_is_nothing_to_warn_of(alone, tmp_path, capsys):
    fault_injection.install_faults("model:1:full")
    with pytest.raises(SystemFault):
        train(alone, tmp_path / "run")
    path = tmp_path / "run" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "threads": 7}))
    train(alone, tmp_path / "run", resume=True)
    said = capsys.readouterr()
    assert any(line.startswith(f"{tmp_path / 'run'}: ") for line in said.out.splitlines())
    assert [row["step"] for row in run_log.read(tmp_path / "run" / run_log.HASH_CHAIN)] == [
        4,
        8,
        LAST,
    ]
    assert "threads" not in said.err


@pytest.mark.fault("B5")
def test_a_run_whose_checkpoints_are_gone_is_not_started_over(config, straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    (out / "result.json").unlink()
    for _, folder in run_folder.list_checkpoints(out):
        shutil.rmtree(folder)
    with raises(CheckpointError, out, "--out"):
        train(config, out, resume=True)


@pytest.mark.fault("A9")
def test_a_finished_run_stays_as_it_is_to_the_very_times_of_its_files(config, straight):
    def times() -> dict[Path, int]:
        everything = (straight, *straight.rglob("*"))
        return {path: path.stat().st_mtime_ns for path in everything}

    before = times()
    result = train(config, straight, resume=True)
    assert times() == before
    assert result == json.loads((straight / "result.json").read_text())


@pytest.mark.fault("B1", "B2", "B4")
def test_one_damaged_checkpoint_is_passed_over_and_set_aside(config, straight, tmp_path, capsys):
    out = tmp_path / "run"
    stop_at(config, out, "update:6:term")
    newest = run_folder.latest_checkpoint(out)
    assert [step for step, _ in run_folder.list_checkpoints(out)] == [6, 4]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    train(config, out, resume=True)
    said = capsys.readouterr()
    assert str(weights) in said.err
    assert goes_on_after(4, out, said.out)
    assert (out / "damaged-checkpoint-00000006" / "model.safetensors").read_bytes() == content
    assert results(out) == results(straight)


@pytest.mark.parametrize(
    ("call", "number"), [("open", errno.EMFILE), ("open", errno.EACCES), ("lstat", errno.ESTALE)]
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(
    call, number, config, straight, tmp_path, monkeypatch
):
    """A file server fails for a moment, say: nothing is set aside, and nothing trained again."""
    out = tmp_path / "run"
    stop_at(config, out, "update:6:term")
    before, sound = set(out.rglob("*")), getattr(Path, call)

    def failing(self, *arguments, **options):
        if self == run_folder.checkpoint_path(out, 6) / "model.safetensors":
            raise OSError(number, os.strerror(number), str(self))
        return sound(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, call, failing)
        with raises(DeitError, "model.safetensors") as raised:
            train(config, out, resume=True)
    assert raised.value.exit_code == 5
    assert before <= set(out.rglob("*"))
    train(config, out, resume=True)
    assert not list(out.glob("damaged-*"))
    assert results(out) == results(straight)


@pytest.mark.fault("B3", "B5")
def test_where_all_are_damaged_the_run_stops_and_nothing_is_moved(alone, tmp_path):
    out = tmp_path / "run"
    stop_at(alone, out, "update:6:term")
    (out / "checkpoint-00000004" / "manifest.json").unlink()
    (out / "checkpoint-00000006" / "optimizer.safetensors").write_bytes(b"")
    before = sorted(out.rglob("*"))
    empty, unfinished = out / "checkpoint-00000006", out / "checkpoint-00000004"
    with raises(CheckpointError, empty / "optimizer.safetensors", unfinished) as error:
        train(alone, out, resume=True)
    assert re.search(r"optimizer\.safetensors\b.*\b0 bytes\b", str(error.value))
    assert re.search(r"checkpoint-00000004\W.*manifest\.json", str(error.value))
    assert error.value.exit_code == 4
    assert sorted(out.rglob("*")) == before


@pytest.mark.fault("A16")
def test_a_warning_signal_saves_and_the_run_goes_on(config, straight, tmp_path, monkeypatch):
    steps = []
    write = run_folder.save_checkpoint
    monkeypatch.setattr(
        run_folder,
        "save_checkpoint",
        lambda out, step, *a, **k: (steps.append(step), write(out, step, *a, **k)),
    )
    fault_injection.install_faults("update:6:usr1")
    train(config, tmp_path / "run")
    assert steps == [4, 6, 8, 12]
    assert results(tmp_path / "run") == results(straight)


def test_checkpoints_within_an_epoch_stay_as_few_as_asked_for(config, straight, tmp_path):
    out = tmp_path / "run"
    train(config.replace(run={"save_every_steps": 3, "num_checkpoints": 3}), out)
    assert [step for step, _ in run_folder.list_checkpoints(out)] == [12, 9, 8]
    chain = [row["step"] for row in run_log.read(out / run_log.HASH_CHAIN)]
    assert chain == [3, 4, 6, 8, 9, 12]
    ours, theirs = ({**results(one), "chain": b""} for one in (out, straight))
    ours["result"].pop("chain"), theirs["result"].pop("chain")
    assert ours == theirs


@pytest.mark.fault("B22")
def test_with_one_checkpoint_to_keep_a_damaged_one_would_be_all(config, tmp_path):
    with raises(ConfigError, "run.num_checkpoints"):
        train(config.replace(run={"num_checkpoints": 1}), tmp_path / "run")


@pytest.mark.fault("C18")
def test_data_that_changed_since_is_refused(alone, tmp_path):
    out, pictures = tmp_path / "run", tmp_path / "pictures"
    shutil.copytree(alone.data.root, pictures)
    moved = alone.replace(data={"root": str(pictures)})
    stop_at(moved, out, "update:6:term")
    (pictures / "train" / "class1" / "3.png").unlink()
    with raises(DataError, out, "data.source"):
        train(moved, out, resume=True)


@pytest.mark.fault("A15", "A17")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_stop_as_well_each_with_its_code(number, alone, tmp_path):
    before = signal.signal(number, signal.SIG_DFL)  # where the tests run in the background
    name = signal.Signals(number).name.removeprefix("SIG").lower()
    fault_injection.install_faults(f"update:2:{name}")
    with pytest.raises(StoppedBySignal) as stop:
        train(alone, tmp_path / "run")
    assert signal.signal(number, before) == signal.SIG_DFL  # put back
    assert stop.value.exit_code == 128 + number
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(tmp_path / "run")) == 2
    assert "--resume" in str(stop.value)


@pytest.mark.fault("A6", "A11")
def test_a_stop_in_an_evaluation_evaluates_again_and_trains_nothing_again(
    config, straight, tmp_path, capsys
):
    out = tmp_path / "run"
    small = config.replace(run={"eval_batch_size": 4})
    stop_at(small, out, "evaluation:5:term")  # the first three are of the teacher
    capsys.readouterr()
    fault_injection.install_faults("update:1:term")
    with pytest.raises(StoppedBySignal):
        train(small, out, resume=True)
    assert goes_on_after(4, out, capsys.readouterr().out)
    assert [row["epoch"] for row in run_log.read(out / run_log.METRICS)] == [1]
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) == 5
    fault_injection.install_faults(None)
    train(small, out, resume=True)
    assert results(out) == results(straight)


CHANGED = {
    "optim.lr": {"optim": {"lr": 0.5}},
    "optim.batch_size": {"optim": {"batch_size": 4}},
    "optim.epochs": {"optim": {"epochs": 5}},
    "optim.ema_epochs": {"optim": {"ema_epochs": 0.0}},
    "run.seed": {"run": {"seed": 1}},
    "student.depth": {"student": {"depth": 1}},
    "student.embed_dim": {"student": {"embed_dim": 48}},
    "student.image_size": {"student": {"image_size": 24}},
    "views.auto_augment": {"views": {"auto_augment": "none"}},
    "loss.temperature": {"loss": {"temperature": 2.0}},
    "data.classes": {"data": {"classes": ("class0", "class1")}},
}


@pytest.fixture(scope="module")
def begun(alone, tmp_path_factory) -> tuple[Config, Path]:
    """A run stopped after its first update."""
    out = tmp_path_factory.mktemp("begun") / "run"
    stop_at(alone, out, "update:1:term")
    return alone, out


@pytest.mark.fault("A21", "B6")
@pytest.mark.parametrize("field", CHANGED)
def test_another_setting_is_refused_by_name(field, begun, tmp_path):
    alone, stopped = begun
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    with pytest.raises((ConfigError, CheckpointError, DataError)) as error:
        train(alone.replace(**CHANGED[field]), out, resume=True)
    if isinstance(error.value, ConfigError):
        assert f"{field}: " in str(error.value)


@pytest.mark.fault("A21")
def test_a_teacher_with_other_weights_under_the_same_name_is_refused(config, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "teacher"
    shutil.copytree(config.teacher.source[0], folder)
    alone = config.replace(teacher={"target_stores": (), "source": (str(folder),)})
    stop_at(alone, tmp_path / "run", "update:1:term")
    weights = folder / "best" / "model.safetensors"
    content = {name: value * 1.001 for name, value in load_file(weights).items()}
    save_file(content, weights)
    reseal(folder / "best", step=checkpoint_step(folder / "best"))
    with raises(DataError, tmp_path / "run", "teacher.source"):
        train(alone, tmp_path / "run", resume=True)


def checkpoint_step(folder: Path) -> int:
    return json.loads((folder / "manifest.json").read_text())["step"]


@pytest.mark.fault("B11")
@pytest.mark.parametrize("place", ["model", "average", "optimizer"])
def test_numbers_that_are_not_finite_are_not_gone_on_from(place, hard, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    def spoil(folder: Path) -> None:
        path = folder / f"{place}.safetensors"
        tensors = load_file(path)
        next(reversed(tensors.values())).view(-1)[0] = float("inf")
        save_file(tensors, path, metadata={"format": "pt"})

    assert resumed(hard, tmp_path, monkeypatch, spoil) == "CheckpointError"


@pytest.mark.fault("B10")
@pytest.mark.parametrize("how", ["missing", "shape", "unknown"])
def test_the_state_of_another_optimizer_is_refused(how, hard, tmp_path, monkeypatch):
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

    assert resumed(hard, tmp_path, monkeypatch, change) == "CheckpointError"


@pytest.mark.fault("B18")
def test_a_scale_of_fp16_belongs_to_both_or_to_none(hard, tmp_path, monkeypatch):
    def change(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**content, "scaler": {"scale": 1.0}}))

    assert resumed(hard, tmp_path, monkeypatch, change) == "CheckpointError"


@pytest.mark.fault("B18")
def test_a_field_that_is_not_there_is_an_error_not_a_default(hard, tmp_path, monkeypatch):
    def change(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        content.pop("average_updates")
        (folder / "state.json").write_text(json.dumps(content))

    assert resumed(hard, tmp_path, monkeypatch, change) == "CheckpointError"


@pytest.mark.fault("A18")
def test_a_slow_checkpoint_is_told(alone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(save, "_SLOW_S", 0.0)
    stop_at(alone, tmp_path / "run", "update:1:term")
    assert str(run_folder.checkpoint_path(tmp_path / "run", 1)) in capsys.readouterr().err


@pytest.mark.fault("B3")
def test_strangers_in_a_checkpoint_are_told_and_not_read(config, straight, tmp_path, capsys):
    out = tmp_path / "run"
    stop_at(config, out, "update:6:term")
    stranger = run_folder.latest_checkpoint(out) / "optimizer.pt"
    stranger.write_bytes(b"no")
    train(config, out, resume=True)
    assert str(stranger) in capsys.readouterr().err
    assert results(out) == results(straight)


@pytest.mark.fault("B15")
def test_a_link_in_a_checkpoint_is_refused(begun, tmp_path):
    config, stopped = begun
    shutil.copytree(stopped, tmp_path / "run")
    path = run_folder.latest_checkpoint(tmp_path / "run") / "model.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with raises(CheckpointError, path, tmp_path / "elsewhere"):
        train(config, tmp_path / "run", resume=True)


@pytest.mark.fault("A25")
def test_a_checkpoint_is_no_folder_for_a_run(begun, tmp_path):
    config, stopped = begun
    shutil.copytree(stopped, tmp_path / "run")
    folder = run_folder.latest_checkpoint(tmp_path / "run")
    with raises(ConfigError, f"--out {folder}", run_folder.CONFIG):
        train(config, folder, resume=True)


@pytest.mark.fault("A23")
def test_the_other_version_of_torch_is_told(begun, tmp_path, capsys):
    config, stopped = begun
    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run" / "environment.json"
    before = json.loads(path.read_text())
    before["packages"]["torch"] = "1.0"
    path.write_text(json.dumps(before))
    fault_injection.install_faults("update:1:term")
    with pytest.raises(StoppedBySignal):
        train(config, tmp_path / "run", resume=True)
    assert re.search(r"\btorch\b[^;]*\b1\.0\b", capsys.readouterr().err)


@pytest.mark.fault("B11", "D15")
@pytest.mark.parametrize("top1", [float("nan"), 0.5])
def test_an_accuracy_that_is_no_number_is_never_the_best(top1, alone, tmp_path, monkeypatch):
    values = iter([0.25, top1, 0.2])
    monkeypatch.setattr(save, "selection_metric", lambda validation: next(values))
    best = train(alone, tmp_path / "run")["best"]["epoch"]
    assert best == (2 if top1 == 0.5 else 1)


@pytest.mark.fault("A11")
@pytest.mark.parametrize("fault", ["optimizer:1:term", "manifest:1:term", "metrics:1:term"])
def test_a_signal_during_a_save_stops_after_it(fault, config, straight, tmp_path):
    out = tmp_path / "run"
    stop_at(config, out, fault)
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) in (4, 5)
    train(config, out, resume=True)
    assert results(out) == results(straight)


@pytest.mark.fault("C3")
def test_one_other_pixel_in_memory_is_noticed(config, tmp_path):
    pictures = tmp_path / "pictures"
    shutil.copytree(config.data.root, pictures)
    data = {"root": str(pictures), "storage": "memory", "num_workers": None}
    moved = config.replace(data=data, teacher={"target_stores": ()})
    stop_at(moved, tmp_path / "run", "update:6:term")
    path = pictures / "train" / "class1" / "3.png"
    with Image.open(path) as image:
        image.putpixel((5, 5), (1, 2, 3))
        image.save(path)
    with raises(DataError, tmp_path / "run", "data.source"):
        train(moved, tmp_path / "run", resume=True)
