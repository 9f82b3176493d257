"""The image sources: each loads labelled uint8 images and the splits they come with."""

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as transforms

from deit.config import DataConfig
from deit.console import progress
from deit.errors import DataError, EnvironmentFault
from deit.text import nearest


class Images(NamedTuple):
    """Labelled images in memory.

    pixels: uint8 [number, 3, size, size].
    labels: int64 [number], an index into the class names.
    """

    pixels: Tensor
    labels: Tensor


class Loaded(NamedTuple):
    """What a source holds: None where it has no such split.

    identities: int64 [number of training images] in [0, 2**32), a number for each training image
    that does not depend on which others are there: what is set aside is chosen by it.
    """

    class_names: tuple[str, ...]
    identities: Tensor
    train: Images
    validation: Images | None
    test: Images | None


def load_digits(config: DataConfig, keep: tuple[str, ...]) -> Loaded:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels of 17 grey levels, without splits.

    Source: the test half of UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
    1998). Raises EnvironmentFault without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as read
    except ImportError:
        raise EnvironmentFault(
            "data.source digits: scikit-learn is missing; pip install 'deit[digits]'"
        ) from None
    digits = read()
    grey = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))
    pixels = grey.unsqueeze(1).repeat(1, 3, 1, 1)
    names = tuple(str(name) for name in digits.target_names)
    everything = Images(pixels, torch.from_numpy(digits.target).long())
    return _keep_classes(Loaded(names, torch.arange(len(pixels)), everything, None, None), keep)


def load_cifar10(config: DataConfig, keep: tuple[str, ...]) -> Loaded:
    """CIFAR-10 in torchvision's layout: 50,000 training and 10,000 test images of 32x32."""
    return _load_cifar(CIFAR10, config, keep)


def load_cifar100(config: DataConfig, keep: tuple[str, ...]) -> Loaded:
    """CIFAR-100 in torchvision's layout, fine labels."""
    return _load_cifar(CIFAR100, config, keep)


def _load_cifar(dataset: type[VisionDataset], config: DataConfig, keep: tuple[str, ...]) -> Loaded:
    root = Path(config.root)
    try:
        train = dataset(root, train=True, download=config.download)
        test = dataset(root, train=False, download=config.download)
    except Exception as error:  # torchvision raises RuntimeError, urllib and tarfile their own
        expected = root / dataset.base_folder
        raise DataError(
            f"data.root {root}: no {dataset.__name__} here ({_first_line(error)}); expected "
            f"{expected} (archive {dataset.filename}, md5 {dataset.tgz_md5}). Fetch it with "
            "--data.download, or point --data.root at it; images in class folders are read by "
            "--data.source folder"
        ) from None

    def images(split: VisionDataset) -> Images:
        pixels = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        return Images(pixels, torch.tensor(split.targets))

    identities = torch.arange(len(train.targets))
    found = Loaded(tuple(train.classes), identities, images(train), None, images(test))
    return _keep_classes(found, keep)


def load_folder(config: DataConfig, keep: tuple[str, ...]) -> Loaded:
    """Images in class folders: ROOT/train/CLASS/*, or ROOT/CLASS/* without splits.

    ROOT/val (or validation) and ROOT/test are optional. A labelled `val` without a `test` is the
    final test, as is the custom with ImageNet; selection then uses a part of `train`. Each image
    is resized to its shorter side and cut square at data.image_size.
    Classes are sorted by name in code point order. Hidden folders are ignored.
    Raises DataError on a missing or empty root, classes that differ between the splits, an empty
    class, an unreadable image, or more images than fit in memory.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root {root}: no such folder; expected {root}/train/CLASS/IMAGE")
    folders = {child.name: child for child in root.iterdir() if child.is_dir()}
    train = folders.get("train", root)
    validation = folders.get("val") or folders.get("validation")
    test = folders.get("test")
    if train is root:
        validation = test = None
    elif test is None:
        validation, test = None, validation
    classes = _class_folders(train)
    splits = [folder for folder in (train, validation, test) if folder is not None]
    if train is root and (split := next((n for n in classes if n.lower() in _SPLITS), None)):
        raise DataError(
            f"data.root {root}: {split!r} looks like a split and not a class; name the folder of "
            f"the training images {root}/train"
        )
    if keep:
        classes = tuple(name for name in classes if name in _known(keep, classes))
    for folder in splits:
        _check_classes(folder, classes, others=bool(keep))
    files = {folder: _class_files(folder, classes) for folder in splits}
    check_memory(sum(map(len, files.values())), config)
    images = {folder: _decode_all(folder, files[folder], config.image_size) for folder in splits}
    # The path below the split, so that an image keeps its place whatever comes and goes around it.
    paths = [path.relative_to(train).as_posix() for path, _ in files[train]]
    identities = [zlib.crc32(path.encode()) for path in paths]
    return Loaded(
        classes,
        torch.tensor(identities),
        images[train],
        images.get(validation),
        images.get(test),
    )


_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "eval")


def check_memory(number: int, config: DataConfig) -> None:
    """Refuse so many images before they are decoded or enlarged. Raises DataError.

    Counted twice: setting a split aside copies.
    """
    needed = 2 * number * 3 * config.image_size**2
    allowed = psutil.virtual_memory().available * config.memory_fraction
    if needed > allowed:
        raise DataError(
            f"{number} images need {needed / 2**30:.1f} GiB at data.image_size "
            f"{config.image_size}, allowed are {allowed / 2**30:.1f} GiB; lower data.image_size, "
            "keep fewer data.classes, or raise data.memory_fraction"
        )


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = sorted(
        child.name
        for child in folder.iterdir()
        if child.is_dir() and not child.name.startswith((".", "__"))
    )
    if not names:
        raise DataError(f"{folder}: no class folders; expected {folder}/CLASS/IMAGE")
    return tuple(names)


def _check_classes(folder: Path, classes: tuple[str, ...], *, others: bool) -> None:
    """Every split must have these classes, and no others unless they were left out on purpose."""
    found = _class_folders(folder)
    for name in classes:
        if name not in found:
            raise DataError(f"{folder}: no folder for class {name!r}, which the others have")
    for name in found:
        if name not in classes and not others:
            raise DataError(f"{folder / name}: this class has no training images")


def _class_files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """The image files of a split and their labels, in the order of their names."""
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        members = sorted(
            path
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")
        )
        if not members:
            raise DataError(f"{folder / name}: no images in this class folder")
        files += [(path, label) for path in members]
    return files


def _decode_all(folder: Path, files: list[tuple[Path, int]], size: int) -> Images:
    pixels = torch.empty((len(files), 3, size, size), dtype=torch.uint8)

    def decode(index: int) -> None:
        pixels[index] = decode_image(files[index][0], size)

    with ThreadPoolExecutor() as pool:
        done = pool.map(decode, range(len(files)))
        try:
            for _ in progress(done, total=len(files), title=f"reading {folder}"):
                pass
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise
    return Images(pixels, torch.tensor([label for _, label in files]))


def decode_image(path: Path, size: int) -> Tensor:
    """An image as uint8 [3, size, size]: shorter side to size, bicubic, the centre cut square.

    Turned as its EXIF orientation says; transparent parts become black. Raises DataError naming
    the file if it is unreadable or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path}: has more than 8 bits a channel (mode {image.mode}); convert it first"
                )
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright)
            square = transforms.resize(upright.convert("RGB"), size, _BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({_first_line(error)})") from None
    square = transforms.center_crop(square, [size, size])
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


_BICUBIC = transforms.InterpolationMode.BICUBIC


def _known(keep: tuple[str, ...], names: tuple[str, ...]) -> set[str]:
    """The wanted classes; raises DataError for one the data does not have."""
    for name in keep:
        if name not in names:
            raise DataError(f"data.classes: no class {name!r} in the data{nearest(name, names)}")
    return set(keep)


def _keep_classes(loaded: Loaded, keep: tuple[str, ...]) -> Loaded:
    """Only the wanted classes, in the order of the source; all of them if none are named."""
    if not keep:
        return loaded
    wanted = _known(keep, loaded.class_names)
    old = [index for index, name in enumerate(loaded.class_names) if name in wanted]
    new_label = torch.full((len(loaded.class_names),), -1)
    new_label[old] = torch.arange(len(old))

    def filtered(images: Images | None) -> Images | None:
        if images is None:
            return None
        labels = new_label[images.labels]
        return Images(images.pixels[labels >= 0], labels[labels >= 0])

    names = tuple(loaded.class_names[index] for index in old)
    identities = loaded.identities[new_label[loaded.train.labels] >= 0]
    train, validation, test = (filtered(images) for images in loaded[2:])
    return Loaded(names, identities, train, validation, test)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


SOURCES: dict[str, Callable[[DataConfig, tuple[str, ...]], Loaded]] = {
    "digits": load_digits,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "folder": load_folder,
}
"""Every source by its name in data.source: (config, class names to keep or none) -> Loaded."""
