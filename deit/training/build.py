"""Build everything that a training run needs from its configuration."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from deit.config.schema import Config
from deit.core.accelerator import compile_module
from deit.core.errors import ConfigError, DataError, is_out_of_memory
from deit.core.sharding import device_mesh, shard_degree, shard_model
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import load_splits
from deit.distill.build import build_accelerator, model_info_from
from deit.distill.run_teachers import RunTeachers
from deit.distill.student_init import (
    init_masks,
    init_student,
    load_init_weights,
    with_init_normalization,
)
from deit.models.adapt_weights import LoadedWeights
from deit.models.metadata import AdapterBase, base_of
from deit.models.onednn_linear import resolve_linear_backend, use_onednn
from deit.models.parameters import freeze_except, layer_depths
from deit.models.saved import ModelInfo, build_student
from deit.models.student import Student, has_distillation_head
from deit.models.surgery.pruning_masks import PruningMasks
from deit.training.memory import recomputes
from deit.training.optimizer import EMA, build_optimizer, layer_lr_scales
from deit.training.state import TrainingRun, TrainState


def build_run(config: Config) -> TrainingRun:
    """The parts of a run that is only to be looked at: as `train` builds them, teachers and stores
    checked, networks compiled if that is asked for; nothing is written, `out` is no folder.

    Raises the errors of deit.core.errors.
    """
    found = load_init_weights(config)
    config = with_init_normalization(config, found)
    accelerator = build_accelerator(config.run, grad_accum_steps=config.optim.grad_accum_steps)
    config = config.replace(run={"linear_backend": resolve_linear_backend(config.run, accelerator)})
    faculty = RunTeachers(config)
    run = build(config, Path("nowhere"), accelerator, faculty, found)
    check_run_teachers(run, faculty)
    return run


def build(
    config: Config,
    out: Path,
    accelerator: Accelerator,
    faculty: RunTeachers,
    init_weights: LoadedWeights | None,
    *,
    resumed: bool = False,
) -> TrainingRun:
    """Build every part of a run. found: what the student starts from; None: random weights.
    resumed: whether a checkpoint will bring weights and masks."""
    splits = load_splits(config.data)
    if len(splits.validation.labels) < accelerator.num_processes:
        raise DataError("data.validation_fraction: fewer validation images than processes")
    facts = model_info_from(config, splits)
    loader, panel = faculty.load(splits, accelerator)
    _check_update(config, loader)
    student, notes = _student(config, facts, init_weights)
    masks = None if resumed else init_masks(config, init_weights, student.network)
    pieces = shard_degree(config.run.sharding, accelerator.num_processes)
    if pieces == 1:  # else no device is asked to hold it whole, not even for a moment
        student = student.to(accelerator.device)
    _check_student(config, student)
    average = None
    if config.optim.ema_epochs > 0:
        # Copied before Accelerate binds its own forward to the student.
        horizon = config.optim.ema_epochs * loader.steps_per_epoch
        average = EMA(student, horizon=horizon, device=accelerator.device)
    if pieces > 1:
        _shard(config, accelerator, pieces, [student, *([average.model] if average else [])])
    held = None if masks is None else PruningMasks(masks, student.network)
    optimizer = build_optimizer(student, config.optim, _scales(config, student))
    if config.run.compile != "none":
        compile_module(student, config.run.compile)
    student = accelerator.prepare_model(student, evaluation_mode=pieces > 1)  # then not in DDP too
    optimizer = accelerator.prepare_optimizer(optimizer)
    return TrainingRun(
        config=config,
        out=out,
        accelerator=accelerator,
        splits=splits,
        facts=facts,
        panel=panel,
        loader=loader,
        student=student,
        optimizer=optimizer,
        average=average,
        state=TrainState(
            epoch=config.init.start_step // loader.steps_per_epoch,
            step=config.init.start_step,
            fingerprint=splits.fingerprint,
            targets=faculty.digests,
            teachers=faculty.weight_digests,
        ),
        masks=held,
        adapter_base=None if notes is None else _base_of(config, out, notes),
        init_report=notes,
    )


def _shard(config: Config, accelerator: Accelerator, pieces: int, models: list[Student]) -> None:
    """Shard student and average among `pieces` processes each, in place."""
    mesh = device_mesh(pieces, accelerator.num_processes, accelerator.device, config.run.timeout_s)
    for model in models:
        shard_model(model, mesh, compressed=config.run.gradient_compression == "bf16")


def _student(
    config: Config, facts: ModelInfo, init_weights: LoadedWeights | None
) -> tuple[Student, dict[str, Any] | None]:
    """Build the student as its configuration says, on the CPU; return it and what was initialized
    how."""
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        student = build_student(facts)
    notes = None
    if init_weights is not None:
        notes = init_student(student.network, init_weights, config, facts)
    freeze_except(student.network, config.optim.trainable)
    student.frozen_backbone = config.optim.trainable in ("heads", "adapters")
    if config.run.linear_backend == "onednn":
        use_onednn(student)
    if config.run.activation_checkpointing:
        _recompute(config, student.network)
    return student, notes


def _base_of(config: Config, out: Path, notes: dict[str, Any]) -> AdapterBase | None:
    """What adapters that are trained alone belong to. notes: what `begin` gave."""
    if config.optim.trainable != "adapters":
        return None
    return base_of(notes["source"], notes["weights"], config.init.pos_embed_resize, out=out)


def _check_update(config: Config, loader: TrainLoader) -> None:
    """Refuse to begin behind the end. Raises ConfigError."""
    updates = config.optim.epochs * loader.steps_per_epoch
    if config.init.start_step >= updates:
        raise ConfigError(
            f"init.start_step = {config.init.start_step}: the run has {updates} updates"
        )
    if late := [one for one in config.run.keep_steps if one > updates]:
        raise ConfigError(f"run.keep_steps = {late[0]}: the run has {updates} updates")


def _recompute(config: Config, network: nn.Module) -> None:
    """Have a network compute its blocks again in the backward pass. Raises ConfigError."""
    if not recomputes(network):
        raise ConfigError(
            f"run.activation_checkpointing = True: {config.student.name} has no blocks that it "
            "could compute "
            "again; --optim.grad_accum_steps saves memory too"
        )


def _scales(config: Config, student: nn.Module) -> dict[str, float] | None:
    """The factor of the learning rate of each of the student's parameters; None: 1 for all."""
    if config.optim.layer_decay == 1:
        return None
    scales = layer_lr_scales(layer_depths(student.network), config.optim.layer_decay)
    return {f"network.{name}": scale for name, scale in scales.items()}


def _check_student(config: Config, student: nn.Module) -> None:
    """What the name of a timm model cannot promise, the built network must show."""
    name, side = config.student.name, config.student.image_size
    taught = config.loss.kind != "none" and config.loss.head == "distillation"
    if taught and not has_distillation_head(student.network):
        raise ConfigError(f"student.name = {name!r}: has no distillation head to distil through")
    images = torch.zeros(2, 3, side, side, device=next(student.parameters()).device)
    try:
        with torch.no_grad():
            student.eval()(images)
    except RuntimeError as error:
        if is_out_of_memory(error):  # which says nothing of the size
            raise
        raise ConfigError(
            f"student.image_size = {side}: {name} cannot take images of this size "
            f"({str(error).splitlines()[0]})"
        ) from None


def check_run_teachers(run: TrainingRun, faculty: RunTeachers) -> None:
    """Check teachers and stores, and have the networks compiled that stay."""
    run.teacher_predictions = faculty.check(run.splits, run.accelerator, run.loader)
    run.num_view_epochs = faculty.num_stored_epochs
    if run.config.run.compile != "none" and run.panel is not None:
        run.panel.compile(run.config.run.compile)  # not before: it was shown other batches
