"""Count steps that were skipped because loss or gradient was not finite; log their images."""

from collections import deque

import torch
from torch import Tensor

from deit.core import run_log
from deit.core.console import warn
from deit.core.errors import NumericsError
from deit.training.loop import StepResult
from deit.training.state import TrainingRun

_LAG = 4  # steps


class NonFiniteMonitor:
    """Counts skipped steps.

    On a GPU it looks at the step a few steps before the latest, so that the loop does not wait for
    the device. The lag is fixed, so all processes stop at the same step.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.lag = 0 if run.accelerator.device.type == "cpu" else _LAG
        self._queue: deque[tuple[int, Tensor, torch.cuda.Event | None, StepResult]] = deque()

    def __call__(self, step: int, result: StepResult) -> None:
        """Add the result of a step. Raises NumericsError as `_count` does."""
        applied, event = result.applied, None
        if applied.device.type == "cuda":
            applied = torch.empty((), dtype=torch.bool, pin_memory=True)
            applied.copy_(result.applied, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._queue.append((step, applied, event, result))
        self.flush(self.lag)

    def flush(self, lag: int = 0) -> None:
        """Count all steps but the latest `lag`. Raises NumericsError as `_count` does."""
        while len(self._queue) > lag:
            step, applied, event, result = self._queue.popleft()
            if event is not None:
                event.synchronize()
            _count(self.run, step, None if applied else result)


def _count(run: TrainingRun, step: int, skipped: StepResult | None) -> None:
    """Count a step and log the images of a skipped one. skipped: None if the step was applied.

    Raises NumericsError after too many skipped steps in a row, or if fp16 has no scale left, in all
    processes; each logs its own images.
    """
    state, limit = run.state, run.config.run.max_nonfinite_steps
    if skipped is None:
        state.skipped_in_a_row = 0
        return
    state.skipped += 1
    state.skipped_in_a_row += 1
    scaler = run.accelerator.scaler
    if scaler is not None and scaler.get_scale() < 1:
        raise NumericsError(
            f"step {step}: gradients overflow fp16 at any scale; use --run.precision bf16 or fp32, "
            "or a lower optim.lr"
        )
    if scaler is not None and state.skipped_in_a_row < limit:
        return  # the scaler starts with scales that are too large
    images = skipped.nonfinite_samples().tolist()
    row = {
        "step": step,
        "process": run.accelerator.process_index,
        "images": images,
        "names": [run.splits.train.name(index) for index in images],
    }
    if run.out.is_dir():
        run_log.append(run.out / run_log.NONFINITE_LOG, row)
    names = ", ".join(row["names"][:5]) + (f" and {len(images) - 5} more" if images[5:] else "")
    if state.skipped_in_a_row >= limit:
        raise NumericsError(
            f"step {step}: loss or gradient is not finite, {state.skipped_in_a_row} steps in a row "
            f"since step {step - state.skipped_in_a_row + 1}; images: {names} (all: "
            f"{run.out / run_log.NONFINITE_LOG}). The checkpoints in {run.out} are from before. A "
            f"lower optim.lr{_clipping_advice(run)} usually helps, in a new run or from a "
            "checkpoint (deit finetune --from), with another folder (--out)"
        )
    warn(
        f"step {step}: loss or gradient is not finite, step skipped ({state.skipped_in_a_row} of "
        f"at most {limit} in a row); images: {names}"
    )


def _clipping_advice(run: TrainingRun) -> str:
    norm = run.config.optim.clip_grad_norm
    return "" if norm is not None and norm <= 1 else " or optim.clip_grad_norm 1"
