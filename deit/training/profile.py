"""Profile a training step: time per component and per operator, with an optional trace."""

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from deit.config.command_choices import PROFILED_STEPS, check_at_least
from deit.config.schema import Config
from deit.config.validation import validate
from deit.core.accelerator import environment_info
from deit.core.console import info, is_main_process, table
from deit.core.types import Batch
from deit.training.build import build_run
from deit.training.epochs import step_context
from deit.training.loop import MetricAccumulator, StepContext, train_epoch
from deit.training.progress_log import log_setup
from deit.training.state import TrainingRun

PARTS = ("views", "teacher", "student", "backward", "optimizer", "average")
"""Components of a step; the rest is the loss, the metrics and the loop itself."""
_WARM_UP = 4  # steps, for caches and compilation
_OPERATIONS = 15  # rows
_OF_AUTOGRAD = "autograd::engine::evaluate_function"
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_LAUNCHES += ("cudaGraphLaunch",)


def profile_run(
    config: Config, *, num_steps: int = PROFILED_STEPS, trace: str | Path | None = None
) -> dict[str, Any]:
    """Profile training steps of a configuration and print the result; only the trace is written.

    num_steps: number of steps to time. trace: a JSON file for chrome://tracing or ui.perfetto.dev.

    Returns seconds per step, by component (`parts`) and by operator (`operations`). Raises the
    errors of deit.core.errors.

    >>> from deit.core.console import quiet
    >>> from deit.config.recipes import find_recipe
    >>> with quiet():
    ...     result = profile_run(find_recipe("digits"), num_steps=1)
    >>> result["step_s"] > 0, "teacher" in result["parts"]
    (True, True)
    """
    check_at_least("num_steps", num_steps, 1)
    # PyTorch's profiler logs its start and, as an error, a missing GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    run = build_run(validate(config))
    accelerator = run.accelerator
    log_setup(run, environment_info(accelerator))
    context = _with_labels(step_context(run), run)
    batches = _endless(run)
    _train(context, batches, _WARM_UP)
    started = time.perf_counter()
    _train(context, batches, num_steps)
    step_s = (time.perf_counter() - started) / num_steps
    on_gpu = accelerator.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities, acc_events=True) as profiler:
        started = time.perf_counter()
        _train(context, batches, num_steps)
        profiled_s = (time.perf_counter() - started) / num_steps
    result = {"step_s": step_s, "profiled_s": profiled_s, **_read(profiler, num_steps, on_gpu)}
    _print(result, run.config)
    if trace is not None and is_main_process():
        profiler.export_chrome_trace(str(trace))
        info(f"wrote {trace}; open it in https://ui.perfetto.dev")
    return result


def _endless(run: TrainingRun) -> Iterator[Batch]:
    """Yield micro-batches without end; their time is labeled `views`."""
    for epoch in itertools.count():
        epochs = run.num_view_epochs or run.config.optim.epochs
        batches = run.loader.epoch(epoch % epochs)
        while True:
            with record_function("views"):
                batch = next(batches, None)
            if batch is None:
                break
            yield batch


def _train(context: StepContext, batches: Iterator[Batch], num_steps: int) -> None:
    limited = itertools.islice(batches, num_steps * context.optim.grad_accum_steps)
    metrics = MetricAccumulator(context.accelerator, {})
    for _ in train_epoch(context, limited, metrics, step=0, steps=10**6):
        pass
    if context.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _with_labels(context: StepContext, run: TrainingRun) -> StepContext:
    """Return the context with its components labeled for the profiler."""
    accelerator, average = context.accelerator, context.average
    backward, student = accelerator.backward, accelerator.unwrap_model(context.student)

    def labeled_backward(loss: torch.Tensor) -> None:
        with record_function("backward"):
            backward(loss)

    accelerator.backward = labeled_backward
    running: list[Any] = []

    def begin(*ignored: Any) -> None:
        running.append(record_function("student"))
        running[-1].__enter__()

    student.register_forward_pre_hook(begin)
    student.register_forward_hook(lambda *ignored: running.pop().__exit__(None, None, None))
    if average is not None:
        update = average.update

        def labeled_update(*arguments: Any, **options: Any) -> None:
            with record_function("average"):
                update(*arguments, **options)

        average.update = labeled_update
    if run.ensemble is None:
        return context
    return context._replace(teacher=_LabeledEnsemble(run.ensemble))


class _LabeledEnsemble:
    def __init__(self, ensemble: Any) -> None:
        self.ensemble = ensemble
        self.check = ensemble.check

    def __call__(self, batch: Batch) -> Any:
        with record_function("teacher"):
            return self.ensemble(batch)


def _read(profiler: profile, num_steps: int, on_gpu: bool) -> dict[str, Any]:
    """Return seconds per step: on the GPU if there is one, otherwise on the CPU."""
    total, self_time = ("device_time_total", "self_device_time_total")
    if not on_gpu:
        total, self_time = ("cpu_time_total", "self_cpu_time_total")
    # GPU time is attributed to the calls that launched it; rows of the GPU would count it twice.
    rows = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    events = {event.key: event for event in rows}
    names = {name: name for name in PARTS}
    optimizers = (key for key in events if key.startswith("Optimizer.step#"))
    names["optimizer"] = next(optimizers, "optimizer")
    by_part = {
        part: getattr(events[name], total) / num_steps / 1e6
        for part, name in names.items()
        if name in events
    }
    if on_gpu:  # autograd launches from its own thread, outside the label
        passes = [event for event in rows if event.key.startswith(_OF_AUTOGRAD)]
        by_part["backward"] = sum(getattr(event, total) for event in passes) / num_steps / 1e6
    operations = sorted(
        (event for event in rows if event.key not in names.values()),
        key=lambda event: -getattr(event, self_time),
    )
    return {
        "parts": by_part,
        "operations": {
            event.key: {
                "seconds": getattr(event, self_time) / num_steps / 1e6,
                "calls": event.count / num_steps,
            }
            for event in operations[:_OPERATIONS]
        },
        "launches": sum(events[name].count for name in _LAUNCHES if name in events) / num_steps,
    }


def _print(result: dict[str, Any], config: Config) -> None:
    profiled_s, step_s = result["profiled_s"], result["step_s"]

    def row(name: str, seconds: float, *more: str) -> tuple[str, ...]:
        return (name, f"{1e3 * seconds:.2f}", f"{100 * seconds / profiled_s:.1f}", *more)

    rest = profiled_s - sum(result["parts"].values())
    images = config.optim.batch_size
    table(
        f"a step of {images} images: {1e3 * step_s:.1f} ms, {images / step_s:.0f} images/s; "
        f"under the profiler {1e3 * profiled_s:.1f} ms:",
        ("component", "ms", "%"),
        [*(row(name, seconds) for name, seconds in result["parts"].items()), row("other", rest)],
    )
    table(
        "operators by self time",
        ("operator", "ms", "%", "calls"),
        [
            row(name, operator["seconds"], f"{operator['calls']:g}")
            for name, operator in result["operations"].items()
        ],
    )
    if result["launches"]:
        info(f"{result['launches']:.0f} kernel launches per step")
