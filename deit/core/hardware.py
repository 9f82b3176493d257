"""The processor of this machine: its name, and what it can do in 8 bits."""

import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_EXACT = ("avx512_vnni", "avx_vnni", "amx_int8")
_SHOWN = ("avx2", "avx512f", *_EXACT, "asimddp", "i8mm", "sve")


def processor() -> str:
    """Its name and the number of its cores, for a person."""
    told = _from_cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{told}, {os.cpu_count()} cores"


def cpu_vendor() -> str:
    """The processor's maker as x86 names it (GenuineIntel, AuthenticAMD); empty where the system
    does not tell."""
    if vendor := _from_cpuinfo("vendor_id"):
        return vendor
    return platform.processor().rpartition(", ")[2]  # Windows: `AMD64 Family 25 ..., AuthenticAMD`


def cores() -> int:
    """Those this process may run on: in a container or a job often a few of many."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def int8_flags() -> tuple[str, ...]:
    """Those of its extensions that decide how products of 8-bit integers are computed; none where
    the system does not tell."""
    told = (_from_cpuinfo("flags") or _from_cpuinfo("Features")).split()
    return tuple(flag for flag in _SHOWN if flag in told)


def saturates(flags: tuple[str, ...], machine: str | None = None) -> bool:
    """Whether sums of products of 8-bit integers may be cut off: on x86 without VNNI or AMX, where
    two products of unsigned by signed bytes are added in 16 bits (Intel's VPMADDUBSW). Weights of 7
    bits cannot reach that. machine: as platform.machine says it; None: this one."""
    x86 = (machine or platform.machine()).lower() in ("x86_64", "amd64", "i386", "i686")
    return x86 and not any(flag in flags for flag in _EXACT)


def _from_cpuinfo(key: str) -> str:
    """What Linux says of the first core, empty where it says nothing."""
    if not _CPUINFO.is_file():
        return ""
    for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
        if line.split(":")[0].strip() == key:
            return line.split(":", 1)[1].strip()
    return ""


@contextmanager
def threads(number: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that is waited for at its end, but not where an error or a signal ends it:
    what has not begun by then is dropped. number: of threads; None: as Python chooses."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
