"""The facts of the machine a run happens on: devices, precision, versions, commit."""

import functools
import gc
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
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
    """fp32, bf16 or fp16: the configured one, or what the launcher asked for.

    Raises SystemFault where the device cannot compute in it.
    """
    if precision == "auto":
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        names = {theirs: ours for ours, theirs in _ACCELERATE_NAMES.items()}
        if asked not in names:
            raise SystemFault(f"--mixed_precision {asked}: not supported; use no, bf16, fp16")
        precision = names[asked]
    if precision == "fp16" and device_type == "cpu":
        raise SystemFault("run.precision = 'fp16': a CPU cannot; use fp32")
    if precision == "bf16" and device_type == "cuda" and not torch.cuda.is_bf16_supported():
        raise SystemFault("run.precision = 'bf16': this GPU cannot; use fp16 or fp32")
    return precision


def resolve_device(device: str) -> str:
    """`cuda` or `cpu`. Raises SystemFault if cuda is asked for and not there."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise SystemFault("run.device = 'cuda': no CUDA device here; use --run.device cpu")
    if device == "auto":
        return "cuda" if available else "cpu"
    return device


_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def _check_launcher() -> None:
    """Refuse what would train something else than it says. Raises SystemFault."""
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise SystemFault(
                f"the launcher asks for {name} ({variable}); a student is divided among processes "
                "by --run.sharding fsdp (what FSDP2 and ZeRO's stage 3 do; docs/scaling.md) under "
                "a "
                "launcher of distributed_type MULTI_GPU, or torchrun"
            )
    variable = "ACCELERATE_DYNAMO_BACKEND"
    asked = os.environ.get(variable, "no")
    if asked.lower() != "no":
        raise SystemFault(
            f"the launcher asks for torch.compile ({variable} {asked}); launch without, and give "
            "--run.compile default"
        )


def create_accelerator(
    *,
    device: str = "auto",
    precision: str = "auto",
    grad_accum_steps: int = 1,
    sharding: str = "none",
    gradient_compression: str = "none",
    timeout_s: float = 300.0,
) -> Accelerator:
    """Return Accelerate's object for a device, precision and accumulation.

    The arguments are the fields of `RunConfig` of the same names, and optim.grad_accum_steps.
    Raises SystemFault where the machine cannot do what is asked.
    """
    _check_launcher()
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    if precision == "fp16" and sharding != "none":
        raise SystemFault("run.sharding: not with fp16, which the launcher asks for; use bf16")
    if device == "cpu":
        raise_malloc_threshold()
    name = _ACCELERATE_NAMES[precision]
    # One process may evaluate runs of several precisions; Accelerate knows one until it is told.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != name:
        AcceleratorState._reset_state()
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=name,
        # As a plugin: the plain argument is overruled by an environment variable of the launcher.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=grad_accum_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
            _gradient_exchange(gradient_compression),
        ],
    )


def _gradient_exchange(compression: str) -> DistributedDataParallelKwargs:
    """In pieces of 4 MiB, so that the exchange begins while gradients are still computed: the 21 MB
    of a DeiT-Ti would be one piece by default. And without a copy: gradients lie in the pieces."""
    hooks = {"none": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}
    return DistributedDataParallelKwargs(
        bucket_cap_mb=4, gradient_as_bucket_view=True, comm_hook=hooks[compression]
    )


def in_main_process(accelerator: Accelerator, work: Callable[[], int], what: object) -> int:
    """Call a function in the main process alone; return its result, a whole number from 0 on, in
    all processes.

    what: is read or tried, for the message. Raises the function's DeitError in the main process, an
    OSError as SystemFault, and an error of the same exit code in the other processes.
    """
    number, trouble = 0, None
    if accelerator.is_main_process:
        try:
            number = work()
        except DeitError as error:
            trouble = error
        except OSError as error:
            trouble = SystemFault(f"{error.filename or what}: {error.strerror}")
        if trouble is not None:
            number = -trouble.exit_code
    shared = torch.tensor(number, device=accelerator.device)
    number = int(accelerator.reduce(shared, reduction="sum"))
    if trouble is not None:
        raise trouble
    if number < 0:
        kinds = {kind.exit_code: kind for kind in (ConfigError, DataError, CheckpointError)}
        raise kinds.get(-number, SystemFault)(f"{what}: see process 0")
    return number


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether the flag is true in any process. Every process has to call it."""
    flags = torch.tensor(float(flag), device=accelerator.device)
    return accelerator.reduce(flags, reduction="sum").item() > 0


def compile_module(network: nn.Module, mode: str) -> None:
    """Let torch compile a network's forward and backward pass at its first call, in a mode of
    run.compile. In its place: names, weights and copies of it stay as they are."""
    network.compile(mode=None if mode == "default" else mode)


def uses_cuda_graphs(compile_mode: str) -> bool:
    """Return whether networks compiled in a mode are recorded as CUDA graphs, whose outputs are
    overwritten by the next call."""
    return compile_mode in ("reduce-overhead", "max-autotune")


def raise_malloc_threshold() -> None:
    """Let glibc keep blocks of up to 31 MiB for the next tensor.

    It hands larger blocks than any freed so far back to the system, and takes pages anew, zeroed,
    for every tensor: that made crops four times and a small training step a quarter slower. Having
    freed one such block it keeps them (mallopt(3), M_MMAP_THRESHOLD); elsewhere this does nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def destroy_process_group() -> None:
    """Join the threads of the process group while the interpreter still stands.

    Left to the end of the process, a thread of Gloo that holds a Python object may ask for the
    interpreter after it is gone, and the process of a finished run then ends by SIGABRT. They live
    as long as any network wrapped for several processes does: the caller keeps none.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # a wrapped network may be in a cycle of references
        torch.distributed.destroy_process_group()


def is_peer_failure(error: Exception) -> bool:
    """Whether processes could not talk: one is gone, or did not answer in time.

    Gloo says so by a plain RuntimeError, in words of its own.
    """
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory so far [MB]: on a GPU what torch held there at once, else what this process
    held of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, else kilobytes


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
            "torch": str(torch.__version__),  # tells the CUDA build apart, its metadata does not
        },
        "device": device.type,
        "device_name": _name_of(device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": {v: k for k, v in _ACCELERATE_NAMES.items()}[accelerator.mixed_precision],
    }


def hardware_summary(device: torch.device) -> str:
    """What a speed or a peak of memory that is measured here and now depends on, in a line."""
    threads = torch.get_num_threads()
    by = "" if device.type == "cuda" else f", {count_noun(threads, 'thread')}"
    return f"{_name_of(device)}{by}, torch {torch.__version__}"


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@functools.cache
def git_commit() -> str | None:
    """The commit of this checkout, with `-dirty` if it has changes; None outside a checkout. Asked
    once: what is loaded stays what it was."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
