"""The parts and the state of a training run."""

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
from deit.models.saved_student import ModelInfo
from deit.models.surgery.pruning_masks import PruningMasks
from deit.training.optimizer import EMA


@dataclass
class TrainState:
    """The progress of a run: all of a checkpoint that is not a tensor.

    There is no random state: order, views, mixing and drop path are functions of seed, epoch and
    step.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    format_version: int = FORMAT_VERSION
    epoch: int = 0
    """Number of epochs that are trained, evaluated and logged."""
    step: int = 0
    """Number of steps, including skipped ones."""
    samples_seen: int = 0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=lambda: {"epoch": 0, "top1": -1.0})
    average_updates: int = 0
    skipped: int = 0
    """Number of steps skipped because loss or gradient was not finite; skipped_in_a_row: since the
    last applied one."""
    skipped_in_a_row: int = 0
    metric_sums: dict[str, list[float]] = field(default_factory=dict)
    """Sums of the current epoch, by name and process."""
    fingerprint: str = ""
    """Hash of images, labels and class names."""
    targets: list[str] = field(default_factory=list)
    """Digests of the target stores."""
    teachers: list[str] = field(default_factory=list)
    """Digests of the teachers' weights; "" for one of which only stored targets are available."""
    scaler: dict[str, Any] | None = None
    """State of the gradient scaler in fp16."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl; rows after it were written later."""
    chain_bytes: int = 0
    chain: str = ""
    """The latest hash of the chain in state_hashes.jsonl."""


@dataclass
class TrainingRun:
    """All parts of a run; `student` and `optimizer` are prepared by Accelerate."""

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
    """Masks of a pruned student; None for a dense one."""
    adapter_base: AdapterBase | None = None
    """The weights that adapters were trained on top of; None if all weights are trained."""
    init_report: dict[str, Any] | None = None
    """How the initial weights were adapted; None for random weights and a resumed run."""
    teacher_predictions: Tensor | None = None
    """Classes that the teachers predict on the validation split, int64 [N]."""
    check_lock: Callable[[], None] | None = None
    """Raises if another process has taken the folder; set in the main process."""
    in_callback: bool = False
    """Whether a callback of the user is called; its errors are not those of the training."""
    num_view_epochs: int | None = None
    """Number of epochs of views that are reused cyclically; None: each epoch has its own."""
