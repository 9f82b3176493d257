"""Convert a ViT to transformers' DeiT or ViT and back: names of weights, config.json."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deit.config.sections.student import SIZES
from deit.core.errors import CheckpointError, ConfigError, single_line
from deit.models.metadata import ModelInfo
from deit.models.registry import check_plain_blocks

Weights = dict[str, Tensor]

_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_PARTS = ("query", "key", "value")  # the rows of timm's qkv, in this order
_HEADS = {
    "deit": {"head": "cls_classifier", "head_dist": "distillation_classifier"},
    "vit": {"head": "classifier"},
}


def to_transformers(weights: Weights) -> Weights:
    """Rename the weights of a deit_* or vit_* from timm's names to those of transformers' files.

    These are the names of transformers 4; version 5 renamed its modules and reads both.

    >>> list(to_transformers({"norm.bias": torch.zeros(6), "head.bias": torch.zeros(2)}))
    ['vit.layernorm.bias', 'classifier.bias']
    """
    kind = "deit" if "dist_token" in weights else "vit"
    converted: Weights = {}
    for name, value in weights.items():
        if (qkv := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)) is not None:
            layer, leaf = qkv.groups()
            for part, rows in zip(_PARTS, value.chunk(3)):
                prefix = f"{kind}.encoder.layer.{layer}.attention.attention"
                converted[f"{prefix}.{part}.{leaf}"] = rows.contiguous()
        else:
            converted[_renamed(name, kind)] = value
    return converted


def _renamed(name: str, kind: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if name in _EMBEDDINGS:  # a parameter by itself
        return f"{kind}.{_EMBEDDINGS[name]}"
    if stem in _EMBEDDINGS:
        return f"{kind}.{_EMBEDDINGS[stem]}.{leaf}"
    if stem in _HEADS[kind]:
        return f"{_HEADS[kind][stem]}.{leaf}"
    _, layer, part = stem.split(".", 2)
    return f"{kind}.encoder.layer.{layer}.{_LAYER[part]}.{leaf}"


def from_transformers(weights: Weights) -> Weights:
    """Rename weights from the names in transformers' files, version 4 or 5, to timm's names.

    Raises CheckpointError for a name that a DeiT or ViT does not have, and for two names of one
    weight.
    """
    kinds = {name.split(".")[0] for name in weights} & set(_HEADS)
    if len(kinds) != 1:
        raise CheckpointError("its weights are not those of transformers' DeiT or ViT")
    (kind,) = kinds
    converted: Weights = {}
    qkv_parts: dict[str, Weights] = {}
    full_names: dict[tuple[str, str | None], str] = {}
    for name, value in weights.items():
        timm_name, part = _timm_name(name, kind)
        if (first := full_names.setdefault((timm_name, part), name)) != name:
            raise CheckpointError(
                f"its weights {single_line(first)} and {single_line(name)} are both {timm_name} of "
                "a deit_* or vit_*; keep one of them"
            )
        if part is None:
            converted[timm_name] = value
        else:
            qkv_parts.setdefault(timm_name, {})[part] = value
    for timm_name, parts in qkv_parts.items():
        if set(parts) != set(_PARTS):
            layer = timm_name.split(".")[1]
            raise CheckpointError(f"its layer {layer} lacks query, key or value")
        converted[timm_name] = torch.cat([parts[part] for part in _PARTS])
    return converted


def _timm_name(name: str, kind: str) -> tuple[str, str | None]:
    """Return the timm name of a weight, and which part of qkv it is (None for other weights)."""
    embeddings = {new: old for old, new in _EMBEDDINGS.items()}
    layers = {new: old for old, new in _LAYER.items()}
    heads = {new: old for old, new in _HEADS[kind].items()} | {"classifier": "head"}
    inner = name.removeprefix(f"{kind}.")
    stem, _, leaf = inner.rpartition(".")
    layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem)
    if inner in embeddings:  # a parameter by itself
        return embeddings[inner], None
    if stem in embeddings:
        return f"{embeddings[stem]}.{leaf}", None
    if stem in heads:
        return f"{heads[stem]}.{leaf}", None
    if layer is not None and layer[2] in layers:
        return f"blocks.{layer[1]}.{layers[layer[2]]}.{leaf}", None
    if layer is not None and layer[2].removeprefix("attention.attention.") in _PARTS:
        return f"blocks.{layer[1]}.attn.qkv.{leaf}", layer[2].rpartition(".")[2]
    raise CheckpointError(f"its weight {single_line(name)} does not exist in a deit_* or vit_*")


def transformers_config(model_info: ModelInfo) -> dict[str, Any]:
    """Return the config.json of DeiTForImageClassificationWithTeacher or ViTForImageClassification.

    Raises ConfigError if transformers has no such network.
    """
    student = model_info.student
    if not student.is_transformer:
        raise ConfigError(
            f"student.name = {student.name!r}: transformers has no such network of its own; "
            "use --format timm (for its TimmWrapper) if timm has the network, or onnx or pt2"
        )
    if student.num_distillation_tokens > 1:
        raise ConfigError(
            f"student.num_distillation_tokens = {student.num_distillation_tokens}: transformers "
            "supports one such token only; use format onnx or pt2"
        )
    check_plain_blocks(student)
    usual = SIZES[student.name.split("_")[1]]
    shape = {name: getattr(student, name) or value for name, value in usual.items()}
    distilled = student.has_distillation_token
    kind = "DeiTForImageClassificationWithTeacher" if distilled else "ViTForImageClassification"
    return {
        "architectures": [kind],
        "model_type": "deit" if distilled else "vit",
        "hidden_size": shape["embed_dim"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["num_heads"],
        "intermediate_size": 4 * shape["embed_dim"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,  # as in timm; transformers' default is 1e-12
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": student.image_size,
        "patch_size": student.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(label): name for label, name in enumerate(model_info.class_names)},
        "label2id": {name: label for label, name in enumerate(model_info.class_names)},
        "dtype": "float32",
    }


def preprocessor_config(model_info: ModelInfo) -> dict[str, Any]:
    """Return the preprocessor_config.json: resize the shorter side, crop the center, normalize.

    It uses CLIP's processor. DeiT's supports a shorter side from transformers 5 on only; with a
    fixed height and width it would distort images that are not square.
    """
    side = model_info.student.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side / model_info.evaluation_crop)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model_info.mean),
        "image_std": list(model_info.std),
    }


def load_from_transformers(folder: str | Path) -> nn.Module:
    """Load an exported folder with transformers, without our code, in evaluation mode.

    Folders in timm's format are supported too.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModelForImageClassification
    return auto.from_pretrained(folder, local_files_only=True).eval()
