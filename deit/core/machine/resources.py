"""Cores, disks, shared memory and file descriptors that this process can use."""

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deit.core.filesystem import format_bytes
from deit.core.hardware import cpu_name, num_cores
from deit.core.machine.checks import Check, fault, note, ok, ok_or_note

_DISK_BYTES, _LEAST_DISK_BYTES = 5 * 10**9, 10**8
_FEW_INODES = 10_000
_SHARED_MEMORY = Path("/dev/shm")
_SHARED_MEMORY_BYTES = 10**9
_DESCRIPTORS = 1024


def resource_checks() -> Iterator[Check]:
    """Yield a check for cores, folders, shared memory and file descriptors."""
    yield core_check()
    yield disk_check("disk", Path.cwd(), "give another disk by --out")
    yield disk_check("cache", cache_folder(), "set HF_HOME to a folder on another disk")
    yield temporary_folder_check()
    if _SHARED_MEMORY.is_dir():
        yield shared_memory_check(shutil.disk_usage(_SHARED_MEMORY).total)
    yield descriptor_check(*resource.getrlimit(resource.RLIMIT_NOFILE))


def core_check(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> Check:
    """Check the cores that this process may use. cpu_max: the limit of its control group."""
    cores = num_cores()
    detail = f"{cores} of {cpu_name()}"
    if variables := [f"{n} {os.environ[n]}" for n in _THREAD_VARIABLES if n in os.environ]:
        detail += f"; {', '.join(variables)}"
    quota = cpu_quota(cpu_max)
    if quota is not None and quota < cores:
        whole = max(int(quota), 1)
        return note(
            "cores",
            f"{detail}; a limit of the container allows {quota:g}",
            f"set OMP_NUM_THREADS={whole} and --data.num_workers {whole}: more threads wait",
        )
    return ok("cores", detail)


_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def cpu_quota(file: Path) -> float | None:
    """Return the number of cores that a control group (version 2) allows; None without a limit."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # not Linux, or "max"
        return None


def cache_folder() -> Path:
    """Return the folder of downloaded weights, or its parent that exists."""
    home = os.environ.get("HF_HOME") or Path("~/.cache/huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home).expanduser().absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def disk_check(name: str, folder: Path, hint: str) -> Check:
    """Check free space, free inodes and the permission to write, without writing."""
    try:
        space, inodes = shutil.disk_usage(folder), os.statvfs(folder)
    except OSError as error:
        return fault(name, f"{folder}: {error.strerror}", "change to a folder that exists")
    detail = f"{format_bytes(space.free)} free of {format_bytes(space.total)} at {folder}"
    if space.free < _LEAST_DISK_BYTES:
        return fault(name, detail, f"free some space, or {hint}")
    if not os.access(folder, os.W_OK):
        return note(name, f"{detail}, which cannot be written", hint)
    few_inodes = inodes.f_files > 0 and inodes.f_favail < _FEW_INODES
    if few_inodes:
        return note(name, f"{detail}, {inodes.f_favail} inodes free", f"remove files, or {hint}")
    return ok_or_note(name, detail, hint, limited=space.free < _DISK_BYTES)


def temporary_folder_check() -> Check:
    """Check that temporary files can be written."""
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        return fault("temporary files", str(error), "set TMPDIR to a folder that can be written")
    return disk_check("temporary files", folder, "set TMPDIR to a folder on another disk")


def shared_memory_check(size: int) -> Check:
    """Check the size [bytes] of shared memory, in which worker processes pass their batches."""
    return ok_or_note(
        "shared memory",
        f"{format_bytes(size)} at {_SHARED_MEMORY}",
        "docker run --shm-size 8g; with less, large batches of workers are passed in files",
        limited=size < _SHARED_MEMORY_BYTES,
    )


def descriptor_check(soft: int, hard: int) -> Check:
    """Check the limit of open files. hard: what it can be raised to, -1 without a limit."""
    unlimited = soft == resource.RLIM_INFINITY
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    return ok_or_note(
        "open files",
        f"at most {'unlimited' if unlimited else soft}, can be raised to {most}",
        "ulimit -n 4096, if many worker processes read images",
        limited=not unlimited and soft < _DESCRIPTORS,
    )
