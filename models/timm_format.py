"""A network as a folder of timm's, which transformers loads as well: its config.json."""

import math
from pathlib import Path
from typing import Any

import timm
from torch import nn

from deit.config.student_section import SIZES, StudentConfig
from deit.core.errors import ConfigError
from deit.models.metadata import ModelInfo
from deit.models.networks import check_blocks_alike
from deit.models.parameters import classifier_names


def timm_config(facts: ModelInfo, network: nn.Module) -> dict[str, Any]:
    """What timm's `local-dir:` and transformers' TimmWrapper read beside model.safetensors.

    The number of classes stands outside `model_args`: transformers hands it over itself and would
    do so twice. Raises ConfigError where timm has no such network.
    """
    architecture, settings = timm_name(facts.student)
    known = timm.get_pretrained_cfg(architecture).to_dict()
    heads = classifier_names(network)
    side = facts.student.image_size
    return {
        "architecture": architecture,
        "num_classes": len(facts.class_names),
        "num_features": network.num_features,
        "label_names": list(facts.class_names),
        "model_args": settings,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": bool(known.get("fixed_input_size")),
            "interpolation": "bicubic",
            "crop_pct": _crop_share(side, facts.evaluation_crop),
            "crop_mode": "center",
            "mean": list(facts.mean),
            "std": list(facts.std),
            "num_classes": len(facts.class_names),
            "pool_size": None,
            "first_conv": known.get("first_conv"),
            # Both heads: with one alone, timm would renew only that for other classes.
            "classifier": list(heads) if len(heads) > 1 else heads[0],
        },
    }


def _crop_share(side: int, crop: float) -> float:
    """A crop_pct by which timm, which rounds down, resizes to the edge that we round to."""
    edge = round(side / crop)
    return side / edge if math.floor(side / (side / edge)) == edge else side / (edge + 0.5)


def timm_name(student: StudentConfig) -> tuple[str, dict[str, Any]]:
    """The registered name of a network and the arguments that make it ours. Raises ConfigError
    where timm has no such network."""
    if student.name.startswith("timm:"):
        name = student.name.removeprefix("timm:")
        sized = timm.get_pretrained_cfg(name).fixed_input_size
        return name, {"img_size": student.image_size} if sized else {}
    if not student.is_transformer:
        raise ConfigError(
            f"student.name = {student.name!r}: timm has no such network, so neither timm nor "
            "transformers could load it; --format onnx or pt2 takes any"
        )
    if student.num_distillation_tokens > 1:
        raise ConfigError(
            f"student.num_distillation_tokens = {student.num_distillation_tokens}: timm and "
            "transformers "
            "know one such token; --format onnx or pt2 takes any number"
        )
    check_blocks_alike(student)
    shape = {
        name: getattr(student, name) or usual
        for name, usual in SIZES[student.name.split("_")[1]].items()
    }
    distilled = student.has_distillation_token
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    return name, {"img_size": student.image_size, "patch_size": student.patch_size, **shape}


def load_from_timm(folder: Path) -> nn.Module:
    """The network of such a folder, as timm loads it, without our code."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
