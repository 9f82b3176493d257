"""Load a teacher for a loop of your own, from a source or from a module."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from deit.config.arguments import checks_types
from deit.config.command_choices import check_channels, check_path
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import teacher_specs
from deit.config.validation import section_from_dict
from deit.core.console import info
from deit.core.errors import NO_VALUE, ConfigError, ConfigProblem
from deit.core.rng import unchanged_generators
from deit.core.tensors import as_device
from deit.models.student import Student
from deit.models.teacher_sources import FusedLogits, match_teacher, teacher_from_spec
from deit.models.teachers import LoadedNetwork, Teacher

_PROBE_SIZE = 224  # side [px] of a test image, for networks that accept any size


@checks_types
@unchanged_generators()
def load_teacher(
    source: str | PathLike | nn.Module,
    class_names: Sequence[str],
    *,
    architecture: str | None = None,
    classes: str | Sequence[str] | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> Teacher:
    """Return a frozen teacher whose logits are in the order of the data's classes.

    source: as teacher.source: a run folder, a timm name or folder, a checkpoint file, or
    FILE.py:FUNCTION; or a module that maps normalized images to logits [B, C]. A module is frozen
    and set to evaluation mode. class_names: of the data, in order.
    architecture: network of a checkpoint file, as timm:resnet50. classes: the teacher's classes in
    the order of its outputs, as teacher.classes. image_size: side of its input [px]; other images
    are resized. mean, std: its normalization, for images in [0, 1]; both or neither. Default of
    these: what the source states; for a module also the image size of its patch embedding. device:
    cpu, cuda, cuda:INDEX, or auto for a GPU if there is one.

    Raises NotFoundError if the source is missing, DataError if it has no trained weights or its
    classes differ, ConfigError for invalid options, and CheckpointError for an unreadable file.

    Example:
        >>> teacher = load_teacher("checkpoints/digits-teacher", list("0123456789"))
        >>> teacher(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 10])
        >>> network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> teacher = load_teacher(network, ["r", "g", "b"], mean=[0.5] * 3, std=[0.5] * 3)
        >>> teacher(torch.ones(1, 3, 8, 8)).tolist()  # (1 - 0.5) / 0.5
        [[1.0, 1.0, 1.0]]
    """
    device = as_device(device)
    if (mean is None) != (std is None):
        raise ConfigError("mean, std: give both or neither")
    if mean is not None:
        mean, std = check_channels("mean", mean), check_channels("std", std)
    if not len(class_names):
        raise ConfigError("class_names: give those of the data in order, as loader.class_names")
    if len(set(class_names)) < len(class_names):
        raise ConfigError(f"class_names = {tuple(class_names)}: should be different names")
    if architecture is not None and isinstance(source, nn.Module):
        raise ConfigError(f"architecture = {architecture}: is for a checkpoint file, not a module")
    options = {"architecture": architecture, "classes": classes, "mean": mean, "std": std}
    fields = {name: value for name, value in options.items() if value is not None}
    if image_size is not None:
        fields["image_size"] = (image_size,)
    name = "" if isinstance(source, nn.Module) else check_path("source", source)
    config = section_from_dict(TeacherConfig, "teacher", {"source": (name,), **fields})
    (spec,) = teacher_specs(config)
    names, size = tuple(map(str, class_names)), image_size or _PROBE_SIZE
    if isinstance(source, nn.Module):
        loaded = _from_module(source, has_normalization=None not in (mean, std))
        _report_assumptions(loaded, image_size=image_size, has_normalization=mean is not None)
        teacher = match_teacher(loaded, spec, names, image_size=size)
    else:
        teacher = teacher_from_spec(spec, names, image_size=size)
    return teacher.to(device)


def _from_module(network: nn.Module, *, has_normalization: bool) -> LoadedNetwork:
    """Return a module with what it states about its training, as timm's networks do.

    Raises ConfigError if the normalization is neither stated nor given.
    """
    description = type(network).__name__
    if isinstance(network, Student):  # normalizes its input itself
        fused, plain = FusedLogits(network), ((0.0,) * 3, (1.0,) * 3)
        return LoadedNetwork(fused, description, _input_size(network.network), *plain, None)
    stated: dict[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    mean, std = stated.get("mean"), stated.get("std")
    if not has_normalization and (mean is None or std is None):
        hint = (
            f"{description} does not state its normalization; give mean and std, for images in "
            "[0, 1] (mean=(0, 0, 0), std=(1, 1, 1) for none)"
        )
        raise ConfigError(hint, [ConfigProblem("teacher.mean", NO_VALUE, hint)])
    names = getattr(network, "class_names", None) or stated.get("label_names")
    return LoadedNetwork(
        network,
        description,
        _input_size(network) or stated.get("input_size", (None,))[-1],
        tuple(mean or (0.0,) * 3),
        tuple(std or (1.0,) * 3),
        None if names is None else tuple(names),
    )


def _report_assumptions(
    loaded: LoadedNetwork, *, image_size: int | None, has_normalization: bool
) -> None:
    """Print the input that timm's `pretrained_cfg` states: the module may be trained otherwise."""
    if not getattr(loaded.network, "pretrained_cfg", None):
        return
    assumed = []
    if image_size is None and loaded.image_size is not None:
        assumed.append(f"images of {loaded.image_size} px")
    if not has_normalization:
        numbers = (", ".join(f"{x:.3g}" for x in values) for values in (loaded.mean, loaded.std))
        assumed.append("mean ({}) and std ({})".format(*numbers))
    if assumed:
        info(
            f"teacher   {loaded.description}: {', '.join(assumed)}, as its pretrained_cfg states; "
            "give image_size, mean and std if it was trained otherwise"
        )


def _input_size(network: nn.Module) -> int | None:
    """Return the side [px] of the images that timm's patch embedding takes; None without one."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return size[-1] if isinstance(size, tuple) else size
