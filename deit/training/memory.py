"""Memory of a training step: check that it fits, find a micro-batch that does, advise what takes
less."""

import traceback
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deit.core.accelerator import any_process, uses_cuda_graphs
from deit.core.console import info
from deit.core.errors import SystemFault, is_out_of_memory
from deit.core.fault_injection import fault_point
from deit.core.host_memory import bytes_per_image, check_inference_memory, format_gib, free_memory
from deit.core.sharding import is_sharded
from deit.core.types import Batch, StudentOutput
from deit.models.teachers import Teacher
from deit.training.state import TrainingRun


def grad_accum_advice(run: TrainingRun, number: int) -> str:
    """The options by which a micro-batch has this number of images."""
    words = (
        f"--optim.grad_accum_steps {run.config.optim.grad_accum_steps * run.loader.block // number}"
    )
    graphs = uses_cuda_graphs(run.config.run.compile)
    return f"{words} --run.compile default" if graphs else words  # which take one micro-batch alone


def less_memory_advice(run: TrainingRun) -> list[str]:
    """What would need less memory for the same micro-batch, and is not done yet."""
    network = run.accelerator.unwrap_model(run.student).network
    found = (
        ["--run.activation_checkpointing"]
        if not run.config.run.activation_checkpointing and recomputes(network)
        else []
    )
    return [*found, "a smaller student" + " or teacher" * (run.ensemble is not None)]


def joined_by_or(ways: list[str]) -> str:
    return ", or ".join(ways)


def recomputes(network: nn.Module) -> bool:
    """Have a network compute its blocks again in the backward pass; whether it has such blocks."""
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):  # timm's way to say that it cannot
        return False
    return True


def micro_batch_sizes(run: TrainingRun) -> list[int]:
    """Sizes into which a micro-batch can be cut (for mixing: even ones), each at most half of the
    one before."""
    block, even = run.loader.block, 2 if run.config.views.uses_mixing else 1
    found = [block]
    for number in range(block // 2, 0, -1):
        if block % number == 0 and number % even == 0 and number <= found[-1] // 2:
            found.append(number)
    return found[1:]


def fits(run: TrainingRun, number: int) -> bool:
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

    each = bytes_per_image(student, ask, side, device, training=True, is_enough=enough)
    shown = loader.sizes.teacher
    for teacher in teachers:
        with accelerator.autocast():
            check_inference_memory(
                teacher, teacher.forward, shown, accelerator, config.run.eval_batch_size
            )
            more = bytes_per_image(
                teacher, teacher.forward, shown, device, training=False, is_enough=enough
            )
        each = None if each is None or more is None else each + more
    fitting = block
    if each is not None:
        each += _BYTES_OF_PIXELS * (side**2 + (shown**2 if teachers else 0))
        sizes = [block, *micro_batch_sizes(run)]
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
        f"an update needs at least {format_gib(needed)} with {block} images at once, and "
        f"{format_gib(free)} of memory are free"
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
            if run.ensemble is not None:
                run.ensemble(batch)
            return student(batch.images)

        if not any_process(run.accelerator, not _try_backward(run, answer)):
            return
        before, smaller = loader.block, micro_batch_sizes(run)
        if not smaller:
            raise SystemFault(
                f"run.auto_micro_batch: out of memory even with {loader.block} images at once: try "
                f"{joined_by_or(less_memory_advice(run))}"
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
