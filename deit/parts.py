"""The parts of a training run, built once and handed from stage to stage."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import ConfigDict
from torch import Tensor, nn

from deit import checkpoint
from deit.config import Config
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import Splits
from deit.models.saved import Facts
from deit.optim import WeightAverage
from deit.panel import Panel


@dataclass
class State:
    """How far a run has come; everything a resumed run must know beside tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    format_version: int = checkpoint.FORMAT_VERSION
    epoch: int = 0
    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=lambda: {"epoch": 0, "top1": -1.0})
    average_updates: int = 0
    fingerprint: str = ""
    targets: list[str] = field(default_factory=list)
    scaler: dict[str, Any] | None = None


@dataclass
class Parts:
    """Everything a run works with; `student` and `optimizer` are prepared by Accelerate."""

    config: Config
    out: Path
    accelerator: Accelerator
    splits: Splits
    facts: Facts
    panel: Panel | None
    loader: TrainLoader
    student: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    state: State
    start_notes: dict[str, Any] | None = None
    """What the student started from, and what was done to fit it; None: random weights, or a
    resumed run."""
    teacher_answers: Tensor | None = None
    view_epochs: int | None = None
    """Epochs of views that come round again and again; None: each epoch has its own."""
