"""The CPU of this machine: its name, cores and 8-bit instructions; a thread pool."""

import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_INT32_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8")
"""x86 extensions that sum products of 8-bit integers in 32 bits."""
_INT8_FLAGS = ("avx2", "avx512f", *_INT32_SUMS, "asimddp", "i8mm", "sve")


def cpu_name() -> str:
    """Return the name of the CPU and the number of its cores, for logs."""
    name = _from_cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def cpu_vendor() -> str:
    """Return the x86 vendor string (GenuineIntel, AuthenticAMD); empty if it is unknown."""
    if vendor := _from_cpuinfo("vendor_id"):
        return vendor
    return platform.processor().rpartition(", ")[2]  # Windows: `AMD64 Family 25 ..., AuthenticAMD`


def num_cores() -> int:
    """Return the number of cores that this process may use.

    In a container or a cluster job these are often fewer than the machine has.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def int8_flags() -> tuple[str, ...]:
    """Return the CPU's instruction-set extensions that affect 8-bit arithmetic; empty if unknown.

    ONNX Runtime chooses its int8 kernels by them.
    """
    flags = (_from_cpuinfo("flags") or _from_cpuinfo("Features")).split()
    return tuple(flag for flag in _INT8_FLAGS if flag in flags)


def int8_sums_saturate(flags: tuple[str, ...], machine: str | None = None) -> bool:
    """Return whether sums of 8-bit products can saturate on a CPU with these flags.

    That is so on x86 without VNNI or AMX: VPMADDUBSW adds two products of an unsigned and a signed
    byte in 16 bits. Weights of 7 bits cannot saturate it.

    machine: as `platform.machine()` returns it. Default: this machine.
    """
    x86 = (machine or platform.machine()).lower() in ("x86_64", "amd64", "i386", "i686")
    return x86 and not any(flag in flags for flag in _INT32_SUMS)


def _from_cpuinfo(key: str) -> str:
    """Return a field of the first core in Linux's /proc/cpuinfo; empty if there is none."""
    if not _CPUINFO.is_file():
        return ""
    for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
        if line.split(":")[0].strip() == key:
            return line.split(":", 1)[1].strip()
    return ""


@contextmanager
def thread_pool(num_threads: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool. Wait for its tasks at the end, but not after an error or a signal: then
    tasks that have not started are canceled.

    num_threads: Python's default if None.
    """
    pool = ThreadPoolExecutor(num_threads)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
