"""One rule for devices: the CPU, unless another is given."""

import pytest
import torch
from torch import nn

import deit
from tests.helpers.errors import raises

NAMES = ("ant", "bee", "cat")
IMAGES, LABELS = torch.zeros(48, 3, 8, 8, dtype=torch.uint8), torch.arange(48) % 3
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}
SMALL = {"image_size": 8, "patch_size": 2, "depth": 1, "embed_dim": 16, "num_heads": 2}
ConfigError = deit.errors.ConfigError


class MeanColor(nn.Module):
    def forward(self, images):
        return images.mean(dim=(2, 3))


def on_devices(device, folder="student"):
    """Return what a person puts into a loop of their own, each by a call with this device.

    folder: of a saved student.
    """
    options = {} if device is None else {"device": device}
    return {
        "loader": lambda: deit.TrainLoader.from_arrays(IMAGES, LABELS, batch_size=16, **options),
        "teacher": lambda: deit.load_teacher(MeanColor(), NAMES, **PLAIN, **options),
        "student": lambda: deit.build_student("deit_micro", 3, **PLAIN, **SMALL, **options),
        "loaded student": lambda: deit.load_student(folder, **options)[0],
        "run": lambda: deit.Run("run", **options),
    }


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_every_part_is_on_the_cpu_unless_another_device_is_given(device, monkeypatch, tmp_path):
    student = deit.build_student("deit_micro", 3, **PLAIN, **SMALL)
    folder = deit.save_student(student, tmp_path / "student", NAMES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, make in on_devices(device, folder).items():
        part = make()
        actual = next(part.buffers()).device if isinstance(part, nn.Module) else part.device
        assert actual == torch.device("cpu"), name


@pytest.mark.parametrize(
    ("device", "names"),
    [
        ("gpu", ["'gpu'", "use 'cuda'"]),
        ("gpu:1", ["use 'cuda'"]),
        ("cude", ["did you mean cuda"]),
        (torch.device("meta"), ["meta", "cpu"]),
        (0, ["device = 0", "device or str"]),
        ([], ["device", "got list"]),
    ],
)
@pytest.mark.parametrize("part", on_devices(None))
def test_other_devices_raise(part, device, names):
    with raises(ConfigError, *names):
        on_devices(device)[part]()


@pytest.mark.parametrize("part", on_devices(None))
def test_devices_that_are_missing_raise(part):
    with raises(deit.errors.SystemFault, "device = 'cuda:64'", "use device='cpu'"):
        on_devices("cuda:64")[part]()
