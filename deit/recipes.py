"""The named experiments: functions that return a whole configuration, derived from one another."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from deit.config import (
    Config,
    DataConfig,
    InitConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    ViewsConfig,
)
from deit.errors import ConfigError, raise_transient
from deit.files import import_file
from deit.hyper_rule import hyper_rule
from deit.inputs import no_file
from deit.presets import AUGMENTATIONS, LOSS_PRESETS, VIEW_MODES
from deit.text import nearest
from deit.tuning import at_resolution, deit, short
from deit.validation import load_config


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


def digits() -> Config:
    """A small DeiT distilled from `digits-teacher`: minutes on a laptop, nothing to download."""
    return Config(
        data=DataConfig(source="digits", image_size=8),
        views=ViewsConfig(
            crop="padded",
            crop_padding=1,
            crop_scale=(0.35, 1.0),  # for modes that cut: 5 % of 8 px is one and a half
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


def digits_involution_teacher() -> Config:
    """A 0.1 M network of involutions on digits: the other teacher of `digits-ensemble`."""
    return digits_teacher().replace(student={"name": "rednet_micro"})


def digits_transformer_teacher() -> Config:
    """`digits` without token or teacher: the transformer among the teachers of digits."""
    return _transformer(digits())


def _transformer(config: Config) -> Config:
    """The student of a recipe with a class token alone, trained by labels."""
    name = config.student.name.replace("deit_", "vit_", 1)
    return config.replace(
        student={"name": name}, teacher=TeacherConfig(), loss=LOSS_PRESETS["none"]
    )


def digits_ensemble() -> Config:
    """`digits` with two teachers, a ConvNet and an involution network, each with its own token."""
    return digits().replace(
        student={"num_distillation_tokens": 2},
        teacher={
            "source": ("checkpoints/digits-teacher", "checkpoints/digits-involution-teacher"),
            "combine": "tokens",
        },
    )


def digits_function_matching() -> Config:
    """`digits` by function matching: the teacher's answers alone, mixup, ten times the epochs."""
    return _function_matching(digits(), epochs=600)


def digits_held_out() -> Config:
    """`digits` without a picture of 6, 7, 8 or 9: the student hears of them by its teacher alone,
    in what it says of mixed images."""
    return _held_out(digits(), epochs=120)


def _held_out(config: Config, *, epochs: int) -> Config:
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


def mnist_teacher() -> Config:
    """The ConvNet of `digits-teacher` on MNIST at 28 px in 5 epochs: the teacher of `mnist`."""
    return digits_teacher().replace(
        data={"source": "mnist", "image_size": 28},
        views={"crop_padding": 2},
        student={"image_size": 28},
        optim={"epochs": 5, "batch_size": 128, "warmup_epochs": 1},
        run={"eval_every_epochs": 1},
    )


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


def mnist_held_out() -> Config:
    """`mnist` without a picture of 6, 7, 8 or 9: AditMeh/Distillation's experiment with a ViT."""
    return _held_out(mnist(), epochs=12)


def digits_finetune() -> Config:
    """`digits` at twice its resolution, still taught: by `digits-finetune-teacher` at 16 px."""
    return _finetune(digits(), 16, start="digits", teacher="digits-finetune-teacher")


def digits_finetune_teacher() -> Config:
    """`digits-teacher` fitted to 16 px, the teacher of `digits-finetune`."""
    return _finetune(digits_teacher(), 16, start="digits-teacher")


def _finetune(config: Config, side: int, *, start: str, teacher: str | None = None) -> Config:
    """A recipe turned into its fine-tuning at `side` px, from the run of another."""
    sources = () if teacher is None else (f"checkpoints/{teacher}",)
    config = config.replace(teacher={"source": sources}, init={"weights": f"checkpoints/{start}"})
    return short(at_resolution(config, side))


def cifar10_teacher() -> Config:
    """RegNetY-400MF with a stem of stride 1 on CIFAR-10: the teacher of `cifar10`."""
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


def cifar10_bit_teacher() -> Config:
    """BiT's ResNet-50x1 of ImageNet-21k on CIFAR-10 at 128 px, all by its HyperRule."""
    config = cifar10_teacher().replace(
        student=StudentConfig(name="timm:resnetv2_50x1_bit"),
        init={"weights": "resnetv2_50x1_bit.goog_in21k"},
    )
    return hyper_rule(config, images=45_000)


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


def cifar10_involution_teacher() -> Config:
    """RedNet-26 with a stem of stride 1 on CIFAR-10: the other teacher of `cifar10-ensemble`."""
    return cifar10_teacher().replace(student={"name": "rednet_26_small_stem", "drop_path": 0.0})


def cifar10_transformer_teacher() -> Config:
    """`cifar10` without token or teacher: the transformer among the teachers of CIFAR-10."""
    return _transformer(cifar10())


def cifar10_ensemble() -> Config:
    """`cifar10` with two teachers, a RegNet and an involution network, each with its own token."""
    return cifar10().replace(
        student={"num_distillation_tokens": 2},
        teacher={
            "source": ("checkpoints/cifar10-teacher", "checkpoints/cifar10-involution-teacher"),
            "combine": "tokens",
        },
    )


def cifar10_function_matching() -> Config:
    """`cifar10` by function matching, 1,200 epochs: a patient teacher (one GPU)."""
    return _function_matching(cifar10(), epochs=1200)


def _function_matching(config: Config, *, epochs: int) -> Config:
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


def cifar10_usi() -> Config:
    """RegNetY-200MF as the student of `cifar10-teacher` by USI, the one scheme for any backbone."""
    return _usi(cifar10(), StudentConfig(name="regnety_002_small_stem", image_size=32))


def imagenet_usi() -> Config:
    """Any backbone (--student.name timm:NAME) on class folders of ImageNet by USI, taught by the
    authors' TResNet-L."""
    config = imagenet_subset().replace(
        views={"eval_crop_pct": 0.95},
        teacher={"source": ("tresnet_v2_l.miil_in21k_ft_in1k",)},
    )
    return _usi(config, StudentConfig(name="timm:resnet50", image_size=224))


def _usi(config: Config, student: StudentConfig) -> Config:
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


def cifar10_micro_teacher() -> Config:
    """RegNetY-200MF on CIFAR-10 in 12 epochs: the teacher of `cifar10-micro` (a laptop)."""
    return cifar10_teacher().replace(
        views={"mixup_alpha": 0.0, "cutmix_alpha": 0.0},
        student={"name": "regnety_002_small_stem", "drop_path": 0.0},
        optim={"epochs": 12, "batch_size": 128, "warmup_epochs": 1},
    )


_SHORT = {
    "epochs": 8,
    "batch_size": 128,
    "lr": 1e-3,
    "lr_base_batch_size": None,
    "warmup_epochs": 1,
}


def cifar10_micro() -> Config:
    """A micro DeiT distilled from `cifar10-micro-teacher` in 8 epochs (a laptop, half an hour)."""
    return cifar10().replace(
        views=AUGMENTATIONS["none"],
        student={"name": "deit_micro", "drop_path": 0.0, "weight_init": "scaled"},
        teacher={"source": ("checkpoints/cifar10-micro-teacher",)},
        optim=_SHORT,
    )


def cifar10_micro_involution_teacher() -> Config:
    """A 0.5 M network of involutions on CIFAR-10 in 12 epochs: the other teacher of
    `cifar10-micro-ensemble` (a laptop)."""
    return cifar10_micro_teacher().replace(student={"name": "rednet_tiny"})


def cifar10_micro_transformer_teacher() -> Config:
    """`cifar10-micro` without token or teacher, for 12 epochs: the transformer among its teachers
    (a laptop)."""
    return _transformer(cifar10_micro()).replace(optim={"epochs": 12})


def cifar10_micro_ensemble() -> Config:
    """`cifar10-micro` with two teachers, a RegNet and an involution network, each with its own
    token (a laptop)."""
    sources = ("checkpoints/cifar10-micro-teacher", "checkpoints/cifar10-micro-involution-teacher")
    return cifar10_micro().replace(
        student={"num_distillation_tokens": 2},
        teacher={"source": sources, "combine": "tokens"},
    )


def cifar10_micro_finetune() -> Config:
    """`cifar10-micro` at 48 px, still taught: by `cifar10-micro-finetune-teacher` (a laptop)."""
    teacher = "cifar10-micro-finetune-teacher"
    return _finetune(cifar10_micro(), 48, start="cifar10-micro", teacher=teacher)


def cifar10_micro_finetune_teacher() -> Config:
    """`cifar10-micro-teacher` fitted to 48 px, the teacher of `cifar10-micro-finetune`."""
    return _finetune(cifar10_micro_teacher(), 48, start="cifar10-micro-teacher")


def cifar10_finetune() -> Config:
    """`cifar10` at 48 px by DeiT's schedule, its teacher at the same resolution (one GPU)."""
    config = cifar10().replace(init={"weights": "checkpoints/cifar10"})
    return deit(at_resolution(config, 48))


def cifar100_teacher() -> Config:
    """RegNetY-400MF with a stem of stride 1 on CIFAR-100: the teacher of `cifar100`."""
    return cifar10_teacher().replace(data={"source": "cifar100"})


def cifar100() -> Config:
    """DeiT-Ti with patches of 4 px distilled from `cifar100-teacher` for 300 epochs (one GPU)."""
    return cifar10().replace(
        data={"source": "cifar100"},
        teacher={"source": ("checkpoints/cifar100-teacher",)},
    )


def tiny_imagenet_teacher() -> Config:
    """RegNetY-400MF at 64 px on Tiny-ImageNet: the teacher of `tiny-imagenet` (one GPU)."""
    return cifar10_teacher().replace(
        data={"source": "folder", "root": "data/tiny-imagenet-200", "image_size": 64},
        views={"crop": "random_resized", "crop_scale": (0.25, 1.0)},
        student={"image_size": 64},
        optim={"epochs": 100},
    )


def tiny_imagenet() -> Config:
    """DeiT-Ti with patches of 8 px distilled from `tiny-imagenet-teacher` by DeiT's recipe."""
    return cifar10().replace(
        data={"source": "folder", "root": "data/tiny-imagenet-200", "image_size": 64},
        views={"crop": "random_resized", "crop_scale": (0.25, 1.0)},
        student={"image_size": 64, "patch_size": 8},
        teacher={"source": ("checkpoints/tiny-imagenet-teacher",)},
    )


def tiny_imagenet_micro_teacher() -> Config:
    """RegNetY-200MF at 64 px in 10 epochs: the teacher of `tiny-imagenet-micro` (a laptop)."""
    return tiny_imagenet_teacher().replace(
        views=AUGMENTATIONS["none"],
        student={"name": "timm:regnety_002", "drop_path": 0.0},
        optim={"epochs": 10, "batch_size": 128, "warmup_epochs": 1},
    )


def tiny_imagenet_micro() -> Config:
    """A micro DeiT by the whole recipe in 8 epochs (a laptop; for a part of the classes)."""
    return tiny_imagenet().replace(
        student={"name": "deit_micro", "drop_path": 0.0, "weight_init": "scaled"},
        teacher={"source": ("checkpoints/tiny-imagenet-micro-teacher",)},
        optim=_SHORT,
    )


def image_folder_teacher() -> Config:
    """RegNetY-400MF at 64 px on your class folders (--data.root): the teacher of `folder`."""
    return cifar10_teacher().replace(
        data={"source": "folder", "image_size": 72},
        views={"crop": "random_resized", "crop_scale": (0.25, 1.0), "eval_crop_pct": 64 / 72},
        student={"image_size": 64},
        optim={"batch_size": 64, "lr": 1e-3},
    )


def image_folder() -> Config:
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


def imagenet_subset() -> Config:
    """DeiT-Ti/16 at 224 px on an ImageNet subset in class folders, timm's RegNetY-16GF teaching."""
    return image_folder().replace(
        data={"image_size": 256},
        views={"crop_scale": (0.08, 1.0), "aug_repeats": 3, "eval_crop_pct": 0.875},
        student={"image_size": 224, "patch_size": 16},
        teacher={"source": ("regnety_160.deit_in1k",)},
        optim={"batch_size": 1024, "lr_base_batch_size": 512},
    )


def imagenet_384() -> Config:
    """DeiT (--from WEIGHTS) at 384 px by the paper's schedule, RegNetY-16GF at 384 px teaching."""
    return deit(at_resolution(imagenet_subset(), 384))


def transfer_cifar10() -> Config:
    """A DeiT of ImageNet (--from WEIGHTS) on CIFAR-10 at 224 px: AdamW of dino's issue 81."""
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


def transfer_cifar100() -> Config:
    """A DeiT of ImageNet (--from WEIGHTS) on CIFAR-100 at 224 px: AdamW of deit's issue 117."""
    return transfer_cifar10().replace(
        data={"source": "cifar100"}, views={"aug_repeats": 3}, optim={"lr": 5e-6}
    )


def transfer_flowers() -> Config:
    """A DeiT of ImageNet (--from WEIGHTS) on Flowers-102 in class folders; nobody published a
    recipe for it, these are CIFAR's numbers."""
    return _transfer_to("flowers", epochs=1000, lr=7.5e-6)


def transfer_cars() -> Config:
    """A DeiT of ImageNet (--from WEIGHTS) on Stanford Cars in class folders: deit's issue 45, with
    AdamW."""
    return _transfer_to("cars", epochs=1000, lr=7.5e-6)


def transfer_inaturalist() -> Config:
    """A DeiT of ImageNet (--from WEIGHTS) on iNaturalist 2018 or 2019 in class folders: deit's
    issues 105 and 141."""
    config = _transfer_to("inaturalist", epochs=360, lr=7.5e-5)
    return config.replace(views={"erasing_prob": 0.1}, optim={"min_lr": 1e-5})


def _transfer_to(name: str, *, epochs: int, lr: float) -> Config:
    return transfer_cifar10().replace(
        data={"source": "folder", "root": f"data/{name}", "image_size": 256},
        views={"eval_crop_pct": 0.875},
        optim={"epochs": epochs, "lr": lr},
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "digits-teacher": digits_teacher,
    "digits-involution-teacher": digits_involution_teacher,
    "digits-transformer-teacher": digits_transformer_teacher,
    "digits-ensemble": digits_ensemble,
    "digits-function-matching": digits_function_matching,
    "digits-held-out": digits_held_out,
    "digits-finetune": digits_finetune,
    "digits-finetune-teacher": digits_finetune_teacher,
    "mnist": mnist,
    "mnist-teacher": mnist_teacher,
    "mnist-held-out": mnist_held_out,
    "cifar10": cifar10,
    "cifar10-teacher": cifar10_teacher,
    "cifar10-involution-teacher": cifar10_involution_teacher,
    "cifar10-transformer-teacher": cifar10_transformer_teacher,
    "cifar10-ensemble": cifar10_ensemble,
    "cifar10-function-matching": cifar10_function_matching,
    "cifar10-usi": cifar10_usi,
    "cifar10-bit-teacher": cifar10_bit_teacher,
    "cifar10-finetune": cifar10_finetune,
    "cifar10-micro": cifar10_micro,
    "cifar10-micro-teacher": cifar10_micro_teacher,
    "cifar10-micro-transformer-teacher": cifar10_micro_transformer_teacher,
    "cifar10-micro-ensemble": cifar10_micro_ensemble,
    "cifar10-micro-involution-teacher": cifar10_micro_involution_teacher,
    "cifar10-micro-finetune": cifar10_micro_finetune,
    "cifar10-micro-finetune-teacher": cifar10_micro_finetune_teacher,
    "cifar100": cifar100,
    "cifar100-teacher": cifar100_teacher,
    "tiny-imagenet": tiny_imagenet,
    "tiny-imagenet-teacher": tiny_imagenet_teacher,
    "tiny-imagenet-micro": tiny_imagenet_micro,
    "tiny-imagenet-micro-teacher": tiny_imagenet_micro_teacher,
    "folder": image_folder,
    "folder-teacher": image_folder_teacher,
    "imagenet-subset": imagenet_subset,
    "imagenet-384": imagenet_384,
    "imagenet-usi": imagenet_usi,
    "transfer-cifar10": transfer_cifar10,
    "transfer-cifar100": transfer_cifar100,
    "transfer-flowers": transfer_flowers,
    "transfer-cars": transfer_cars,
    "transfer-inaturalist": transfer_inaturalist,
}
"""Every recipe by its name on the command line."""


def recipe_of_path(source: str | None) -> str | None:
    """The recipe whose run lies at `source` where nobody said another --out; None: none of ours."""
    folder, _, name = (source or "").rpartition("/")
    return name if folder == "checkpoints" and name in RECIPES else None


def find_recipe(name: str) -> Config:
    """The configuration of a named recipe, of FILE.py:FUNCTION (or FILE.py with a function named
    `recipe`), or of a run's config.json. Raises ConfigError.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".json"):
        return load_config(Path(name))
    if name.endswith(".py") or ".py:" in name:
        return _from_file(name)
    if (Path(name) / "config.json").is_file():
        raise ConfigError(
            f"{name}: is a run, not a recipe; its configuration is {Path(name) / 'config.json'}"
        )
    raise ConfigError(
        f"no recipe {name!r}{nearest(name, RECIPES)}; recipes are {', '.join(RECIPES)}, "
        "FILE.py:FUNCTION, or a run's config.json"
    )


def _from_file(name: str) -> Config:
    file, _, function = name.partition(".py:")
    path = Path(file if file.endswith(".py") else f"{file}.py")
    function = function or "recipe"
    if not path.is_file():
        raise ConfigError(f"recipe {name}: {no_file(path)}")
    try:
        config = getattr(import_file(path), function)()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise_transient(error, f"recipe {name}")
        raise ConfigError(f"recipe {name}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"recipe {name}: should return a Config, returned {type(config).__name__}"
        )
    return config
