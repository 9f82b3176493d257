"""What goes wrong in the middle of a run: counted, named, and said so that a person can act."""

import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deit.core import run_log
from deit.core.accelerator import is_peer_failure, uses_cuda_graphs
from deit.core.console import info, warn
from deit.core.errors import (
    DeitError,
    NumericsError,
    PeerError,
    StoppedBySignal,
    SystemFault,
    WorkerLost,
    compiler_failure,
    is_out_of_memory,
)
from deit.core.fault_injection import fault_point
from deit.core.host_memory import bytes_per_image, check_answers, free_memory, gib
from deit.core.sharding import is_sharded
from deit.core.types import Batch, StudentOutput
from deit.models.teachers import Teacher
from deit.training.loop import StepResult
from deit.training.state import TrainingRun

_BEHIND = 4  # updates


class NonFiniteMonitor:
    """Counts updates that were left out, because loss or gradient was not finite.

    Told of each update, it looks at the one some updates before: a device that works behind the
    loop is not waited for. Which one does not depend on how fast it is, so all processes come to
    the same end at the same update.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.parts = run
        self.lag = 0 if run.accelerator.device.type == "cpu" else _BEHIND
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None, StepResult]] = deque()

    def __call__(self, step: int, update: StepResult) -> None:
        """Take the update of a step up. Raises NumericsError as `_count` does."""
        told, event = update.applied, None
        if told.device.type == "cuda":
            told = torch.empty((), dtype=torch.bool, pin_memory=True)
            told.copy_(update.applied, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, told, event, update))
        self.flush(self.lag)

    def flush(self, behind: int = 0) -> None:
        """Look at all updates but the latest so many. Raises NumericsError as `_count` does."""
        while len(self._waiting) > behind:
            step, told, event, update = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            _count(self.parts, step, None if told else update)


def _count(run: TrainingRun, step: int, left_out: StepResult | None) -> None:
    """Count an update that was left out, and note its images; None: one that was not.

    Raises NumericsError where there are too many in a row, or fp16 has no scale left. The same in
    all processes, but for the images: each notes its own.
    """
    state = run.state
    if left_out is None:
        state.skipped_in_a_row = 0
        return
    state.skipped += 1
    state.skipped_in_a_row += 1
    scaler = run.accelerator.scaler
    if scaler is not None and scaler.get_scale() < 1:
        raise NumericsError(
            f"update {step}: gradients overflow fp16 at any scale; use --run.precision bf16 "
            "or fp32, or a lower optim.lr"
        )
    fp16_searches = (
        scaler is not None and state.skipped_in_a_row < run.config.run.max_nonfinite_steps
    )
    if fp16_searches:
        return  # the first scales are meant to be too large
    images = left_out.nonfinite_samples().tolist()
    row = {
        "step": step,
        "process": run.accelerator.process_index,
        "images": images,
        "names": [run.splits.train.name(index) for index in images],
    }
    if run.out.is_dir():
        run_log.append(run.out / run_log.NONFINITE_LOG, row)
    named = ", ".join(row["names"][:5]) + (f" and {len(images) - 5} more" if images[5:] else "")
    if state.skipped_in_a_row >= run.config.run.max_nonfinite_steps:
        raise NumericsError(
            f"update {step}: loss or gradient is not finite, number {state.skipped_in_a_row} "
            f"in a row from update {step - state.skipped_in_a_row + 1} on; its images: "
            f"{named} (all: {run.out / run_log.NONFINITE_LOG}). The checkpoints in {run.out} are "
            f"of before; a lower optim.lr{_clipped(run)} usually helps, in a run from the start "
            "or from a checkpoint (deit finetune --from), with another --out"
        )
    warn(
        f"update {step}: loss or gradient is not finite, so it is left out "
        f"({state.skipped_in_a_row} of at most {run.config.run.max_nonfinite_steps} in a row); its "
        f"images: {named}"
    )


def _clipped(run: TrainingRun) -> str:
    norm = run.config.optim.clip_grad_norm
    return "" if norm is not None and norm <= 1 else " or optim.clip_grad_norm 1"


@contextmanager
def translate_errors(run: TrainingRun, asked: Callable[[], int]) -> Iterator[None]:
    """Turn what stops a run in its middle into an error of deit.core.errors that says what is kept
    and what to do.

    asked: the signal that this process was asked to stop by, 0 for none. What goes wrong after it
    is no other mishap: the other processes were asked as well, and may have ended first.
    """
    try:
        yield
    except StoppedBySignal as stop:
        raise StoppedBySignal(stop.number, f"{stop}; {_kept(run)}") from None
    except WorkerLost as error:
        raise SystemFault(f"{error}; {_kept(run)}") from None
    except DeitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
            raise _memory_fault(run) from None
        if run.accelerator.num_processes > 1 and is_peer_failure(error):
            if number := asked():
                stop = StoppedBySignal(number)
                raise StoppedBySignal(number, f"{stop}; {_kept(run)}") from None
            raise PeerError(
                f"another process of the run is gone, or did not answer within "
                f"{run.config.run.timeout_s:g} s; {_kept(run)}"
            ) from None
        if (failure := compiler_failure(error)) is not None:
            raise SystemFault(f"{failure}; without --run.compile {_kept(run)}") from error
        raise


def _kept(run: TrainingRun) -> str:
    return f"the same command with --resume goes on with {run.out}"


def _memory_fault(run: TrainingRun) -> SystemFault:
    optim, block = run.config.optim, run.loader.block
    student = run.accelerator.unwrap_model(run.student)
    tried = (
        [] if is_sharded(student) else _micro_batch_sizes(run)
    )  # which computes with all processes
    fitting = next((number for number in tried if _fits(run, number)), None)
    told = f"out of memory with {block} images at once"
    if fitting is None and is_sharded(student):
        cut = [_accumulating(run, number) for number in _micro_batch_sizes(run)[:1]]
        return SystemFault(
            f"{told}, which is not tried smaller in a student that is divided (run.sharding): try "
            f"{_either(cut + _less_memory(run))}; {_kept(run)}"
        )
    if fitting is None:
        too = f", and with {tried[-1]}" if tried else ""
        return SystemFault(f"{told}{too}: try {_either(_less_memory(run))}; {_kept(run)}")
    return SystemFault(
        f"{told}; {fitting} fit (without a teacher beside them): {_accumulating(run, fitting)} "
        f"makes micro-batches of that size and keeps the batch of {optim.batch_size}; "
        f"{_kept(run)}"
    )


def _accumulating(run: TrainingRun, number: int) -> str:
    """The options by which a micro-batch has this number of images."""
    words = (
        f"--optim.grad_accum_steps {run.config.optim.grad_accum_steps * run.loader.block // number}"
    )
    graphs = uses_cuda_graphs(run.config.run.compile)
    return f"{words} --run.compile default" if graphs else words  # which take one micro-batch alone


def _less_memory(run: TrainingRun) -> list[str]:
    """What would need less memory for the same micro-batch, and is not done yet."""
    network = run.accelerator.unwrap_model(run.student).network
    found = (
        ["--run.activation_checkpointing"]
        if not run.config.run.activation_checkpointing and recomputes(network)
        else []
    )
    return [*found, "a smaller student" + " or teacher" * (run.panel is not None)]


def _either(ways: list[str]) -> str:
    return ", or ".join(ways)


def recomputes(network: nn.Module) -> bool:
    """Have a network compute its blocks again in the backward pass; whether it has such blocks."""
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):  # timm's way to say that it cannot
        return False
    return True


def _micro_batch_sizes(run: TrainingRun) -> list[int]:
    """Sizes into which a micro-batch can be cut (for mixing: even ones), each at most half of the
    one before."""
    block, even = run.loader.block, 2 if run.config.views.uses_mixing else 1
    found = [block]
    for number in range(block // 2, 0, -1):
        if block % number == 0 and number % even == 0 and number <= found[-1] // 2:
            found.append(number)
    return found[1:]


def _fits(run: TrainingRun, number: int) -> bool:
    """Whether the student can learn from so many images at once, by trying: without teachers, and
    without the other processes."""
    student = run.accelerator.unwrap_model(run.student)
    side, device = run.config.student.image_size, run.accelerator.device
    shape = (number, 3, side, side)
    return _try_backward(run, lambda: student(torch.zeros(shape, device=device)))


def check_memory(run: TrainingRun, teachers: list[Teacher]) -> None:
    """Refuse a run whose updates or evaluations certainly need more memory than is free, before
    the first of them; where run.auto_micro_batch is on, cut micro-batches that may fit.

    teachers: those that answer in training. Raises SystemFault, in all processes or in none.
    """
    config, accelerator, loader = run.config, run.accelerator, run.loader
    student, device = accelerator.unwrap_model(run.student), accelerator.device
    if is_sharded(student):
        return  # which answers with all processes, or not at all
    free, block, side = free_memory(device), loader.block, config.student.image_size
    kept = _kept_bytes(student, config.optim.name)

    def enough(rough: float) -> bool:
        return kept + rough * max(block, config.run.eval_batch_size) < free / 2

    def ask(images: Tensor) -> StudentOutput:
        with accelerator.autocast():
            return student.forward(images)  # not what compiles it for these few images

    each = bytes_per_image(student, ask, side, device, learns=True, enough=enough)
    shown = loader.sizes.teacher
    for teacher in teachers:
        with accelerator.autocast():
            check_answers(teacher, teacher.forward, shown, accelerator, config.run.eval_batch_size)
            more = bytes_per_image(
                teacher, teacher.forward, shown, device, learns=False, enough=enough
            )
        each = None if each is None or more is None else each + more
    fitting = block
    if each is not None:
        each += _BYTES_OF_PIXELS * (side**2 + (shown**2 if teachers else 0))
        sizes = [block, *_micro_batch_sizes(run)]
        fits = (one for one in sizes if kept + _SPARE * each * one <= free)
        fitting = block if kept + each * block <= free else next(fits, 0)
    needed = kept + (each or 0) * block
    own = torch.tensor([[float(fitting), needed, float(free)]], device=device)
    smallest, needed, free = min(accelerator.gather(own).tolist())  # of all processes
    if smallest < block:
        _cut_or_refuse(run, int(smallest), needed, free)


_BYTES_OF_PIXELS = 3 * 4  # of an image as the networks get it
_SPARE = 1.5  # times what is measured, at most, an update took of the machine's memory


def _kept_bytes(student: nn.Module, algorithm: str) -> int:
    """Bytes of gradients and of the optimizer's state, which is not there before the first
    update."""
    trained = [one for one in student.parameters() if one.requires_grad]
    copies = 3 if algorithm == "adamw" else 2
    return copies * sum(one.numel() * one.element_size() for one in trained)


def _cut_or_refuse(run: TrainingRun, fitting: int, needed: float, free: float) -> None:
    """Cut micro-batches to `fitting` images, 0 for none, where run.auto_micro_batch is on. Raises
    SystemFault where it is off, or none fits."""
    optim, block = run.config.optim, run.loader.block
    found = (
        f"an update needs at least {gib(needed)} with {block} images at once, and {gib(free)} of "
        "memory are free"
    )
    if fitting == 0:
        raise SystemFault(
            f"{found}, which is too little for any number of images: "
            "--run.activation_checkpointing keeps less "
            "of each; else a smaller image, student or teacher is left"
        )
    accumulate = optim.grad_accum_steps * block // fitting
    if not run.config.run.auto_micro_batch:
        raise SystemFault(
            f"{found}: --optim.grad_accum_steps {accumulate} makes micro-batches of {fitting} and "
            "keeps "
            f"the batch of {optim.batch_size}; --run.auto_micro_batch finds such a number itself, "
            "--run.activation_checkpointing keeps less of each image"
        )
    info(f"memory    {found}")
    _cut(run, accumulate)


def _cut(run: TrainingRun, accumulate: int) -> None:
    """Cut the same batches into other micro-batches."""
    before, loader = run.loader.block, run.loader
    run.config = run.config.replace(optim={"grad_accum_steps": accumulate})
    run.accelerator.gradient_accumulation_steps = accumulate
    loader.set_micro_batches(run.config.optim)
    info(
        f"memory    too little for {before} images at once; optim.grad_accum_steps "
        f"{accumulate}: {loader.block} images, the batch stays"
    )


def find_micro_batch(run: TrainingRun) -> None:
    """Cut micro-batches, to half where that is whole, until all processes can take one with their
    teachers; the batch stays.

    Changes the configuration's optim.grad_accum_steps. Raises SystemFault where none fits.
    """
    student, loader = run.accelerator.unwrap_model(run.student), run.loader
    while True:
        batch = next(loader.epoch(0))

        def answer(batch: Batch = batch) -> StudentOutput:
            fault_point("fit")
            if run.panel is not None:
                run.panel(batch)
            return student(batch.images)

        failed = torch.tensor(float(not _try_backward(run, answer)), device=run.accelerator.device)
        if run.accelerator.reduce(failed, reduction="sum").item() == 0:
            return
        before, smaller = loader.block, _micro_batch_sizes(run)
        if not smaller:
            raise SystemFault(
                f"run.auto_micro_batch: out of memory even with {loader.block} images at once: try "
                f"{_either(_less_memory(run))}"
            )
        optim = run.config.optim
        accumulate = optim.grad_accum_steps * before // smaller[0]
        _cut(run, accumulate)


def _try_backward(run: TrainingRun, answer: Callable[[], StudentOutput]) -> bool:
    """Whether there is memory to learn from an answer; nothing is learnt."""
    if run.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    student = run.accelerator.unwrap_model(run.student)
    try:
        with run.accelerator.autocast():
            outputs = answer()
        sum(one.float().sum() for one in outputs if one is not None).backward()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    finally:
        student.zero_grad()
    return True
