"""Fine-tuning configurations: pretrained weights, another resolution, and named schedules."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from deit.config.command_choices import check_at_least, check_choice
from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS
from deit.config.schema import Config
from deit.config.sections.optim import OptimConfig
from deit.config.sections.student import StudentConfig
from deit.core.errors import ConfigError

_SHAPE = (
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "heads_per_block",
    "mlp_hidden_per_block",
    "shared_block_size",
)
_ADAPTERS = ("adapters", "adapter_dim", "adapter_scale")


def with_init(
    config: Config, source: str, student: StudentConfig | None, *, heads_known: bool = True
) -> Config:
    """Return the configuration with pretrained weights and the network that they fit.

    student: the network of the weights; None if it is unknown. Its shape replaces that of the
    configuration. Image size, drop path, dropout and distillation tokens do not change, because the
    weights are adapted to them; nor do adapters, unless the weights have some.
    heads_known: whether the weights give the number of attention heads. Otherwise it is that of the
    configuration if the width is the same, else the usual one for the width.
    """
    target = config.student
    if student is not None and student.is_transformer and target.is_transformer:
        kind, size = target.name.split("_")[0], student.name.split("_")[1]
        names = _SHAPE if student.adapters == "none" else (*_SHAPE, *_ADAPTERS)
        shape = {name: getattr(student, name) for name in names}
        if not heads_known and target.width == student.width:
            shape["num_heads"] = target.heads
        target = replace(target, name=f"{kind}_{size}", **shape)
    elif student is not None:
        names = ("image_size", "drop_path", "dropout")
        target = replace(student, **{name: getattr(target, name) for name in names})
    init = {"weights": source, "pruning_masks": "keep", "start_step": 0}
    return config.replace(student=target, init=init, run={"keep_steps": ()})


def at_resolution(config: Config, side: int) -> Config:
    """Return the configuration with a student of `side` px.

    The images and the border of crop `padded` are scaled in proportion. The teachers get the
    student's resolution, as in the DeiT paper.

    >>> from deit.config.recipes import find_recipe
    >>> config = at_resolution(find_recipe("digits"), 16)
    >>> config.student.image_size, config.data.image_size, config.views.crop_padding
    (16, 16, 2)
    """
    scale = side / config.student.image_size
    padding = config.views.crop_padding
    if config.views.crop == "padded":
        padding = max(round(padding * scale), 1)
    return config.replace(
        data={"image_size": round(config.data.image_size * scale)},
        views={"crop_padding": padding},
        student={"image_size": side},
        teacher={"image_size": (side,) if config.teacher.source else ()},
    )


def deit(config: Config) -> Config:
    """Apply DeiT's schedule for 384 px (README of DeiT): 30 epochs at a constant 5e-6 with batches
    of 512 and a weight decay of 1e-8. The views do not change."""
    return _constant(config, lr=5e-6, epochs=30, batch_size=512, weight_decay=1e-8)


def deit3(config: Config) -> Config:
    """Apply DeiT III's schedule for a higher resolution (README of DeiT III): 20 epochs at a
    constant 1e-5 with batches of 512, RandAugment, no repeated augmentation."""
    config = config.replace(
        views={"auto_augment": "randaugment", "color_jitter": 0.3, "aug_repeats": 1}
    )
    return _constant(config, lr=1e-5, epochs=20, batch_size=512, weight_decay=0.1)


def short(config: Config) -> Config:
    """Apply the run's own schedule in a third of its epochs, for small runs.

    DeiT's learning rate is too small for them, and a constant tenth of the run's loses 3 points on
    digits at 16 px (docs/log.md).

    >>> from deit.config.recipes import find_recipe
    >>> config = short(find_recipe("digits").replace(init={"weights": "checkpoints/digits"}))
    >>> config.optim.epochs, config.init.weights  # a third of 60
    (20, 'checkpoints/digits')
    """
    config = _with_epochs_and_horizons(config, max(round(config.optim.epochs / 3), 1))
    warmup = min(config.optim.warmup_epochs, config.optim.epochs / 6)
    return config.replace(optim={"warmup_epochs": warmup})


def with_epochs(config: Config, epochs: int | None) -> Config:
    """Return the configuration with another number of epochs; unchanged for None or less than 1.

    The warm-up is scaled in proportion. The horizon of the average and the warm-up of the
    distillation term are limited to half of the epochs.
    """
    if epochs is None or epochs < 1:
        return config
    warmup = config.optim.warmup_epochs * epochs / config.optim.epochs
    return _with_epochs_and_horizons(config, epochs).replace(optim={"warmup_epochs": warmup})


def linear_probe(config: Config) -> Config:
    """Train only the heads, on labels, with frozen features and no augmentation or mixing."""
    labels = LOSS_PRESETS["none"]
    config = config.replace(views=AUGMENTATIONS["none"], optim={"trainable": "heads"}, loss=labels)
    return config.replace(optim={"weight_decay": 0.0})


def convpass(config: Config) -> Config:
    """Train only adapters and heads, with the optimizer of Jie and Deng 2022 (section 4.1).

    AdamW at 1e-3 for any batch size, a weight decay of 1e-4, and a cosine to 1e-5 after a warm-up
    of a tenth of the epochs. The paper trains 100 epochs on 1,000 images; here it is a third of the
    run's epochs, as in `short`. Views and loss do not change.
    """
    if config.student.adapters == "none":
        config = config.replace(student={"adapters": "convpass"})
    config = short(config)
    return _fresh_optimizer(
        config,
        trainable="adapters",
        batch_size=config.optim.batch_size,
        lr=1e-3,
        min_lr=1e-5,
        warmup_lr=1e-6,
        warmup_epochs=config.optim.epochs / 10,
        weight_decay=1e-4,
    )


def int8(config: Config) -> Config:
    """Train all weights with the int8 rounding of `deit quantize` (quantization-aware training).

    A third of the epochs, at 0.3 times the run's learning rate, with a cosine to a tenth of that,
    also if the run used lr_milestones.
    """
    config = short(config.replace(student={"qat": "int8"}))
    config = config.replace(
        optim={"trainable": "all", "lr": 0.3 * config.optim.lr, "lr_milestones": ()}
    )
    end_lr = config.optim.peak_lr / 10
    return config.replace(optim={"min_lr": end_lr, "warmup_lr": end_lr})


def _with_epochs_and_horizons(config: Config, epochs: int) -> Config:
    """Set the epochs; limit the average's horizon and the distillation warm-up to half of them."""
    warmup = min(config.loss.distillation_warmup_epochs, epochs / 2)
    horizon = min(config.optim.ema_epochs, epochs / 2)
    optim = {"epochs": epochs, "ema_epochs": horizon}
    return config.replace(loss={"distillation_warmup_epochs": warmup}, optim=optim)


def _fresh_optimizer(config: Config, **fields: Any) -> Config:
    """Replace the optimizer section by AdamW with these fields and the same number of epochs.

    Another optimizer, lr_milestones and layer_decay are dropped; lr is not scaled by the batch.
    """
    names = ("trainable", "grad_accum_steps", "clip_grad_norm", "epochs", "ema_epochs")
    unchanged = {name: getattr(config.optim, name) for name in names}
    return config.replace(optim=OptimConfig(**{"lr_base_batch_size": None, **unchanged, **fields}))


def _constant(
    config: Config, *, lr: float, epochs: int, batch_size: int, weight_decay: float
) -> Config:
    """Set a constant learning rate after a warm-up of 5 epochs, or a sixth of all if fewer."""
    return _fresh_optimizer(
        _with_epochs_and_horizons(config, epochs),
        lr=lr,
        min_lr=lr,
        warmup_lr=lr / 5,
        warmup_epochs=min(5.0, epochs / 6),
        batch_size=batch_size,
        weight_decay=weight_decay,
    )


FINETUNE_SCHEDULES: dict[str, Callable[[Config], Config]] = {
    "deit": deit,
    "deit3": deit3,
    "short": short,
    "linear-probe": linear_probe,
    "convpass": convpass,
    "int8": int8,
}
"""Fine-tuning schedules by name; each turns a configuration into another."""


class Rule(NamedTuple):
    """The schedule of BiT's HyperRule for data sets with fewer than `below` images.

    steps: all of them. warmup: steps of linear warm-up.
    milestones: steps after which the learning rate drops to a tenth.
    mixup: alpha; 0 for none.
    """

    below: float
    steps: int
    warmup: int
    milestones: tuple[int, ...]
    mixup: float


RULES = (
    Rule(20_000, 500, 100, (200, 300, 400), 0.0),
    Rule(500_000, 10_000, 500, (3_000, 6_000, 9_000), 0.1),
    Rule(float("inf"), 20_000, 500, (6_000, 12_000, 18_000), 0.1),
)
_SMALL = 96  # px: smaller images are resized to 160 and cropped to 128, others to 512 and 480
_BATCH_SIZE = 512


def hyper_rule(config: Config, *, images: int) -> Config:
    """Apply BiT's HyperRule: schedule, views and resolution by the number of training images.

    SGD with momentum, no weight decay, heads initialized to zero.

    Differences from BiT: steps are rounded to whole epochs; with fewer images than the batch size,
    the batch size is halved until it fits, and the learning rate with it; mixup draws a weight for
    each pair, not for each batch. Small images are stored as they are and enlarged in the view.
    Source: Kolesnikov et al. 2020, "Big Transfer (BiT): General Visual Representation Learning",
    section 3.3.
    """
    rule = next(rule for rule in RULES if images < rule.below)
    batch_size = _BATCH_SIZE
    while batch_size > max(images, 1):
        batch_size //= 2
    steps_per_epoch = max(images // batch_size, 1)
    is_small = config.data.image_size < _SMALL
    resized, side = (160, 128) if is_small else (512, 480)
    views = {**AUGMENTATIONS["none"], "mixup_alpha": rule.mixup, "flip": 0.5, "rotation": 0.0}
    views |= {"crop": "random", "crop_pct": side / resized, "eval_crop_pct": 1.0}
    epochs = max(round(rule.steps / steps_per_epoch), 1)
    return config.replace(
        data={"image_size": config.data.image_size if is_small else resized},
        views=views,
        student={"image_size": side},
        init={"head": "zero" if config.init.weights is not None else "keep"},
        loss={
            "label_smoothing": 0.0,
            "distillation_warmup_epochs": min(config.loss.distillation_warmup_epochs, epochs / 2),
        },
        optim=OptimConfig(  # a new section, so that no field of another schedule remains
            trainable=config.optim.trainable,
            name="sgd",
            momentum=0.9,
            lr=0.003,
            lr_base_batch_size=_BATCH_SIZE,
            batch_size=batch_size,
            epochs=epochs,
            warmup_epochs=rule.warmup / steps_per_epoch,
            warmup_lr=0.0,
            lr_milestones=tuple(step / rule.steps for step in rule.milestones),
            weight_decay=0.0,
        ),
    )


DATA_SIZED_SCHEDULES: dict[str, Callable[..., Config]] = {"bit": hyper_rule}
"""Fine-tuning schedules that depend on the number of training images (argument `images`)."""

DEFAULT_SCHEDULE = "short"
"""The schedule of a fine-tuning with the configuration of the run that it starts from."""


def check_finetuning(
    *, schedule: str | None, resolution: int | None, epochs: int | None = None
) -> None:
    """Raise ConfigError for an unknown schedule, and invalid numbers. resolution: in px."""
    if epochs is not None:
        check_at_least("epochs", epochs, 1)
    if schedule is not None:
        check_choice("schedule", schedule, (*FINETUNE_SCHEDULES, *DATA_SIZED_SCHEDULES))
    if resolution is None:
        return
    check_at_least("resolution", resolution, 1)
    if schedule in DATA_SIZED_SCHEDULES:
        raise ConfigError(
            f"resolution = {resolution}: the schedule {schedule} sets the resolution; leave it out"
        )
