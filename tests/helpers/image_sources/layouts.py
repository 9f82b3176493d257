"""Small images as class folders, shards or tar files."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from deit.config.sections.data import DataConfig
from deit.datasets.sources.registry import LISTINGS

CLASSES = ("ant", "bee")
SPLIT_SIZES = {"train": 4, "validation": 3, "test": 2}


def random_image(seed: int = 0, size: tuple[int, int] = (9, 8)) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8))


def encoded(kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    random_image().save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded()


def write_file(path: Path, content: bytes = PNG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def file_names(images_per_class: int) -> list[str]:
    return [f"{name}/{index}.png" for name in CLASSES for index in range(images_per_class)]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shard(path: Path, names: list[str]) -> Path:
    members = {}
    for name in names:
        key, suffix = os.path.splitext(name)
        members |= {f"{key}{suffix}": PNG, f"{key}.cls": name.split("/")[0].encode()}
    return write_tar(path, members)


def write_images(layout: str, root: Path, splits: dict[str, str]) -> DataConfig:
    """Write the same images in one of `LAYOUTS`. splits: the folder name of each split."""
    for split, name_of_split in splits.items():
        names = file_names(SPLIT_SIZES[split])
        if layout == "shards":
            write_shard(root / name_of_split / "0.tar", names)
        elif layout == "tar reader":
            write_tar(root / f"{name_of_split}.tar", dict.fromkeys(names, PNG))
        else:
            for name in names:
                write_file(root / name_of_split / name)
    return source_config(layout, root)


def source_config(layout: str, root: Path, **fields: object) -> DataConfig:
    kind, _, reader = layout.partition(" ")
    source = {"source": "reader", "reader": kind} if reader else {"source": kind}
    return DataConfig(root=str(root), image_size=8, storage="files", **source, **fields)


def split_sizes(config: DataConfig) -> dict[str, int]:
    """Return the number of images of each split."""
    listing = LISTINGS[config.source](config, ())
    return {split: len(rows) for split, rows in listing.splits.items()}


def skipped_notes(config: DataConfig) -> tuple[str, ...]:
    """Return the notes on files that are not read."""
    return LISTINGS[config.source](config, ()).skipped.notes()


LAYOUTS = ("folder", "shards", "folder reader", "tar reader")
