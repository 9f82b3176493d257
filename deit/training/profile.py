"""Where the time of an update goes: by part, by operation, and as a trace to look into."""

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

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
"""What an update is made of; the rest is loss, sums and the loop itself."""
_WARM_UP = 4  # updates: caches, compilation
_OPERATIONS = 15  # rows
_OF_AUTOGRAD = "autograd::engine::evaluate_function"
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_LAUNCHES += ("cudaGraphLaunch",)


def profile_run(config: Config, *, updates: int, trace: Path | None) -> dict[str, Any]:
    """Train some updates of a configuration and print where their time went; nothing is saved but
    the trace. Returns what was printed: seconds of an update by part and by operation.

    trace: a JSON file for chrome://tracing or ui.perfetto.dev. Raises the errors of
    deit.core.errors."""
    # PyTorch's profiler says that it began and, as an error, that there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    run = build_run(validate(config))
    accelerator = run.accelerator
    log_setup(run, environment_info(accelerator, []))
    job = _noted(step_context(run), run)
    batches = _endless(run)
    _train(job, batches, _WARM_UP)
    started = time.perf_counter()
    _train(job, batches, updates)
    update_s = (time.perf_counter() - started) / updates
    on_gpu = accelerator.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities, acc_events=True) as seen:
        started = time.perf_counter()
        _train(job, batches, updates)
        watched_s = (time.perf_counter() - started) / updates
    result = {"update_s": update_s, "watched_s": watched_s, **_read(seen, updates, on_gpu)}
    _print(result, run.config)
    if trace is not None and is_main_process():
        seen.export_chrome_trace(str(trace))
        info(f"wrote {trace}; look at it in https://ui.perfetto.dev")
    return result


def _endless(run: TrainingRun) -> Iterator[Batch]:
    """Micro-batches without end, what they take noted as `views`."""
    for epoch in itertools.count():
        epochs = run.num_view_epochs or run.config.optim.epochs
        batches = run.loader.epoch(epoch % epochs)
        while True:
            with record_function("views"):
                batch = next(batches, None)
            if batch is None:
                break
            yield batch


def _train(job: StepContext, batches: Iterator[Batch], updates: int) -> None:
    own = itertools.islice(batches, updates * job.optim.grad_accum_steps)
    for _ in train_epoch(job, own, MetricAccumulator(job.accelerator, {}), step=0, steps=10**6):
        pass
    if job.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _noted(job: StepContext, run: TrainingRun) -> StepContext:
    """The same job, with what its parts take noted by their names."""
    accelerator, average = job.accelerator, job.average
    backward, student = accelerator.backward, accelerator.unwrap_model(job.student)

    def noted_backward(loss: torch.Tensor) -> None:
        with record_function("backward"):
            backward(loss)

    accelerator.backward = noted_backward
    running: list[Any] = []

    def begin(*ignored: Any) -> None:
        running.append(record_function("student"))
        running[-1].__enter__()

    student.register_forward_pre_hook(begin)
    student.register_forward_hook(lambda *ignored: running.pop().__exit__(None, None, None))
    if average is not None:
        update = average.update

        def noted_update(*arguments: Any, **options: Any) -> None:
            with record_function("average"):
                update(*arguments, **options)

        average.update = noted_update
    panel = run.ensemble
    return job if panel is None else job._replace(teacher=_NotedPanel(panel))


class _NotedPanel:
    def __init__(self, panel: Any) -> None:
        self.panel = panel
        self.check = panel.check

    def __call__(self, batch: Batch) -> Any:
        with record_function("teacher"):
            return self.panel(batch)


def _read(seen: profile, updates: int, on_gpu: bool) -> dict[str, Any]:
    """Seconds of an update: of the GPU where there is one, else of the CPU."""
    total, own = ("device_time_total", "self_device_time_total")
    if not on_gpu:
        total, own = ("cpu_time_total", "self_cpu_time_total")
    # What a GPU did counts with the calls that asked for it; its own rows repeat it.
    rows = [event for event in seen.key_averages() if event.device_type == DeviceType.CPU]
    events = {event.key: event for event in rows}
    names = {name: name for name in PARTS}
    named = (key for key in events if key.startswith("Optimizer.step#"))
    names["optimizer"] = next(named, "optimizer")
    by_part = {
        part: getattr(events[name], total) / updates / 1e6
        for part, name in names.items()
        if name in events
    }
    if on_gpu:  # autograd asks a GPU from a thread of its own, where the name does not reach
        passes = [event for event in rows if event.key.startswith(_OF_AUTOGRAD)]
        by_part["backward"] = sum(getattr(event, total) for event in passes) / updates / 1e6
    operations = sorted(
        (event for event in rows if event.key not in names.values()),
        key=lambda event: -getattr(event, own),
    )
    return {
        "parts": by_part,
        "operations": {
            event.key: {
                "seconds": getattr(event, own) / updates / 1e6,
                "calls": event.count / updates,
            }
            for event in operations[:_OPERATIONS]
        },
        "launches": sum(events[name].count for name in _LAUNCHES if name in events) / updates,
    }


def _print(result: dict[str, Any], config: Config) -> None:
    whole, parts, alone = result["watched_s"], result["parts"], result["update_s"]
    rows = [
        (name, f"{1e3 * took:.2f}", f"{100 * took / whole:.1f}") for name, took in parts.items()
    ]
    rest = whole - sum(parts.values())
    rows.append(("the rest", f"{1e3 * rest:.2f}", f"{100 * rest / whole:.1f}"))
    images = config.optim.batch_size
    table(
        f"an update of {images} images: {1e3 * alone:.1f} ms, {images / alone:.0f} images/s; "
        f"looked at, {1e3 * whole:.1f} ms:",
        ("part", "ms", "%"),
        rows,
    )
    table(
        "operations by their own time",
        ("operation", "ms", "%", "calls"),
        [
            (
                name,
                f"{1e3 * one['seconds']:.2f}",
                f"{100 * one['seconds'] / whole:.1f}",
                f"{one['calls']:g}",
            )
            for name, one in result["operations"].items()
        ],
    )
    if result["launches"]:
        info(f"{result['launches']:.0f} launches an update")
