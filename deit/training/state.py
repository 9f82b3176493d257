"""The parts of a training run, built once and handed from stage to stage."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import ConfigDict
from torch import Tensor, nn

from deit.config.schema import Config
from deit.core.manifest import FORMAT_VERSION
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import Splits
from deit.distill.run_teachers import RunTeachers
from deit.distill.teacher_ensemble import TeacherEnsemble
from deit.models.metadata import AdapterBase
from deit.models.saved import ModelInfo
from deit.models.surgery.pruning_masks import PruningMasks
from deit.training.optimizer import EMA


@dataclass
class TrainState:
    """How far a run has come; everything a resumed run must know beside tensors.

    No random state is among it: order, views, mixing and drop path are functions of the seed and
    of where the run is.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    format_version: int = FORMAT_VERSION
    epoch: int = 0
    """Epochs that are trained, evaluated and logged."""
    step: int = 0
    """Updates so far, those skipped among them."""
    samples_seen: int = 0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=lambda: {"epoch": 0, "top1": -1.0})
    average_updates: int = 0
    skipped: int = 0
    """Updates left out because loss or gradient was not finite; `skipped_in_a_row` of them without
    a good one between."""
    skipped_in_a_row: int = 0
    metric_sums: dict[str, list[float]] = field(default_factory=dict)
    """Sums of the epoch under way: by name, of each process."""
    fingerprint: str = ""
    """Of the images, labels and class names."""
    targets: list[str] = field(default_factory=list)
    """Digests of the stores of targets."""
    teachers: list[str] = field(default_factory=list)
    """Digests of the teachers' weights; "" for one whose stored answers alone are here."""
    scaler: dict[str, Any] | None = None
    """Of the gradients in fp16."""
    metrics_bytes: int = 0
    """Length of the log of metrics; what is behind it was written later."""
    chain_bytes: int = 0
    chain: str = ""
    """The latest link of the chain of hashes."""


@dataclass
class TrainingRun:
    """Everything a run works with; `student` and `optimizer` are prepared by Accelerate."""

    config: Config
    out: Path
    accelerator: Accelerator
    splits: Splits
    model_info: ModelInfo
    teachers: RunTeachers
    ensemble: TeacherEnsemble | None
    """The teachers as one call; None without any."""
    loader: TrainLoader
    student: nn.Module
    optimizer: torch.optim.Optimizer
    average: EMA | None
    state: TrainState
    masks: PruningMasks | None = None
    """The masks of a pruned student; None where every weight is trained."""
    adapter_base: AdapterBase | None = None
    """Where adapters are trained alone, the weights they belong to; None where all are saved."""
    init_report: dict[str, Any] | None = None
    """What the student started from, and what was done to fit it; None: random weights, or a
    resumed run."""
    teacher_predictions: Tensor | None = None
    check_lock: Callable[[], None] | None = None
    """Raises where the run's folder is no longer this run's; in the main process."""
    num_view_epochs: int | None = None
    """Epochs of views that come round again and again; None: each epoch has its own."""
