"""What a training run says: before the first step, and after each epoch."""

import os
from typing import Any

import torch
from accelerate import Accelerator

from deit.config.schema import LossConfig, OptimConfig
from deit.core.console import count_noun, format_count, format_duration, format_percent, info, warn
from deit.core.hardware import num_cores
from deit.core.sharding import shard_degree
from deit.datasets.decode_workers import worker_count
from deit.datasets.images import InMemoryImages
from deit.models.parameters import count_parameters
from deit.models.surgery.fake_quant import fake_quant_layers
from deit.models.surgery.pruning_masks import mask_summary
from deit.training.state import TrainingRun


def log_setup(run: TrainingRun, environment: dict[str, Any]) -> None:
    """Print what is about to happen, with the arithmetic people get wrong."""
    config, optim, loader = run.config, run.config.optim, run.loader
    splits, accelerator = run.splits, run.accelerator
    network = accelerator.unwrap_model(run.student).network
    views = loader.steps_per_epoch * optim.batch_size
    number = accelerator.num_processes
    processes = count_noun(number, "process")
    info(
        f"student   {config.student.name}: {format_count(count_parameters(network))} parameters, "
        f"input {config.student.image_size} px"
    )
    _of_start(run)
    if run.ensemble is None:
        info("teacher   none (loss.kind none)")
    info(
        f"data      {config.data.source}: {len(splits.class_names)} classes; "
        f"{len(splits.train.labels)} train, {len(splits.validation.labels)} validation, "
        f"{len(splits.test.labels)} test" + "".join(f"; {note}" for note in splits.notes)
    )
    for note in splits.passed:
        info(f"          {note}")
    info(
        f"batch     {optim.batch_size} = {processes} x "
        f"{optim.grad_accum_steps} accumulated x {loader.block}; {loader.steps_per_epoch} updates "
        "and "
        f"{views} views of {loader.images_per_epoch} unique images (of "
        f"{len(splits.train.labels)}) an epoch"
    )
    info(f"views     {_of_views(run)}")
    info(f"schedule  {schedule_of(optim)}")
    threads = environment["threads"]
    info(
        f"machine   {environment['device_name']}, {environment['precision']}, "
        f"{count_noun(threads, 'thread')}"
        f"{', linear layers by oneDNN' * (config.run.linear_backend == 'onednn')}; seed "
        f"{config.run.seed}"
    )
    pieces = shard_degree(config.run.sharding, number)
    if pieces > 1:
        info(
            f"          student, gradients and optimizer divided into {pieces} parts "
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
    """Epochs, learning rate and warm-up in words."""
    scaled = optim.lr_base_batch_size
    arithmetic = f" = {optim.lr:g} x {optim.batch_size} / {scaled}" if scaled else ""
    return (
        f"{optim.epochs} epochs, peak learning rate {optim.peak_lr:.3g}{arithmetic}, "
        f"warm-up {optim.warmup_epochs:g} epochs"
    )


def _of_start(run: TrainingRun) -> None:
    """What the student starts from, everything that was done to it, and what is trained."""
    notes, optim = run.init_report, run.config.optim
    if notes is not None:
        info(f"start     {notes['found']}")
        for note in notes["notes"]:
            info(f"          {note}")
    if run.masks is not None:
        summary = mask_summary(run.masks.masks)
        zero = format_percent(1 - summary["kept"] / summary["total"])
        info(f"pruned    {zero} % of {summary['total']:,} weights in {len(run.masks.masks)} layers")
    if run.config.student.qat != "none":
        network = run.accelerator.unwrap_model(run.student).network
        number = len(fake_quant_layers(network))
        info(f"rounded   {number} layers, as the {run.config.student.qat} file computes them")
    if (update := run.config.init.start_step) and notes is not None:  # not of a resumed run
        info(f"          begins at update {update}: schedule, order and views of those before pass")
    notes = [] if optim.trainable == "all" else [f"{optim.trainable} only"]
    if optim.layer_decay < 1:
        notes.append(f"learning rate times {optim.layer_decay:g} a layer from the heads down")
    if notes:
        network = run.accelerator.unwrap_model(run.student).network
        number = count_parameters(network, trainable=True)
        info(f"trained   {'; '.join(notes)}: {number:,} parameters")


def _of_views(run: TrainingRun) -> str:
    """Sizes, where the images lie, and what is done to them."""
    views, sizes, images = run.config.views, run.loader.sizes, run.splits.train
    words = [f"{sizes.view} px"]
    if sizes.view != sizes.student:
        words[0] += f", student {sizes.student} px"
    if run.ensemble is not None and sizes.teacher != sizes.student:
        words[0] += f", teacher {sizes.teacher} px"
    if run.ensemble is not None and views.teacher_view != "same":
        words[0] += f", the teacher's {_TEACHER_VIEWS[views.teacher_view]}"
    if isinstance(images, InMemoryImages):
        format_gib = images.pixels.numel() / 2**30
        words.append(f"from {images.pixels.shape[-1]} px in memory ({format_gib:.2f} GiB)")
        if run.config.data.num_workers:
            words.append("data.num_workers are not used")
    else:
        number = worker_count(run.config.data.num_workers)
        workers = {0: "the training process", 1: "1 worker"}.get(number, f"{number} workers")
        words.append(f"decoded by {workers}")
    steps = {
        f"crop {views.crop}": views.crop != "none",
        f"flip {views.flip:g}": views.flip > 0,
        f"rotation {views.rotation:g}": views.rotation > 0,
        views.auto_augment: views.auto_augment != "none",
        f"colour jitter {views.color_jitter:g}": views.color_jitter > 0,
        f"erasing {views.erasing_prob:g}": views.erasing_prob > 0,
        f"mixup {views.mixup_alpha:g}": views.mixup_alpha > 0,
        f"cutmix {views.cutmix_alpha:g}": views.cutmix_alpha > 0,
        f"{views.aug_repeats} views of an image in a batch": views.aug_repeats > 1,
    }
    words.append(", ".join(step for step, on in steps.items() if on) or "plain")
    return "; ".join(words)


_TEACHER_VIEWS = {
    "independent": "drawn apart",
    "resized": "always the whole image",
    "center": "always the centre",
    "crops": "a mean over crops",
}


def _warn_of_idle_cores(accelerator: Accelerator) -> None:
    """`accelerate launch` sets OMP_NUM_THREADS=1 unasked: a lone process then idles the others."""
    number = num_cores()
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if (
        alone
        and "ACCELERATE_MIXED_PRECISION" in os.environ
        and torch.get_num_threads() == 1 < number
    ):
        warn(
            f"accelerate launch left this process one thread of {number}; plain python, or "
            f"OMP_NUM_THREADS={number} accelerate launch ..., is faster"
        )


def log_epoch(row: dict[str, Any], epochs: int, loss: LossConfig) -> None:
    """One line for a finished epoch, from its row of metrics; a term without weight is left out."""
    train = row["train"]
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}", f"loss {train['loss']:.3f}"]
    named = [
        f"{name.removeprefix('loss_')} {value:.3f}"
        for name, value in train.items()
        if name.startswith("loss_")
        and not (name == "loss_class" and loss.effective_label_weight == 0)
    ]
    if len(named) > 1:
        parts[-1] += f" ({', '.join(named)})"
    if "validation" in row:
        shown = [
            f"{name.removesuffix('_top1')} {format_percent(value)}"
            for name, value in row["validation"].items()
        ]
        parts.append(f"validation {', '.join(shown)}")
    remaining = row["seconds"] / row["epoch"] * (epochs - row["epoch"])
    if "loader" in row:  # not in an epoch that was trained before a stop, and evaluated after it
        loading = format_percent(row["loader"]["share"])
        parts.append(f"{row['images_per_s']:.0f} images/s (loader {loading} %)")
    parts.append(f"ETA {format_duration(remaining)}")
    info(" | ".join(parts))
