"""Folders and files that a command reads, checked before torch is imported: images, teachers and
stored targets."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from deit.config.schema import Config
from deit.config.sections.data import DataConfig
from deit.config.teachers import teacher_slots
from deit.core.errors import ConfigError, DataError, NotFoundError
from deit.core.file_reading import missing_file_reason
from deit.core.user_code import HUB_PREFIXES, address_hint

_LAYOUTS = {"folder": "CLASS/IMAGE", "shards": "*.tar"}
"""What a split holds, by data.source."""
_TORCHVISION_FOLDERS = {
    "mnist": "MNIST/raw",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
}
"""Folders in data.root of data sets that torchvision downloads, by data.source."""


def check_root(root: Path, layout: str = "CLASS/IMAGE") -> None:
    """Raise NotFoundError if the root folder is missing. layout: expected within a split."""
    if not root.is_dir():
        raise NotFoundError(
            f"data.root {root}: no such folder; expected {root}/{layout}, or "
            f"{root}/train/{layout} with splits (set the location of the images with --data.root)"
        )


def check_image_root(data: DataConfig) -> None:
    """Raise NotFoundError if data.root is missing for class folders or shards."""
    if data.source in _LAYOUTS:
        check_root(Path(data.root), _LAYOUTS[data.source])


def check_images(data: DataConfig) -> None:
    """Raise DataError if the folder of the images is missing, also for MNIST and CIFAR."""
    check_image_root(data)
    root = Path(data.root)
    if data.source in _TORCHVISION_FOLDERS and not data.download:
        folder = root / _TORCHVISION_FOLDERS[data.source]
        if not folder.is_dir():
            raise DataError(
                f"data.root {root}: contains no {data.source} (no folder {folder}). Download it "
                "with --data.download, or set --data.root to its location; for images in class "
                "folders use --data.source folder"
            )


@contextmanager
def with_missing_images(data: DataConfig) -> Iterator[None]:
    """Add missing images to a ConfigError that is raised within, such as that of a wrong folder."""
    try:
        yield
    except ConfigError as error:
        try:
            check_images(data)
        except DataError as missing:
            problems = (*error.problems, *ConfigError(str(missing)).problems)
            raise ConfigError(f"{error}\n  {missing}", problems) from None
        raise


def check_new_root(root: str | None) -> None:
    """Raise NotFoundError if the folder to which the images of a run were moved is missing.

    root: None if it is not given.
    """
    if root is not None and not Path(root).expanduser().exists():
        raise NotFoundError(f"data.root {root}: no such file or folder")


def check_image_files(paths: Iterable[Path]) -> None:
    """Raise DataError if none of some image files and folders exists."""
    paths = list(paths)
    if not any(path.exists() for path in paths):
        raise unreadable_error({str(path): "no such file" for path in paths}, 0)


def unreadable_error(unreadable: Mapping[str, str], num_read: int) -> DataError:
    """Return an error with every image that could not be read, and why.

    num_read: how many could be read.
    """
    lines = [f"{name}: {reason}" for name, reason in unreadable.items()]
    if len(lines) == 1 and not num_read:
        return DataError(lines[0])
    title = f"{len(lines)} of {len(lines) + num_read} images could not be read"
    return DataError("\n  ".join([f"{title}:", *lines]))


def check_source(source: str) -> None:
    """Raise NotFoundError if a teacher's source is a path that does not exist.

    A name without a slash can be that of a timm model, which is not checked here.
    """
    path = Path(source).expanduser()
    if ".py:" in source:
        file = Path(source.rsplit(":", 1)[0]).expanduser()
        if not file.is_file():
            raise NotFoundError(f"teacher.source {source}: {missing_file_reason(file)}")
    elif "/" in source and not source.startswith(HUB_PREFIXES) and not path.exists():
        if (advice := address_hint(source)) is not None:
            raise NotFoundError(f"teacher.source {source}: {advice}")
        raise NotFoundError(missing_source(source))


def missing_source(source: str) -> str:
    """Return the message about a teacher's source, a path, that does not exist."""
    path = Path(source).expanduser()
    recipe = path.name if path.name.endswith("-teacher") else "RECIPE"
    folder = "" if path.is_absolute() else f" in {Path.cwd()}"
    return (
        f"teacher.source {source}: no such file or folder{folder}; train a teacher first "
        f"(python train_deit.py {recipe} --out {source}, with the same --data options), or set "
        "its location (--teacher.source DIR)"
    )


def missing_store(path: Path) -> str:
    """Return the message about a folder that is no store of targets."""
    return (
        f"teacher.target_stores {path}: is not a target store (no store.json); write one with "
        "`deit targets write RECIPE --out STORE`, or deit.write_targets"
    )


def check_store(path: Path) -> None:
    """Raise DataError if the folder of a store is missing."""
    if not path.is_dir():
        raise DataError(missing_store(path))


def check_inputs(config: Config) -> None:
    """Raise NotFoundError or DataError with all images, teachers and stores that are missing."""
    slots = teacher_slots(config.teacher) if config.loss.kind != "none" else ()
    checks: list[Callable[[], None]] = []
    for slot in slots:
        source = slot.members[0].source
        if slot.target_store is not None:
            checks.append(partial(check_store, Path(slot.target_store).expanduser()))
        elif source is not None:
            checks.append(partial(check_source, source))
    check_all([*checks, partial(check_images, config.data)])


def check_all(checks: Iterable[Callable[[], object]]) -> None:
    """Call checks; raise one DataError with the messages of all that raise one.

    It is a NotFoundError if all of them are.
    """
    errors = []
    for check in checks:
        try:
            check()
        except DataError as error:
            errors.append(error)
    if errors:
        missing = all(isinstance(error, NotFoundError) for error in errors)
        kind = NotFoundError if missing else DataError
        raise kind("\n  ".join(map(str, errors)))
