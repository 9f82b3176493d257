"""Manifests cover every byte of a folder; a damaged folder raises."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deit.config.validation import load_config
from deit.core import manifest, run_folder
from deit.core.errors import CheckpointError, SystemFault
from deit.core.run_folder import (
    latest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
    write_with_manifest,
)
from tests.helpers.errors import raises
from tests.helpers.images import mutate

MUTATIONS = 2000


def fill(folder: Path) -> None:
    save_file({"a": torch.arange(50.0), "b": torch.zeros(3, 3)}, folder / "model.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": 3, "best": [0.25, None]}, indent=1))


@pytest.fixture
def folder(tmp_path) -> Path:
    write_with_manifest(tmp_path / "checkpoint-00000003", fill, step=3)
    return tmp_path / "checkpoint-00000003"


def test_written_folder_is_verified(folder):
    verified = manifest.verify_dir(folder)
    assert (verified.step, sorted(verified.files)) == (3, ["model.safetensors", "state.json"])
    for name, content in verified.files.items():
        assert (folder / name).stat().st_size == content.bytes


def test_folder_replaced_during_verification_is_verified_again(folder, monkeypatch):
    """A file server reports that an opened file no longer exists (ESTALE)."""
    opens, old = Path.open, folder / "model.safetensors"

    def failing(self, *arguments, **options):
        if self == old and folder.stat().st_ino == first:
            if replaced:
                folder.rename(folder.with_name(f"gone-{first}"))
                write_with_manifest(folder, fill, step=3)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
        return opens(self, *arguments, **options)

    first, replaced = folder.stat().st_ino, True
    monkeypatch.setattr(Path, "open", failing)
    assert manifest.verify_dir(folder).step == 3
    first, replaced = folder.stat().st_ino, False
    with raises(SystemFault, old, os.strerror(errno.ESTALE)):
        manifest.verify_dir(folder)


@pytest.mark.fault("B1", "B2", "B3")
def test_every_mutation_of_a_file_is_detected(folder):
    rng = random.Random(0)
    content = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    for _ in range(MUTATIONS):
        path = rng.choice(list(content))
        mutate(path, rng)
        if path.is_file() and path.read_bytes() == content[path]:
            continue  # replaced by the same bytes
        with pytest.raises(CheckpointError):
            verify_checkpoint(folder, 3)
        path.write_bytes(content[path])
    verify_checkpoint(folder, 3)


@pytest.mark.fault("B4", "B16", "B17")
@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["Invalid JSON"]),  # the message of pydantic
        ("[" * 100_000, ["Invalid JSON"]),
        ("{}", ["format_version"]),
        ('{"format_version": NaN, "step": 3, "files": {}, "sha256": ""}', ["format_version"]),
        ('{"format_version": 3, "step": "3", "files": {}, "sha256": ""}', ["step"]),
        ('{"format_version": 3, "step": 3, "files": [], "sha256": ""}', ["files"]),
        ('{"format_version": 98765, "step": 3, "files": {}, "sha256": ""}', ["98765"]),
        ('{"format_version": 3, "step": 3, "files": {}, "sha256": "", "more": 1}', ["more"]),
        ('{"format_version": 3, "step": 3, "files": {}, "sha256": ""}', ["sha256"]),
        ('{"format_version": 3, "step": 1, "step": 3, "files": {}, "sha256": ""}', ["sha256"]),
    ],
)
def test_invalid_manifest_raises(text, names, folder):
    (folder / "manifest.json").write_text(text)
    with raises(CheckpointError, folder / "manifest.json", *names):
        manifest.verify_dir(folder)


@pytest.mark.fault("B15")
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ".hidden", "A.bin", "a/b", ""])
def test_manifest_with_a_path_outside_the_folder_raises(name, folder):
    (folder.parent / "secret").write_text("secret")
    manifest.write_manifest(folder, {name: manifest.FileDigest(6, "0" * 64)}, step=3)
    with raises(CheckpointError, folder / "manifest.json", repr(name)):
        manifest.verify_dir(folder)


@pytest.mark.fault("B4")
def test_checkpoint_renamed_to_another_step_raises(folder):
    moved = folder.rename(folder.with_name("checkpoint-00000009"))
    with raises(CheckpointError, moved, "step 3"):
        verify_checkpoint(moved, 9)


@pytest.mark.fault("B3", "B23")
def test_unlisted_files_are_ignored(folder, tmp_path):
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-00000004.bak", "checkpoint", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-00000099").write_text("a file")
    (folder / "pytorch_model.bin").write_bytes(b"a stray pickle")
    assert latest_checkpoint(tmp_path) == folder
    for step in (5, 6, 7):
        save_checkpoint(tmp_path, step, fill, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if name[-1].isdigit()] == [
        *("checkpoint-00000006", "checkpoint-00000007", "checkpoint-00000099"),
    ]
    assert {"checkpoint-", "checkpoint-x", "checkpoint-00000004.bak", "notes"} < set(names)


@pytest.mark.fault("E8")
def test_file_times_have_no_effect(tmp_path):
    import os

    for step, when in ((3, 2e9), (4, 1e9), (5, 0)):
        save_checkpoint(tmp_path, step, fill, keep=3)
        os.utime(run_folder.checkpoint_path(tmp_path, step), (when, when))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-00000005"


@pytest.mark.fault("A27")
def test_files_are_synced_before_the_rename_and_old_ones_removed_last(tmp_path, monkeypatch):
    """After a power cut, the order of fsync and rename decides what is on the disk."""
    import os

    calls: list[str] = []
    real_fsync, real_rename, real_rmtree = os.fsync, Path.rename, shutil.rmtree

    def fsync(handle: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        real_fsync(handle)

    def rename(self: Path, target: Path) -> Path:
        calls.append(f"rename to {Path(target).name}")
        return real_rename(self, target)

    def rmtree(path: Path, **settings: object) -> None:
        calls.append(f"remove {Path(path).name}")
        real_rmtree(path, **settings)

    save_checkpoint(tmp_path, 3, fill, keep=2)
    save_checkpoint(tmp_path, 4, fill, keep=2)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save_checkpoint(tmp_path, 5, fill, keep=2)
    named = calls.index("rename to checkpoint-00000005")
    before, after = calls[:named], calls[named + 1 :]
    first = {name: before.index(f"fsync {name}") for name in ("model.safetensors", "state.json")}
    assert all(index < before.index("fsync manifest.json") for index in first.values())
    assert before[-1] == "fsync .deit-new-checkpoint-00000005"
    assert after[0] == f"fsync {tmp_path.name}"
    assert after[-1] == "remove .deit-gone-checkpoint-00000003"


@pytest.mark.fault("B13")
def test_planted_pickle_is_never_opened(folder, tmp_path):
    """Neither under the name of a file of a checkpoint nor next to them."""
    import pickle  # noqa: TID251

    class Canary:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "canary",))

    payload = pickle.dumps(Canary())
    for name in ("model.safetensors", "state.json", "manifest.json", "random_states_0.pkl"):
        content = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(payload)
        if content is None:
            verify_checkpoint(folder, 3)
            continue
        with pytest.raises(CheckpointError):
            verify_checkpoint(folder, 3)
        (folder / name).write_bytes(content)
    assert not (tmp_path / "canary").exists()


def test_run_of_another_format_version_raises_one_line(tmp_path):
    """Not a line for each of its unknown fields."""
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "manifest.json").write_text('{"format_version": 2}')
    (tmp_path / "config.json").write_text('{"start": {"source": null}, "run": {"shard": "none"}}')
    with raises(CheckpointError, tmp_path, "version 2", str(manifest.FORMAT_VERSION)) as refused:
        load_config(tmp_path / "config.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"format_version": "2"}'])
def test_manifest_without_version_is_reported_by_its_checkpoint(text, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "manifest.json").write_text(text)
    manifest.check_format_version(tmp_path)
