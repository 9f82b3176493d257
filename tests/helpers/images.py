"""Images that tests read, and loaders of them."""

import dataclasses
import random
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deit.config.presets import AUGMENTATIONS
from deit.config.sections.data import DataConfig
from deit.config.sections.optim import OptimConfig
from deit.config.sections.views import ViewsConfig
from deit.datasets.loader import TrainLoader
from deit.datasets.sources.imagenet_test_sets import SYNSET_FILES
from deit.datasets.splits import load_splits
from deit.datasets.views import ChannelStats

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def real_images(width=60, height=48):
    """Return twelve crops of the two photographs that come with scikit-learn."""
    datasets = pytest.importorskip("sklearn.datasets")
    photographs = [Image.fromarray(array) for array in datasets.load_sample_images().images]
    crops = []
    for index in range(12):
        left, top = 37 * index, 23 * index
        box = (left, top, left + 3 * width, top + 3 * height)
        crop = photographs[index % 2].crop(box)
        crops.append(crop.resize((width, height), Image.Resampling.BICUBIC))
    return crops


def pixels_of(images):
    """Return Pillow images of one size as uint8 [N, 3, H, W]."""
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])


SIDE = 12


def write_image_folder(root, classes=("ant", "bee", "cat"), images_per_class=18):
    """Write class folders of JPEG and PNG files of many sizes; smooth, so that resizing matters."""
    generator = np.random.default_rng(3)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(images_per_class):
            small = generator.integers(256, size=(4, 5, 3), dtype=np.uint8)
            small[..., label % 3] //= 4
            size = tuple(int(side) for side in generator.integers(20, 41, size=2))
            ending = "jpg" if index % 2 else "png"
            Image.fromarray(small).resize(size).save(root / name / f"{index:02d}.{ending}")
    return root


def images_at(root):
    """Return the training images of a folder, which are decoded when they are read."""
    config = DataConfig(source="folder", root=str(root), storage="files", image_size=SIDE)
    return load_splits(config).train


def joined(blocks):
    """Return the fields of several batches, each as one tensor."""
    fields = ("images", "teacher_images", "targets", "sample_ids", "target_rows")
    blocks = list(blocks)
    return [torch.cat([getattr(block, field) for block in blocks]) for field in fields]


def write_class_folders(
    root, classes=("ant", "bee", "cat"), images_per_class=4, size=(10, 8), splits=("train", "test")
):
    """Write class folders of PNG files of noise, `images_per_class` for each class and split."""
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(images_per_class):
                pixels = generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def mutate(path: Path, draw: random.Random) -> None:
    """Damage a file: change a bit, a byte or a range; truncate, extend, empty or remove it."""
    content = bytearray(path.read_bytes())
    offset = draw.randrange(len(content))
    kind = draw.choice(("bit", "byte", "stretch", "cut", "append", "twice", "empty", "remove"))
    if kind == "bit":
        content[offset] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        content[offset] = (content[offset] + draw.randrange(1, 256)) % 256
    elif kind == "stretch":
        stretch = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 20)))
        content[offset : offset + len(stretch)] = stretch
    elif kind == "cut":
        del content[offset:]
    elif kind == "append":
        content += bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    elif kind == "twice":
        content[offset:offset] = content[offset : offset + draw.randrange(1, 30)]
    elif kind == "empty":
        content.clear()
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(content)


def random_batch(side: int = 12, num_images: int = 3, seed: int = 5) -> torch.Tensor:
    """Return images of standard normal numbers, float32 [num_images, 3, side, side]."""
    return torch.randn(num_images, 3, side, side, generator=torch.Generator().manual_seed(seed))


def folder_data(root, **changes):
    """Return the configuration of a folder of images at 8 px."""
    return DataConfig(source="folder", root=str(root), image_size=8, **changes)


CHANNEL_STATS = ChannelStats((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
PLAIN = ViewsConfig(crop="random_resized", crop_scale=(0.2, 1.0), flip=0.0)
FULL = dataclasses.replace(PLAIN, flip=0.5, **{**AUGMENTATIONS["deit"], "aug_repeats": 2})


def loader(images, process=0, num_processes=1, accumulate=1, batch_size=16, views=FULL, workers=0):
    """Return a loader of three classes at 16 px, with the teacher's images at `SIDE` px."""
    return TrainLoader(
        images,
        3,
        views=views,
        optim=OptimConfig(batch_size=batch_size, grad_accum_steps=accumulate),
        student_size=SIDE,
        teacher_size=16,
        channel_stats=CHANNEL_STATS,
        seed=5,
        process_index=process,
        num_processes=num_processes,
        num_workers=workers,
    )


def imagenet_classes(test_set):
    """Return timm's class names of one of ImageNet's other test sets."""
    file = resources.files("timm.data") / "_info" / SYNSET_FILES[test_set]
    return tuple(file.read_text().split())


def write_class_images(root, names, files=("a.png",)):
    """Write 4x4 images to ROOT/NAME/FILE for each class; return the root."""
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (4, 4), (index % 256, 0, 0)).save(root / name / file)
    return root
