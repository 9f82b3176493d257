"""Reading of files: pipes and devices raise; transient errors do not mean a bad file."""

import errno
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deit.config import validation
from deit.config.schema import Config, to_dict
from deit.core import manifest, run_log
from deit.core.errors import CheckpointError, ConfigError, DataError, NotReadableError, SystemFault
from deit.core.file_reading import NOT_PLAIN, read_bytes
from deit.core.filesystem import ENVIRONMENT, LOCK, lock_dir
from deit.core.json_io import load_json_as
from deit.core.run_folder import check_run_dir
from deit.core.run_log import HASH_CHAIN, METRICS
from deit.core.user_code import read_names
from deit.distill.target_store import read_manifest
from deit.evaluation import predictions
from deit.experiments.sweep_spec import read_sweep
from deit.models import weight_files
from deit.models.load_weights import load_weights_from
from deit.models.weight_files import read_weights
from deit.training import optimizer
from deit.training.optimizer import read_tensors
from tests.helpers.errors import raises

READERS = {
    "configuration": ("config.json", validation.load_config, ConfigError),
    "names": ("names.txt", lambda path: read_names("data.classes", (f"@{path}",)), DataError),
    "sweep": ("sweep.yaml", read_sweep, ConfigError),
    "picture": ("picture.png", lambda path: predictions._open(str(path)), DataError),
    "store": ("store.json", lambda path: read_manifest(path.parent), CheckpointError),
    "record": ("record.json", lambda path: load_json_as(path, Config), CheckpointError),
    "digest": ("a", lambda path: manifest.digests(path.parent, ["a"]), CheckpointError),
    "weights": ("weights.pth", read_weights, CheckpointError),
    "start": ("config.json", lambda path: load_weights_from(str(path.parent)), CheckpointError),
}


def fail(path, error_number, monkeypatch):
    """Make opening a file raise an OSError."""
    opens = Path.open

    def failing(self, *arguments, **options):
        if self == path:
            raise OSError(error_number, os.strerror(error_number), str(path))
        return opens(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("error_number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_transient_read_errors_raise_system_fault(error_number, kind, tmp_path, monkeypatch):
    """The file is not reported as damaged: the command can be run again."""
    name, read, expected = READERS[kind]
    path = tmp_path / name
    path.write_bytes(b"\xff no content of any kind")
    with nullcontext() if kind == "digest" else pytest.raises(expected):
        read(path)
    fail(path, error_number, monkeypatch)
    with raises(SystemFault, name, os.strerror(error_number)):
        read(path)


@pytest.mark.parametrize("kind", READERS)
def test_unreadable_file_is_reported(kind, tmp_path, monkeypatch):
    name, read, expected = READERS[kind]
    path = tmp_path / name
    path.touch()
    fail(path, errno.EACCES, monkeypatch)
    is_run_file = kind in ("record", "digest", "configuration", "weights")
    expected = NotReadableError if is_run_file else expected
    with raises(expected, path, "Permission denied"):
        read(path)


@pytest.mark.parametrize("kind", READERS)
def test_pipe_raises_without_blocking(kind, tmp_path):
    name, read, expected = READERS[kind]
    os.mkfifo(tmp_path / name)
    with pytest.raises(expected):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", READERS)
def test_json_nested_too_deep_raises(kind, tmp_path):
    name, read, expected = READERS[kind]
    (tmp_path / name).write_text("[" * 200_000)
    with nullcontext() if kind in ("digest", "names") else pytest.raises(expected):
        read(tmp_path / name)


@pytest.mark.parametrize("name", [METRICS, HASH_CHAIN, "config.json", LOCK])
def test_pipe_instead_of_a_run_file_raises(name, tmp_path):
    """Opening it for writing would wait for a reader forever."""
    (tmp_path / "config.json").write_text("{}")
    check_run_dir(tmp_path, resume=True)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with raises(CheckpointError, name):
        check_run_dir(tmp_path, resume=True)
    with raises(SystemFault, tmp_path / name, NOT_PLAIN):
        run_log.append(tmp_path / name, {})


def test_pipe_instead_of_the_lock_raises(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    with raises(SystemFault, f"out = {tmp_path}", NOT_PLAIN), lock_dir(tmp_path, name="out"):
        pass


@pytest.mark.parametrize("read", [read_weights, read_tensors])
@pytest.mark.parametrize("error", [FileNotFoundError("No such file"), "Too many open files"])
def test_safetensors_errors_give_no_reason(error, read, tmp_path, monkeypatch):
    """It reports any file that it cannot open as missing, or only with a message."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    read(path)

    def failing(_):
        if isinstance(error, str):
            raise RuntimeError(error)
        fail(path, errno.EMFILE, monkeypatch)
        raise error

    for module in (weight_files, optimizer):
        monkeypatch.setattr(module, "load_file", failing)
    with raises(SystemFault, path, "Too many open files"):
        read(path)


def test_load_config_ignores_invalid_environment_files(tmp_path, monkeypatch):
    config = validation.config_from_dict({"loss": {"kind": "none"}})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    os.mkfifo(tmp_path / ENVIRONMENT)
    assert validation.load_config(tmp_path / "config.json") == config
    (tmp_path / ENVIRONMENT).unlink()
    (tmp_path / ENVIRONMENT).write_text("[" * 200_000)
    assert validation.load_config(tmp_path / "config.json") == config
    (tmp_path / METRICS).write_text('{"epoch": 1}\n' + "[" * 200_000)
    assert run_log.read(tmp_path / METRICS) == [{"epoch": 1}]
    (tmp_path / ENVIRONMENT).unlink()
    (tmp_path / ENVIRONMENT).write_text('{"directory": "there"}')
    fail(tmp_path / ENVIRONMENT, errno.EACCES, monkeypatch)
    assert validation.load_config(tmp_path / "config.json") == config


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "link") == b"abc"
    for path, error in (("none", FileNotFoundError), (".", IsADirectoryError)):
        with pytest.raises(error):
            read_bytes(tmp_path / path)
    with pytest.raises(OSError, match=NOT_PLAIN):
        read_bytes(Path(os.devnull))
