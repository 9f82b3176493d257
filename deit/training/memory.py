"""Memory of a training step: check that it fits, find a micro-batch that does, give advice."""

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


def grad_accum_advice(run: TrainingRun, size: int) -> str:
    """Return the options that make micro-batches of `size` images."""
    steps = run.config.optim.grad_accum_steps * run.loader.micro_batch_size // size
    options = f"--optim.grad_accum_steps {steps}"
    # CUDA graphs do not support accumulation.
    return (
        f"{options} --run.compile default" if uses_cuda_graphs(run.config.run.compile) else options
    )


def less_memory_advice(run: TrainingRun) -> list[str]:
    """Return what would take less memory with the same micro-batch."""
    network = run.accelerator.unwrap_model(run.student).network
    advice = []
    if not run.config.run.activation_checkpointing and recomputes(network):
        advice.append("--run.activation_checkpointing")
    return [*advice, "a smaller student" + " or teacher" * (run.ensemble is not None)]


def recomputes(network: nn.Module) -> bool:
    """Turn activation checkpointing on; return whether the network supports it."""
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):  # timm raises these if it is not supported
        return False
    return True


def micro_batch_sizes(run: TrainingRun) -> list[int]:
    """Return the sizes to which a micro-batch can be reduced, each at most half of the one before;
    with mixing all are even."""
    micro_batch, multiple = run.loader.micro_batch_size, 2 if run.config.views.uses_mixing else 1
    sizes = [micro_batch]
    for size in range(micro_batch // 2, 0, -1):
        if micro_batch % size == 0 and size % multiple == 0 and size <= sizes[-1] // 2:
            sizes.append(size)
    return sizes[1:]


def fits(run: TrainingRun, size: int) -> bool:
    """Return whether a backward pass of the student fits with `size` images, by trying it, without
    teachers and other processes."""
    student = run.accelerator.unwrap_model(run.student)
    side, device = run.config.student.image_size, run.accelerator.device
    shape = (size, 3, side, side)
    return _try_backward(run, lambda: student(torch.zeros(shape, device=device)))


def check_memory(run: TrainingRun, teachers: list[Teacher]) -> None:
    """Check that steps and evaluations do not need more memory than is free, before the first.

    With run.auto_micro_batch, micro-batches are made smaller instead. teachers: those that run in
    training. Raises SystemFault in all processes or in none.
    """
    config, accelerator, loader = run.config, run.accelerator, run.loader
    student, device = accelerator.unwrap_model(run.student), accelerator.device
    if is_sharded(student):
        return  # it computes with all processes only
    free, micro_batch, side = (
        free_memory(device),
        loader.micro_batch_size,
        config.student.image_size,
    )
    fixed = _fixed_bytes(student, config.optim.name)

    def is_plenty(per_image: float) -> bool:
        return fixed + per_image * max(micro_batch, config.run.eval_batch_size) < free / 2

    def forward(images: Tensor) -> StudentOutput:
        with accelerator.autocast():
            return student.forward(
                images
            )  # not the compiled call: it would compile for these few images

    each = bytes_per_image(student, forward, side, device, training=True, is_enough=is_plenty)
    teacher_size = loader.sizes.teacher
    for teacher in teachers:
        with accelerator.autocast():
            check_inference_memory(
                teacher, teacher.forward, teacher_size, accelerator, config.run.eval_batch_size
            )
            more = bytes_per_image(
                teacher, teacher.forward, teacher_size, device, training=False, is_enough=is_plenty
            )
        each = None if each is None or more is None else each + more
    fitting = micro_batch
    if each is not None:
        each += _BYTES_PER_PIXEL * (side**2 + (teacher_size**2 if teachers else 0))
        sizes = [micro_batch, *micro_batch_sizes(run)]
        fitting_sizes = (size for size in sizes if fixed + _MARGIN * each * size <= free)
        fitting = micro_batch if fixed + each * micro_batch <= free else next(fitting_sizes, 0)
    needed = fixed + (each or 0) * micro_batch
    row = torch.tensor([[float(fitting), needed, float(free)]], device=device)
    smallest, needed, free = min(accelerator.gather(row).tolist())  # of all processes
    if smallest < micro_batch:
        _reduce_or_raise(run, int(smallest), needed, free)


_BYTES_PER_PIXEL = 3 * 4  # three channels in float32
_MARGIN = 1.5  # a step took at most this factor more memory than the estimate


def _fixed_bytes(student: nn.Module, optimizer: str) -> int:
    """Return the bytes of gradients and optimizer state, which are allocated in the first step."""
    trainable = [p for p in student.parameters() if p.requires_grad]
    copies = 3 if optimizer == "adamw" else 2
    return copies * sum(p.numel() * p.element_size() for p in trainable)


def _reduce_or_raise(run: TrainingRun, fitting: int, needed: float, free: float) -> None:
    """Reduce micro-batches to `fitting` images under run.auto_micro_batch.

    Raises SystemFault without that option, or if none fits (0).
    """
    optim, micro_batch = run.config.optim, run.loader.micro_batch_size
    message = (
        f"a step needs at least {format_gib(needed)} with {micro_batch} images at once, and "
        f"{format_gib(free)} of memory are free"
    )
    if fitting == 0:
        raise SystemFault(
            f"{message}, too little even for one image: "
            "--run.activation_checkpointing needs less; otherwise use smaller images, a smaller "
            "student or teacher"
        )
    accumulate = optim.grad_accum_steps * micro_batch // fitting
    if not run.config.run.auto_micro_batch:
        raise SystemFault(
            f"{message}: --optim.grad_accum_steps {accumulate} makes micro-batches of {fitting} "
            f"and keeps the batch of {optim.batch_size}; --run.auto_micro_batch does this "
            "automatically, --run.activation_checkpointing needs less memory per image"
        )
    info(f"memory    {message}")
    _set_grad_accum(run, accumulate)


def _set_grad_accum(run: TrainingRun, accumulate: int) -> None:
    """Split the same batches into other micro-batches."""
    before, loader = run.loader.micro_batch_size, run.loader
    run.config = run.config.replace(optim={"grad_accum_steps": accumulate})
    run.accelerator.gradient_accumulation_steps = accumulate
    loader.set_micro_batches(run.config.optim)
    info(
        f"memory    too little for micro-batches of {before} images; using optim.grad_accum_steps "
        f"{accumulate}: {loader.micro_batch_size} images, the batch size stays"
    )


def find_micro_batch(run: TrainingRun) -> None:
    """Reduce micro-batches until a step of all processes with their teachers fits the memory.

    Sets optim.grad_accum_steps of the run's configuration; the batch size stays. Raises SystemFault
    if no size fits.
    """
    student, loader = run.accelerator.unwrap_model(run.student), run.loader
    while True:
        batch = next(loader.epoch(0))

        def forward(batch: Batch = batch) -> StudentOutput:
            fault_point("fit")
            if run.ensemble is not None:
                run.ensemble(batch)
            return student(batch.images)

        if not any_process(run.accelerator, not _try_backward(run, forward)):
            return
        size, smaller = loader.micro_batch_size, micro_batch_sizes(run)
        if not smaller:
            raise SystemFault(
                f"run.auto_micro_batch: out of memory even with micro-batches of {size} images: "
                f"try {', or '.join(less_memory_advice(run))}"
            )
        _set_grad_accum(run, run.config.optim.grad_accum_steps * size // smaller[0])


def _try_backward(run: TrainingRun, forward: Callable[[], StudentOutput]) -> bool:
    """Return whether a forward and backward pass fits the memory; gradients are discarded."""
    if run.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    student = run.accelerator.unwrap_model(run.student)
    try:
        with run.accelerator.autocast():
            outputs = forward()
        sum(head.float().sum() for head in outputs if head is not None).backward()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    finally:
        student.zero_grad()
    return True
