"""Limits of cores, disks, shared memory and files; encoding, compiler and launcher."""

import os
from types import SimpleNamespace

import pytest

from deit.core.machine import environment, resources
from deit.core.machine.environment import compiler_check, encoding_check, launcher_checks
from deit.core.machine.resources import (
    cache_folder,
    core_check,
    cpu_quota,
    descriptor_check,
    disk_check,
    shared_memory_check,
)


@pytest.mark.parametrize(
    ("text", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("", None), (None, None)]
)
def test_cpu_quota_of_a_control_group(tmp_path, text, cores):
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path / "cpu.max") == cores


def test_fewer_cores_in_a_container_are_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "num_cores", lambda: 8)
    (tmp_path / "cpu.max").write_text("250000 100000")
    check = core_check(tmp_path / "cpu.max")
    assert (check.status, "2.5" in check.detail) == ("note", True)
    assert "OMP_NUM_THREADS=2" in check.hint
    (tmp_path / "cpu.max").write_text("800000 100000")
    assert core_check(tmp_path / "cpu.max").status == "ok"


GB = 10**9


def with_disk(monkeypatch, free, inodes=10**6, writable=True):
    usage = SimpleNamespace(free=free, total=100 * GB)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda folder: usage)
    counts = SimpleNamespace(f_files=10**7, f_favail=inodes)
    monkeypatch.setattr(resources.os, "statvfs", lambda folder: counts)
    monkeypatch.setattr(resources.os, "access", lambda folder, mode: writable)


@pytest.mark.parametrize(
    ("free", "inodes", "writable", "status", "fragment"),
    [
        (50 * GB, 10**6, True, "ok", "50 GB free of 100 GB"),
        (GB, 10**6, True, "note", "1 GB free"),
        (GB // 1000, 10**6, True, "fault", "1 MB free"),
        (50 * GB, 99, True, "note", "99 inodes"),
        (50 * GB, 10**6, False, "note", "cannot be written"),
    ],
)
def test_disk(monkeypatch, tmp_path, free, inodes, writable, status, fragment):
    with_disk(monkeypatch, free, inodes, writable)
    check = disk_check("disk", tmp_path, "give another disk by --out")
    assert (check.name, check.status) == ("disk", status)
    assert fragment in check.detail
    assert ("--out" in check.hint) == (status != "ok")


def test_missing_folder_is_a_fault(tmp_path):
    check = disk_check("disk", tmp_path / "gone", "hint")
    assert (check.status, os.strerror(2) in check.detail) == ("fault", True)


def test_cache_folder_follows_the_variables_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "later" / "deep"))
    assert cache_folder() == tmp_path  # the parent that exists
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert cache_folder() == tmp_path / "hub"


@pytest.mark.parametrize(("size", "status"), [(64 * 2**20, "note"), (8 * GB, "ok")])
def test_shared_memory(size, status):
    check = shared_memory_check(size)
    assert (check.status, "--shm-size" in check.hint) == (status, status == "note")


@pytest.mark.parametrize(
    ("soft", "hard", "status", "fragment"),
    [
        (256, 4096, "note", "256, can be raised to 4096"),
        (65536, -1, "ok", "65536, can be raised to unlimited"),
        (-1, -1, "ok", "unlimited"),
    ],
)
def test_open_files(soft, hard, status, fragment):
    check = descriptor_check(soft, hard)
    assert check.status == status
    assert fragment in check.detail


@pytest.mark.parametrize(
    ("of_names", "of_output", "status"),
    [
        ("utf-8", "utf-8", "ok"),
        ("utf-8", "UTF8", "ok"),
        ("utf-8", None, "ok"),
        ("ascii", "utf-8", "note"),
        ("utf-8", "latin-1", "note"),
    ],
)
def test_encoding(of_names, of_output, status):
    check = encoding_check(of_names, of_output)
    assert (check.status, "PYTHONUTF8" in check.hint) == (status, status == "note")


def test_compiler(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert compiler_check().status == "note"
    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("CXX", "my-c++")
    assert compiler_check() == ("compiler", "ok", "/bin/my-c++, for --run.compile", "")


def test_launchers_are_named_with_their_settings(monkeypatch, tmp_path):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(launcher_checks({})) == []
    checks = {
        check.name: check.detail
        for check in launcher_checks(
            {
                "WORLD_SIZE": "2",
                "RANK": "1",
                "SLURM_JOB_ID": "7",
                "SLURM_NTASKS": "2",
                "ACCELERATE_MIXED_PRECISION": "bf16",
            }
        )
    }
    assert checks["torchrun"] == "RANK 1, WORLD_SIZE 2"
    assert "ACCELERATE_MIXED_PRECISION bf16" in checks["accelerate launch"]
    assert checks["SLURM"] == "SLURM_JOB_ID 7, SLURM_NTASKS 2"
    assert "accelerate config" not in checks
    (tmp_path / "mine.yaml").touch()
    (check,) = launcher_checks({"ACCELERATE_CONFIG_FILE": str(tmp_path / "mine.yaml")})
    assert check.name == "accelerate config"
