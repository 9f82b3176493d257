"""Teachers: frozen, in evaluation for ever, their own size and normalisation, matched classes."""

import json
from dataclasses import asdict

import pytest
import timm
import torch
from torch import nn

from deit.config import Config, StudentConfig, TeacherConfig, derive
from deit.errors import CheckpointError, ConfigError, DataError
from deit.models.saved import Facts, build_student, save_student
from deit.models.teachers import Origin, Teacher
from deit.models.teachers import load_teacher as load_teacher_at
from deit.records import head_logits
from deit.seats import members
from deit.validation import validate

NAMES = ("ant", "bee", "cat")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def load_teacher(config, class_names, image_size=16):
    (member,) = members(validate(derive(Config(), teacher=asdict(config))).teacher)
    return load_teacher_at(member, class_names, image_size=image_size)


class Recorder(nn.Module):
    """Remembers its input and answers with the mean colour."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen = None

    def forward(self, images):
        self.seen = images
        return self.norm(images).mean(dim=(2, 3))


def recorder_teacher(**changes):
    origin = Origin(Recorder(), "recorder", None, MEAN, STD, NAMES)._replace(**changes)
    return Teacher(origin)


def test_it_is_frozen_and_stays_in_evaluation_mode():
    teacher = recorder_teacher()
    container = nn.ModuleList([teacher]).train()
    assert container.training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = teacher.network.norm.running_mean.clone()
    logits = teacher(torch.rand(4, 3, 8, 8))
    assert not logits.requires_grad
    assert torch.equal(teacher.network.norm.running_mean, before)


def test_it_normalises_for_itself():
    teacher, images = recorder_teacher(), torch.rand(2, 3, 8, 8)
    teacher(images)
    restored = teacher.network.seen * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(
        3, 1, 1
    )
    assert torch.allclose(restored, images, atol=1e-6)


def test_it_resizes_to_its_own_input():
    teacher = recorder_teacher(image_size=12, mean=(0.0,) * 3, std=(1.0,) * 3)
    images = torch.rand(2, 3, 8, 8)
    teacher(images)
    expected = torch.nn.functional.interpolate(images, (12, 12), mode="bicubic", antialias=True)
    assert torch.equal(teacher.network.seen, expected.clamp(0, 1))


@pytest.fixture
def run(tmp_path):
    student = StudentConfig(name="deit_micro", image_size=16, embed_dim=24, depth=1)
    facts = Facts(student, NAMES, MEAN, STD, 1.0)
    folder = tmp_path / "run" / "best"
    folder.mkdir(parents=True)
    built = build_student(facts)
    save_student(folder, built.network.state_dict(), facts)
    return tmp_path / "run", built.eval()


def test_one_of_our_runs_answers_as_its_fused_student(run):
    folder, student = run
    teacher = load_teacher(TeacherConfig(source=str(folder)), NAMES)
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        expected = head_logits(student(images))["fused"]
    assert torch.allclose(teacher(images), expected, atol=1e-6)
    assert teacher.image_size == 16


def test_classes_are_matched_by_name(run):
    folder, _ = run
    images = torch.rand(4, 3, 16, 16)
    straight = load_teacher(TeacherConfig(source=str(folder)), NAMES)(images)
    turned = load_teacher(TeacherConfig(source=str(folder)), ("cat", "ant"))(images)
    assert torch.equal(turned, straight[:, [2, 0]])
    with pytest.raises(DataError, match="lacks 1: 'bees'; did you mean bee"):
        load_teacher(TeacherConfig(source=str(folder)), ("ant", "bees"))


def timm_folder(path, **extra):
    network = timm.create_model("resnet10t", num_classes=3).eval()
    path.mkdir()
    torch.save(network.state_dict(), path / "pytorch_model.bin")
    known = {"mean": list(MEAN), "std": list(STD), "input_size": [3, 48, 48], "num_classes": 3}
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": known, **extra}
    (path / "config.json").write_text(json.dumps(config))
    return network


def test_a_timm_folder_brings_its_size_normalisation_and_names(tmp_path):
    network = timm_folder(tmp_path / "timm", label_names=list(NAMES))
    teacher = load_teacher(TeacherConfig(source=str(tmp_path / "timm")), NAMES)
    assert teacher.image_size == 48
    assert teacher.normalisation == (MEAN, STD)
    images = torch.rand(2, 3, 48, 48)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(teacher(images), network((images - mean) / std), atol=1e-5)


def test_a_timm_folder_of_another_class_count_is_refused(tmp_path):
    timm_folder(tmp_path / "timm")
    with pytest.raises(DataError, match="answers with 3 classes, the data has 2"):
        load_teacher(TeacherConfig(source=str(tmp_path / "timm")), ("ant", "bee"))


def test_a_thousand_class_teacher_gives_the_columns_of_a_subset(tmp_path):
    network = timm.create_model("resnet10t", num_classes=1000).eval()
    (tmp_path / "timm").mkdir()
    torch.save(network.state_dict(), tmp_path / "timm" / "pytorch_model.bin")
    known = {"mean": [0.0] * 3, "std": [1.0] * 3, "input_size": [3, 32, 32], "num_classes": 1000}
    config = {"architecture": "resnet10t", "num_classes": 1000, "pretrained_cfg": known}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    subset = ("n01443537", "n01440764")  # goldfish is class 1, tench class 0 of ImageNet-1k
    teacher = load_teacher(TeacherConfig(source=str(tmp_path / "timm")), subset)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(teacher(images), network(images)[:, [1, 0]], atol=1e-5)


def test_a_checkpoint_file_needs_its_architecture_and_answers_like_it(tmp_path):
    network = timm.create_model("resnet10t", num_classes=3).eval()
    path = tmp_path / "teacher.pth"
    torch.save({"state_dict": network.state_dict(), "epoch": 9}, path)
    with pytest.raises(ConfigError, match=r"teacher\.architecture"):
        load_teacher(TeacherConfig(source=str(path)), NAMES)
    config = TeacherConfig(
        source=str(path), architecture="timm:resnet10t", image_size=32, mean=(0,) * 3, std=(1,) * 3
    )
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(load_teacher(config, NAMES)(images), network(images), atol=1e-6)
    with pytest.raises(CheckpointError, match=r"\(3, 512\) in the file, \(4, 512\) in the network"):
        load_teacher(config, (*NAMES, "dog"))


def test_a_python_function_gives_the_teacher(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\n"
        "class Mean(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        "        return images.mean(dim=(2, 3))\n"
        "def teacher():\n"
        "    return Mean()\n"
        "def number():\n"
        "    return 3\n"
    )
    images = torch.rand(2, 3, 8, 8)
    teacher = load_teacher(TeacherConfig(source=f"{path}:teacher"), NAMES)
    assert torch.allclose(teacher(images), images.mean(dim=(2, 3)))
    config = TeacherConfig(source=f"{path}:teacher", mean=(0.5,) * 3, std=(0.5,) * 3)
    expected = ((images - 0.5) / 0.5).mean(dim=(2, 3))
    assert torch.allclose(load_teacher(config, NAMES)(images), expected, atol=1e-6)
    with pytest.raises(DataError, match="no attribute 'other'"):
        load_teacher(TeacherConfig(source=f"{path}:other"), NAMES)
    with pytest.raises(DataError, match=r"should return a torch\.nn\.Module"):
        load_teacher(TeacherConfig(source=f"{path}:number"), NAMES)
    with pytest.raises(DataError, match="answers with 3 classes"):
        load_teacher(TeacherConfig(source=f"{path}:teacher"), (*NAMES, "dog"))


def test_a_python_function_that_fails_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\n"
        "def fails():\n    raise RuntimeError('boom')\n"
        "def linear():\n    return torch.nn.Linear(5, 3)\n"
    )
    with pytest.raises(DataError, match=r"mine\.py:fails: RuntimeError: boom"):
        load_teacher(TeacherConfig(source=f"{path}:fails"), NAMES)
    with pytest.raises(DataError, match="cannot answer images"):
        load_teacher(TeacherConfig(source=f"{path}:linear"), NAMES)


def test_a_python_file_may_hold_dataclasses_and_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("WIDTH = 3\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from neighbour_of_mine import WIDTH\n"
        "@dataclass\n"
        "class Settings:\n    width: int = WIDTH\n"
        "class Sized(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        "        assert images.shape[-1] == 24\n"
        "        return images.mean(dim=(2, 3))\n"
        "def teacher():\n    return Sized()\n"
        "def misnamed():\n    teacher = Sized()\n"
        "    teacher.class_names = ('ant', 'bee')\n    return teacher\n"
    )
    assert load_teacher(TeacherConfig(source=f"{path}:teacher"), NAMES, image_size=24)
    with pytest.raises(DataError, match="answers with 3 classes and names 2"):
        load_teacher(TeacherConfig(source=f"{path}:misnamed"), ("ant", "bee"), image_size=24)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("checkpoints/nobody", "train a teacher first"),
        ("resnet81", "did you mean resnet18"),
        ("somewhere/teacher.pth", "no such file"),
    ],
)
def test_a_missing_teacher_is_explained(source, message):
    with pytest.raises(DataError, match=message):
        load_teacher(TeacherConfig(source=source), NAMES)


def test_an_unfinished_run_is_no_teacher(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no trained network"):
        load_teacher(TeacherConfig(source=str(tmp_path)), NAMES)


def test_weights_that_cannot_be_fetched_are_an_error_not_a_random_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="could not be loaded"):
        load_teacher(TeacherConfig(source="resnet10t.c3_in1k"), NAMES)


def test_a_timm_name_without_weights_is_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="weights"):
        load_teacher(TeacherConfig(source="vit_tiny_patch16_384"), NAMES)
