"""Recipes for scikit-learn's digits and for MNIST."""

from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS
from deit.config.recipes.modifiers import (
    by_function_matching,
    class_token_only,
    finetuned,
    with_unseen_digits,
)
from deit.config.recipes.registry import recipe
from deit.config.schema import Config
from deit.config.sections.data import DataConfig
from deit.config.sections.loss import LossConfig
from deit.config.sections.optim import OptimConfig
from deit.config.sections.run import RunConfig
from deit.config.sections.student import StudentConfig
from deit.config.sections.teacher import TeacherConfig
from deit.config.sections.views import ViewsConfig


@recipe
def digits_teacher() -> Config:
    """A 0.3 M ConvNet on scikit-learn's handwritten digits: the teacher of `digits`."""
    return Config(
        data=DataConfig(source="digits", image_size=8),
        views=ViewsConfig(crop="padded", crop_padding=1, flip=0.0, rotation=10.0),
        student=StudentConfig(name="small_convnet", image_size=8),
        loss=LOSS_PRESETS["none"],
        optim=OptimConfig(
            epochs=20, batch_size=64, lr=3e-3, lr_base_batch_size=None, warmup_epochs=2
        ),
        run=RunConfig(eval_every_epochs=2),
    )


@recipe
def digits() -> Config:
    """A small DeiT distilled from `digits-teacher`: minutes on a laptop, nothing to download."""
    return Config(
        data=DataConfig(source="digits", image_size=8),
        views=ViewsConfig(
            crop="padded",
            crop_padding=1,
            crop_scale=(0.35, 1.0),  # for view modes that crop: 5 % of 8 x 8 px is 3 pixels
            flip=0.0,
            rotation=7.5,
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
        ),
        student=StudentConfig(
            name="deit_micro",
            image_size=8,
            patch_size=2,
            embed_dim=64,
            depth=4,
            num_heads=4,
            weight_init="scaled",
        ),
        teacher=TeacherConfig(source=("checkpoints/digits-teacher",)),
        loss=LossConfig(kind="soft", distillation_weight=0.5, temperature=3.0),
        optim=OptimConfig(
            epochs=60, batch_size=32, lr=1e-3, lr_base_batch_size=None, warmup_epochs=5
        ),
        run=RunConfig(eval_every_epochs=5),
    )


@recipe
def digits_few_labels_teacher() -> Config:
    """`digits-teacher` on 5 % of the training images: the teacher of `digits-few-labels`."""
    return digits_teacher().replace(
        data={"train_fraction": 0.05},
        optim={"epochs": 200, "batch_size": 32, "warmup_epochs": 2},
        run={"eval_every_epochs": 20},
    )


@recipe
def digits_few_labels() -> Config:
    """`digits` with labels of 5 % of the images, which only the teacher uses: the student learns
    from the teacher's outputs for all images (the quickstart)."""
    return digits().replace(
        views=AUGMENTATIONS["none"],
        teacher={"source": ("checkpoints/digits-few-labels-teacher",)},
        loss={"head": "all", "distillation_weight": 1.0},
        optim={"epochs": 12, "warmup_epochs": 1},
        run={"eval_every_epochs": 1},
    )


@recipe
def digits_involution_teacher() -> Config:
    """A 0.1 M involution network (RedNet) on digits: the second teacher of `digits-ensemble`."""
    return digits_teacher().replace(student={"name": "rednet_micro"})


@recipe
def digits_transformer_teacher() -> Config:
    """The student of `digits` as a ViT, trained without a teacher: a transformer as a teacher."""
    return class_token_only(digits())


@recipe
def digits_ensemble() -> Config:
    """`digits` with two teachers, a ConvNet and an involution network, and a token for each."""
    return digits().replace(
        student={"num_distillation_tokens": 2},
        teacher={
            "source": ("checkpoints/digits-teacher", "checkpoints/digits-involution-teacher"),
            "combine": "tokens",
        },
    )


@recipe
def digits_function_matching() -> Config:
    """`digits` by function matching: the teacher's outputs only, mixup, ten times the epochs."""
    return by_function_matching(digits(), epochs=600)


@recipe
def digits_held_out() -> Config:
    """`digits` without training images of 6 to 9: the student learns them from the teacher only."""
    return with_unseen_digits(digits(), epochs=120)


@recipe
def mnist_teacher() -> Config:
    """The ConvNet of `digits-teacher` on MNIST at 28 px in 5 epochs: the teacher of `mnist`."""
    return digits_teacher().replace(
        data={"source": "mnist", "image_size": 28},
        views={"crop_padding": 2},
        student={"image_size": 28},
        optim={"epochs": 5, "batch_size": 128, "warmup_epochs": 1},
        run={"eval_every_epochs": 1},
    )


@recipe
def mnist() -> Config:
    """A small DeiT with patches of 4 px on MNIST at 28 px, distilled from `mnist-teacher`."""
    return digits().replace(
        data={"source": "mnist", "image_size": 28},
        views={"crop_padding": 2},
        student={"image_size": 28, "patch_size": 4},
        teacher={"source": ("checkpoints/mnist-teacher",)},
        optim={"epochs": 10, "batch_size": 128, "warmup_epochs": 1},
        run={"eval_every_epochs": 1},
    )


@recipe
def mnist_held_out() -> Config:
    """`mnist` without training images of 6 to 9: AditMeh/Distillation's experiment with a ViT."""
    return with_unseen_digits(mnist(), epochs=12)


@recipe
def digits_finetune() -> Config:
    """`digits` fine-tuned at 16 px, distilled from `digits-finetune-teacher`."""
    return finetuned(digits(), 16, start="digits", teacher="digits-finetune-teacher")


@recipe
def digits_finetune_teacher() -> Config:
    """`digits-teacher` fine-tuned at 16 px: the teacher of `digits-finetune`."""
    return finetuned(digits_teacher(), 16, start="digits-teacher")
