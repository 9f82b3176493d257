"""The configuration of training benchmarks, and the same training made of timm's parts.

timm's side has its TokenDistillationTask, its loader and its optimizer factory. They are called in
the order of its train script, which reads the loss at every step. It is measured with the default
settings and with the fastest settings for the machine.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.cifar import cifar10_micro
from deit.config.schema import Config
from deit.config.sections.views import ViewsConfig
from deit.distill.losses import distillation_loss
from deit.models.saved_student import ModelInfo, student_from_info
from deit.models.student import Student
from deit.training.build import build_run
from deit.training.epochs import step_context
from scripts.benchmarks.interleaved import photographs
from scripts.benchmarks.ours import timm_loader

TIMM_WORKERS = 4
"""Workers of the loader by default in timm's train script."""
PIXELS = 6400 * 32**2  # of all images: at 32 px an epoch has 50 steps of 128 images
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
VIEWS = ViewsConfig(
    crop="random_resized",
    crop_scale=(0.8, 1.0),
    flip=0.5,
    auto_augment="randaugment",
    erasing_prob=0.25,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
    mean=MEAN,
    std=STD,
)
_ON_GPU = {"precision": "bf16", "compile": "default"}


def teacher() -> nn.Module:
    """Return ResNet-18 with random weights, which do not affect the speed."""
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=10)
    network.pretrained_cfg.update(mean=MEAN, std=STD)
    return network.eval()


def num_images(side: int) -> int:
    """Return the number of training images of a size [px]: PIXELS in all, at least 2,560 images."""
    return max(PIXELS // side**2, 2560)


def configuration(folder: Path, *, student: str, batch: int, device: str, side: int = 32) -> Config:
    """Return a recipe for CIFAR's or ImageNet's image size with DeiT's augmentation, on crops of
    scikit-learn's photographs in class folders."""
    root = folder / f"pictures-{side}"
    if not root.exists():
        for index, array in enumerate(photographs(num_images(side), side)):
            class_folder = root / "train" / f"class {index % 10}"
            class_folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(class_folder / f"{index:05d}.png")
            if index < 320:
                class_folder = root / "validation" / f"class {index % 10}"
                class_folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(class_folder / f"{index:05d}.png")
    return cifar10_micro().replace(
        data={"source": "folder", "root": str(root), "image_size": side, "storage": "memory"},
        views=VIEWS,
        student={
            "name": student,
            "image_size": side,
            "patch_size": 4 if side < 64 else 16,
            "drop_path": 0.1,
            "weight_init": "timm",
        },
        teacher={
            "source": (f"{Path(__file__)}:teacher",),
            "allow_near_chance": True,
            "mean": MEAN,
            "std": STD,
        },
        loss=LOSS_PRESETS["deit-hard"],
        optim={"epochs": 2, "batch_size": batch, "weight_decay": 0.05, "ema_epochs": 0.0},
        run={"device": device, **(_ON_GPU if device == "cuda" else {})},
    )


def our_student(config: Config) -> Student:
    """Return the student with the initial weights of both sides."""
    names = tuple(f"class {label}" for label in range(10))
    torch.manual_seed(0)
    return student_from_info(ModelInfo(config.student, names, MEAN, STD, 1.0))


def timm_batches(config: Config, *, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mixed batches of timm's loader, endlessly."""
    from timm.data import FastCollateMixup

    views, device = config.views, torch.device(config.run.device)
    side = config.student.image_size
    loader = timm_loader(
        photographs(num_images(side), side),
        views,
        side,
        workers=workers,
        batch_size=config.optim.batch_size,
        mean=MEAN,
        std=STD,
        collate_fn=FastCollateMixup(
            mixup_alpha=views.mixup_alpha,
            cutmix_alpha=views.cutmix_alpha,
            label_smoothing=config.loss.label_smoothing,
            num_classes=10,
        ),
        pin_memory=device.type == "cuda",
        device=device,
    )
    while True:
        yield from loader


class TimmTrainer(NamedTuple):
    """The parts of timm's train script. autocast: whether forward passes are in bf16."""

    task: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    autocast: bool


def timm_side(config: Config, *, best: bool) -> TimmTrainer:
    """Return timm's parts with the initial weights of our student. best: use the fastest settings
    for this kind of machine instead of the defaults."""
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.task import TokenDistillationTask

    device = torch.device(config.run.device)
    network = our_student(config).network
    width, depth = network.embed_dim, len(network.blocks)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=10,
        img_size=config.student.image_size,
        patch_size=config.student.patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=network.blocks[0].attn.num_heads,
        drop_path_rate=config.student.drop_path,
    )
    model.load_state_dict(network.state_dict())
    model.pretrained_cfg.update(mean=MEAN, std=STD)
    model.to(device)
    task = TokenDistillationTask(
        model,
        teacher_model=teacher().to(device),
        criterion=SoftTargetCrossEntropy(),
        distill_type="hard",
        task_loss_weight=0.5,
        device=device,
        verbose=False,
    )
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=1e-4, weight_decay=0.05, **({"fused": True} if best else {})
    )
    if best and device.type == "cuda":
        task.compile()
    return TimmTrainer(task, optimizer, device, device.type == "cuda")


def timm_steps(
    config: Config, *, best: bool, fixed_batch: bool, labels_only: bool = False, workers: int = 1
) -> Iterator[int]:
    """Yield the number of images of each training step of timm.

    fixed_batch: use the same batch in all steps. labels_only: train without the teacher. workers:
    of the loader.
    """
    trainer = timm_side(config, best=best)
    batches = timm_batches(config, workers=workers)
    if fixed_batch:
        batch = next(batches)
        batches = (batch for _ in range(10**9))
    trainer.task.train()
    for images, targets in batches:
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.autocast):
            if labels_only:
                logits = sum(trainer.task.trainable_module(images)) / 2
                loss = trainer.task.criterion(logits, targets)
            else:
                loss = trainer.task(images, targets)["loss"]
        loss.backward()
        trainer.optimizer.step()
        loss.item()  # timm's loop reads the loss of every step
        trainer.optimizer.zero_grad()
        yield len(images)


def first_losses(config: Config) -> tuple[float, float]:
    """Return the losses of our and timm's first step, on the same batch without drop path."""
    config = config.replace(student={"drop_path": 0.0})
    run = build_run(config)
    batch, context = next(run.loader.epoch(0)), step_context(run)
    context.student.train()
    losses = distillation_loss(
        context.student(batch.images), batch.targets, context.teacher(batch), context.loss
    )
    task = timm_side(config, best=False).task.train()
    mean, std = (torch.tensor(v, device=batch.images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    smoothed = (
        batch.targets * (1 - context.loss.label_smoothing) + context.loss.label_smoothing / 10
    )
    return losses["loss"].item(), task((batch.images - mean) / std, smoothed)["loss"].item()
