"""What goes wrong in the middle of a run: counted, named, and said so that a person can act."""

import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deit import journal
from deit.config import mixes
from deit.console import say, warn
from deit.engine import Update
from deit.environment import lost_peer, records_graphs
from deit.errors import (
    DeitError,
    EnvironmentFault,
    NumericsError,
    PeerError,
    Stopped,
    WorkerLost,
    compiler_failure,
    out_of_memory,
)
from deit.faults import reach
from deit.memory import bytes_per_image, check_answers, free_memory, gib
from deit.models.teachers import Teacher
from deit.parts import Parts
from deit.records import Batch, Outputs
from deit.sharding import is_divided

_BEHIND = 4  # updates


class NumberWatch:
    """Counts updates that were left out, because loss or gradient was not finite.

    Told of each update, it looks at the one some updates before: a device that works behind the
    loop is not waited for. Which one does not depend on how fast it is, so all processes come to
    the same end at the same update.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.behind = 0 if parts.accelerator.device.type == "cpu" else _BEHIND
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None, Update]] = deque()

    def __call__(self, step: int, update: Update) -> None:
        """Take the update of a step up. Raises NumericsError as `_count` does."""
        told, event = update.applied, None
        if told.device.type == "cuda":
            told = torch.empty((), dtype=torch.bool, pin_memory=True)
            told.copy_(update.applied, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, told, event, update))
        self.settle(self.behind)

    def settle(self, behind: int = 0) -> None:
        """Look at all updates but the latest so many. Raises NumericsError as `_count` does."""
        while len(self._waiting) > behind:
            step, told, event, update = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            _count(self.parts, step, None if told else update)


def _count(parts: Parts, step: int, left_out: Update | None) -> None:
    """Count an update that was left out, and note its images; None: one that was not.

    Raises NumericsError where there are too many in a row, or fp16 has no scale left. The same in
    all processes, but for the images: each notes its own.
    """
    state = parts.state
    if left_out is None:
        state.skipped_in_a_row = 0
        return
    state.skipped += 1
    state.skipped_in_a_row += 1
    scaler = parts.accelerator.scaler
    if scaler is not None and scaler.get_scale() < 1:
        raise NumericsError(
            f"update {step}: gradients overflow fp16 at any scale; use --run.precision bf16 "
            "or fp32, or a lower optim.lr"
        )
    fp16_searches = scaler is not None and state.skipped_in_a_row < parts.config.run.max_skipped
    if fp16_searches:
        return  # the first scales are meant to be too large
    images = left_out.suspects().tolist()
    row = {
        "step": step,
        "process": parts.accelerator.process_index,
        "images": images,
        "names": [parts.splits.train.name(index) for index in images],
    }
    if parts.out.is_dir():
        journal.append(parts.out / journal.ANOMALIES, row)
    named = ", ".join(row["names"][:5]) + (f" and {len(images) - 5} more" if images[5:] else "")
    if state.skipped_in_a_row >= parts.config.run.max_skipped:
        raise NumericsError(
            f"update {step}: loss or gradient is not finite, number {state.skipped_in_a_row} "
            f"in a row from update {step - state.skipped_in_a_row + 1} on; its images: "
            f"{named} (all: {parts.out / journal.ANOMALIES}). The checkpoints in {parts.out} are "
            f"of before; a lower optim.lr{_clipped(parts)} usually helps, in a run from the start "
            "or from a checkpoint (deit finetune --from), with another --out"
        )
    warn(
        f"update {step}: loss or gradient is not finite, so it is left out "
        f"({state.skipped_in_a_row} of at most {parts.config.run.max_skipped} in a row); its "
        f"images: {named}"
    )


def _clipped(parts: Parts) -> str:
    norm = parts.config.optim.clip_norm
    return "" if norm is not None and norm <= 1 else " or optim.clip_norm 1"


@contextmanager
def understood(parts: Parts, asked: Callable[[], int]) -> Iterator[None]:
    """Turn what stops a run in its middle into an error of deit.errors that says what is kept and
    what to do.

    asked: the signal that this process was asked to stop by, 0 for none. What goes wrong after it
    is no other mishap: the other processes were asked as well, and may have ended first.
    """
    try:
        yield
    except Stopped as stop:
        raise Stopped(stop.number, f"{stop}; {_kept(parts)}") from None
    except WorkerLost as error:
        raise EnvironmentFault(f"{error}; {_kept(parts)}") from None
    except DeitError:
        raise
    except Exception as error:
        if out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
            raise _memory_fault(parts) from None
        if parts.accelerator.num_processes > 1 and lost_peer(error):
            if number := asked():
                stop = Stopped(number)
                raise Stopped(number, f"{stop}; {_kept(parts)}") from None
            raise PeerError(
                f"another process of the run is gone, or did not answer within "
                f"{parts.config.run.timeout:g} s; {_kept(parts)}"
            ) from None
        if (failure := compiler_failure(error)) is not None:
            raise EnvironmentFault(f"{failure}; without --run.compile {_kept(parts)}") from error
        raise


def _kept(parts: Parts) -> str:
    return f"the same command with --resume goes on with {parts.out}"


def _memory_fault(parts: Parts) -> EnvironmentFault:
    optim, block = parts.config.optim, parts.loader.block
    student = parts.accelerator.unwrap_model(parts.student)
    tried = [] if is_divided(student) else _smaller(parts)  # which computes with all processes
    fitting = next((number for number in tried if _learns(parts, number)), None)
    told = f"out of memory with {block} images at once"
    if fitting is None and is_divided(student):
        cut = [_accumulating(parts, number) for number in _smaller(parts)[:1]]
        return EnvironmentFault(
            f"{told}, which is not tried smaller in a student that is divided (run.shard): try "
            f"{_either(cut + _less_memory(parts))}; {_kept(parts)}"
        )
    if fitting is None:
        too = f", and with {tried[-1]}" if tried else ""
        return EnvironmentFault(f"{told}{too}: try {_either(_less_memory(parts))}; {_kept(parts)}")
    return EnvironmentFault(
        f"{told}; {fitting} fit (without a teacher beside them): {_accumulating(parts, fitting)} "
        f"makes micro-batches of that size and keeps the batch of {optim.batch_size}; "
        f"{_kept(parts)}"
    )


def _accumulating(parts: Parts, number: int) -> str:
    """The options by which a micro-batch has this number of images."""
    words = f"--optim.accumulate {parts.config.optim.accumulate * parts.loader.block // number}"
    graphs = records_graphs(parts.config.run)
    return f"{words} --run.compile default" if graphs else words  # which take one micro-batch alone


def _less_memory(parts: Parts) -> list[str]:
    """What would need less memory for the same micro-batch, and is not done yet."""
    network = parts.accelerator.unwrap_model(parts.student).network
    found = ["--run.recompute"] if not parts.config.run.recompute and recomputes(network) else []
    return [*found, "a smaller student" + " or teacher" * (parts.panel is not None)]


def _either(ways: list[str]) -> str:
    return ", or ".join(ways)


def recomputes(network: nn.Module) -> bool:
    """Have a network compute its blocks again in the backward pass; whether it has such blocks."""
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):  # timm's way to say that it cannot
        return False
    return True


def _smaller(parts: Parts) -> list[int]:
    """Sizes into which a micro-batch can be cut (for mixing: even ones), each at most half of the
    one before."""
    block, even = parts.loader.block, 2 if mixes(parts.config.views) else 1
    found = [block]
    for number in range(block // 2, 0, -1):
        if block % number == 0 and number % even == 0 and number <= found[-1] // 2:
            found.append(number)
    return found[1:]


def _learns(parts: Parts, number: int) -> bool:
    """Whether the student can learn from so many images at once, by trying: without teachers, and
    without the other processes."""
    student = parts.accelerator.unwrap_model(parts.student)
    side, device = parts.config.student.image_size, parts.accelerator.device
    shape = (number, 3, side, side)
    return _tried(parts, lambda: student(torch.zeros(shape, device=device)))


def check_memory(parts: Parts, teachers: list[Teacher]) -> None:
    """Refuse a run whose updates or evaluations certainly need more memory than is free, before
    the first of them; where run.fit_memory is on, cut micro-batches that may fit.

    teachers: those that answer in training. Raises EnvironmentFault, in all processes or in none.
    """
    config, accelerator, loader = parts.config, parts.accelerator, parts.loader
    student, device = accelerator.unwrap_model(parts.student), accelerator.device
    if is_divided(student):
        return  # which answers with all processes, or not at all
    free, block, side = free_memory(device), loader.block, config.student.image_size
    kept = _kept_bytes(student, config.optim.algorithm)

    def enough(rough: float) -> bool:
        return kept + rough * max(block, config.run.evaluation_batch) < free / 2

    def ask(images: Tensor) -> Outputs:
        with accelerator.autocast():
            return student.forward(images)  # not what compiles it for these few images

    each = bytes_per_image(student, ask, side, device, learns=True, enough=enough)
    shown = loader.sizes.teacher
    for teacher in teachers:
        with accelerator.autocast():
            check_answers(teacher, teacher.forward, shown, accelerator, config.run.evaluation_batch)
            more = bytes_per_image(
                teacher, teacher.forward, shown, device, learns=False, enough=enough
            )
        each = None if each is None or more is None else each + more
    fitting = block
    if each is not None:
        each += _BYTES_OF_PIXELS * (side**2 + (shown**2 if teachers else 0))
        sizes = [block, *_smaller(parts)]
        fits = (one for one in sizes if kept + _SPARE * each * one <= free)
        fitting = block if kept + each * block <= free else next(fits, 0)
    needed = kept + (each or 0) * block
    own = torch.tensor([[float(fitting), needed, float(free)]], device=device)
    smallest, needed, free = min(accelerator.gather(own).tolist())  # of all processes
    if smallest < block:
        _cut_or_refuse(parts, int(smallest), needed, free)


_BYTES_OF_PIXELS = 3 * 4  # of an image as the networks get it
_SPARE = 1.5  # times what is measured, at most, an update took of the machine's memory


def _kept_bytes(student: nn.Module, algorithm: str) -> int:
    """Bytes of gradients and of the optimizer's state, which is not there before the first
    update."""
    trained = [one for one in student.parameters() if one.requires_grad]
    copies = 3 if algorithm == "adamw" else 2
    return copies * sum(one.numel() * one.element_size() for one in trained)


def _cut_or_refuse(parts: Parts, fitting: int, needed: float, free: float) -> None:
    """Cut micro-batches to `fitting` images, 0 for none, where run.fit_memory is on. Raises
    EnvironmentFault where it is off, or none fits."""
    optim, block = parts.config.optim, parts.loader.block
    found = (
        f"an update needs at least {gib(needed)} with {block} images at once, and {gib(free)} of "
        "memory are free"
    )
    if fitting == 0:
        raise EnvironmentFault(
            f"{found}, which is too little for any number of images: --run.recompute keeps less "
            "of each; else a smaller image, student or teacher is left"
        )
    accumulate = optim.accumulate * block // fitting
    if not parts.config.run.fit_memory:
        raise EnvironmentFault(
            f"{found}: --optim.accumulate {accumulate} makes micro-batches of {fitting} and keeps "
            f"the batch of {optim.batch_size}; --run.fit_memory finds such a number itself, "
            "--run.recompute keeps less of each image"
        )
    say(f"memory    {found}")
    _cut(parts, accumulate)


def _cut(parts: Parts, accumulate: int) -> None:
    """Cut the same batches into other micro-batches."""
    before, loader = parts.loader.block, parts.loader
    parts.config = parts.config.replace(optim={"accumulate": accumulate})
    parts.accelerator.gradient_accumulation_steps = accumulate
    loader.cut(parts.config.optim)
    say(
        f"memory    too little for {before} images at once; optim.accumulate "
        f"{accumulate}: {loader.block} images, the batch stays"
    )


def fit_memory(parts: Parts) -> None:
    """Cut micro-batches, to half where that is whole, until all processes can take one with their
    teachers; the batch stays.

    Changes the configuration's optim.accumulate. Raises EnvironmentFault where none fits.
    """
    student, loader = parts.accelerator.unwrap_model(parts.student), parts.loader
    while True:
        batch = next(loader.epoch(0))

        def answer(batch: Batch = batch) -> Outputs:
            reach("fit")
            if parts.panel is not None:
                parts.panel(batch)
            return student(batch.images)

        failed = torch.tensor(float(not _tried(parts, answer)), device=parts.accelerator.device)
        if parts.accelerator.reduce(failed, reduction="sum").item() == 0:
            return
        before, smaller = loader.block, _smaller(parts)
        if not smaller:
            raise EnvironmentFault(
                f"run.fit_memory: out of memory even with {loader.block} images at once: try "
                f"{_either(_less_memory(parts))}"
            )
        optim = parts.config.optim
        accumulate = optim.accumulate * before // smaller[0]
        _cut(parts, accumulate)


def _tried(parts: Parts, answer: Callable[[], Outputs]) -> bool:
    """Whether there is memory to learn from an answer; nothing is learnt."""
    if parts.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    student = parts.accelerator.unwrap_model(parts.student)
    try:
        with parts.accelerator.autocast():
            outputs = answer()
        sum(one.float().sum() for one in outputs if one is not None).backward()
    except Exception as error:
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    finally:
        student.zero_grad()
    return True
