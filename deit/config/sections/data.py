"""The section `data`: the images and how they are split."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from deit.config.field_types import (
    STRICT,
    Count,
    ExpandedPath,
    Fraction,
    Names,
    OptionalText,
    OptNonNegativeInt,
    Source,
    Storage,
)


@dataclass(frozen=True)
class DataConfig:
    """The images and how they are split."""

    __pydantic_config__ = STRICT
    source: Source = "digits"
    """Source of the images. digits, mnist, cifar10, cifar100: these data sets; folder: class
    folders, with or without split folders (train, val or valid, test); shards: WebDataset tar files
    of KEY.jpg and KEY.cls; reader: a timm reader (data.reader)."""
    root: ExpandedPath = "data"
    """Folder of the images (not used by digits)."""
    reader: OptionalText = None
    """For source reader: folder, tar (a tar of class folders), hfds/NAME or torch/NAME."""
    download: bool = False
    """Allow downloading MNIST and CIFAR (checksums are verified) or the dataset of data.reader."""
    storage: Storage = "auto"
    """memory: images are decoded once, to squares of image_size (uint8). files: images stay
    encoded, and each view decodes them (folder, shards, reader). auto: memory for up to 2 GiB, else
    files."""
    num_workers: OptNonNegativeInt = None
    """Decoding processes per training process, with storage files. Default: one per core, at most
    8."""
    exclude_list: OptionalText = None
    """Text file of images to exclude, one name relative to root per line, as written by `deit
    check-data`."""
    image_size: Count = 32
    """Side [px] of the square images in memory; views are cropped from them."""
    classes: Names = ()
    """Class names to keep, separated by commas, or @FILE, a text file (UTF-8, with or without a
    byte-order mark) with one name per line. Default: all."""
    unseen_classes: Names = ()
    """Classes (in the format of data.classes) whose training and validation images are removed: the
    student learns them from the teacher only. The test split keeps them."""
    validation_fraction: Fraction = 0.1
    """Fraction of each training class used as the validation split, unless the data has one."""
    test_fraction: Fraction = 0.2
    """Fraction of each class used as the test split, for a folder without split folders."""
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of each class of the training split that is used, for experiments with fewer
    images."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all splits; independent of run.seed, so that runs with different seeds share their
    splits."""
    memory_fraction: Fraction = 0.5
    """Largest fraction of the free memory that decoded images may use."""
