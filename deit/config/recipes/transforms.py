"""Recipes turned into others: by function matching, by USI, fine-tuned, with unseen classes."""

import dataclasses

from deit.config.finetune_schedules import at_resolution, short
from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS, VIEW_MODES
from deit.config.schema import Config, LossConfig, TeacherConfig
from deit.config.student_section import StudentConfig


def class_token_only(config: Config) -> Config:
    """The student of a recipe with a class token alone, trained by labels."""
    name = config.student.name.replace("deit_", "vit_", 1)
    return config.replace(
        student={"name": name}, teacher=TeacherConfig(), loss=LOSS_PRESETS["none"]
    )


def with_unseen_digits(config: Config, *, epochs: int) -> Config:
    """A recipe of digits turned into the experiment of AditMeh/Distillation: classes 0 to 5 seen, a
    warm teacher. Of labels nothing, which would name no unseen class."""
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
    """A recipe turned into its fine-tuning at `side` px, from the run of another."""
    sources = () if teacher is None else (f"checkpoints/{teacher}",)
    config = config.replace(teacher={"source": sources}, init={"weights": f"checkpoints/{start}"})
    return short(at_resolution(config, side))


def by_function_matching(config: Config, *, epochs: int) -> Config:
    """A recipe turned into function matching (Beyer et al. 2022): inception crops and mixup for
    teacher and student alike, the divergence alone, patience, and weight decay by their rule."""
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
    """The scheme of Ridnik et al. 2022 ("Solving ImageNet", section 3.3), whatever the backbone:
    300 epochs in batches of 1,024, the label and five times the divergence at temperature 1."""
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
            "ema_epochs": 20.0,  # 0.99996 a step on ImageNet: some 20 epochs of 1,251 steps
        },
    )


SHORT_SCHEDULE = {
    "epochs": 8,
    "batch_size": 128,
    "lr": 1e-3,
    "lr_base_batch_size": None,
    "warmup_epochs": 1,
}
"""The schedule of the recipes for a laptop."""
