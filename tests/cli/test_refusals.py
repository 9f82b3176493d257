"""Data, teachers, devices and folders that a command cannot use: the exit code and the message."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import deit
from deit.config.recipes import recipe
from deit.config.sections.data import DataConfig
from deit.config.sections.student import StudentConfig
from deit.core.errors import ConfigError, DataError
from deit.datasets.sources.folders import list_folder
from deit.experiments.lottery import lottery
from deit.models.saved_student import ModelInfo, student_from_info
from deit.training.train import train
from tests.helpers.commands import QUICK, SMALL, TEN, assert_refused, fake_teacher, tree
from tests.helpers.errors import raises

TRAIN = "train_deit.py"


def class_folders(root: Path, *names: str, num_images: int = 6) -> Path:
    """Write a folder with gray images for each class name."""
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(num_images):
            Image.new("RGB", (8, 8), (20 * index,) * 3).save(root / name / f"{index}.png")
    return root


FOLDER = ("folder-teacher", "--data.root=images", "--out=run", "--optim.batch_size=2")


@pytest.mark.fault("C12")
def test_missing_image_folder_is_named(refused):
    layouts = ("images/CLASS/IMAGE", "images/train/CLASS/IMAGE")
    refused(3, ("data.root images", *layouts), TRAIN, *FOLDER)


def test_existing_out_and_missing_images_are_reported_together(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    config = recipe("folder-teacher", data={"root": tmp_path / "images"})
    with raises(ConfigError, "out = ", "data.root", "images/train/CLASS/IMAGE") as refused:
        train(config, tmp_path / "run")
    fields = [problem.field for problem in refused.value.problems]
    assert fields == ["out", "data.root"]
    (tmp_path / "images").mkdir()
    with raises(ConfigError) as refused:
        train(config, tmp_path / "run")
    assert [problem.field for problem in refused.value.problems] == ["out"]


@pytest.mark.parametrize("manifest", [None, {"sweep": "loss", "recipe": "digits"}])
@pytest.mark.parametrize("command", ["compare", "sweep", "lottery"])
def test_folder_with_other_content_and_missing_images_are_reported_together(
    command, manifest, tmp_path
):
    """Neither is found only after the other has been mended."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").touch()
    if manifest:
        (out / "sweep.json").write_text(json.dumps(manifest))
    config = recipe("folder", data={"root": tmp_path / "images"}, loss={"kind": "none"})
    experiment = {
        "compare": lambda: deit.compare(config, out, study="table-8"),
        "sweep": lambda: deit.sweep({"grid": {"optim.lr": [1, 2]}}, out, config=config),
        "lottery": lambda: lottery(config, out),
    }[command]
    with raises(ConfigError, "out = ", "data.root", "images/train/CLASS/IMAGE") as refused:
        experiment()
    assert [problem.field for problem in refused.value.problems] == ["out", "data.root"]
    if manifest and command != "lottery":
        assert "the sweep loss of the recipe digits" in str(refused.value)


def test_folder_without_classes_is_refused_with_both_layouts(tmp_path):
    (tmp_path / "train").mkdir()
    with raises(DataError, f"{tmp_path}/train/CLASS/IMAGE") as refused:
        list_folder(DataConfig(source="folder", root=str(tmp_path)), ())
    assert "with splits" not in str(refused.value)  # the folder has them already
    (tmp_path / "train").rmdir()
    with raises(DataError, f"{tmp_path}/CLASS/IMAGE", f"{tmp_path}/train/CLASS/IMAGE"):
        list_folder(DataConfig(source="folder", root=str(tmp_path)), ())


def test_missing_cifar_is_refused_with_download_option(refused):
    fragments = ("data.root data", "cifar-10-batches-py", "--data.download")
    refused(3, fragments, TRAIN, "cifar10-micro-teacher", "--out=run")


@pytest.mark.fault("C12")
def test_empty_image_folder_is_named(refused, tmp_path):
    (tmp_path / "images").mkdir()
    refused(3, ("images: ", "images/CLASS/IMAGE"), TRAIN, *FOLDER)


@pytest.mark.fault("C13")
def test_empty_class_is_named(refused, tmp_path):
    class_folders(tmp_path / "images", "ant", "bee")
    (tmp_path / "images" / "cat").mkdir()
    refused(3, ("images/cat: ",), TRAIN, *FOLDER)


@pytest.mark.fault("C2")
def test_corrupt_image_is_named(refused, tmp_path):
    class_folders(tmp_path / "images", "ant", "bee")
    (tmp_path / "images" / "bee" / "3.png").write_bytes(b"no image at all")
    refused(3, ("images/bee/3.png: ", "15 bytes"), TRAIN, *FOLDER)


@pytest.mark.fault("C19")
def test_batch_larger_than_the_data_is_refused(refused):
    command = (TRAIN, "digits-teacher", "--out=run", "--optim.batch_size=5000")
    refused(3, ("optim.batch_size = 5000", "1295"), *command)


def test_missing_teacher_is_refused_with_command_to_train_it(refused):
    fragments = ("teacher.source checkpoints/digits-teacher", "train_deit.py digits-teacher")
    refused(3, fragments, TRAIN, "digits", "--out=run")


@pytest.mark.fault("D1")
def test_teacher_of_other_classes_is_refused(refused, tmp_path):
    fake_teacher(tmp_path / "teacher", ("zero", *TEN[1:]))
    fragments = ("from teacher", "lacks 1 ", "'0'")
    refused(3, fragments, TRAIN, "digits", "--out=run", "--teacher.source=teacher")


@pytest.mark.fault("D2")
def test_teacher_near_chance_is_refused_unless_allowed(run, tmp_path):
    fake_teacher(tmp_path / "teacher", TEN)
    before = tree(tmp_path)
    command = (TRAIN, "digits", *QUICK, *SMALL, "--out=run", "--teacher.source=teacher")
    done = run(*command)
    assert_refused(done, 3, "from teacher", "10.5 %", "--teacher.allow")  # chance
    assert tree(tmp_path) == before, "something was written"
    allowed = run(*command, "--dry-run", re.search(r"--teacher\.allow_near_chance", done.stderr)[0])
    assert allowed.returncode == 0, allowed.stderr
    assert re.search(r"deit: warning: .*from teacher\b.*10\.5 %", allowed.stderr)
    assert tree(tmp_path) == before, "the dry run wrote something"


FILE_TEACHER = ("--teacher.architecture=small_convnet", "--teacher.image_size=8")
FILE_TEACHER += ("--teacher.mean=0.5,0.5,0.5", "--teacher.std=0.5,0.5,0.5")


class Malicious:
    """Creates a canary file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch canary",)


def garbage(folder: Path) -> Path:
    path = folder / "teacher.pth"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def truncated(folder: Path) -> Path:
    path = folder / "teacher.safetensors"
    save_file({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def malicious(folder: Path) -> Path:
    path = folder / "teacher.pth"
    torch.save({"model": Malicious()}, path)
    return path


def plain_pickle(folder: Path) -> Path:
    path = folder / "teacher.pth"
    path.write_bytes(b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR.")
    return path


def other_network(folder: Path) -> Path:
    path = folder / "teacher.safetensors"
    info = ModelInfo(StudentConfig(name="small_convnet"), TEN[1:], (0.5,) * 3, (0.5,) * 3, 1.0)
    weights = student_from_info(info).network.state_dict()
    save_file({**weights, "unknown": torch.zeros(1)}, path)
    return path


@pytest.mark.fault("B6", "B14")
@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (garbage, ()),
        (truncated, ()),
        (malicious, (f"{os.system.__module__}.system", "state_dict")),
        (plain_pickle, (f"{os.system.__module__}.system", "state_dict")),
        (other_network, ("unknown",)),
    ],
)
def test_unusable_teacher_file_is_refused(spoil, fragments, refused, tmp_path):
    path = spoil(tmp_path)
    command = (TRAIN, "digits", "--out=run", f"--teacher.source={path.name}", *FILE_TEACHER)
    refused(4, (f"{path.name}:", *fragments), *command)
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("E2")
def test_half_precision_on_a_cpu_is_refused(refused):
    command = (TRAIN, "digits-teacher", "--run.precision=fp16", "--out=run")
    refused(5, ("run.precision = 'fp16'", "fp32"), *command)


@pytest.mark.fault("E1")
def test_missing_gpu_is_refused(refused):
    command = (TRAIN, "digits-teacher", "--run.device=cuda", "--out=run")
    refused(5, ("run.device = 'cuda'", "--run.device cpu"), *command)


@pytest.mark.fault("B20")
@pytest.mark.parametrize("out", ["file", "file/run"])
def test_output_path_that_is_a_file_is_refused(out, refused, tmp_path):
    (tmp_path / "file").write_text("precious")
    refused(5, (f"--out {out}",), TRAIN, "digits-teacher", f"--out={out}")


@pytest.mark.fault("B20")
def test_unwritable_output_path_is_refused(refused):
    out = "/proc/deit-run"  # not even root
    fragments = (f"--out {out}: ", "No such file or directory")
    refused(5, fragments, TRAIN, "digits-teacher", f"--out={out}")


def test_output_folder_with_other_files_is_refused(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("precious")
    refused(2, ("--out run: ", "config.json"), TRAIN, "digits-teacher", "--out=run")
