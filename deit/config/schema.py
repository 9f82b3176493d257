"""The configuration of a run: frozen sections of typed fields."""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deit.config.field_types import STRICT
from deit.config.sections.data import DataConfig
from deit.config.sections.init import InitConfig
from deit.config.sections.loss import LossConfig
from deit.config.sections.optim import OptimConfig
from deit.config.sections.run import RunConfig
from deit.config.sections.student import StudentConfig
from deit.config.sections.teacher import TeacherConfig
from deit.config.sections.views import ViewsConfig


class EvalSettings(NamedTuple):
    """The settings of an evaluation on validation or test images.

    image_size: side of the student's input [px].
    crop_pct: side of the center crop, as a fraction of the resized image.
    batch_size: images per batch and process.
    num_workers: decoding processes; None: by the number of cores.
    """

    image_size: int
    crop_pct: float
    batch_size: int
    num_workers: int | None


@dataclass(frozen=True)
class Config:
    """The configuration of a run, in sections."""

    __pydantic_config__ = STRICT
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    init: InitConfig = field(default_factory=InitConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def views_seed(self) -> int:
        """The seed of order and views: views.seed, or run.seed."""
        return self.run.seed if self.views.seed is None else self.views.seed

    @property
    def evaluation(self) -> EvalSettings:
        """The settings of evaluations on validation and test images."""
        return EvalSettings(
            image_size=self.student.image_size,
            crop_pct=self.views.eval_crop_pct,
            batch_size=self.run.eval_batch_size,
            num_workers=self.data.num_workers,
        )

    def replace(self, **sections: dict[str, Any] | object) -> "Config":
        """Return a copy with some fields or sections replaced.

        sections: by section name, a dict of field values, or a whole new section.
        Raises TypeError for an unknown section or field. Values are checked when a run starts.

        >>> from deit.config.recipes import find_recipe
        >>> config = find_recipe("digits").replace(optim={"lr": 2e-3, "epochs": 20})
        >>> config.optim.lr, config.optim.epochs, config.optim.batch_size
        (0.002, 20, 32)
        """
        new = {
            name: dataclasses.replace(getattr(self, name), **fields)
            if isinstance(fields, dict)
            else fields
            for name, fields in sections.items()
        }
        return dataclasses.replace(self, **new)


RESUMABLE_FIELDS = (
    "data.root",
    "data.exclude_list",  # compared by the fingerprint of the images
    "data.download",
    "data.memory_fraction",
    "data.num_workers",
    "teacher.target_stores",  # compared by the digest of the stores
    "teacher.source",  # compared by the digest of the weights
    "optim.grad_accum_steps",  # the batch size stays the same
    "run.device",
    "teacher.memory_format",
    "run.linear_backend",
    "run.compile",
    "run.activation_checkpointing",
    "run.sharding",
    "run.eval_batch_size",
    "run.save_every_steps",
    "run.num_checkpoints",
    "run.keep_steps",
    "run.auto_micro_batch",
    "run.max_nonfinite_steps",
    "run.trackers",
    "run.timeout_s",
)
"""Fields that a resumed run may change: they choose where and how to compute, not what."""


SPLIT_FIELDS = ("source", "root", "reader", "classes", "exclude_list", "split_seed")
SPLIT_FIELDS += ("validation_fraction", "test_fraction")
"""Fields of DataConfig that decide which images are in which split."""


def differing_split_field(first: DataConfig, second: DataConfig) -> str | None:
    """Return the first field by which the splits differ; None if they have the same images."""
    for leaf in SPLIT_FIELDS:
        values = [getattr(data, leaf) for data in (first, second)]
        if leaf == "root":
            values = [os.path.realpath(value) * (first.source != "digits") for value in values]
        if values[0] != values[1]:
            return f"data.{leaf}"
    return None


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the configuration as nested dicts, ready for JSON."""
    return dataclasses.asdict(config)
