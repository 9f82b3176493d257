"""A configuration turned into one of fine-tuning: from given weights, at another resolution."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS
from deit.config.schema import Config, OptimConfig
from deit.config.student_section import StudentConfig

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
    """The configuration with a start, and its network.

    heads_known: whether the number of attention heads is that of the weights; else it is the
    configuration's where the width is the same, and the usual one of the width where not.
    student: the network of the weights, None where it is not known. Size of the image, drop path,
    dropout and distillation tokens stay the configuration's: the weights are fitted to them; so do
    adapters, unless the weights have some.
    """
    own = config.student
    if student is not None and student.is_transformer and own.is_transformer:
        kind, size = own.name.split("_")[0], student.name.split("_")[1]
        taken = _SHAPE if student.adapters == "none" else (*_SHAPE, *_ADAPTERS)
        shape = {name: getattr(student, name) for name in taken}
        if not heads_known and own.width == student.width:
            shape["num_heads"] = own.heads
        own = replace(own, name=f"{kind}_{size}", **shape)
    elif student is not None:
        kept = {name: getattr(own, name) for name in ("image_size", "drop_path", "dropout")}
        own = replace(student, **kept)
    init = {"weights": source, "pruning_masks": "keep", "start_step": 0}
    return config.replace(student=own, init=init, run={"keep_steps": ()})


def at_resolution(config: Config, side: int) -> Config:
    """The configuration with a student of `side` px: the images and the border of crop padded in
    proportion, and the teachers, as in the paper, at the student's resolution."""
    share = side / config.student.image_size
    padding = config.views.crop_padding
    if config.views.crop == "padded":
        padding = max(round(padding * share), 1)
    return config.replace(
        data={"image_size": round(config.data.image_size * share)},
        views={"crop_padding": padding},
        student={"image_size": side},
        teacher={"image_size": (side,) if config.teacher.source else ()},
    )


def deit(config: Config) -> Config:
    """DeiT's schedule at 384 px (its README): 30 epochs at a constant 5e-6 for a batch of 512,
    hardly any weight decay; the views stay."""
    return _constant(config, lr=5e-6, epochs=30, batch_size=512, weight_decay=1e-8)


def deit3(config: Config) -> Config:
    """DeiT III's schedule at a higher resolution (its README): 20 epochs at a constant 1e-5 for a
    batch of 512, RandAugment, no repeats."""
    config = config.replace(
        views={"auto_augment": "randaugment", "color_jitter": 0.3, "aug_repeats": 1}
    )
    return _constant(config, lr=1e-5, epochs=20, batch_size=512, weight_decay=0.1)


def short(config: Config) -> Config:
    """A third of the epochs by the run's own schedule, for small runs of one's own: DeiT's learning
    rate would move nothing there, and a constant tenth leaves 16 px digits three points behind
    (docs/log.md)."""
    config = _with_epochs_and_horizons(config, max(round(config.optim.epochs / 3), 1))
    warmup = min(config.optim.warmup_epochs, config.optim.epochs / 6)
    return config.replace(optim={"warmup_epochs": warmup})


def with_epochs(config: Config, epochs: int | None) -> Config:
    """A configuration by a schedule in another number of epochs: its warm-up in proportion, the
    average's horizon and the growth of the teacher's term half of them at most. None, or a number
    that can be none: as it is."""
    if epochs is None or epochs < 1:
        return config
    warmup = config.optim.warmup_epochs * epochs / config.optim.epochs
    return _with_epochs_and_horizons(config, epochs).replace(optim={"warmup_epochs": warmup})


def linear_probe(config: Config) -> Config:
    """The heads alone, on frozen features, by labels, with neither policy nor mixing."""
    labels = LOSS_PRESETS["none"]
    config = config.replace(views=AUGMENTATIONS["none"], optim={"trainable": "heads"}, loss=labels)
    return config.replace(optim={"weight_decay": 0.0})


def convpass(config: Config) -> Config:
    """Adapters and heads alone, by the paper's optimizer (Jie and Deng 2022, section 4.1): AdamW at
    1e-3 whatever the batch, hardly any decay, a cosine to 1e-5 after a tenth of warm-up. Its 100
    epochs are of 1,000 images; here a third of the run's own, as `short`. Views and objective stay.
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
    """Layers that round as the int8 file of `deit quantize` does, all of them trained; a third of
    the epochs, at less than a third of the run's own learning rate, which falls to a tenth of that
    by a cosine, whatever the run's own does."""
    config = short(config.replace(student={"qat": "int8"}))
    config = config.replace(
        optim={"trainable": "all", "lr": 0.3 * config.optim.lr, "lr_milestones": ()}
    )
    end = config.optim.peak_lr / 10
    return config.replace(optim={"min_lr": end, "warmup_lr": end})


def _with_epochs_and_horizons(config: Config, epochs: int) -> Config:
    """The configuration with so many epochs, of which the average's horizon and the growth of the
    teacher's term take half at most."""
    growth = min(config.loss.distillation_warmup_epochs, epochs / 2)
    horizon = min(config.optim.ema_epochs, epochs / 2)
    optim = {"epochs": epochs, "ema_epochs": horizon}
    return config.replace(loss={"distillation_warmup_epochs": growth}, optim=optim)


def _fresh_optimizer(config: Config, **fields: Any) -> Config:
    """The configuration with AdamW and a schedule of these fields, in as many epochs: of another
    optimizer, a staircase or decays by layer nothing stays. lr is taken as it stands."""
    kept = ("trainable", "grad_accum_steps", "clip_grad_norm", "epochs", "ema_epochs")
    own = {name: getattr(config.optim, name) for name in kept}
    return config.replace(optim=OptimConfig(**{"lr_base_batch_size": None, **own, **fields}))


def _constant(
    config: Config, *, lr: float, epochs: int, batch_size: int, weight_decay: float
) -> Config:
    """A learning rate that stays, after at most five epochs (a sixth of them) of warm-up."""
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
"""Schedules of fine-tuning by name: configuration -> configuration."""


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


DATA_SIZED_SCHEDULES: dict[str, Callable[..., Config]] = {"bit": hyper_rule}
"""Those that depend on the number of training images, which they are told as `images`."""
