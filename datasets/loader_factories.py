"""Loaders of training views for a loop of your own: from a configuration, a folder or arrays."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from deit.config.arguments import checks_types
from deit.config.command_choices import check_at_least, check_path
from deit.config.cross_field_checks.teacher import check_teacher_view
from deit.config.recipes import recipe
from deit.config.schema import Config
from deit.config.sections.data import DataConfig
from deit.config.sections.optim import OptimConfig
from deit.config.sections.run import RunConfig
from deit.config.sections.student import StudentConfig
from deit.config.sections.views import ViewsConfig
from deit.config.validation import as_section, section_from_dict, validate_sections
from deit.core.errors import NO_VALUE, ConfigError, ConfigProblem, config_error
from deit.core.tensors import as_tensor, layout_advice
from deit.datasets.decode_workers import resolve_num_workers
from deit.datasets.images import InMemoryImages
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import Splits, channel_statistics, digest_of_images, load_splits
from deit.datasets.views import ChannelStats

Process = tuple[int | None, int | None]
"""Index and number of processes; None: those of torch.distributed."""


def channel_stats(views: ViewsConfig, splits: Splits) -> ChannelStats:
    """Return the normalization of `views`, or else the mean and standard deviation of the data, in
    [0, 1] per channel."""
    return ChannelStats(views.mean or splits.mean, views.std or splits.std)


def loader_of(
    config: Config,
    splits: Splits,
    *,
    teacher_size: int | None,
    device: torch.device | str = "cpu",
    process: Process = (None, None),
    with_teacher_images: bool = True,
) -> TrainLoader:
    """Return the loader of the training views of loaded images.

    Only the sections data, views, student (its input size), optim (batch size) and run (seed) of
    the configuration matter. device, process: see `TrainLoader.from_config`.
    Raises ConfigError and DataError as TrainLoader does.
    """
    process_index, num_processes = _process(process)
    if problems := check_teacher_view(config):
        raise config_error(problems)
    if teacher_size is not None:
        check_at_least("teacher_size", teacher_size, 1)
    loader = TrainLoader(
        splits.train,
        len(splits.class_names),
        views=config.views,
        optim=config.optim,
        student_size=config.student.image_size,
        teacher_size=teacher_size,
        decoded_size=config.data.image_size,
        channel_stats=channel_stats(config.views, splits),
        seed=config.views_seed,
        process_index=process_index,
        num_processes=num_processes,
        device=device,
        num_workers=resolve_num_workers(config.data.num_workers),
        with_teacher_images=with_teacher_images,
    )
    loader.splits, loader.class_names = splits, splits.class_names
    return loader


def loader_from_config(
    config: Config | str | PathLike,
    teacher_size: int | None,
    device: Any,
    process: Process,
    with_teacher_images: bool,
) -> TrainLoader:
    """Load the images of a configuration; see `TrainLoader.from_config`."""
    config = config if isinstance(config, Config) else recipe(config)
    config = validate_sections(config, ("data", "views", "student", "optim", "run"))
    return loader_of(
        config,
        load_splits(config.data),
        teacher_size=teacher_size,
        device=device,
        process=process,
        with_teacher_images=with_teacher_images,
    )


def loader_from_folder(
    root: str | PathLike,
    image_size: int,
    batch_size: int,
    views: ViewsConfig | dict[str, Any] | None,
    seed: int,
    **options: Any,
) -> TrainLoader:
    """Load the images of class folders; see `TrainLoader.from_folder`."""
    data = {"source": "folder", "root": check_path("root", root), "image_size": image_size}
    config = _config(views, batch_size=batch_size, image_size=image_size, seed=seed)
    config = config.replace(data=section_from_dict(DataConfig, "data", data))
    return TrainLoader.from_config(config, **options)


@checks_types
def loader_from_arrays(
    images: Any,
    labels: Any,
    batch_size: int,
    class_names: Sequence[str] | None,
    image_size: int | None,
    views: ViewsConfig | dict[str, Any] | None,
    seed: int,
    *,
    teacher_size: int | None = None,
    device: torch.device | str = "cpu",
    process_index: int | None = None,
    num_processes: int | None = None,
    with_teacher_images: bool = True,
    validation: Any = None,
) -> TrainLoader:
    """Make the splits of images in memory; see `TrainLoader.from_arrays`."""
    images, labels = as_tensor("images", images), as_tensor("labels", labels)
    names = _check_arrays(images, labels, class_names)
    train = InMemoryImages(images, labels.long())
    mean, std = channel_statistics(images)
    empty = train.select(slice(0))
    held_out = empty if validation is None else _validation(validation, names)
    fingerprint = digest_of_images(names, (train, held_out, empty))
    splits = Splits(names, train, held_out, empty, mean, std, (), fingerprint)
    size = images.shape[-1] if image_size is None else image_size
    config = _config(views, batch_size=batch_size, image_size=size, seed=seed)
    return loader_of(
        config,
        splits,
        teacher_size=teacher_size,
        device=device,
        process=(process_index, num_processes),
        with_teacher_images=with_teacher_images,
    )


def _validation(arrays: tuple[Any, Any], class_names: tuple[str, ...]) -> InMemoryImages:
    """Return validation images. Raises ConfigError for images and labels of another form."""
    if not isinstance(arrays, tuple | list) or len(arrays) != 2:
        raise ConfigError("validation: should be a pair (images, labels)")
    images = as_tensor("validation images", arrays[0])
    labels = as_tensor("validation labels", arrays[1])
    _check_arrays(images, labels, class_names, prefix="validation ")
    return InMemoryImages(images, labels.long())


def _config(
    views: ViewsConfig | dict[str, Any] | None, *, batch_size: int, image_size: int, seed: int
) -> Config:
    """Return a configuration with these fields, of which only the loader's sections matter."""
    return Config(
        views=as_section(ViewsConfig, "views", {} if views is None else views),
        student=section_from_dict(StudentConfig, "student", {"image_size": image_size}),
        optim=section_from_dict(OptimConfig, "optim", {"batch_size": batch_size}),
        run=section_from_dict(RunConfig, "run", {"seed": seed}),
    )


def _check_arrays(
    images: Tensor, labels: Tensor, class_names: Sequence[str] | None, *, prefix: str = ""
) -> tuple[str, ...]:
    """Return the class names. Raises ConfigError for images and labels of another form.

    prefix: of the names of both in messages.
    """
    problems = []
    images_name, labels_name = f"{prefix}images", f"{prefix}labels"
    given = f"{images.dtype} {list(images.shape)}"
    if images.dtype != torch.uint8 or images.shape[1:2] != (3,):
        advice = layout_advice(images.shape)
        hint = f"should be uint8 [images, 3, side, side]; got {given}{advice}"
        problems.append(ConfigProblem(images_name, NO_VALUE, hint))
    elif not len(images):
        problems.append(ConfigProblem(images_name, NO_VALUE, "should be at least one image"))
    elif images.ndim != 4 or images.shape[2] != images.shape[3]:
        hint = f"should be square, [images, 3, side, side]; got {given}"
        problems.append(ConfigProblem(images_name, NO_VALUE, hint))
    if labels.is_floating_point() or labels.shape != images.shape[:1]:
        hint = (
            f"should be integers {list(images.shape[:1])}; got {labels.dtype} {list(labels.shape)}"
        )
        problems.append(ConfigProblem(labels_name, NO_VALUE, hint))
        raise config_error(problems)
    if not len(labels):
        raise config_error(problems)
    num_classes = int(labels.max()) + 1
    names = tuple(map(str, range(num_classes) if class_names is None else class_names))
    if not names or len(set(names)) < len(names):
        problems.append(ConfigProblem("class_names", names, "should be different names"))
    elif int(labels.min()) < 0 or num_classes > len(names):
        hint = f"should be in 0 ... {len(names) - 1}, the number of class names less 1"
        problems.append(ConfigProblem(labels_name, NO_VALUE, hint))
    if problems:
        raise config_error(problems)
    return names


def _process(process: Process) -> tuple[int, int]:
    """Return index and number of processes, from torch.distributed where they are None."""
    index, count = process
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if index is None:
        index = torch.distributed.get_rank() if is_distributed else 0
    if count is None:
        count = torch.distributed.get_world_size() if is_distributed else 1
    check_at_least("num_processes", count, 1)
    check_at_least("process_index", index, 0)
    if index >= count:
        raise ConfigError(f"process_index = {index}: should be in 0 ... {count - 1}")
    return index, count
