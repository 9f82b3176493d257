"""Resolve a configuration: make every choice of a run once, in one place."""

from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from deit.config.schema import Config
from deit.config.validation import load_config
from deit.core import run_folder
from deit.distill.build import build_accelerator
from deit.distill.run_teachers import RunTeachers, check_inputs
from deit.distill.student_init import load_init_weights, with_init_normalization
from deit.models.adapt_weights import LoadedWeights
from deit.models.onednn_linear import resolve_linear_backend


class ResolvedConfig(NamedTuple):
    """A configuration with every choice made, and what had to be opened to make them.

    config: nothing in it changes any more, but optim.grad_accum_steps under run.auto_micro_batch,
    which is measured on the built run. init_weights: None for random weights and a resumed run,
    whose checkpoint has the weights.
    """

    config: Config
    accelerator: Accelerator
    teachers: RunTeachers
    init_weights: LoadedWeights | None
    resuming: bool


def resolve(config: Config, *, resume_from: Path | None = None) -> ResolvedConfig:
    """Make every choice that a validated configuration leaves open.

    These are the normalization (that of the initial weights), device, precision and processes, and
    the implementation of linear layers. resume_from: the folder of a run to resume.
    Raises the errors of deit.core.errors.

    Example:
        >>> from deit.config.recipes import find_recipe
        >>> resolved = resolve(find_recipe("digits"))
        >>> resolved.teachers.live_sources, resolved.config.run.linear_backend != "auto"
        (['checkpoints/digits-teacher'], True)
    """
    resuming = resume_from is not None
    # The initial weights of a resumed run are in its checkpoint; their file can be gone.
    init_weights = None if resuming else load_init_weights(config.init)
    if resuming:
        config = _with_normalization_of(config, resume_from)
    else:
        config = with_init_normalization(config, init_weights)
    accelerator = build_accelerator(config.run, grad_accum_steps=config.optim.grad_accum_steps)
    backend = resolve_linear_backend(config.run, accelerator)
    config = config.replace(run={"linear_backend": backend})
    teachers = RunTeachers(config.teacher, config.loss)
    check_inputs(teachers.live_sources, config.data)
    return ResolvedConfig(config, accelerator, teachers, init_weights, resuming)


def _with_normalization_of(config: Config, out: Path) -> Config:
    """Return the configuration with the normalization that the run in `out` took from its initial
    weights."""
    if config.init.weights is None or config.views.mean is not None:
        return config
    before = load_config(out / run_folder.CONFIG).views
    return config.replace(views={"mean": before.mean, "std": before.std})
