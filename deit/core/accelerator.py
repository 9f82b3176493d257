"""Accelerate for a run: device, precision, processes; versions, commit and peak memory."""

import functools
import gc
import os
import platform
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import nn

import deit
from deit.core.console import count_noun
from deit.core.errors import CheckpointError, ConfigError, DataError, DeitError, SystemFault
from deit.core.hardware import cpu_name

_PACKAGES = ("torchvision", "timm", "accelerate", "safetensors", "numpy", "pillow")
_ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def resolve_precision(precision: str, device_type: str) -> str:
    """Return fp32, bf16 or fp16; for auto the precision that the launcher sets, else fp32.

    Raises SystemFault if the device does not support it.
    """
    if precision == "auto":
        accelerate_name = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        names = {value: key for key, value in _ACCELERATE_NAMES.items()}
        if accelerate_name not in names:
            raise SystemFault(
                f"--mixed_precision {accelerate_name}: not supported; use no, bf16, fp16"
            )
        precision = names[accelerate_name]
    if precision == "fp16" and device_type == "cpu":
        raise SystemFault("run.precision = 'fp16': not supported on a CPU; use fp32")
    if precision == "bf16" and device_type == "cuda" and not torch.cuda.is_bf16_supported():
        raise SystemFault("run.precision = 'bf16': not supported by this GPU; use fp16 or fp32")
    return precision


def resolve_device(device: str) -> str:
    """Return `cuda` or `cpu`. Raises SystemFault if `cuda` is given and not available."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise SystemFault("run.device = 'cuda': no CUDA device found; use --run.device cpu")
    if device == "auto":
        return "cuda" if available else "cpu"
    return device


_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def _check_launcher() -> None:
    """Raise SystemFault for launcher settings that would have no effect or a wrong one."""
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise SystemFault(
                f"the launcher sets {name} ({variable}), which is not supported; to shard the "
                "student, use --run.sharding fsdp (FSDP2, like ZeRO stage 3; "
                "docs/guides/scaling.md) with distributed_type MULTI_GPU, or with torchrun"
            )
    variable = "ACCELERATE_DYNAMO_BACKEND"
    backend = os.environ.get(variable, "no")
    if backend.lower() != "no":
        raise SystemFault(
            f"the launcher sets torch.compile ({variable} {backend}), which is not supported; "
            "launch without it, and use --run.compile default"
        )


_SHARED_BY_ACCELERATE = (AcceleratorState, GradientState)
_nesting_lock, _nesting, _of_caller = threading.Lock(), 0, []


@contextmanager
def own_accelerate_state() -> Iterator[None]:
    """Keep the settings of this block's Accelerators separate from those of the caller's.

    Precision and gradient accumulation are the same for all Accelerators of a process: without this
    block, a run in fp32 would switch off the mixed precision of the loop that calls it. Nested
    blocks have one state. It is also a decorator.
    """
    global _nesting
    with _nesting_lock:
        if _nesting == 0:
            _of_caller[:] = (vars(state)["_shared_state"] for state in _SHARED_BY_ACCELERATE)
            for state in _SHARED_BY_ACCELERATE:
                state._shared_state = {}
        _nesting += 1
    try:
        yield
    finally:
        with _nesting_lock:
            _nesting -= 1
            if _nesting == 0:
                for state, shared in zip(_SHARED_BY_ACCELERATE, _of_caller, strict=True):
                    state._shared_state = shared
                _of_caller.clear()


def create_accelerator(
    *,
    device: str = "auto",
    precision: str = "auto",
    grad_accum_steps: int = 1,
    sharding: str = "none",
    gradient_compression: str = "none",
    timeout_s: float = 300.0,
) -> Accelerator:
    """Create Accelerate's object for a run.

    The arguments are the fields of `RunConfig` with the same names, and optim.grad_accum_steps.
    Raises SystemFault if the machine or the launcher does not support them.
    """
    _check_launcher()
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    if precision == "fp16" and sharding != "none":
        raise SystemFault("run.sharding: not with fp16, which the launcher sets; use bf16")
    if device == "cpu":
        raise_malloc_threshold()
    name = _ACCELERATE_NAMES[precision]
    # A process may evaluate runs of different precisions; Accelerate keeps the first until reset.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != name:
        AcceleratorState._reset_state()
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=name,
        # As a plugin: an environment variable of the launcher overrides the plain argument.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=grad_accum_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
            _ddp_kwargs(gradient_compression),
        ],
    )


def _ddp_kwargs(compression: str) -> DistributedDataParallelKwargs:
    hooks = {"none": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}
    # Buckets of 4 MiB, so that all-reduce starts during the backward pass: by default the 21 MB of
    # a DeiT-Ti are one bucket. Gradients are views of the buckets, which saves a copy.
    return DistributedDataParallelKwargs(
        bucket_cap_mb=4, gradient_as_bucket_view=True, comm_hook=hooks[compression]
    )


def in_main_process(accelerator: Accelerator, work: Callable[[], int], subject: object) -> int:
    """Call a function in the main process only; return its result, an integer >= 0, in all.

    Every process must call it. subject: what is read or tried, for the message.
    Raises the function's DeitError in the main process (an OSError as SystemFault), and an error
    with the same exit code in the other processes.
    """
    result, failure = 0, None
    if accelerator.is_main_process:
        try:
            result = work()
        except DeitError as error:
            failure = error
        except OSError as error:
            failure = SystemFault(f"{error.filename or subject}: {error.strerror}")
        if failure is not None:
            result = -failure.exit_code
    shared = torch.tensor(result, device=accelerator.device)
    result = int(accelerator.reduce(shared, reduction="sum"))
    if failure is not None:
        raise failure
    if result < 0:
        kinds = {kind.exit_code: kind for kind in (ConfigError, DataError, CheckpointError)}
        raise kinds.get(-result, SystemFault)(f"{subject}: see process 0")
    return result


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether the flag is true in any process. Every process must call it."""
    flags = torch.tensor(float(flag), device=accelerator.device)
    return accelerator.reduce(flags, reduction="sum").item() > 0


def compile_module(network: nn.Module, mode: str) -> None:
    """Compile a network in place, in a mode of run.compile; torch does it at the first call.

    Parameter names and weights stay as they are.
    """
    network.compile(mode=None if mode == "default" else mode)


def uses_cuda_graphs(compile_mode: str) -> bool:
    """Return whether a mode of run.compile records CUDA graphs, whose next call overwrites the
    outputs of the last."""
    return compile_mode in ("reduce-overhead", "max-autotune")


def raise_malloc_threshold() -> None:
    """Make glibc reuse freed blocks of up to 31 MiB; no effect with other C libraries.

    glibc returns blocks to the system that are larger than any freed before, and gets zeroed pages
    again for the next tensor. That made crops four times slower and a small training step 25 %
    slower. Freeing one block of this size raises the threshold (mallopt(3), M_MMAP_THRESHOLD).
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def destroy_process_group() -> None:
    """Destroy the process group before the interpreter shuts down.

    Otherwise a thread of Gloo that holds a Python object may need the interpreter after its end,
    and the process of a finished run is killed by SIGABRT. The threads live as long as any network
    wrapped in DDP, so the caller must not keep one.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # a wrapped network may be in a cycle of references
        torch.distributed.destroy_process_group()


def is_peer_failure(error: Exception) -> bool:
    """Return whether an error means that another process has exited or timed out.

    Gloo raises a plain RuntimeError for it, so the message decides.
    """
    if isinstance(error, torch.distributed.DistError):
        return True
    phrases = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory [MiB] so far: allocated by torch on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS: bytes, Linux: KiB


def environment_info(accelerator: Accelerator, command: str = "") -> dict[str, Any]:
    """Return versions, commit, device and command; no environment variables, no user names."""
    device = accelerator.device
    return {
        "command": command,
        "deit": deit.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            **{package: metadata.version(package) for package in _PACKAGES},
            "torch": str(torch.__version__),  # with the CUDA build, which the metadata lacks
        },
        "device": device.type,
        "device_name": _device_name(device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": {v: k for k, v in _ACCELERATE_NAMES.items()}[accelerator.mixed_precision],
    }


def hardware_summary(device: torch.device) -> str:
    """Return device, threads and torch version in a line, to go with measured speeds."""
    num_threads = torch.get_num_threads()
    threads = "" if device.type == "cuda" else f", {count_noun(num_threads, 'thread')}"
    return f"{_device_name(device)}{threads}, torch {torch.__version__}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@functools.cache
def git_commit() -> str | None:
    """Return the commit of this checkout, with `-dirty` if it has changes; None outside a checkout.

    Cached: the loaded code does not change when the checkout does.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
