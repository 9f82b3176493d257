"""What is a fault of the machine, and what of a file, a setting or a network: no library says."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deit import optimizer_state, preparation, recipes, run
from deit.config import Config, derive
from deit.datasets import decoding, readers, sources
from deit.errors import (
    TRANSIENT,
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentFault,
    compiler_failure,
    out_of_memory,
    raise_transient,
)
from deit.formats import _tracing
from deit.models import start, teachers, weights
from deit.quantization_layers import by_onnxruntime

NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Failed to allocate memory for requested buffer of size 9"),
    RuntimeError("std::bad_alloc"),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: f"{type(error).__name__} {error}")
def test_want_of_memory_is_known_by_kind_or_words(error):
    assert out_of_memory(error)
    with pytest.raises(type(error)) as raised:
        raise_transient(error, "a place")
    assert raised.value is error


def test_why_a_network_is_not_compiled_is_known_by_who_says_it():
    error = type("CppCompileError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    said = "C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nx.h:1: fatal error: no Python.h\n"
    assert compiler_failure(error(said)) == (
        "torch.compile failed (C++ compile error: x.h:1: fatal error: no Python.h)"
    )
    folder = FileExistsError(errno.EEXIST, "File exists", "/cache")
    assert compiler_failure(folder) is None
    with pytest.raises(FileExistsError) as raised:
        exec(
            "raise error", {"error": folder, "__name__": "torch._inductor.runtime.cache_dir_utils"}
        )
    assert "/cache" in compiler_failure(raised.value)


@pytest.mark.parametrize("number", TRANSIENT)
def test_what_may_pass_is_a_fault_of_the_machine(number):
    with pytest.raises(EnvironmentFault, match=r"^a place: cannot be read now"):
        raise_transient(OSError(number, "said by the system"), "a place")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a must match the size of tensor b"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        PermissionError(errno.EACCES, "Permission denied"),
        IsADirectoryError(errno.EISDIR, "Is a directory"),
        OSError(errno.ENAMETOOLONG, "File name too long"),
        OSError("image file is truncated"),
    ],
)
def test_all_else_is_left_to_who_asks(error):
    assert not out_of_memory(error)
    raise_transient(error, "a place")


def raising(error):
    def instead(*arguments, **options):
        raise error

    return instead


class Fails(nn.Module):
    """A network that answers with an error."""

    def __init__(self, error):
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.error = error

    def forward(self, images):
        raise self.error


def check_student(error, monkeypatch):
    config = derive(Config(), loss={"kind": "none"})
    run._check_student(config, Fails(error))


def read_weights(error, monkeypatch):
    path = Path("weights.pth")
    monkeypatch.setattr(weights, "_head_of", lambda path: b"PK")
    monkeypatch.setattr(weights.torch, "load", raising(error))
    weights.read_weights(path)


def read_safetensors(error, monkeypatch):
    monkeypatch.setattr(optimizer_state, "load_file", raising(error))
    optimizer_state.read_tensors(Path("optimizer.safetensors"))


def teacher_answers(error, monkeypatch):
    origin = teachers.Origin(Fails(error), "one", 8, (0.0,) * 3, (1.0,) * 3, None)
    teachers._count_outputs(origin, 8)


def teacher_of_timm(error, monkeypatch):
    monkeypatch.setattr(teachers.timm, "create_model", raising(error))
    teachers._from_timm("resnet10t", "resnet10t")


def own_code(error, monkeypatch):
    monkeypatch.setattr(teachers, "import_file", lambda path: SimpleNamespace(own=raising(error)))
    teachers._from_callable("mine.py:own")


def own_recipe(error, monkeypatch):
    monkeypatch.setattr(recipes, "import_file", lambda path: SimpleNamespace(own=raising(error)))
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    recipes._from_file("mine.py:own")


def start_of_timm(error, monkeypatch):
    monkeypatch.setattr(start.timm, "create_model", raising(error))
    start._from_timm("resnet10t")


def start_of_file(error, monkeypatch):
    monkeypatch.setattr(start, "read_weights", raising(error))
    start.find_start(__file__)


def fit_start(error, monkeypatch):
    monkeypatch.setattr(preparation, "fit", raising(error))
    preparation.begin(nn.Linear(1, 1), None, Config(), SimpleNamespace(class_names=()))


def export(error, monkeypatch):
    with _tracing():
        try:
            raise error
        except type(error) as cause:
            raise ValueError("step 2 of the exporter failed") from cause


def onnxruntime(error, monkeypatch):
    with by_onnxruntime("calibrate"):
        raise error


def torchvision(error, monkeypatch):
    config = derive(Config(), data={"source": "cifar10"}).data
    sources._both_splits(raising(error), config, expected="files", else_="none")


def reader(error, monkeypatch):
    monkeypatch.setitem(readers._READERS, "folder", raising(error))
    config = derive(Config(), data={"source": "reader", "reader": "folder", "root": "."}).data
    readers.list_reader(config, ())


CALLS = {
    call.__name__: call
    for call in (
        *(check_student, read_weights, read_safetensors, teacher_answers, teacher_of_timm),
        *(
            own_code,
            own_recipe,
            start_of_timm,
            start_of_file,
            fit_start,
            export,
            onnxruntime,
            torchvision,
            reader,
        ),
    )
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_want_of_memory_is_no_other_mistake(call, monkeypatch):
    """Wherever what a library raises becomes a wrong setting, a bad file or another network."""
    for error in (NO_MEMORY[0], NO_MEMORY[2]):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError) as raised:
            call(error, patched)
        assert raised.value is error
    with monkeypatch.context() as patched, pytest.raises((ConfigError, DataError, CheckpointError)):
        call(RuntimeError("anything else"), patched)


def test_no_memory_for_its_exif_turns_no_picture(monkeypatch):
    """It would be shown as it lies, and nobody would know."""
    image = SimpleNamespace(getexif=raising(MemoryError()))
    with pytest.raises(MemoryError):
        decoding._upright(image, image)
    image.getexif = raising(SyntaxError("broken"))
    assert decoding._upright(image, image) is image
