"""Memory: what is free on this machine, and what a network takes for each image, measured."""

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
    """Memory [bytes] that this process may still take: of a GPU, what is free there; else its share
    of what the machine has free, swap too, and of what its control groups allow."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([free, *allowed()]) // processes_on_host()


_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def allowed(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self")) -> list[int]:
    """What each control group with a limit leaves to this process [bytes]: containers and jobs of
    a cluster have them."""
    try:
        lines = (process / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []  # no Linux
    found = []
    for line in lines:
        kinds, place = line.split(":", 2)[1:]
        if kinds and "memory" not in kinds.split(","):
            continue
        top, names = (root / "memory", _V1) if kinds else (root, _V2)
        folder = top / place.lstrip("/")
        # In a container the path may be the host's, and its own group lies at the top.
        groups = [one for one in (folder, *folder.parents) if one.is_relative_to(top)]
        for group in groups:
            found += _left(group, *names)
    return found


def _read(file: Path) -> str:
    return file.read_text(encoding="ascii")


def _left(group: Path, limit: str, usage: str, files: str) -> list[int]:
    """What a control group leaves [bytes], as a list of one; none without a limit."""
    try:
        most, used = _read(group / limit).strip(), int(_read(group / usage))
        lines = _read(group / "memory.stat").splitlines()
    except (OSError, ValueError):
        return []
    if not most.isdecimal() or int(most) >= 2**60:  # "max", or what stands for no limit
        return []
    stat = dict(line.split(" ", 1) for line in lines if " " in line)
    # The content of files that the system may drop counts as used there.
    return [max(int(most) - used + int(stat.get(files, 0)), 0)]


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that operations make and that are still held: now, and at most.

    known: tensors that are there already, whose views cost nothing.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {one.untyped_storage()._cdata for one in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it returns."""
        answer = func(*args, **(kwargs or {}))
        for one in tree_leaves(answer):
            if isinstance(one, Tensor) and one.layout == torch.strided:
                self._count(one.untyped_storage())
        return answer

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, place, size).atexit = False

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def bytes_per_image(
    network: nn.Module,
    answer: Callable[[Tensor], Any],
    side: int,
    device: torch.device,
    *,
    learns: bool,
    enough: Callable[[float], bool] = lambda rough: False,
) -> float | None:
    """Memory [bytes] that one more image takes: where the network `learns`, what the backward pass
    will need of it; else the most that its answer needs at once. None where that cannot be
    measured. Weights, statistics and torch's generators are left as they are.

    answer: the forward pass of images, float32 [number, 3, side, side]. enough: whether a number
    that is rather too high is all that is asked for: one or two images are measured then, else
    twice as many as well.

    What operations need within themselves is not seen: with few small images that is as much again.
    """
    # In evaluation nothing moves them.
    kept = [(one, one.clone()) for one in network.buffers()] if learns else []
    modes = [(module, module.training) for module in network.modules()]

    def measured(number: int) -> int:
        images = torch.zeros(number, 3, side, side, device=device)
        known = [images, *network.parameters(), *network.buffers()]
        with torch.set_grad_enabled(learns):
            return _held(lambda: answer(images), known, device, most=not learns)

    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            network.train(learns)
            try:
                few, first = 1, measured(1)
            except ValueError:  # a batch norm, of a single number
                few, first = 2, measured(2)
            if enough(first / few):
                return first / few
            return max(measured(2 * few) - first, 0) / few
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return None  # whatever it is, the first update says it
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for one, before in kept:
                one.copy_(before)


def _held(
    run: Callable[[], Any], known: Iterable[Tensor], device: torch.device, *, most: bool
) -> int:
    """Bytes that are held when `run` is done and its value is kept, or the most on the way."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        outcome = run()
        asked = torch.cuda.max_memory_allocated if most else torch.cuda.memory_allocated
        held = asked(device) - before
        del outcome
        return held
    with _Live(known) as live:
        outcome = run()
        held = live.most if most else live.now
    del outcome
    return held


def gib(number: float) -> str:
    """Bytes in words."""
    return f"{number / 2**30:.1f} GiB"


def check_answers(
    network: nn.Module,
    answer: Callable[[Tensor], Any],
    side: int,
    accelerator: Accelerator,
    images: int,
) -> None:
    """Refuse to have a network answer so many images of `side` px at once where the memory that is
    free is certainly too little in one of the processes. answer: as in `bytes_per_image`. Raises
    SystemFault, in all processes or in none."""
    device = accelerator.device
    free = free_memory(device)
    each = bytes_per_image(
        network, answer, side, device, learns=False, enough=lambda rough: rough * images < free / 2
    )
    found = torch.tensor([[float(each or 0), float(free)]], device=device)
    each, free = max(accelerator.gather(found).tolist(), key=lambda one: one[0] * images - one[1])
    if each * images <= free:
        return
    fitting = max(int(free / 2 / each), 1)
    raise SystemFault(
        f"run.eval_batch_size = {images}: so many images of {side} px at once need at least "
        f"{gib(each * images)}, and {gib(free)} of memory are free; --run.eval_batch_size "
        f"{2 ** (fitting.bit_length() - 1)} fits"
    )
