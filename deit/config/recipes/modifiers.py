"""Functions from one recipe to another: function matching, USI, fine-tuning, unseen classes."""

import dataclasses

from deit.config.finetune_schedules import at_resolution, short
from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS, VIEW_MODES
from deit.config.schema import Config
from deit.config.sections.loss import LossConfig
from deit.config.sections.student import StudentConfig
from deit.config.sections.teacher import TeacherConfig


def class_token_only(config: Config) -> Config:
    """Return a recipe for the same student as a ViT, without distillation token and teacher."""
    name = config.student.name.replace("deit_", "vit_", 1)
    return config.replace(
        student={"name": name}, teacher=TeacherConfig(), loss=LOSS_PRESETS["none"]
    )


def with_unseen_digits(config: Config, *, epochs: int) -> Config:
    """Return the experiment of AditMeh/Distillation: training images of the classes 0 to 5 only.

    The loss is cross-entropy with the teacher at temperature 10, without labels, because no label
    is of an unseen class.
    """
    return config.replace(
        data={"unseen_classes": ("6", "7", "8", "9")},
        loss=LossConfig(
            kind="cross_entropy",
            head="all",
            distillation_weight=1.0,
            temperature=10.0,
            label_smoothing=0.0,
        ),
        optim={"epochs": epochs},
        run={"eval_every_epochs": max(epochs // 12, 1)},
    )


def finetuned(config: Config, side: int, *, start: str, teacher: str | None = None) -> Config:
    """Return the fine-tuning of a recipe at `side` px. start, teacher: recipes of their runs."""
    sources = () if teacher is None else (f"checkpoints/{teacher}",)
    config = config.replace(teacher={"source": sources}, init={"weights": f"checkpoints/{start}"})
    return short(at_resolution(config, side))


def by_function_matching(config: Config, *, epochs: int) -> Config:
    """Return a recipe for function matching (Beyer et al. 2022).

    Inception crops and mixup, the same views for teacher and student, KL divergence only, many
    epochs, and weight decay independent of the learning rate.
    """
    config = config.replace(views={**AUGMENTATIONS["none"], "interpolation": "bilinear"})
    return config.replace(
        views=VIEW_MODES["function-matching"].fields(dataclasses.asdict(config.views)),
        loss=dataclasses.replace(LOSS_PRESETS["function-matching"], temperature=2.0),
        optim={
            "epochs": epochs,
            "lr": 1e-3,
            "lr_base_batch_size": None,
            "weight_decay": 1e-4,
            "independent_weight_decay": True,
            "clip_grad_norm": 1.0,
            "min_lr": 0.0,
        },
    )


def by_usi(config: Config, student: StudentConfig) -> Config:
    """Return a recipe for USI (Ridnik et al. 2022, "Solving ImageNet", section 3.3).

    The same for any backbone: 300 epochs with batches of 1,024; cross-entropy plus 5 times the KL
    divergence at temperature 1.
    """
    return config.replace(
        views=AUGMENTATIONS["usi"],
        student=student,
        loss=LOSS_PRESETS["usi"],
        optim={
            "epochs": 300,
            "batch_size": 1024,
            "lr": 2e-3,
            "lr_base_batch_size": None,
            "weight_decay": 0.02,
            "warmup_epochs": 5,
            "warmup_lr": 1e-4,
            "min_lr": 1e-6,
            "clip_grad_norm": None,
            "ema_epochs": 20.0,  # a decay of 0.99996 per step: 20 epochs of 1,251 steps (ImageNet)
        },
    )


SHORT_SCHEDULE = {
    "epochs": 8,
    "batch_size": 128,
    "lr": 1e-3,
    "lr_base_batch_size": None,
    "warmup_epochs": 1,
}
"""The schedule of recipes for a laptop."""
