"""Recipes for Tiny-ImageNet, ImageNet subsets and folders of images."""

from deit.config.finetune_schedules import at_resolution, deit
from deit.config.presets import AUGMENTATIONS
from deit.config.recipes.cifar import cifar10, cifar10_teacher
from deit.config.recipes.modifiers import SHORT_SCHEDULE
from deit.config.recipes.registry import recipe
from deit.config.schema import Config


@recipe
def tiny_imagenet_teacher() -> Config:
    """RegNetY-400MF at 64 px on Tiny-ImageNet: the teacher of `tiny-imagenet` (one GPU)."""
    return cifar10_teacher().replace(
        data={"source": "folder", "root": "data/tiny-imagenet-200", "image_size": 64},
        views={"crop": "random_resized", "crop_scale": (0.25, 1.0)},
        student={"image_size": 64},
        optim={"epochs": 100},
    )


@recipe
def tiny_imagenet() -> Config:
    """DeiT-Ti with patches of 8 px distilled from `tiny-imagenet-teacher` by DeiT's recipe."""
    return cifar10().replace(
        data={"source": "folder", "root": "data/tiny-imagenet-200", "image_size": 64},
        views={"crop": "random_resized", "crop_scale": (0.25, 1.0)},
        student={"image_size": 64, "patch_size": 8},
        teacher={"source": ("checkpoints/tiny-imagenet-teacher",)},
    )


@recipe
def tiny_imagenet_micro_teacher() -> Config:
    """RegNetY-200MF at 64 px in 10 epochs: the teacher of `tiny-imagenet-micro` (a laptop)."""
    return tiny_imagenet_teacher().replace(
        views=AUGMENTATIONS["none"],
        student={"name": "timm:regnety_002", "drop_path": 0.0},
        optim={"epochs": 10, "batch_size": 128, "warmup_epochs": 1},
    )


@recipe
def tiny_imagenet_micro() -> Config:
    """A micro DeiT by DeiT's recipe in 8 epochs (a laptop; meant for a subset of the classes)."""
    return tiny_imagenet().replace(
        student={"name": "deit_micro", "drop_path": 0.0, "weight_init": "scaled"},
        teacher={"source": ("checkpoints/tiny-imagenet-micro-teacher",)},
        optim=SHORT_SCHEDULE,
    )


@recipe
def folder_teacher() -> Config:
    """RegNetY-400MF at 64 px on your class folders (--data.root): the teacher of `folder`."""
    return cifar10_teacher().replace(
        data={"source": "folder", "image_size": 72},
        views={"crop": "random_resized", "crop_scale": (0.25, 1.0), "eval_crop_pct": 64 / 72},
        student={"image_size": 64},
        optim={"batch_size": 64, "lr": 1e-3},
    )


@recipe
def folder() -> Config:
    """DeiT-Ti with patches of 8 px at 64 px on your class folders (--data.root)."""
    return cifar10().replace(
        data={"source": "folder", "image_size": 72},
        views={
            "crop": "random_resized",
            "crop_scale": (0.25, 1.0),
            "aug_repeats": 1,
            "eval_crop_pct": 64 / 72,
        },
        student={"image_size": 64, "patch_size": 8},
        teacher={"source": ("checkpoints/folder-teacher",)},
        optim={"batch_size": 64, "lr": 5e-4, "lr_base_batch_size": None},
    )


@recipe
def imagenet_subset() -> Config:
    """DeiT-Ti/16 at 224 px on an ImageNet subset in class folders, with timm's RegNetY-16GF as the
    teacher."""
    return folder().replace(
        data={"image_size": 256},
        views={"crop_scale": (0.08, 1.0), "aug_repeats": 3, "eval_crop_pct": 0.875},
        student={"image_size": 224, "patch_size": 16},
        teacher={"source": ("regnety_160.deit_in1k",)},
        optim={"batch_size": 1024, "lr_base_batch_size": 512},
    )


@recipe
def imagenet_384() -> Config:
    """DeiT (--from WEIGHTS) fine-tuned at 384 px by the paper's schedule, with RegNetY-16GF at 384
    px as the teacher."""
    return deit(at_resolution(imagenet_subset(), 384))
