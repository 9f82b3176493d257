"""A run resumed with other settings, data, teachers, packages or hardware is refused or warned."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from deit.config.validation import load_config
from deit.core import fault_injection, run_log
from deit.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    StoppedBySignal,
    SystemFault,
)
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import LAST, rewrite_manifest, stop_at


@pytest.mark.fault("A22", "A23")
def test_resume_on_other_hardware_warns(stopped_run, tmp_path, capsys):
    config, stopped = stopped_run
    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run" / "environment.json"
    before = json.loads(path.read_text())
    packages = {**before["packages"], "pillow": "1.1.7"}
    other = {"threads": 7, "device_name": "an abacus", "packages": packages}
    path.write_text(json.dumps({**before, **other}))
    fault_injection.install_faults("step:1:term")
    with pytest.raises(StoppedBySignal):
        train(config, tmp_path / "run", resume=True)
    output = capsys.readouterr().err
    assert re.search(r"\bdevice_name\b[^;]*\ban abacus\b", output)
    assert re.search(r"\bthreads\b[^;]*\b7\b[^;]*\b1\b", output)
    pillow = re.escape(before["packages"]["pillow"])
    assert re.search(rf"\bpillow\b[^;]*\b1\.1\.7\b[^;]*\b{pillow}\b", output)
    assert "precision" not in output
    assert "torch" not in output


def test_resume_with_other_epochs_does_not_list_what_follows_from_them(stopped_run, tmp_path):
    """The command line limits the warm-up to half of the epochs; it was not given."""
    config, stopped = stopped_run
    shutil.copytree(stopped, tmp_path / "run")
    fewer = config.replace(optim={"epochs": 1, "warmup_epochs": 0.5, "ema_epochs": 0.5})
    with raises(ConfigError, "optim.epochs", "1 now") as refused:
        train(fewer, tmp_path / "run", resume=True)
    assert "warmup_epochs" not in str(refused.value)
    assert "ema_epochs" not in str(refused.value)
    with raises(ConfigError, "optim.warmup_epochs: 1.0 before, 0.25 now"):
        train(config.replace(optim={"warmup_epochs": 0.25}), tmp_path / "run", resume=True)


def test_resume_without_a_saved_step_does_not_warn(live_config, tmp_path, capsys):
    fault_injection.install_faults("model:1:full")
    with pytest.raises(SystemFault):
        train(live_config, tmp_path / "run")
    path = tmp_path / "run" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "threads": 7}))
    train(live_config, tmp_path / "run", resume=True)
    output = capsys.readouterr()
    assert any(line.startswith(f"{tmp_path / 'run'}: ") for line in output.out.splitlines())
    assert [row["step"] for row in run_log.read(tmp_path / "run" / run_log.HASH_CHAIN)] == [
        4,
        8,
        LAST,
    ]
    assert "threads" not in output.err


@pytest.mark.fault("C18")
def test_resume_with_changed_data_is_refused(live_config, tmp_path):
    out, image_folder = tmp_path / "run", tmp_path / "pictures"
    shutil.copytree(live_config.data.root, image_folder)
    moved = live_config.replace(data={"root": str(image_folder)})
    stop_at(moved, out, "step:6:term")
    (image_folder / "train" / "class1" / "3.png").unlink()
    with raises(DataError, out, "data.source"):
        train(moved, out, resume=True)


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


@pytest.mark.fault("A21", "B6")
@pytest.mark.parametrize("field", CHANGED)
def test_resume_with_another_setting_names_the_field(field, stopped_run, tmp_path):
    config, stopped = stopped_run
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    with pytest.raises((ConfigError, CheckpointError, DataError)) as error:
        train(config.replace(**CHANGED[field]), out, resume=True)
    if isinstance(error.value, ConfigError):
        assert f"{field}: " in str(error.value)
    with pytest.raises(type(error.value), match=re.escape(str(error.value))):
        train(config.replace(**CHANGED[field]), out, resume=True, dry_run=True)


@pytest.mark.parametrize("dry_run", [False, True])
def test_resume_takes_another_exclude_list_of_the_same_content(dry_run, live_config, tmp_path):
    out, names = (
        tmp_path / "run",
        [tmp_path / name for name in ("bad.txt", "same.txt", "other.txt")],
    )
    for path, images in zip(names, (["3.png", "4.png"], ["4.png", "3.png"], ["3.png", "5.png"])):
        path.write_text("".join(f"train/class1/{image}\n" for image in images))
    configs = [live_config.replace(data={"exclude_list": str(path)}) for path in names]
    stop_at(configs[0], out, "step:5:term")
    with raises(DataError, out, "data.exclude_list"):
        train(configs[2], out, resume=True, dry_run=dry_run)
    if dry_run:
        before = contents(out)
        train(configs[1], out, resume=True, dry_run=True)
        assert contents(out) == before
    else:
        stop_at(configs[1], out, "step:1:term", resume=True)
        assert load_config(out / "config.json").data.exclude_list == str(names[1])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dry_run_of_resume_checks_the_folder(live_config, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").touch()
    with raises(ConfigError, out):
        train(live_config, out, resume=True, dry_run=True)


@pytest.mark.fault("A21")
def test_resume_with_other_weights_of_the_teacher_is_refused(config, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "teacher"
    shutil.copytree(config.teacher.source[0], folder)
    live = config.replace(teacher={"target_stores": (), "source": (str(folder),)})
    stop_at(live, tmp_path / "run", "step:1:term")
    weights = folder / "best" / "model.safetensors"
    content = {name: value * 1.001 for name, value in load_file(weights).items()}
    save_file(content, weights)
    rewrite_manifest(folder / "best", step=checkpoint_step(folder / "best"))
    with raises(DataError, tmp_path / "run", "teacher.source"):
        train(live, tmp_path / "run", resume=True)


def checkpoint_step(folder: Path) -> int:
    return json.loads((folder / "manifest.json").read_text())["step"]


@pytest.mark.fault("A23")
def test_resume_with_another_torch_version_warns(stopped_run, tmp_path, capsys):
    config, stopped = stopped_run
    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run" / "environment.json"
    before = json.loads(path.read_text())
    before["packages"]["torch"] = "1.0"
    path.write_text(json.dumps(before))
    fault_injection.install_faults("step:1:term")
    with pytest.raises(StoppedBySignal):
        train(config, tmp_path / "run", resume=True)
    assert re.search(r"\btorch\b[^;]*\b1\.0\b", capsys.readouterr().err)


@pytest.mark.fault("C3")
def test_resume_with_one_changed_pixel_is_refused(config, tmp_path):
    image_folder = tmp_path / "pictures"
    shutil.copytree(config.data.root, image_folder)
    data = {"root": str(image_folder), "storage": "memory", "num_workers": None}
    moved = config.replace(data=data, teacher={"target_stores": ()})
    stop_at(moved, tmp_path / "run", "step:6:term")
    path = image_folder / "train" / "class1" / "3.png"
    with Image.open(path) as image:
        image.putpixel((5, 5), (1, 2, 3))
        image.save(path)
    with raises(DataError, tmp_path / "run", "data.source"):
        train(moved, tmp_path / "run", resume=True)
