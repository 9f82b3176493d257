"""Free memory of this machine or GPU, and the memory that a network needs per image, measured."""

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deit.core.errors import SystemFault
from deit.core.parent_process import processes_on_host


def free_memory(device: torch.device) -> int:
    """Return the memory [bytes] that this process can still allocate.

    On a GPU its free memory; on the CPU this process's share of the free memory and swap, within
    the limits of its control groups.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([free, *cgroup_headroom()]) // processes_on_host()


_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def cgroup_headroom(
    root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self")
) -> list[int]:
    """Return the memory [bytes] left in each control group of this process that has a limit.

    Containers and cluster jobs have such limits. Empty on systems other than Linux.
    """
    try:
        lines = (process / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []  # not Linux
    headroom = []
    for line in lines:
        controllers, path = line.split(":", 2)[1:]
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", _V1) if controllers else (root, _V2)
        folder = top / path.lstrip("/")
        # In a container the path may be the host's, and the container's group is then the top one.
        groups = [group for group in (folder, *folder.parents) if group.is_relative_to(top)]
        for group in groups:
            headroom += _group_headroom(group, *names)
    return headroom


def _read(file: Path) -> str:
    return file.read_text(encoding="ascii")


def _group_headroom(group: Path, limit_file: str, usage_file: str, cache_key: str) -> list[int]:
    """Return the memory left in a control group [bytes] as a list of one; empty without a limit."""
    try:
        limit, used = _read(group / limit_file).strip(), int(_read(group / usage_file))
        lines = _read(group / "memory.stat").splitlines()
    except (OSError, ValueError):
        return []
    if not limit.isdecimal() or int(limit) >= 2**60:  # "max", or the number that means no limit
        return []
    stat = dict(line.split(" ", 1) for line in lines if " " in line)
    # Cached file content counts as used, but the system drops it when memory runs out.
    return [max(int(limit) - used + int(stat.get(cache_key, 0)), 0)]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations create: currently alive, and the peak.

    known: existing tensors; their storage and views of it are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the tensors that it returns."""
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage._cdata, storage.nbytes()
        if pointer in self._known:
            return
        self._known.add(pointer)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, pointer, size).atexit = False

    def _forget(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.current -= size


def bytes_per_image(
    network: nn.Module,
    forward: Callable[[Tensor], Any],
    side: int,
    device: torch.device,
    *,
    training: bool,
    is_enough: Callable[[float], bool] = lambda estimate: False,
) -> float | None:
    """Return the memory [bytes] that one more image needs; None if it cannot be measured.

    With `training` that is the memory kept for the backward pass, otherwise the peak of the forward
    pass. Memory that kernels use internally is not counted: for a few small images it is about as
    much again. Weights, buffers, modes and random states are restored.

    forward: the forward pass of images, float32 [B, 3, side, side].
    is_enough: called with an upper estimate, measured with one or two images; if it returns true,
    the estimate is returned. Otherwise twice as many images are measured and the difference taken.
    """
    # Only training changes the buffers.
    saved_buffers = [(buffer, buffer.clone()) for buffer in network.buffers()] if training else []
    modes = [(module, module.training) for module in network.modules()]

    def measure(num_images: int) -> int:
        images = torch.zeros(num_images, 3, side, side, device=device)
        known = [images, *network.parameters(), *network.buffers()]
        with torch.set_grad_enabled(training):
            return _allocated_bytes(lambda: forward(images), known, device, peak=not training)

    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            network.train(training)
            try:
                num_images, first = 1, measure(1)
            except ValueError:  # a batch norm that gets one value per channel
                num_images, first = 2, measure(2)
            if is_enough(first / num_images):
                return first / num_images
            return max(measure(2 * num_images) - first, 0) / num_images
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return None  # the first step raises the same error, with its cause
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, saved in saved_buffers:
                buffer.copy_(saved)


def _allocated_bytes(
    run: Callable[[], Any], known: Iterable[Tensor], device: torch.device, *, peak: bool
) -> int:
    """Return the bytes allocated after `run`, while its result is alive, or the peak during it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        measure = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        allocated = measure(device) - before
        del result
        return allocated
    with _LiveBytes(known) as live:
        result = run()
        allocated = live.peak if peak else live.current
    del result
    return allocated


def format_gib(num_bytes: float) -> str:
    """Return bytes in GiB with one decimal."""
    return f"{num_bytes / 2**30:.1f} GiB"


def check_inference_memory(
    network: nn.Module,
    forward: Callable[[Tensor], Any],
    side: int,
    accelerator: Accelerator,
    num_images: int,
) -> None:
    """Check that a network can process a batch of images of `side` px in the free memory.

    forward: as in `bytes_per_image`.
    Raises SystemFault in all processes if the memory of any process is certainly too small.
    """
    device = accelerator.device
    free = free_memory(device)
    per_image = bytes_per_image(
        network,
        forward,
        side,
        device,
        training=False,
        is_enough=lambda estimate: estimate * num_images < free / 2,
    )
    measured = torch.tensor([[float(per_image or 0), float(free)]], device=device)
    gathered = accelerator.gather(measured).tolist()
    per_image, free = max(gathered, key=lambda pair: pair[0] * num_images - pair[1])
    if per_image * num_images <= free:
        return
    fitting = max(int(free / 2 / per_image), 1)
    raise SystemFault(
        f"run.eval_batch_size = {num_images}: a batch of this size at {side} px needs at least "
        f"{format_gib(per_image * num_images)}, and {format_gib(free)} of memory are free; "
        f"--run.eval_batch_size {2 ** (fitting.bit_length() - 1)} fits"
    )
