"""The learning rate as a function of the step."""

import math

import torch

from deit.config.sections.optim import OptimConfig


def lr_at(step: int, *, optim: OptimConfig, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, counted from 0.

    It rises linearly from warmup_lr to the peak, which the first step after the warm-up has. Then a
    half cosine reaches min_lr at the last step; with lr_milestones it drops to a tenth at each of
    these fractions of all steps instead.

    Example:
        >>> optim = OptimConfig(epochs=2, lr=1.0, lr_base_batch_size=None, warmup_epochs=1,
        ...                     warmup_lr=0.0, min_lr=0.0)
        >>> [round(lr_at(step, optim=optim, steps_per_epoch=3), 3) for step in range(6)]
        [0.0, 0.333, 0.667, 1.0, 0.5, 0.0]
    """
    peak = optim.peak_lr
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return optim.warmup_lr + (peak - optim.warmup_lr) * step / warmup
    last = optim.epochs * steps_per_epoch - 1
    if optim.lr_milestones:
        num_drops = sum(step >= round(share * (last + 1)) for share in optim.lr_milestones)
        return peak * 0.1**num_drops
    progress = (step - warmup) / max(last - warmup, 1)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return optim.min_lr + (peak - optim.min_lr) * cosine


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: `lr` times the group's lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
