"""Build everything that a training run needs from its resolved configuration."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from deit.config.schema import Config
from deit.config.sections.optim import OptimConfig
from deit.config.sections.run import RunConfig
from deit.core.accelerator import compile_module
from deit.core.console import info
from deit.core.errors import ConfigError, DataError, is_out_of_memory
from deit.core.sharding import device_mesh, shard_degree, shard_model
from deit.datasets.splits import load_splits
from deit.distill.build import build_train_loader, model_info_from
from deit.distill.student_init import init_masks, init_student
from deit.models.metadata import base_of
from deit.models.onednn_linear import use_onednn
from deit.models.parameters import freeze_except, layer_depths
from deit.models.saved_student import ModelInfo, student_from_info
from deit.models.student import Student, has_distillation_head
from deit.models.surgery.pruning_masks import Masks, PruningMasks
from deit.training.memory import recomputes
from deit.training.optimizer import EMA, build_optimizer, layer_lr_scales
from deit.training.resolve import ResolvedConfig, resolve
from deit.training.state import TrainingRun, TrainState

_NO_FOLDER = Path(os.devnull)


def build_run(config: Config) -> TrainingRun:
    """Build a run that writes no folder, for profiling, benchmarks and your own training loop.

    Teachers and stores are checked, and networks compiled if the configuration has run.compile.
    Raises the errors of deit.core.errors.

    Example:
        >>> from deit.config.recipes import find_recipe
        >>> from deit.core.console import quiet
        >>> with quiet():
        ...     run = build_run(find_recipe("digits"))
        >>> batch = next(run.loader.epoch(0))
        >>> output, teacher = run.student(batch.images), run.ensemble(batch)
        >>> output.class_logits.shape, teacher.logits.shape  # [B, C] and [B, teachers, C]
        (torch.Size([32, 10]), torch.Size([32, 1, 10]))
    """
    run = build(resolve(config), _NO_FOLDER)
    check_run_teachers(run)
    return run


def build(resolved: ResolvedConfig, out: Path) -> TrainingRun:
    """Build every part of a run. out: its folder, to which nothing is written here.

    Raises the errors of deit.core.errors; DataError if there are fewer validation images than
    processes.
    """
    config, accelerator, teachers = resolved.config, resolved.accelerator, resolved.teachers
    splits = load_splits(config.data)
    if len(splits.validation.labels) < accelerator.num_processes:
        raise DataError("data.validation_fraction: fewer validation images than processes")
    model_info = model_info_from(config.student, config.views, splits)
    teachers.load(splits.class_names, config.student.image_size, accelerator)
    loader = build_train_loader(
        config,
        splits,
        accelerator,
        teacher_size=teachers.input_size,
        with_teacher_images=None in teachers.stores,
    )
    _check_steps(config, loader.steps_per_epoch)
    bare_student, init_report, masks = _build_student(resolved, model_info)
    student, optimizer, average = _prepare(
        config, bare_student, accelerator, loader.steps_per_epoch
    )
    adapter_base = None
    if init_report is not None and config.optim.trainable == "adapters":
        source, weights = init_report["source"], init_report["weights"]
        adapter_base = base_of(source, weights, config.init.pos_embed_resize, out=out)
    return TrainingRun(
        config=config,
        out=out,
        accelerator=accelerator,
        splits=splits,
        model_info=model_info,
        teachers=teachers,
        ensemble=teachers.ensemble(splits, accelerator),
        loader=loader,
        student=student,
        optimizer=optimizer,
        average=average,
        state=TrainState(
            epoch=config.init.start_step // loader.steps_per_epoch,
            step=config.init.start_step,
            fingerprint=splits.fingerprint,
            targets=teachers.digests,
            teachers=teachers.weight_digests,
        ),
        masks=None if masks is None else PruningMasks(masks, bare_student.network),
        adapter_base=adapter_base,
        init_report=init_report,
    )


def _build_student(
    resolved: ResolvedConfig, model_info: ModelInfo
) -> tuple[Student, dict[str, Any] | None, Masks | None]:
    """Build the student on the CPU; return it, the report on its initial weights, and its masks."""
    config, loaded = resolved.config, resolved.init_weights
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        student = student_from_info(model_info)
    report = None
    if loaded is not None:
        report = init_student(student.network, loaded, config.init, model_info)
    freeze_except(student.network, config.optim.trainable)
    student.frozen_backbone = config.optim.trainable in ("heads", "adapters")
    if config.run.linear_backend == "onednn":
        use_onednn(student)
    if config.run.activation_checkpointing and not recomputes(student.network):
        raise ConfigError(
            f"run.activation_checkpointing = True: {config.student.name} has no blocks to "
            "recompute; --optim.grad_accum_steps saves memory too"
        )
    masks = None
    # A resumed run has its masks in the checkpoint; adapters leave masked weights as they are.
    if not resolved.resuming and config.optim.trainable != "adapters":
        masks = init_masks(config.init, loaded, student.network)
    return student, report, masks


def _prepare(
    config: Config, student: Student, accelerator: Accelerator, steps_per_epoch: int
) -> tuple[nn.Module, torch.optim.Optimizer, EMA | None]:
    """Move the student to its device or shard it; return it and its optimizer as Accelerate's, and
    its EMA."""
    degree = shard_degree(config.run.sharding, accelerator.num_processes)
    if degree == 1:  # a sharded student never has to fit one device as a whole
        student = student.to(accelerator.device)
    _check_student(config, student)
    average = None
    if config.optim.ema_epochs > 0:
        # Copied before Accelerate binds its own forward to the student.
        horizon = config.optim.ema_epochs * steps_per_epoch
        average = EMA(student, horizon=horizon, device=accelerator.device)
    if degree > 1:
        models = [student] if average is None else [student, average.model]
        _shard(config.run, accelerator, degree, models)
    optimizer = build_optimizer(student, config.optim, _lr_scales(config.optim, student))
    if config.run.compile != "none":
        compile_module(student, config.run.compile)
    prepared = accelerator.prepare_model(student, evaluation_mode=degree > 1)  # FSDP excludes DDP
    return prepared, accelerator.prepare_optimizer(optimizer), average


def _shard(run: RunConfig, accelerator: Accelerator, degree: int, models: list[Student]) -> None:
    """Shard models over `degree` processes each, in place."""
    mesh = device_mesh(degree, accelerator.num_processes, accelerator.device, run.timeout_s)
    for model in models:
        shard_model(model, mesh, compressed=run.gradient_compression == "bf16")


def _lr_scales(optim: OptimConfig, student: Student) -> dict[str, float] | None:
    """Return the learning rate factor of each parameter; None if all are 1."""
    if optim.layer_decay == 1:
        return None
    scales = layer_lr_scales(layer_depths(student.network), optim.layer_decay)
    return {f"network.{name}": scale for name, scale in scales.items()}


def _check_steps(config: Config, steps_per_epoch: int) -> None:
    """Raise ConfigError if a step that the configuration names is after the last."""
    num_steps = config.optim.epochs * steps_per_epoch
    if config.init.start_step >= num_steps:
        raise ConfigError(
            f"init.start_step = {config.init.start_step}: the run has {num_steps} steps"
        )
    if late := [step for step in config.run.keep_steps if step > num_steps]:
        raise ConfigError(f"run.keep_steps = {late[0]}: the run has {num_steps} steps")


def _check_student(config: Config, student: Student) -> None:
    """Check what the name of a timm model does not show: its heads and image size.

    Raises ConfigError.
    """
    name, size = config.student.name, config.student.image_size
    distilled = config.loss.kind != "none" and config.loss.head == "distillation"
    if distilled and not has_distillation_head(student.network):
        raise ConfigError(f"student.name = {name!r}: has no distillation head; use --loss.head all")
    images = torch.zeros(2, 3, size, size, device=next(student.parameters()).device)
    try:
        with torch.no_grad():
            student.eval()(images)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"student.image_size = {size}: {name} cannot take images of this size "
            f"({str(error).splitlines()[0]})"
        ) from None


def check_run_teachers(run: TrainingRun) -> None:
    """Check teachers and stores; then compile the networks that run in training."""
    teachers, views = run.teachers, run.config.views
    run.teacher_predictions = teachers.check(
        run.splits, run.accelerator, run.loader, run.config.evaluation
    )
    if not views.has_fixed_teacher_view:
        run.num_view_epochs = teachers.num_stored_epochs
    num_epochs = run.config.optim.epochs
    if run.num_view_epochs is not None and run.num_view_epochs < num_epochs:
        info(
            f"targets   only {run.num_view_epochs} of {num_epochs} epochs are stored: their views "
            "are reused cyclically, an approximation"
        )
    if run.config.run.compile != "none" and run.ensemble is not None:
        run.ensemble.compile(run.config.run.compile)  # last: the checks use other batch sizes
