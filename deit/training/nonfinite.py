"""What goes wrong in the middle of a run: counted, named, and said so that a person can act."""

from collections import deque

import torch
from torch import Tensor

from deit.core import run_log
from deit.core.console import warn
from deit.core.errors import (
    NumericsError,
)
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
