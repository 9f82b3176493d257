"""Teachers: frozen, always in evaluation mode, own size and normalization, matched classes."""

import json
from dataclasses import asdict, replace

import pytest
import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from deit.config.schema import Config
from deit.config.sections.student import StudentConfig
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import teacher_specs
from deit.config.validation import validate
from deit.core.errors import ConfigError, DataError, NotFoundError
from deit.core.types import logits_by_head
from deit.models.saved_student import ModelInfo, student_from_info, write_student
from deit.models.teacher_sources import resolve_source, teacher_from_spec
from deit.models.teachers import ASSUMED
from tests.helpers.errors import raises
from tests.helpers.recorder_teacher import MEAN, NAMES, ROOM_CLASSES, STD, recorder_teacher


def load_teacher(config, class_names, image_size=16):
    (member,) = teacher_specs(validate(Config().replace(teacher=asdict(config))).teacher)
    return teacher_from_spec(member, class_names, image_size=image_size)


@pytest.mark.fault("D3")
def test_teacher_is_frozen_and_stays_in_evaluation_mode():
    teacher = recorder_teacher()
    container = nn.ModuleList([teacher]).train()
    assert container.training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = teacher.network.norm.running_mean.clone()
    logits = teacher(torch.rand(4, 3, 8, 8))
    assert not logits.requires_grad
    assert torch.equal(teacher.network.norm.running_mean, before)


@pytest.mark.fault("D5")
def test_teacher_normalizes_its_input():
    teacher, images = recorder_teacher(), torch.rand(2, 3, 8, 8)
    teacher(images)
    restored = teacher.network.seen * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(
        3, 1, 1
    )
    assert torch.allclose(restored, images, atol=1e-6)


@pytest.mark.fault("D5")
def test_teacher_resizes_to_its_input_size():
    teacher = recorder_teacher(image_size=12, mean=(0.0,) * 3, std=(1.0,) * 3)
    images = torch.rand(2, 3, 8, 8)
    teacher(images)
    expected = torch.nn.functional.interpolate(images, (12, 12), mode="bicubic", antialias=True)
    assert torch.equal(teacher.network.seen, expected.clamp(0, 1))


@pytest.fixture
def run(tmp_path):
    student = StudentConfig(name="deit_micro", image_size=16, embed_dim=24, depth=1)
    model_info = ModelInfo(student, NAMES, MEAN, STD, 1.0)
    folder = tmp_path / "run" / "best"
    folder.mkdir(parents=True)
    built = student_from_info(model_info)
    write_student(folder, built.network.state_dict(), model_info)
    return tmp_path / "run", built.eval()


def test_teacher_from_run_returns_fused_logits(run):
    folder, student = run
    teacher = load_teacher(TeacherConfig(source=str(folder)), NAMES)
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        expected = logits_by_head(student(images))["fused"]
    assert torch.allclose(teacher(images), expected, atol=1e-6)
    assert teacher.image_size == 16


@pytest.mark.fault("C15", "D2")
def test_classes_are_matched_by_name(run):
    folder, _ = run
    images = torch.rand(4, 3, 16, 16)
    in_order = load_teacher(TeacherConfig(source=str(folder)), NAMES)(images)
    reordered = load_teacher(TeacherConfig(source=str(folder)), ("cat", "ant"))(images)
    assert torch.equal(reordered, in_order[:, [2, 0]])
    with raises(DataError, "'bees'"):
        load_teacher(TeacherConfig(source=str(folder)), ("ant", "bees"))


def timm_folder(path, **extra):
    network = timm.create_model("resnet10t", num_classes=3).eval()
    path.mkdir()
    torch.save(network.state_dict(), path / "pytorch_model.bin")
    known = {"mean": list(MEAN), "std": list(STD), "input_size": [3, 48, 48], "num_classes": 3}
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": known, **extra}
    (path / "config.json").write_text(json.dumps(config))
    return network


def test_timm_folder_provides_size_normalization_and_names(tmp_path):
    network = timm_folder(tmp_path / "timm", label_names=list(NAMES))
    teacher = load_teacher(TeacherConfig(source=str(tmp_path / "timm")), NAMES)
    assert teacher.image_size == 48
    assert teacher.normalization == (MEAN, STD)
    images = torch.rand(2, 3, 48, 48)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(teacher(images), network((images - mean) / std), atol=1e-5)


@pytest.mark.fault("D1")
def test_timm_folder_with_other_class_count_raises(tmp_path):
    timm_folder(tmp_path / "timm")
    many = tuple(map(str, range(1234)))
    with raises(DataError, tmp_path / "timm", 1234, "teacher.classes"):
        load_teacher(TeacherConfig(source=str(tmp_path / "timm")), many)


def test_imagenet_teacher_selects_classes_of_subset(tmp_path):
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


def test_checkpoint_file_requires_architecture_and_matches_its_outputs(tmp_path):
    network = timm.create_model("resnet10t", num_classes=3).eval()
    path = tmp_path / "teacher.pth"
    torch.save({"state_dict": network.state_dict(), "epoch": 9}, path)
    with raises(ConfigError, "teacher.architecture", path):
        load_teacher(TeacherConfig(source=str(path)), NAMES)
    config = TeacherConfig(
        source=str(path), architecture="timm:resnet10t", image_size=32, mean=(0,) * 3, std=(1,) * 3
    )
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(load_teacher(config, NAMES)(images), network(images), atol=1e-6)
    with raises(DataError, path, 1234, "teacher.classes"):
        load_teacher(config, tuple(map(str, range(1234))))


@pytest.mark.fault("D1")
def test_python_function_provides_teacher(tmp_path):
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
    with raises(DataError, "'other'"):
        load_teacher(TeacherConfig(source=f"{path}:other"), NAMES)
    with raises(DataError, f"{path}:number", "torch.nn.Module"):
        load_teacher(TeacherConfig(source=f"{path}:number"), NAMES)
    with raises(DataError, path, 1234, "teacher.classes"):
        load_teacher(TeacherConfig(source=f"{path}:teacher"), tuple(map(str, range(1234))))


def test_python_file_that_exits_raises_with_name(tmp_path):
    (tmp_path / "t.py").write_text("import sys\nsys.exit('install foo')\n")
    with raises(DataError, tmp_path / "t.py", "SystemExit", "install foo"):
        load_teacher(TeacherConfig(source=f"{tmp_path / 't.py'}:make"), ("a",), image_size=8)


@pytest.mark.parametrize(("calls", "exit_code"), [(0, ""), (0, "0"), (0, "'no GPU'"), (1, "0")])
def test_network_that_exits_raises_with_name(calls, exit_code, tmp_path):
    """Also after successful calls: its exit code 0 would look like that of a finished command."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import sys, torch\n"
        "class Leaves(torch.nn.Module):\n"
        f"    left = {calls}\n"
        "    def forward(self, images):\n"
        "        if not self.left:\n"
        f"            sys.exit({exit_code})\n"
        "        self.left -= 1\n"
        "        return images.mean(dim=(2, 3))\n"
        "def teacher():\n    return Leaves()\n"
    )
    with raises(DataError, path, "SystemExit"):
        load_teacher(TeacherConfig(source=f"{path}:teacher"), NAMES)(torch.rand(2, 3, 8, 8))


def test_failing_python_function_raises_with_name(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\n"
        "def fails():\n    raise RuntimeError('boom')\n"
        "def linear():\n    return torch.nn.Linear(5, 3)\n"
    )
    with raises(DataError, f"{path}:fails", "boom"):
        load_teacher(TeacherConfig(source=f"{path}:fails"), NAMES)
    with raises(DataError, path, "16 px", "RuntimeError", "teacher.image_size"):
        load_teacher(TeacherConfig(source=f"{path}:linear"), NAMES)


def test_python_file_can_define_dataclasses_and_import_neighbors(tmp_path):
    (tmp_path / "helper_module.py").write_text("WIDTH = 3\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from helper_module import WIDTH\n"
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
    with raises(DataError, "misnamed", path, "teacher.classes"):
        load_teacher(TeacherConfig(source=f"{path}:misnamed"), ("ant", "bee"), image_size=24)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("checkpoints/nobody", ("--out checkpoints/nobody", "--teacher.source")),
        ("resnet81", ("resnet18",)),
        ("somewhere/teacher.pth", ("--out somewhere/teacher.pth", "--teacher.source")),
    ],
)
def test_missing_teacher_raises_with_remedy(source, names):
    with raises(NotFoundError, f"teacher.source {source}", *names):
        load_teacher(TeacherConfig(source=source), NAMES)


def test_unfinished_run_as_teacher_raises(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    with raises(NotFoundError, tmp_path, "best/model.safetensors", "config.json"):
        load_teacher(TeacherConfig(source=str(tmp_path)), NAMES)


def test_unavailable_weights_raise(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_source("resnet10t.c3_in1k") == "timm"
    with raises(NotFoundError, "resnet10t.c3_in1k"):
        load_teacher(TeacherConfig(source="resnet10t.c3_in1k"), NAMES)


def test_timm_name_without_weights_raises(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_source("darknet17") == "timm"
    with raises(DataError, "darknet17"):
        load_teacher(TeacherConfig(source="darknet17"), NAMES)


def weight_file(path, outputs=3, name="test_resnet"):
    network = timm.create_model(name, num_classes=outputs).eval()
    torch.save({"state_dict": network.state_dict()}, path)
    settings = {"architecture": f"timm:{name}", "image_size": 32, "mean": (0,) * 3, "std": (1,) * 3}
    return network, TeacherConfig(source=str(path), **settings)


@pytest.mark.parametrize("kind", ["file", "function"])
@pytest.mark.parametrize("outputs", [1000, 11821, 21841])
def test_imagenet_teacher_is_matched_by_synsets_from_any_source(kind, outputs, tmp_path):
    subset = ("n01443537", "n01440764")
    network, config = weight_file(tmp_path / "w.pth", outputs)
    if kind == "function":
        path = tmp_path / "mine.py"
        path.write_text(
            "import timm, torch\n"
            "def teacher():\n"
            f"    network = timm.create_model('test_resnet', num_classes={outputs})\n"
            f"    found = torch.load({str(tmp_path / 'w.pth')!r}, weights_only=True)\n"
            "    network.load_state_dict(found['state_dict'])\n"
            "    return network\n"
        )
        config = TeacherConfig(source=f"{path}:teacher")
    teacher = load_teacher(config, subset, image_size=32)
    known = ImageNetInfo(infer_imagenet_subset({"num_classes": outputs})).label_names()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)[:, [known.index(name) for name in subset]]
    assert torch.allclose(teacher(images), expected, atol=1e-5)
    assert str(outputs) in teacher.class_order
    assert "ImageNet" in teacher.class_order


def test_thousand_other_classes_are_not_matched_as_synsets(tmp_path):
    _, config = weight_file(tmp_path / "w.pth", 1000)
    names = tuple(f"class {index:04}" for index in range(1000))
    teacher = load_teacher(config, names)
    assert (teacher.class_indices, teacher.class_order) == (None, ASSUMED)
    with raises(DataError, 1000, "teacher.classes"):
        load_teacher(config, NAMES)


@pytest.mark.parametrize(
    ("classes", "columns"),
    [
        (("natural",), [0, 2, 1]),
        (("room2", "room1", "room10"), [1, 2, 0]),
        (("@names.txt",), [1, 2, 0]),
        (("data",), None),
    ],
)
def test_class_order_can_be_configured(classes, columns, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfroom2\troom\r\nroom1\r\n\r\nroom10\r\n")
    _, config = weight_file(tmp_path / "w.pth")
    teacher = load_teacher(replace(config, classes=classes), ROOM_CLASSES)
    assert teacher.class_indices == columns
    assert teacher.class_order == f"teacher.classes {','.join(classes)}"


def test_long_class_order_is_abbreviated_in_log(tmp_path):
    _, config = weight_file(tmp_path / "w.pth", outputs=5)
    teacher = load_teacher(replace(config, classes=tuple("edcba")), tuple("abcde"))
    assert teacher.class_order == "teacher.classes e,d,c,b,..."


def test_configured_classes_can_exceed_those_of_the_data(tmp_path):
    network, config = weight_file(tmp_path / "w.pth")
    teacher = load_teacher(replace(config, classes=("a", "b", "c")), ("c", "a"))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(teacher(images), network(images)[:, [2, 0]], atol=1e-5)
    with raises(DataError, tmp_path / "w.pth", "teacher.classes"):
        load_teacher(replace(config, classes=("a", "b")), ("a",))
    with raises(DataError, "teacher.classes", "'a'"):
        load_teacher(replace(config, classes=("a", "b", "a")), ("a",))
    with raises(DataError, "teacher.classes", "@nowhere"):
        load_teacher(replace(config, classes=("@nowhere",)), ("a",))
