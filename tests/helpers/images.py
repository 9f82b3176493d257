"""Images that tests read, and what they are read into."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deit.config.data_section import DataConfig, ViewsConfig
from deit.config.presets import AUGMENTATIONS
from deit.config.schema import OptimConfig
from deit.datasets.loader import Sizes, TrainLoader
from deit.datasets.splits import load_splits
from deit.datasets.views import ChannelStats

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def real_images(width=60, height=48):
    """Twelve parts of the two photographs that come with scikit-learn."""
    datasets = pytest.importorskip("sklearn.datasets")
    pictures = [Image.fromarray(array) for array in datasets.load_sample_images().images]
    found = []
    for number in range(12):
        picture = pictures[number % 2]
        left, top = 37 * number, 23 * number
        box = (left, top, left + 3 * width, top + 3 * height)
        found.append(picture.crop(box).resize((width, height), Image.Resampling.BICUBIC))
    return found


def pixels_of(images):
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])


SIDE = 12


def write_image_folder(root, classes=("ant", "bee", "cat"), number=18):
    """Class folders of JPEG and PNG files of many sizes, smooth so that sizes matter."""
    generator = np.random.default_rng(3)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(number):
            small = generator.integers(256, size=(4, 5, 3), dtype=np.uint8)
            small[..., label % 3] //= 4
            size = tuple(int(side) for side in generator.integers(20, 41, size=2))
            ending = "jpg" if index % 2 else "png"
            Image.fromarray(small).resize(size).save(root / name / f"{index:02d}.{ending}")
    return root


def images_at(root):
    """The training images, which stay in their files."""
    config = DataConfig(source="folder", root=str(root), storage="files", image_size=SIDE)
    return load_splits(config).train


def joined(blocks):
    """What several batches hold, each field as one tensor."""
    fields = ("images", "teacher_images", "targets", "sample_ids", "target_rows")
    blocks = list(blocks)
    return [torch.cat([getattr(block, field) for block in blocks]) for field in fields]


def write_class_folders(
    root, classes=("ant", "bee", "cat"), number=4, size=(10, 8), splits=("train", "test")
):
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return root


def mutate(path: Path, how: random.Random) -> None:
    """Change a file: a bit, a byte, a stretch; cut it off; append; empty it; remove it."""
    content = bytearray(path.read_bytes())
    place = how.randrange(len(content))
    kind = how.choice(("bit", "byte", "stretch", "cut", "append", "twice", "empty", "remove"))
    if kind == "bit":
        content[place] ^= 1 << how.randrange(8)
    elif kind == "byte":
        content[place] = (content[place] + how.randrange(1, 256)) % 256
    elif kind == "stretch":
        stretch = bytes(how.randrange(256) for _ in range(how.randrange(1, 20)))
        content[place : place + len(stretch)] = stretch
    elif kind == "cut":
        del content[place:]
    elif kind == "append":
        content += bytes(how.randrange(256) for _ in range(how.randrange(1, 9)))
    elif kind == "twice":
        content[place:place] = content[place : place + how.randrange(1, 30)]
    elif kind == "empty":
        content.clear()
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(content)


def random_batch(side: int = 12, number: int = 3, seed: int = 5) -> torch.Tensor:
    """Images of standard normal numbers, float32 [number, 3, side, side]."""
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(seed))


def folder_data(root, **changes):
    return DataConfig(source="folder", root=str(root), image_size=8, **changes)


CHANNEL_STATS = ChannelStats((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
PLAIN = ViewsConfig(crop="random_resized", crop_scale=(0.2, 1.0), flip=0.0)
FULL = dataclasses.replace(PLAIN, flip=0.5, **{**AUGMENTATIONS["deit"], "aug_repeats": 2})


def loader(images, process=0, num_processes=1, accumulate=1, batch_size=16, views=FULL, workers=0):
    return TrainLoader(
        images,
        3,
        views=views,
        optim=OptimConfig(batch_size=batch_size, grad_accum_steps=accumulate),
        sizes=Sizes(16, SIDE, 16),
        channel_stats=CHANNEL_STATS,
        seed=5,
        process=process,
        num_processes=num_processes,
        workers=workers,
    )
