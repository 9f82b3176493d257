"""What a training run says: before the first step, and after each epoch."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from deit.config import LossConfig, OptimConfig, is_transformer, label_weight, peak_lr
from deit.console import clock, percent, say, warn
from deit.datasets.images import Images
from deit.datasets.reading import worker_count
from deit.models.masks import told_of
from deit.models.rounding import rounded_layers
from deit.parts import Parts
from deit.processor import cores
from deit.sharding import number_of_parts


def announce(parts: Parts, environment: dict[str, Any]) -> None:
    """Print what is about to happen, with the arithmetic people get wrong."""
    config, optim, loader = parts.config, parts.config.optim, parts.loader
    splits, accelerator = parts.splits, parts.accelerator
    network = accelerator.unwrap_model(parts.student).network
    views = loader.steps_per_epoch * optim.batch_size
    number = accelerator.num_processes
    processes = "1 process" if number == 1 else f"{number} processes"
    say(
        f"student   {config.student.name}: {size_of(network)} parameters, "
        f"input {config.student.image_size} px"
    )
    _of_start(parts)
    if parts.panel is None:
        say("teacher   none (loss.kind none)")
    say(
        f"data      {config.data.source}: {len(splits.class_names)} classes; "
        f"{len(splits.train.labels)} train, {len(splits.validation.labels)} validation, "
        f"{len(splits.test.labels)} test" + "".join(f"; {note}" for note in splits.notes)
    )
    for note in splits.passed:
        say(f"          {note}")
    say(
        f"batch     {optim.batch_size} = {processes} x "
        f"{optim.accumulate} accumulated x {loader.block}; {loader.steps_per_epoch} updates and "
        f"{views} views of {loader.images_per_epoch} unique images (of "
        f"{len(splits.train.labels)}) an epoch"
    )
    say(f"views     {_of_views(parts)}")
    say(f"schedule  {schedule_of(optim)}")
    threads = environment["threads"]
    say(
        f"machine   {environment['device_name']}, {environment['precision']}, "
        f"{threads} thread{'s' * (threads > 1)}"
        f"{', linear layers by oneDNN' * (config.run.linear == 'onednn')}; seed {config.run.seed}"
    )
    pieces = number_of_parts(config.run.shard, number)
    if pieces > 1:
        say(
            f"          student, gradients and optimizer divided into {pieces} parts "
            f"(run.shard {config.run.shard})"
        )
    _warn_of_idle_cores(accelerator)
    if not is_transformer(config.student):
        return
    tokens = (config.student.image_size // config.student.patch_size) ** 2
    if tokens < 16:
        warn(
            f"student.patch_size = {config.student.patch_size} leaves {tokens} patch tokens of a "
            f"{config.student.image_size} px image; fewer than 16 rarely train well"
        )


def schedule_of(optim: OptimConfig) -> str:
    """Epochs, learning rate and warm-up in words."""
    scaled = optim.lr_reference_batch
    arithmetic = f" = {optim.lr:g} x {optim.batch_size} / {scaled}" if scaled else ""
    return (
        f"{optim.epochs} epochs, peak learning rate {peak_lr(optim):.3g}{arithmetic}, "
        f"warm-up {optim.warmup_epochs:g} epochs"
    )


def _of_start(parts: Parts) -> None:
    """What the student starts from, everything that was done to it, and what is trained."""
    notes, optim = parts.start_notes, parts.config.optim
    if notes is not None:
        say(f"start     {notes['found']}")
        for note in notes["notes"]:
            say(f"          {note}")
    if parts.held is not None:
        told = told_of(parts.held.masks)
        zero = percent(1 - told["kept"] / told["total"])
        say(f"pruned    {zero} % of {told['total']:,} weights in {len(parts.held.masks)} layers")
    if parts.config.student.rounding != "none":
        network = parts.accelerator.unwrap_model(parts.student).network
        number = len(rounded_layers(network))
        say(f"rounded   {number} layers, as the {parts.config.student.rounding} file computes them")
    if (update := parts.config.start.update) and notes is not None:  # not of a resumed run
        say(f"          begins at update {update}: schedule, order and views of those before pass")
    told = [] if optim.trained == "all" else [f"{optim.trained} only"]
    if optim.layer_decay < 1:
        told.append(f"learning rate times {optim.layer_decay:g} a layer from the heads down")
    if told:
        network = parts.accelerator.unwrap_model(parts.student).network
        number = sum(one.numel() for one in network.parameters() if one.requires_grad)
        say(f"trained   {'; '.join(told)}: {number:,} parameters")


def _of_views(parts: Parts) -> str:
    """Sizes, where the images lie, and what is done to them."""
    views, sizes, images = parts.config.views, parts.loader.sizes, parts.splits.train
    told = [f"{sizes.view} px"]
    if sizes.view != sizes.student:
        told[0] += f", student {sizes.student} px"
    if parts.panel is not None and sizes.teacher != sizes.student:
        told[0] += f", teacher {sizes.teacher} px"
    if parts.panel is not None and views.teacher_view != "same":
        told[0] += f", the teacher's {_TEACHER_VIEWS[views.teacher_view]}"
    if isinstance(images, Images):
        gib = images.pixels.numel() / 2**30
        told.append(f"from {images.pixels.shape[-1]} px in memory ({gib:.2f} GiB)")
        if parts.config.data.workers:
            told.append("data.workers are not used")
    else:
        number = worker_count(parts.config.data)
        workers = {0: "the training process", 1: "1 worker"}.get(number, f"{number} workers")
        told.append(f"decoded by {workers}")
    steps = {
        f"crop {views.crop}": views.crop != "none",
        f"flip {views.flip:g}": views.flip > 0,
        f"rotation {views.rotation:g}": views.rotation > 0,
        views.policy: views.policy != "none",
        f"colour jitter {views.color_jitter:g}": views.color_jitter > 0,
        f"erasing {views.erasing:g}": views.erasing > 0,
        f"mixup {views.mixup_alpha:g}": views.mixup_alpha > 0,
        f"cutmix {views.cutmix_alpha:g}": views.cutmix_alpha > 0,
        f"{views.repeats} views of an image in a batch": views.repeats > 1,
    }
    told.append(", ".join(step for step, on in steps.items() if on) or "plain")
    return "; ".join(told)


_TEACHER_VIEWS = {
    "independent": "drawn apart",
    "resized": "always the whole image",
    "center": "always the centre",
    "crops": "a mean over crops",
}


def _warn_of_idle_cores(accelerator: Accelerator) -> None:
    """`accelerate launch` sets OMP_NUM_THREADS=1 unasked: a lone process then idles the others."""
    number = cores()
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


def size_of(network: nn.Module) -> str:
    """The number of a network's parameters, in millions or thousands."""
    number = sum(parameter.numel() for parameter in network.parameters())
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number / 1e3:.1f} k"


def report(row: dict[str, Any], epochs: int, loss: LossConfig) -> None:
    """One line for a finished epoch, from its row of metrics; a term without weight is left out."""
    train = row["train"]
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}", f"loss {train['loss']:.3f}"]
    named = [
        f"{name.removeprefix('loss_')} {value:.3f}"
        for name, value in train.items()
        if name.startswith("loss_") and not (name == "loss_class" and label_weight(loss) == 0)
    ]
    if len(named) > 1:
        parts[-1] += f" ({', '.join(named)})"
    if "validation" in row:
        shown = [
            f"{name.removesuffix('_top1')} {percent(value)}"
            for name, value in row["validation"].items()
        ]
        parts.append(f"validation {', '.join(shown)}")
    remaining = row["seconds"] / row["epoch"] * (epochs - row["epoch"])
    if "loader" in row:  # not in an epoch that was trained before a stop, and evaluated after it
        loading = percent(row["loader"]["share"])
        parts.append(f"{row['images_per_s']:.0f} images/s (loader {loading} %)")
    parts.append(f"ETA {clock(remaining)}")
    say(" | ".join(parts))
