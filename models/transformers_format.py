"""A ViT as transformers' own DeiT or ViT: names of its weights there and back, its config.json."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deit.config.student_section import SIZES
from deit.core.errors import CheckpointError, ConfigError
from deit.models.metadata import ModelInfo
from deit.models.networks import check_blocks_alike

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
_PARTS = ("query", "key", "value")  # of timm's qkv, one below the other
_HEADS = {
    "deit": {"head": "cls_classifier", "head_dist": "distillation_classifier"},
    "vit": {"head": "classifier"},
}


def to_transformers(weights: Weights) -> Weights:
    """Weights of a deit_* or vit_* (timm's names) by the names transformers writes to disk.

    These are the names of its version 4; version 5 renamed its modules and reads both.
    """
    kind = "deit" if "dist_token" in weights else "vit"
    found: Weights = {}
    for name, value in weights.items():
        if (qkv := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)) is not None:
            layer, leaf = qkv.groups()
            for part, rows in zip(_PARTS, value.chunk(3)):
                place = f"{kind}.encoder.layer.{layer}.attention.attention"
                found[f"{place}.{part}.{leaf}"] = rows.contiguous()
        else:
            found[_renamed(name, kind)] = value
    return found


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
    """The same the other way round; transformers' names of version 4 and those it saves in 5.

    Raises CheckpointError where a name is of another network.
    """
    kinds = {name.split(".")[0] for name in weights} & set(_HEADS)
    if len(kinds) != 1:
        raise CheckpointError("its weights are neither a DeiT's nor a ViT's of transformers")
    (kind,) = kinds
    back = {new: old for old, new in _EMBEDDINGS.items()}
    layers = {new: old for old, new in _LAYER.items()}
    heads = {new: old for old, new in _HEADS[kind].items()} | {"classifier": "head"}
    found: Weights = {}
    parts: dict[tuple[str, str], Weights] = {}
    for name, value in weights.items():
        inner = name.removeprefix(f"{kind}.")
        stem, _, leaf = inner.rpartition(".")
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem)
        if inner in back or stem in back:
            found[back[inner] if inner in back else f"{back[stem]}.{leaf}"] = value
        elif stem in heads:
            found[f"{heads[stem]}.{leaf}"] = value
        elif layer is not None and layer[2] in layers:
            found[f"blocks.{layer[1]}.{layers[layer[2]]}.{leaf}"] = value
        elif layer is not None and layer[2].removeprefix("attention.attention.") in _PARTS:
            parts.setdefault((layer[1], leaf), {})[layer[2].rpartition(".")[2]] = value
        else:
            raise CheckpointError(f"its weight {name} has no place in a DeiT or ViT of ours")
    for (layer, leaf), three in parts.items():
        if set(three) != set(_PARTS):
            raise CheckpointError(f"its layer {layer} lacks query, key or value")
        found[f"blocks.{layer}.attn.qkv.{leaf}"] = torch.cat([three[part] for part in _PARTS])
    return found


def transformers_config(facts: ModelInfo) -> dict[str, Any]:
    """The config.json of DeiTForImageClassificationWithTeacher, or of ViTForImageClassification.

    Raises ConfigError where transformers has no such network.
    """
    student = facts.student
    if not student.is_transformer:
        raise ConfigError(
            f"student.name = {student.name!r}: transformers has no such network of its own; "
            "--format timm goes through its TimmWrapper where timm has it, onnx and pt2 take any"
        )
    if student.num_distillation_tokens > 1:
        raise ConfigError(
            f"student.num_distillation_tokens = {student.num_distillation_tokens}: transformers "
            "knows one "
            "such token; --format onnx or pt2 takes any number"
        )
    check_blocks_alike(student)
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
        "layer_norm_eps": 1e-6,  # timm's; the default there is 1e-12
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": student.image_size,
        "patch_size": student.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(label): name for label, name in enumerate(facts.class_names)},
        "label2id": {name: label for label, name in enumerate(facts.class_names)},
        "dtype": "float32",
    }


def preprocessor_config(facts: ModelInfo) -> dict[str, Any]:
    """The preprocessor_config.json: the shorter side resized, the centre cut, values normalised.

    CLIP's processor: DeiT's takes a shorter side from transformers 5 on only, and with the height
    and width of its own checkpoints it would squash pictures that are no squares.
    """
    side = facts.student.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side / facts.evaluation_crop)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(facts.mean),
        "image_std": list(facts.std),
    }


def load_from_transformers(folder: Path) -> nn.Module:
    """The network of a folder, as transformers loads it, without our code; it reads those of timm
    as well."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModelForImageClassification
    return auto.from_pretrained(folder, local_files_only=True).eval()
