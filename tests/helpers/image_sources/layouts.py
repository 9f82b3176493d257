"""Small images laid out as folders, shards or tars."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from deit.config.data_section import DataConfig
from deit.datasets.sources import LISTINGS

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


def names_of(number: int) -> list[str]:
    return [f"{name}/{index}.png" for name in CLASSES for index in range(number)]


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
        key, ending = os.path.splitext(name)
        members |= {f"{key}{ending}": PNG, f"{key}.cls": name.split("/")[0].encode()}
    return write_tar(path, members)


def write_images(way: str, root: Path, splits: dict[str, str]) -> DataConfig:
    """The same images as class folders, shards or a tar; splits: what each is called."""
    for split, called in splits.items():
        names = names_of(SPLIT_SIZES[split])
        if way == "shards":
            write_shard(root / called / "0.tar", names)
        elif way == "tar reader":
            write_tar(root / f"{called}.tar", dict.fromkeys(names, PNG))
        else:
            for name in names:
                write_file(root / called / name)
    return source_config(way, root)


def source_config(way: str, root: Path, **fields: object) -> DataConfig:
    kind, _, reader = way.partition(" ")
    source = {"source": "reader", "reader": kind} if reader else {"source": kind}
    return DataConfig(root=str(root), image_size=8, storage="files", **source, **fields)


def split_sizes(found: DataConfig) -> dict[str, int]:
    listing = LISTINGS[found.source](found, ())
    return {split: len(rows) for split, rows in listing.splits.items()}


def skipped_notes(found: DataConfig) -> tuple[str, ...]:
    return LISTINGS[found.source](found, ()).skipped.notes()


LAYOUTS = ("folder", "shards", "folder reader", "tar reader")
