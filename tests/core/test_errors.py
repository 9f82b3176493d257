"""Classification of errors of other libraries: out of memory, transient, or about the input."""

import errno
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from deit.config import recipes
from deit.config.recipes import handwriting
from deit.config.schema import Config
from deit.config.sections.student import StudentConfig
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import teacher_specs
from deit.core.errors import (
    TRANSIENT,
    CheckpointError,
    ConfigError,
    DataError,
    SystemFault,
    compiler_failure,
    is_out_of_memory,
    raise_if_transient,
)
from deit.datasets import decoding
from deit.datasets.sources import registry as sources
from deit.datasets.sources import timm_readers
from deit.deploy.export_formats import FORMATS
from deit.deploy.int8_layers import by_onnxruntime
from deit.distill import student_init
from deit.models import load_weights, teacher_sources, weight_files
from deit.models.saved_student import ModelInfo, student_from_info
from deit.training import build, optimizer
from tests.helpers.errors import raises

NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Failed to allocate memory for requested buffer of size 9"),
    RuntimeError("std::bad_alloc"),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: f"{type(error).__name__} {error}")
def test_is_out_of_memory_by_class_or_message(error):
    assert is_out_of_memory(error)
    with pytest.raises(type(error)) as raised:
        raise_if_transient(error, "a place")
    assert raised.value is error


def test_compiler_failure_by_module_of_the_error():
    error = type("CppCompileError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    message = (
        "C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nx.h:1: fatal error: no Python.h\n"
    )
    reason = compiler_failure(error(message))
    for name in ("torch.compile", "C++ compile error", "x.h:1: fatal error: no Python.h"):
        assert name in reason
    assert "x.cpp" not in reason
    folder = FileExistsError(errno.EEXIST, "File exists", "/cache")
    assert compiler_failure(folder) is None
    with pytest.raises(FileExistsError) as raised:
        exec(
            "raise error", {"error": folder, "__name__": "torch._inductor.runtime.cache_dir_utils"}
        )
    assert "/cache" in compiler_failure(raised.value)


@pytest.mark.parametrize("error_number", TRANSIENT)
def test_transient_errors_raise_system_fault(error_number):
    with raises(SystemFault, "a place", "message of the system"):
        raise_if_transient(OSError(error_number, "message of the system"), "a place")


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
def test_other_errors_are_left_to_the_caller(error):
    assert not is_out_of_memory(error)
    raise_if_transient(error, "a place")


def raising(error):
    def failing(*arguments, **options):
        raise error

    return failing


class Fails(nn.Module):
    """A network whose forward pass raises an error."""

    def __init__(self, error):
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.error = error

    def forward(self, images):
        raise self.error


def check_student(error, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(build, "student_from_info", lambda facts: Fails(error))
    build.build_run(handwriting.digits_teacher())


def read_weights(error, monkeypatch):
    monkeypatch.setattr(weight_files, "open_file", lambda path: BytesIO(b"PK"))
    monkeypatch.setattr(weight_files.torch, "load", raising(error))
    weight_files.read_weights(Path("weights.pth"))


def read_safetensors(error, monkeypatch):
    monkeypatch.setattr(optimizer, "load_file", raising(error))
    optimizer.read_tensors(Path("optimizer.safetensors"))


def load_teacher(source):
    (member,) = teacher_specs(TeacherConfig(source=(source,)))
    teacher_sources.teacher_from_spec(member, ("a", "b"), image_size=8)


def teacher_forward(error, monkeypatch):
    module = SimpleNamespace(own=lambda: Fails(error))
    monkeypatch.setattr(teacher_sources, "import_file", lambda path: module)
    load_teacher(f"{__file__}:own")


def teacher_of_timm(error, monkeypatch):
    monkeypatch.setattr(teacher_sources.timm, "create_model", raising(error))
    load_teacher("resnet10t")


def own_code(error, monkeypatch):
    monkeypatch.setattr(
        teacher_sources, "import_file", lambda path: SimpleNamespace(own=raising(error))
    )
    load_teacher(f"{__file__}:own")


def own_recipe(error, monkeypatch):
    monkeypatch.setattr(recipes, "import_file", lambda path: SimpleNamespace(own=raising(error)))
    recipes.find_recipe(f"{__file__}:own")


def start_of_timm(error, monkeypatch):
    monkeypatch.setattr(load_weights.timm, "create_model", raising(error))
    load_weights.load_weights_from("resnet10t")


def start_of_file(error, monkeypatch):
    monkeypatch.setattr(load_weights, "read_weights", raising(error))
    load_weights.load_weights_from(__file__)


def fit_start(error, monkeypatch):
    monkeypatch.setattr(student_init, "adapt_weights", raising(error))
    build.init_student(nn.Linear(1, 1), None, Config().init, SimpleNamespace(class_names=()))


def export(error, monkeypatch):
    def steps(*arguments, **options):
        raise ValueError("step 2 of the exporter failed") from error

    facts = ModelInfo(
        StudentConfig(name="small_convnet", image_size=8), ("a",), (0,) * 3, (1,) * 3, 1
    )
    monkeypatch.setattr(torch.export, "export", steps)
    FORMATS["pt2"].write(Path("nowhere"), student_from_info(facts), facts)


def onnxruntime(error, monkeypatch):
    with by_onnxruntime("calibrate"):
        raise error


def torchvision(error, monkeypatch):
    monkeypatch.setattr(sources, "MNIST", raising(error))
    sources.load_mnist(Config().replace(data={"source": "mnist", "root": "."}).data, ())


def reader(error, monkeypatch):
    monkeypatch.setattr(timm_readers, "split_folders", raising(error))
    config = Config().replace(data={"source": "reader", "reader": "folder", "root": "."}).data
    timm_readers.list_reader(config, ())


CALLS = {
    call.__name__: call
    for call in (
        *(check_student, read_weights, read_safetensors, teacher_forward, teacher_of_timm),
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
def test_out_of_memory_is_not_translated(call, monkeypatch):
    """Everywhere that errors of a library are translated into errors about the input."""
    for error in (NO_MEMORY[0], NO_MEMORY[2]):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError) as raised:
            call(error, patched)
        assert raised.value is error
    with monkeypatch.context() as patched, pytest.raises((ConfigError, DataError, CheckpointError)):
        call(RuntimeError("anything else"), patched)


def test_out_of_memory_while_reading_exif_is_raised(monkeypatch):
    """Otherwise the image would silently not be rotated."""
    file = BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    monkeypatch.setattr(Image.Image, "getexif", raising(MemoryError()))
    with pytest.raises(MemoryError):
        decoding.open_image(file.getvalue(), "red.png")
    monkeypatch.setattr(Image.Image, "getexif", raising(SyntaxError("broken")))
    assert decoding.open_image(file.getvalue(), "red.png").size == (3, 2)
