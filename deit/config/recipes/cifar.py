"""Recipes for CIFAR-10 and CIFAR-100."""

from deit.config.finetune_schedules import at_resolution, deit, hyper_rule
from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS
from deit.config.recipes.modifiers import (
    SHORT_SCHEDULE,
    by_function_matching,
    by_usi,
    class_token_only,
    finetuned,
)
from deit.config.recipes.registry import recipe
from deit.config.schema import Config
from deit.config.sections.data import DataConfig
from deit.config.sections.init import InitConfig
from deit.config.sections.optim import OptimConfig
from deit.config.sections.student import StudentConfig
from deit.config.sections.teacher import TeacherConfig
from deit.config.sections.views import ViewsConfig


@recipe
def cifar10_teacher() -> Config:
    """RegNetY-400MF with stride 1 in the stem on CIFAR-10: the teacher of `cifar10`."""
    return Config(
        data=DataConfig(source="cifar10", root="data", image_size=32),
        views=ViewsConfig(crop="padded", crop_padding=4, mixup_alpha=0.2, cutmix_alpha=1.0),
        student=StudentConfig(name="regnety_004_small_stem", image_size=32, drop_path=0.1),
        loss=LOSS_PRESETS["none"],
        optim=OptimConfig(
            epochs=200,
            batch_size=256,
            lr=2e-3,
            lr_base_batch_size=None,
            warmup_epochs=5,
            clip_grad_norm=1.0,
        ),
    )


@recipe
def cifar10_bit_teacher() -> Config:
    """BiT's ResNet-50x1 (ImageNet-21k) fine-tuned on CIFAR-10 at 128 px by BiT's HyperRule."""
    config = cifar10_teacher().replace(
        student=StudentConfig(name="timm:resnetv2_50x1_bit"),
        init={"weights": "resnetv2_50x1_bit.goog_in21k"},
    )
    return hyper_rule(config, images=45_000)


@recipe
def cifar10() -> Config:
    """DeiT-Ti with patches of 4 px distilled from `cifar10-teacher` for 300 epochs (one GPU)."""
    return Config(
        data=DataConfig(source="cifar10", root="data", image_size=32),
        views=ViewsConfig(crop="padded", crop_padding=4, **AUGMENTATIONS["deit"]),
        student=StudentConfig(name="deit_tiny", image_size=32, patch_size=4, drop_path=0.1),
        teacher=TeacherConfig(source=("checkpoints/cifar10-teacher",)),
        loss=LOSS_PRESETS["deit-hard"],
        optim=OptimConfig(
            epochs=300, batch_size=1024, lr=5e-4, warmup_epochs=5, clip_grad_norm=1.0
        ),
    )


@recipe
def cifar10_involution_teacher() -> Config:
    """RedNet-26 with stride 1 in the stem on CIFAR-10: the second teacher of `cifar10-ensemble`."""
    return cifar10_teacher().replace(student={"name": "rednet_26_small_stem", "drop_path": 0.0})


@recipe
def cifar10_transformer_teacher() -> Config:
    """The student of `cifar10` as a ViT, trained without a teacher: a transformer as a teacher."""
    return class_token_only(cifar10())


@recipe
def cifar10_ensemble() -> Config:
    """`cifar10` with two teachers, a RegNet and an involution network, and a token for each."""
    return cifar10().replace(
        student={"num_distillation_tokens": 2},
        teacher={
            "source": ("checkpoints/cifar10-teacher", "checkpoints/cifar10-involution-teacher"),
            "combine": "tokens",
        },
    )


@recipe
def cifar10_function_matching() -> Config:
    """`cifar10` by function matching for 1,200 epochs (one GPU)."""
    return by_function_matching(cifar10(), epochs=1200)


@recipe
def cifar10_usi() -> Config:
    """RegNetY-200MF distilled from `cifar10-teacher` by USI, a training scheme for any backbone."""
    return by_usi(cifar10(), StudentConfig(name="regnety_002_small_stem", image_size=32))


@recipe
def cifar10_micro_teacher() -> Config:
    """RegNetY-200MF on CIFAR-10 in 12 epochs: the teacher of `cifar10-micro` (a laptop)."""
    return cifar10_teacher().replace(
        views={"mixup_alpha": 0.0, "cutmix_alpha": 0.0},
        student={"name": "regnety_002_small_stem", "drop_path": 0.0},
        optim={"epochs": 12, "batch_size": 128, "warmup_epochs": 1},
    )


@recipe
def cifar10_micro() -> Config:
    """A micro DeiT distilled from `cifar10-micro-teacher` in 8 epochs (a laptop, half an hour)."""
    return cifar10().replace(
        views=AUGMENTATIONS["none"],
        student={"name": "deit_micro", "drop_path": 0.0, "weight_init": "scaled"},
        teacher={"source": ("checkpoints/cifar10-micro-teacher",)},
        optim=SHORT_SCHEDULE,
    )


@recipe
def cifar10_micro_involution_teacher() -> Config:
    """A 0.5 M involution network (RedNet) on CIFAR-10 in 12 epochs: the second teacher of
    `cifar10-micro-ensemble` (a laptop)."""
    return cifar10_micro_teacher().replace(student={"name": "rednet_tiny"})


@recipe
def cifar10_micro_transformer_teacher() -> Config:
    """The student of `cifar10-micro` as a ViT, trained without a teacher in 12 epochs: a
    transformer as a teacher (a laptop)."""
    return class_token_only(cifar10_micro()).replace(optim={"epochs": 12})


@recipe
def cifar10_micro_ensemble() -> Config:
    """`cifar10-micro` with two teachers, a RegNet and an involution network, and a token for each
    (a laptop)."""
    sources = ("checkpoints/cifar10-micro-teacher", "checkpoints/cifar10-micro-involution-teacher")
    return cifar10_micro().replace(
        student={"num_distillation_tokens": 2},
        teacher={"source": sources, "combine": "tokens"},
    )


@recipe
def cifar10_micro_finetune() -> Config:
    """`cifar10-micro` fine-tuned at 48 px, distilled from `cifar10-micro-finetune-teacher` (a
    laptop)."""
    teacher = "cifar10-micro-finetune-teacher"
    return finetuned(cifar10_micro(), 48, start="cifar10-micro", teacher=teacher)


@recipe
def cifar10_micro_finetune_teacher() -> Config:
    """`cifar10-micro-teacher` fine-tuned at 48 px: the teacher of `cifar10-micro-finetune`."""
    return finetuned(cifar10_micro_teacher(), 48, start="cifar10-micro-teacher")


@recipe
def cifar10_finetune() -> Config:
    """`cifar10` fine-tuned at 48 px by DeiT's schedule, with its teacher at 48 px (one GPU)."""
    config = cifar10().replace(init={"weights": "checkpoints/cifar10"})
    return deit(at_resolution(config, 48))


@recipe
def cifar100_teacher() -> Config:
    """RegNetY-400MF with stride 1 in the stem on CIFAR-100: the teacher of `cifar100`."""
    return cifar10_teacher().replace(data={"source": "cifar100"})


@recipe
def cifar100() -> Config:
    """DeiT-Ti with patches of 4 px distilled from `cifar100-teacher` for 300 epochs (one GPU)."""
    return cifar10().replace(
        data={"source": "cifar100"},
        teacher={"source": ("checkpoints/cifar100-teacher",)},
    )


@recipe
def transfer_cifar10() -> Config:
    """An ImageNet DeiT (--from WEIGHTS) fine-tuned on CIFAR-10 at 224 px, with the AdamW settings
    of issue 81 of facebookresearch/dino."""
    return Config(
        data=DataConfig(source="cifar10", root="data", image_size=32),
        views=ViewsConfig(crop="random_resized", **AUGMENTATIONS["mix"]),
        student=StudentConfig(name="deit_base", image_size=224, patch_size=16, drop_path=0.1),
        init=InitConfig(head="new"),
        loss=LOSS_PRESETS["none"],
        optim=OptimConfig(
            epochs=1000,
            batch_size=768,
            lr=7.5e-6,
            lr_base_batch_size=None,
            warmup_epochs=5,
            warmup_lr=1e-6,
            min_lr=1e-6,
        ),
    )


@recipe
def transfer_cifar100() -> Config:
    """An ImageNet DeiT (--from WEIGHTS) fine-tuned on CIFAR-100 at 224 px, with the AdamW settings
    of issue 117 of facebookresearch/deit."""
    return transfer_cifar10().replace(
        data={"source": "cifar100"}, views={"aug_repeats": 3}, optim={"lr": 5e-6}
    )
