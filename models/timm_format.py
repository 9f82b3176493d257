"""Export to a timm folder, which transformers loads as well: its config.json."""

import math
from pathlib import Path
from typing import Any

import timm
from torch import nn

from deit.config.sections.student import SIZES, StudentConfig
from deit.core.errors import ConfigError
from deit.models.metadata import ModelInfo
from deit.models.parameters import classifier_names
from deit.models.registry import check_plain_blocks


def timm_config(model_info: ModelInfo, network: nn.Module) -> dict[str, Any]:
    """Return the config.json that timm's `local-dir:` and transformers' TimmWrapper read.

    The number of classes is not in `model_args`, because transformers passes it as well. Raises
    ConfigError if timm has no such network.
    """
    architecture, settings = timm_name(model_info.student)
    pretrained_cfg = timm.get_pretrained_cfg(architecture).to_dict()
    heads = classifier_names(network)
    side = model_info.student.image_size
    return {
        "architecture": architecture,
        "num_classes": len(model_info.class_names),
        "num_features": network.num_features,
        "label_names": list(model_info.class_names),
        "model_args": settings,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": bool(pretrained_cfg.get("fixed_input_size")),
            "interpolation": "bicubic",
            "crop_pct": _crop_pct(side, model_info.evaluation_crop),
            "crop_mode": "center",
            "mean": list(model_info.mean),
            "std": list(model_info.std),
            "num_classes": len(model_info.class_names),
            "pool_size": None,
            "first_conv": pretrained_cfg.get("first_conv"),
            # Both heads, because timm replaces those named here for another number of classes.
            "classifier": list(heads) if len(heads) > 1 else heads[0],
        },
    }


def _crop_pct(side: int, crop: float) -> float:
    """Return the crop_pct with which timm, which rounds down, resizes to our rounded edge."""
    edge = round(side / crop)
    return side / edge if math.floor(side / (side / edge)) == edge else side / (edge + 0.5)


def timm_name(student: StudentConfig) -> tuple[str, dict[str, Any]]:
    """Return timm's registered name of a network and the arguments that build it.

    Raises ConfigError if timm has no such network.

    >>> name, settings = timm_name(StudentConfig("deit_micro", image_size=32, patch_size=4))
    >>> name, settings["img_size"], settings["embed_dim"]
    ('deit_tiny_distilled_patch16_224', 32, 96)
    """
    if student.name.startswith("timm:"):
        name = student.name.removeprefix("timm:")
        fixed_size = timm.get_pretrained_cfg(name).fixed_input_size
        return name, {"img_size": student.image_size} if fixed_size else {}
    if not student.is_transformer:
        raise ConfigError(
            f"student.name = {student.name!r}: timm has no such network, so neither timm nor "
            "transformers could load it; use format onnx or pt2"
        )
    if student.num_distillation_tokens > 1:
        raise ConfigError(
            f"student.num_distillation_tokens = {student.num_distillation_tokens}: timm and "
            "transformers support one such token only; use format onnx or pt2"
        )
    check_plain_blocks(student)
    shape = {
        name: getattr(student, name) or usual
        for name, usual in SIZES[student.name.split("_")[1]].items()
    }
    distilled = student.has_distillation_token
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    return name, {"img_size": student.image_size, "patch_size": student.patch_size, **shape}


def load_from_timm(folder: str | Path) -> nn.Module:
    """Load the network of an exported folder with timm, without our code, in evaluation mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
