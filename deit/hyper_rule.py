"""BiT's HyperRule: schedule, resolution and mixup by the number of training images; no torch."""

from typing import NamedTuple

from deit.config import Config, OptimConfig
from deit.presets import AUGMENTATIONS


class Rule(NamedTuple):
    """For data sets of fewer than `below` images: updates, those of the warm-up, those after which
    the learning rate falls to a tenth, and alpha of mixup."""

    below: float
    updates: int
    warmup: int
    falls: tuple[int, ...]
    mixup: float


RULES = (
    Rule(20_000, 500, 100, (200, 300, 400), 0.0),
    Rule(500_000, 10_000, 500, (3_000, 6_000, 9_000), 0.1),
    Rule(float("inf"), 20_000, 500, (6_000, 12_000, 18_000), 0.1),
)
_SMALL = 96  # px: smaller images are shown at 128 of 160, larger ones at 480 of 512
_BATCH = 512


def hyper_rule(config: Config, *, images: int) -> Config:
    """The configuration with the schedule, views and resolution that BiT takes for every task, by
    the number of training images: SGD with momentum, no weight decay, heads that begin at zero.

    Updates are rounded to whole epochs. A batch larger than the images is halved until it is not,
    and the learning rate with it. Small images stay as they are in memory and are enlarged in the
    view; mixup draws a weight for each pair, BiT one for each batch.
    Source: Kolesnikov et al. 2020, "Big Transfer (BiT): General Visual Representation Learning",
    section 3.3.
    """
    rule = next(rule for rule in RULES if images < rule.below)
    batch = _BATCH
    while batch > max(images, 1):
        batch //= 2
    an_epoch = max(images // batch, 1)
    small = config.data.image_size < _SMALL
    resized, side = (160, 128) if small else (512, 480)
    views = {**AUGMENTATIONS["none"], "mixup_alpha": rule.mixup, "flip": 0.5, "rotation": 0.0}
    views |= {"crop": "random", "crop_pct": side / resized, "eval_crop_pct": 1.0}
    epochs = max(round(rule.updates / an_epoch), 1)
    return config.replace(
        data={"image_size": config.data.image_size if small else resized},
        views=views,
        student={"image_size": side},
        init={"head": "zero" if config.init.weights is not None else "keep"},
        loss={
            "label_smoothing": 0.0,
            "distillation_warmup_epochs": min(config.loss.distillation_warmup_epochs, epochs / 2),
        },
        optim=OptimConfig(  # anew: nothing of another schedule stays
            trainable=config.optim.trainable,
            name="sgd",
            momentum=0.9,
            lr=0.003,
            lr_base_batch_size=_BATCH,
            batch_size=batch,
            epochs=epochs,
            warmup_epochs=rule.warmup / an_epoch,
            warmup_lr=0.0,
            lr_milestones=tuple(fall / rule.updates for fall in rule.falls),
            weight_decay=0.0,
        ),
    )
