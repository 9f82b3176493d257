"""The same images as class folders, shards and tar files, and the fields that read them."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from deit.config.sections.data import DataConfig
from deit.datasets.splits import Splits

CLASSES = ("10", "2", "Dog", "cat")  # in code point order; timm would have 2 before 10


def png(generator: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    pixels = generator.integers(256, size=(9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def images(split: str, images_per_class: int = 10) -> dict[str, bytes]:
    """Return the content of each file of a split by CLASS/INDEX.png."""
    generator = np.random.default_rng(len(split))
    return {
        f"{name}/{index}.png": png(generator)
        for name in CLASSES
        for index in range(images_per_class)
    }


def add_member(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def write_folder(root: Path, split: str = "train") -> None:
    for name, content in images(split).items():
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_shards(root: Path, split: str = "train", *, numbers: bool = False) -> None:
    """Write two shards. numbers: labels are line numbers of classes.txt, which is not sorted."""
    order = ("cat", "2", "10", "Dog")
    (root / split).mkdir(parents=True)
    files = list(images(split).items())
    for shard in range(2):
        with tarfile.open(root / split / f"{shard:03}.tar", "w") as archive:
            for name, content in files[shard::2]:
                key, label = name.removesuffix(".png"), name.split("/")[0]
                add_member(archive, f"{key}.json", b"{}")
                add_member(
                    archive, f"{key}.cls", str(order.index(label) if numbers else label).encode()
                )
                add_member(archive, name, content)
    if numbers:
        (root / "classes.txt").write_text("\n".join(order) + "\n")


def write_tar(root: Path, split: str = "train") -> None:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / f"{split}.tar", "w") as archive:
        for name, content in images(split).items():
            add_member(archive, f"./{name}", content)


LAYOUTS = {
    "folder": (write_folder, {"source": "folder"}),
    "shards": (write_shards, {"source": "shards"}),
    "numbered shards": (lambda *a: write_shards(*a, numbers=True), {"source": "shards"}),
    "folder reader": (write_folder, {"source": "reader", "reader": "folder"}),
    "tar reader": (write_tar, {"source": "reader", "reader": "tar"}),
}


def write_splits(layout: str, root: Path, splits: tuple[str, ...] = ("train", "val")) -> DataConfig:
    write, fields = LAYOUTS[layout]
    for split in splits:
        write(root, split)
    return DataConfig(root=str(root), image_size=8, **fields)


def split_contents(splits: Splits) -> list[set[tuple[str, bytes]]]:
    """Return class name and bytes of each image, for each split."""
    return [
        {
            (splits.class_names[label], split.read(index))
            for index, label in enumerate(split.labels.tolist())
        }
        for split in (splits.train, splits.validation, splits.test)
    ]


IMAGE = png(np.random.default_rng(3))
