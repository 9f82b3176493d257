"""Log a training run: its setup before the first step, and a line for each epoch."""

import os
from typing import Any

import torch
from accelerate import Accelerator

from deit.config.schema import Config
from deit.config.sections.loss import LossConfig
from deit.config.sections.optim import OptimConfig
from deit.core.console import (
    count_noun,
    format_count,
    format_duration,
    format_percent,
    info,
    terminal_width,
    warn,
)
from deit.core.hardware import num_cores
from deit.core.sharding import shard_degree
from deit.datasets.decode_workers import resolve_num_workers
from deit.datasets.images import InMemoryImages
from deit.models.parameters import count_parameters
from deit.models.surgery.fake_quant import fake_quant_layers
from deit.models.surgery.pruning_masks import mask_summary
from deit.training.save import selection_name
from deit.training.state import TrainingRun
from deit.viz.tables import head_name


def log_setup(run: TrainingRun, environment: dict[str, Any]) -> None:
    """Log the setup of a run, with the arithmetic of batch size, steps and learning rate."""
    config, optim, loader = run.config, run.config.optim, run.loader
    splits, accelerator = run.splits, run.accelerator
    network = accelerator.unwrap_model(run.student).network
    views = loader.steps_per_epoch * optim.batch_size
    num_processes = accelerator.num_processes
    processes = count_noun(num_processes, "process")
    info(
        f"student   {config.student.name}: {format_count(count_parameters(network))} parameters, "
        f"input {config.student.image_size} px"
    )
    _log_student(run)
    if run.ensemble is None:
        info("teacher   none (loss.kind none)")
    info(
        f"data      {config.data.source}: {len(splits.class_names)} classes; "
        f"{len(splits.train.labels)} train, {len(splits.validation.labels)} validation, "
        f"{len(splits.test.labels)} test" + "".join(f"; {note}" for note in splits.notes)
    )
    for note in splits.skipped:
        info(f"          {note}")
    info(
        f"batch     {optim.batch_size} = {processes} x "
        f"{optim.grad_accum_steps} accumulated x {loader.micro_batch_size}; per epoch "
        f"{loader.steps_per_epoch} steps and {views} views of {loader.images_per_epoch} different "
        f"images (of {len(splits.train.labels)})"
    )
    info(f"views     {_views_text(run)}")
    _warn_of_enlarged_images(run.config)
    info(f"schedule  {schedule_of(optim)}")
    threads = environment["threads"]
    info(
        f"hardware  {environment['device_name']}, {environment['precision']}, "
        f"{count_noun(threads, 'thread')}"
        f"{', linear layers by oneDNN' * (config.run.linear_backend == 'onednn')}; seed "
        f"{config.run.seed}"
    )
    degree = shard_degree(config.run.sharding, num_processes)
    if degree > 1:
        info(
            f"          student, gradients and optimizer sharded over {degree} processes "
            f"(run.sharding {config.run.sharding})"
        )
    _warn_of_idle_cores(accelerator)
    if not config.student.is_transformer:
        return
    tokens = (config.student.image_size // config.student.patch_size) ** 2
    if tokens < 16:
        warn(
            f"student.patch_size = {config.student.patch_size} leaves {tokens} patch tokens of a "
            f"{config.student.image_size} px image; fewer than 16 rarely train well"
        )


def schedule_of(optim: OptimConfig) -> str:
    """Return epochs, peak learning rate and warm-up as text."""
    base = optim.lr_base_batch_size
    arithmetic = f" = {optim.lr:g} x {optim.batch_size} / {base}" if base else ""
    return (
        f"{count_noun(optim.epochs, 'epoch')}, peak learning rate {optim.peak_lr:.3g}{arithmetic}, "
        f"warm-up {optim.warmup_epochs:g} epochs"
    )


def _log_student(run: TrainingRun) -> None:
    """Log initial weights, sparsity, fake quantization, and which weights are trained."""
    report, optim = run.init_report, run.config.optim
    network = run.accelerator.unwrap_model(run.student).network
    if report is not None:
        info(f"init      {report['description']}")
        for note in report["notes"]:
            info(f"          {note}")
    if run.masks is not None:
        summary = mask_summary(run.masks.masks)
        zero = format_percent(1 - summary["kept"] / summary["total"])
        num_layers = len(run.masks.masks)
        info(f"sparsity  {zero} % of {summary['total']:,} weights in {num_layers} layers are 0")
    if run.config.student.qat != "none":
        num_layers = len(fake_quant_layers(network))
        info(f"qat       {num_layers} layers, quantized as in a {run.config.student.qat} file")
    if (step := run.config.init.start_step) and report is not None:  # not in a resumed run
        info(f"          starts at step {step} of schedule, order and views")
    details = [] if optim.trainable == "all" else [f"{optim.trainable} only"]
    if optim.layer_decay < 1:
        details.append(f"learning rate times {optim.layer_decay:g} per layer below the heads")
    if details:
        num_parameters = count_parameters(network, trainable=True)
        info(f"trainable {'; '.join(details)}: {num_parameters:,} parameters")


def _views_text(run: TrainingRun) -> str:
    """Return sizes, storage and augmentation of the views as text."""
    views, sizes, images = run.config.views, run.loader.sizes, run.splits.train
    size = f"made at {sizes.view} px"
    if sizes.view != sizes.student:
        size += f", student {sizes.student} px"
    if run.ensemble is not None and sizes.teacher != sizes.student:
        size += f", teacher {sizes.teacher} px"
    if run.ensemble is not None and views.teacher_view != "same":
        size += f", teacher view: {_TEACHER_VIEWS[views.teacher_view]}"
    parts = [size]
    if isinstance(images, InMemoryImages):
        gib = images.pixels.numel() / 2**30
        parts.append(f"images held in memory at {images.pixels.shape[-1]} px ({gib:.2f} GiB)")
        if run.config.data.num_workers:
            parts.append("data.num_workers has no effect")
    else:
        num_workers = resolve_num_workers(run.config.data.num_workers)
        workers = count_noun(num_workers, "worker") if num_workers else "the training process"
        parts.append(f"images decoded by {workers}")
    steps = {
        f"crop {views.crop}": views.crop != "none",
        f"flip {views.flip:g}": views.flip > 0,
        f"rotation {views.rotation:g}": views.rotation > 0,
        views.auto_augment: views.auto_augment != "none",
        f"color jitter {views.color_jitter:g}": views.color_jitter > 0,
        f"erasing {views.erasing_prob:g}": views.erasing_prob > 0,
        f"mixup {views.mixup_alpha:g}": views.mixup_alpha > 0,
        f"cutmix {views.cutmix_alpha:g}": views.cutmix_alpha > 0,
        f"{views.aug_repeats} views of an image in a batch": views.aug_repeats > 1,
    }
    parts.append(", ".join(step for step, on in steps.items() if on) or "no augmentation")
    if views.eval_crop_pct < 1:
        side = round(sizes.student / views.eval_crop_pct)
        parts.append(f"evaluation resizes to {side} px and crops the center")
    return "; ".join(parts)


def _warn_of_enlarged_images(config: Config) -> None:
    """Warn if an evaluation enlarges images that are stored in the student's size, and crops them:
    a recipe's crop for larger images has no use then, and takes away the border."""
    side, crop = config.student.image_size, config.views.eval_crop_pct
    if crop < 1 and config.data.image_size <= side:
        warn(
            f"views.eval_crop_pct = {crop:.3g}: an evaluation enlarges images of "
            f"{config.data.image_size} px (data.image_size) to {round(side / crop)} px and crops "
            f"{side} px; use 1 for whole images, or a larger data.image_size"
        )


_TEACHER_VIEWS = {
    "independent": "sampled independently",
    "resized": "always the whole image",
    "center": "always the center",
    "crops": "mean over crops",
}


def _warn_of_idle_cores(accelerator: Accelerator) -> None:
    """Warn if `accelerate launch`, which sets OMP_NUM_THREADS=1, leaves cores idle."""
    cores = num_cores()
    is_single = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if (
        is_single
        and "ACCELERATE_MIXED_PRECISION" in os.environ
        and torch.get_num_threads() == 1 < cores
    ):
        warn(
            f"accelerate launch limits this process to one thread on {cores} cores; plain python, "
            f"or OMP_NUM_THREADS={cores} accelerate launch ..., is faster"
        )


_LOSS_TERMS = {
    "label_loss": "labels",
    "distillation_loss": "teacher",
    "class_head_loss": "class head",
    "distillation_head_loss": "distillation head",
}
"""What the terms of the loss are called in log lines."""


def log_epoch(
    row: dict[str, Any],
    epochs: int,
    loss: LossConfig,
    *,
    before: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Log one line for a finished epoch from its metrics.

    On a terminal, details are left out until the line fits; metrics.jsonl has them all. before:
    epochs and seconds before the run was resumed: on another machine, they could be slower.
    """
    width = terminal_width()
    lines = [_epoch_line(row, epochs, loss, before, details) for details in (4, 3, 2, 1, 0)]
    info(next((line for line in lines if width is None or len(line) <= width), lines[-1]))


def _epoch_line(
    row: dict[str, Any],
    epochs: int,
    loss: LossConfig,
    before: tuple[float, float],
    details: int,
) -> str:
    """Return the line of an epoch.

    details: 4: all; fewer: without terms of the loss, share of the loader, agreement, and all heads
    but the one that selects the best weights.
    """
    train = row["train"]
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}", f"loss {train['loss']:.3f}"]
    terms = _loss_terms(train, loss)
    if len(terms) > 1 and details > 3:
        parts[-1] += f" ({', '.join(terms)})"
    if "validation" in row:
        selecting = selection_name(row["validation"])
        accuracies = [
            f"{head_name(name.removesuffix('_top1'))} {format_percent(value)}"
            for name, value in row["validation"].items()
            if details > 1 or (name.endswith("_top1") if details else name == selecting)
        ]
        parts.append(f"validation {', '.join(accuracies)}")
    if "loader" in row:  # absent if the run was stopped between training and evaluation
        speed = f"{row['images_per_s']:.0f} images/s"
        if details > 2:
            speed += f" ({format_percent(row['loader']['share'])} % of time in loader)"
        parts.append(speed)
    done, seconds = row["epoch"] - before[0], row["seconds"] - before[1]
    if done <= 0:  # this process has only evaluated
        done, seconds = row["epoch"], row["seconds"]
    parts.append(f"ETA {format_duration(seconds / done * (epochs - row['epoch']))}")
    return " | ".join(parts)


def _loss_terms(train: dict[str, Any], loss: LossConfig) -> list[str]:
    """Return the terms of the loss as text, without those of weight 0."""
    return [
        f"{_LOSS_TERMS.get(name, name.replace('_', ' '))} {value:.3f}"
        for name, value in train.items()
        if name != "loss"
        and "loss" in name
        and not (name == "label_loss" and loss.effective_label_weight == 0)
    ]
