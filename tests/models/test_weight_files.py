"""Weight files in practice: every usual container is read, other files raise with their kind."""

import argparse
import datetime
import io
import json
import math
import pathlib
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deit.config.sections.init import InitConfig
from deit.core.errors import CheckpointError
from deit.models.adapt_weights import adapt_weights
from deit.models.load_weights import load_weights_from
from deit.models.weight_files import load_weights, read_weights
from tests.helpers.errors import raises


class Small(nn.Module):
    """A convolution and a head."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3)
        self.head = nn.Linear(4, 2)


@pytest.fixture
def weights():
    return dict(Small().state_dict())


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def same(result, weights):
    assert result.keys() == weights.keys()
    assert all(torch.equal(result[name].float(), value) for name, value in weights.items())


NAMES = (
    *("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net", "weights"),
    *("params", "student", "teacher", "ema", "network", "module", "what_i_call_it"),
)


@pytest.mark.parametrize("name", NAMES)
def test_read_weights_unwraps_usual_containers(weights, name, tmp_path):
    other = {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, "optimizer_state_dict": other, "best": torch.tensor(0.9), name: weights}
    torch.save(content, tmp_path / "w.pth")
    same(read_weights(tmp_path / "w.pth"), weights)


def test_read_weights_unwraps_nested_containers(weights, tmp_path):
    torch.save({"ema": {"decay": 0.9, "module": weights}, "epoch": 1}, tmp_path / "w.pth")
    same(read_weights(tmp_path / "w.pth"), weights)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "net.", "backbone.", "module.model.", "model.module.net."],
)
def test_read_weights_removes_wrapper_prefixes(weights, prefix, tmp_path):
    torch.save({"state_dict": prefixed(weights, prefix)}, tmp_path / "w.ckpt")
    same(read_weights(tmp_path / "w.ckpt"), weights)


@pytest.mark.parametrize(
    "names",
    [
        ("module.fc.weight", "fc.weight"),
        ("model.module.fc.weight", "model.fc.weight"),
        ("model._orig_mod.fc.weight", "model.module.fc.weight"),
        ("model.backbone.fc.weight", "model.module.backbone.fc.weight"),
    ],
)
def test_names_equal_without_prefixes_raise(names, tmp_path):
    torch.save({name: torch.full((1,), i) for i, name in enumerate(names)}, tmp_path / "w.pth")
    with raises(CheckpointError, tmp_path / "w.pth", " fc.weight twice", *names):
        read_weights(tmp_path / "w.pth")


def test_load_weights_removes_common_prefix_of_known_network(weights, tmp_path):
    torch.save(prefixed(weights, "my.lovely_net."), tmp_path / "w.pth")
    network = Small()
    load_weights(network, read_weights(tmp_path / "w.pth"), origin="w.pth")
    same(network.state_dict(), weights)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_read_weights_reads_half_precision(weights, kind, tmp_path):
    torch.save({name: value.to(kind) for name, value in weights.items()}, tmp_path / "w.pth")
    network = Small()
    load_weights(network, read_weights(tmp_path / "w.pth"), origin="w.pth")
    assert network.stem.weight.dtype == torch.float32
    assert torch.equal(network.stem.weight, weights["stem.weight"].to(kind).float())


OTHER_VALUES = {
    "a number of NumPy": np.float64(81.5),
    "an array of NumPy": np.arange(3),
    "a Namespace": argparse.Namespace(lr=1.0, out=pathlib.Path("x")),
    "a SimpleNamespace": types.SimpleNamespace(lr=1.0, inner=types.SimpleNamespace(a=(1, 2))),
    "a path": {"out": pathlib.Path("x"), "pure": pathlib.PureWindowsPath("x")},
    "a date": datetime.datetime(2020, 1, 1),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", OTHER_VALUES)
def test_read_weights_ignores_plain_values(weights, kind, zipped, tmp_path):
    content = {"state_dict": weights, "beside": OTHER_VALUES[kind]}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    same(read_weights(tmp_path / "w.pth"), weights)


def test_whole_network_raises_with_remedy(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "w.pth")
    sequential = "torch.nn.modules.container.Sequential"
    with raises(CheckpointError, tmp_path / "w.pth", sequential, "state_dict"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (torch.zeros(2).to(torch.float8_e4m3fn), ("torch.float8_e4m3fn",)),
        (torch.zeros(2).to(torch.float8_e5m2), ("torch.float8_e5m2",)),
        (torch.zeros(2, 2).to_sparse(), ()),
    ],
    ids=["float8_e4m3", "float8_e5m2", "sparse"],
)
def test_unsupported_tensor_raises_with_name(value, names, tmp_path):
    torch.save({"stem.weight": value}, tmp_path / "w.pth")
    with raises(CheckpointError, tmp_path / "w.pth", "stem.weight", *names):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("shape", [[1] * 100, [0, 2**62, 2**62]])
def test_impossible_shape_raises(shape, tmp_path):
    size = 4 * math.prod(shape)
    head = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(head).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(CheckpointError):
        adapt_weights(load_weights_from(str(path)), Small(), ("0", "1"), InitConfig())


def test_safetensors_are_detected_by_content(weights, tmp_path):
    save_file(weights, tmp_path / "w.bin")
    same(read_weights(tmp_path / "w.bin"), weights)


def zipped(names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"), io.BytesIO())
    return file.getvalue()


def array():
    file = io.BytesIO()
    np.savez(file, one=np.zeros(2), two=np.ones(3))
    return file.getvalue()


OTHERS = {
    "empty.pth": (lambda: b"", ("empty",)),
    "short.pth": (lambda: b"\x80\x02", ("early", "copy or download")),
    "lfs.pth": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        ("Git LFS", "git lfs pull"),
    ),
    "lfs.safetensors": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        ("Git LFS", "git lfs pull"),
    ),
    "page.pth": (lambda: b"\n<!DOCTYPE html><html>404</html>", ("HTML",)),
    "error.pth": (lambda: b'{"error": "not found"}', ("JSON",)),
    "keras.h5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), ("HDF5", "Keras")),
    "keras.keras": (lambda: zipped(["config.json", "model.weights.h5"]), ("Keras",)),
    "net.onnx": (lambda: b"\x08\x07\x12\x07pytorch", ("ONNX",)),
    "arrays.npz": (array, (".npz", "2")),
    "pack.zip": (lambda: zipped(["a/b.pth", "readme"]), ("zip", "a/b.pth", "readme")),
    "script.pt": (lambda: zipped(["s/data.pkl", "s/constants.pkl"]), ("TorchScript",)),
    "pack.tar": (tarred, ("tar ", "model.pth")),
    "pack.pth.gz": (lambda: b"\x1f\x8b\x08" + bytes(99), ("archive",)),
    "cut.safetensors": (lambda: (500).to_bytes(8, "little") + b'{"a":', ("header",)),
}
"""What is in a file, and what is named beside the file."""


@pytest.mark.parametrize("name", OTHERS)
def test_file_of_other_kind_raises_in_one_line(name, tmp_path):
    make, names = OTHERS[name]
    (tmp_path / name).write_bytes(make())
    with raises(CheckpointError, tmp_path / name) as no:
        read_weights(tmp_path / name)
    result = str(no.value).replace(str(tmp_path / name), "")
    assert all(item in result for item in names), result
    assert "\n" not in result


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"epoch": 3, "optimizer": {"a": torch.ones(2)}}, ("'epoch'", "'optimizer'", "1 tensor")),
        ([torch.ones(2)], ("list", "1 value")),
        (torch.ones(2, 3), ("Tensor", (2, 3))),
        ({}, (" dict",)),
    ],
)
def test_file_without_weights_raises_with_its_content(content, names, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with raises(CheckpointError, tmp_path / "w.pth", *names):
        read_weights(tmp_path / "w.pth")


def test_names_of_other_network_are_summarized(tmp_path):
    torch.save({"a.x": torch.ones(1), "b.x": torch.ones(1)}, tmp_path / "w.pth")
    with raises(CheckpointError, "w:", "a. (1), b. (1)", "stem. (2), head. (2)"):
        load_weights(Small(), read_weights(tmp_path / "w.pth"), origin="w")


def test_gray_weights_raise_with_conversion_hint(tmp_path):
    with raises(CheckpointError, "w:", "stem.weight", "repeat(1, 3, 1, 1) / 3"):
        load_weights(Small(), Small(1).state_dict(), origin="w")
