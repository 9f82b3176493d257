"""Load initial weights from any source: our runs, timm, transformers, weight files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from deit.config.field_types import PosEmbedKernel
from deit.config.sections.init import InitConfig
from deit.config.sections.student import SIZES, StudentConfig
from deit.core.console import info
from deit.core.errors import CheckpointError, did_you_mean, first_line, raise_if_transient
from deit.core.file_reading import missing_file_reason, read_text
from deit.core.json_io import load_json_as
from deit.core.user_code import HUB_PREFIXES, address_hint
from deit.models.adapt_weights import LoadedWeights, Weights, adapt_weights, num_distillation_tokens
from deit.models.metadata import (
    BASE,
    MODEL_INFO,
    WEIGHTS,
    ModelInfo,
    find_base,
    find_saved_model,
    read_base,
)
from deit.models.parameters import trainable_parameters
from deit.models.pos_embed import grid_side
from deit.models.registry import create_network, is_published_name
from deit.models.surgery.pruning_masks import MASKS, read_masks
from deit.models.transformers_format import from_transformers
from deit.models.weight_files import read_weights

_PARSE_ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)
"""Errors that an unexpected file content can cause."""


def load_weights_from(source: str) -> LoadedWeights:
    """Load the weights that init.weights names.

    source: a run folder, a timm or transformers folder, a weight file, or a timm name, whose
    published weights are downloaded. Raises CheckpointError if the source is missing, cannot be
    read without running code, or contains values that are not finite.

    >>> loaded = load_weights_from("checkpoints/digits")
    >>> loaded.student.name, loaded.weights["head.weight"].shape
    ('deit_micro', torch.Size([10, 16]))
    """
    try:
        loaded = _load(source)
    except _PARSE_ERRORS as error:
        raise_if_transient(error, f"init.weights {source}")
        raise CheckpointError(
            f"init.weights {source}: its content does not match its names ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from None
    for name, value in loaded.weights.items():
        if value.is_floating_point() and value.numel() and not value.isfinite().all():
            raise CheckpointError(
                f"init.weights {source}: {name} contains values that are not finite"
            )
    return loaded


def _load(source: str) -> LoadedWeights:
    path = Path(source).expanduser()
    if path.is_dir():
        saved = find_saved_model(path)
        if saved is not None:
            return _from_run(saved, source)
        if (path / "config.json").is_file() and not (path / "metrics.jsonl").exists():
            return _from_folder(path, source)
        raise CheckpointError(
            f"init.weights {source}: holds no trained network (no best/model.safetensors of a run, "
            "no config.json of timm or transformers); let the run finish first"
        )
    if path.is_file() and path.name == WEIGHTS and (path.parent / MODEL_INFO).is_file():
        return _from_run(path.parent, source)
    if path.is_file():
        weights = read_weights(path)
        return LoadedWeights(
            weights, f"{path}", infer_student_config(weights), None, None, None, heads_known=False
        )
    if is_published_name(source):
        return _from_timm(source)
    if path.exists():
        raise CheckpointError(f"init.weights {source}: {missing_file_reason(path)}")
    if (advice := address_hint(source)) is not None:
        raise CheckpointError(f"init.weights {source}: {advice}")
    hint = "" if "/" in source or path.suffix else did_you_mean(source, timm.list_models())
    raise CheckpointError(f"init.weights {source}: no such file, folder or timm model{hint}")


def _from_run(folder: Path, source: str) -> LoadedWeights:
    model_info = load_json_as(folder / MODEL_INFO, ModelInfo)
    names, mean, std = model_info.class_names, model_info.mean, model_info.std
    description = f"{model_info.student.name} from {source}"
    masks = read_masks(folder / MASKS) if (folder / MASKS).is_file() else None
    base = _load_base(folder, model_info)
    if base is None:
        weights = read_weights(folder / WEIGHTS)
    else:
        weights, masks = _on_base(folder / WEIGHTS, *base, model_info), base[0].masks
    return LoadedWeights(weights, description, model_info.student, names, mean, std, masks=masks)


def saved_weights(folder: Path, model_info: ModelInfo) -> Weights:
    """Read all weights of a saved student, including those that only its base stores.

    Raises CheckpointError.
    """
    return reader_of(folder, model_info)(WEIGHTS)


def reader_of(folder: Path, model_info: ModelInfo) -> Callable[[str], Weights]:
    """Return a function that reads all weights of a saved student, given a file name in `folder`.

    The file is model.safetensors or another one with the same tensors. A base is loaded and
    verified once, for all files. Both functions raise CheckpointError.
    """
    base = _load_base(folder, model_info)
    if base is None:
        return lambda file: read_weights(folder / file)
    return lambda file: _on_base(folder / file, *base, model_info)


def _load_base(folder: Path, model_info: ModelInfo) -> tuple[LoadedWeights, PosEmbedKernel] | None:
    """Load the base of saved adapters, with its kernel; None if all weights are in `folder`."""
    base = read_base(folder)
    if base is None:
        return None
    if model_info.student.adapters == "none":
        raise CheckpointError(
            f"{folder / BASE}: belongs to adapters, but the student has none; remove it"
        )
    return find_base(folder, base, load_weights_from), base.kernel


def _on_base(
    file: Path, base_weights: LoadedWeights, kernel: PosEmbedKernel, model_info: ModelInfo
) -> Weights:
    """Combine the adapters and heads in `file` with the other weights, taken from the base."""
    with torch.device("meta"):
        network = create_network(model_info.student, len(model_info.class_names))
    adapted = adapt_weights(
        base_weights,
        network,
        model_info.class_names,
        InitConfig(head="new", pos_embed_resize=kernel),
    )
    saved, trained = read_weights(file), trainable_parameters(network, "adapters")
    from_base = {name: value for name, value in adapted.weights.items() if name not in trained}
    if both := sorted(saved.keys() & from_base.keys()):
        raise CheckpointError(
            f"{file}: holds all weights; remove the {BASE} next to it"
            if len(both) == len(from_base)
            else f"{file}: holds {both[0]}, a weight of its base; it is from another run"
        )
    return from_base | saved


def _from_folder(folder: Path, source: str) -> LoadedWeights:
    """Load a folder written by timm or transformers."""
    try:
        config = json.loads(read_text(folder / "config.json"))
        if config.get("model_type") in ("deit", "vit"):
            return _from_transformers(folder, config, source)
        architecture = config["architecture"]
        pretrained_cfg = config.get("pretrained_cfg", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"init.weights {folder / 'config.json'}: neither a timm configuration nor that of a "
            f"DeiT or ViT of transformers ({type(error).__name__}: {error})"
        ) from None
    weights = read_weights(_weights_in(folder, source))
    settings = config.get("model_args") or {}
    heads = _attention_heads(architecture, settings)
    student = infer_student_config(weights, heads=heads)
    unsupported = sorted(set(settings) - _SETTINGS)
    if student is not None and unsupported:
        raise CheckpointError(
            f"init.weights {source}: its model_args set {', '.join(unsupported)}, which deit_* and "
            "vit_* do not support"
        )
    return LoadedWeights(
        weights,
        f"{architecture} from {source}",
        student,
        _class_names(config.get("label_names") or pretrained_cfg.get("label_names")),
        _channel_values(pretrained_cfg.get("mean")),
        _channel_values(pretrained_cfg.get("std")),
        heads_known=heads is not None,
    )


_SETTINGS = {
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "in_chans"),
    *("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate"),
    "dynamic_img_size",
}
"""timm's arguments that deit_* and vit_* support, or that have no effect in evaluation."""


def _class_names(labels: Any) -> tuple[str, ...] | None:
    """Return class names; None for none. Raises ValueError if they are no list of unique text."""
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        raise ValueError(f"class names {str(labels)[:40]!r}")
    if len(set(labels)) != len(labels):
        raise ValueError("duplicate class names")
    return tuple(labels)


def _weights_in(folder: Path, source: str) -> Path:
    files = [folder / WEIGHTS, *sorted(folder.glob("*.safetensors")), folder / "pytorch_model.bin"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"init.weights {source}: it contains no {WEIGHTS}")
    if "-of-" in file.name:
        raise CheckpointError(
            f"init.weights {source}: its weights are split over several files; save them as one"
        )
    return file


def _from_transformers(folder: Path, config: dict[str, Any], source: str) -> LoadedWeights:
    """Load a DeiT or ViT saved by transformers, with its preprocessing if that was saved too."""
    file = _weights_in(folder, source)
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(
            f"init.weights {source}: its activation is {config['hidden_act']}; deit_* and vit_* "
            "use gelu"
        )
    if not 0 < config.get("layer_norm_eps", 1e-12) <= 1e-5:
        raise CheckpointError(
            f"init.weights {source}: its layer_norm_eps is {config['layer_norm_eps']}; deit_* and "
            "vit_* use 1e-6"
        )
    try:
        weights = from_transformers(read_weights(file))
    except CheckpointError as error:
        raise CheckpointError(f"init.weights {file}: {error}") from None
    id2label = config.get("id2label") or {}
    labels = tuple(id2label[key] for key in sorted(id2label, key=int))
    preprocessor = folder / "preprocessor_config.json"
    normalization = json.loads(read_text(preprocessor)) if preprocessor.is_file() else {}
    return LoadedWeights(
        weights,
        f"transformers' {config['model_type']} from {source}",
        infer_student_config(weights, heads=config.get("num_attention_heads")),
        None if not labels or labels[0] == "LABEL_0" else _class_names(list(labels)),
        _channel_values(normalization.get("image_mean")),
        _channel_values(normalization.get("image_std")),
    )


def _from_timm(name: str) -> LoadedWeights:
    info(f"init      loading the published weights of timm's {name}")
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub, network, parsing and shape errors of many types
        raise_if_transient(error, f"init.weights {name}")
        advice = "give a local folder or file instead"
        if name.startswith(HUB_PREFIXES):
            advice = f"it {address_hint(name)}"
        raise CheckpointError(
            f"init.weights {name}: its weights could not be loaded ({first_line(error)}); {advice}"
        ) from None
    weights, pretrained_cfg = network.state_dict(), network.pretrained_cfg
    names = pretrained_cfg.get("label_names")
    return LoadedWeights(
        weights,
        f"timm {name}",
        infer_student_config(weights, heads=_heads_within(network)),
        None if names is None else tuple(names),
        _channel_values(pretrained_cfg.get("mean")),
        _channel_values(pretrained_cfg.get("std")),
    )


def _channel_values(values: Any) -> tuple[float, ...] | None:
    return tuple(map(float, values)) if values is not None and len(values) == 3 else None


def _attention_heads(architecture: str, settings: dict[str, Any]) -> int | None:
    """Return the number of attention heads of a timm network; None if it has none or is unknown.

    Of a folder's own settings only num_heads is used: others could name files to open.
    """
    if isinstance(settings.get("num_heads"), int):
        if settings["num_heads"] < 1:
            raise ValueError(f"num_heads {settings['num_heads']}")
        return settings["num_heads"]
    if not timm.is_model(architecture):
        return None
    with torch.device("meta"):
        return _heads_within(timm.create_model(architecture))


def _heads_within(network: nn.Module) -> int | None:
    counts = (getattr(module, "num_heads", None) for module in network.modules())
    return next((count for count in counts if isinstance(count, int)), None)


_PLAIN_VIT = re.compile(
    r"cls_token|dist_token|pos_embed|patch_embed\.proj\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
    r"|(.*\.)?(proj|qkv|fc1|fc2|head|head_dist(\.\d+)?)\.range"
    r"|norm\.(weight|bias)|(head|head_dist(\.\d+)?)\.(weight|bias)"
)


def infer_student_config(weights: Weights, heads: int | None = None) -> StudentConfig | None:
    """Return the deit_* or vit_* with weights of these names and shapes; None if not a plain ViT.

    heads: number of attention heads, which shapes do not show. Default: that of the named size
    with this width, or one per 64 channels, as in DeiT. Raises ValueError if blocks are missing.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if any(name not in weights for name in needed):
        return None
    if not all(_PLAIN_VIT.fullmatch(name) for name in weights):
        return None
    width = weights["cls_token"].shape[-1]
    if weights["blocks.0.mlp.fc1.weight"].shape[0] != 4 * width:
        return None
    tokens = num_distillation_tokens(weights)
    patch = weights["patch_embed.proj.weight"].shape[-1]
    side = grid_side(weights["pos_embed"].shape[1], 1 + tokens)
    blocks = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
    depth = len(blocks)
    if max(blocks) >= depth:
        raise ValueError(f"there is a block {max(blocks)}, but only {depth} blocks in total")
    named = {shape["embed_dim"]: size for size, shape in SIZES.items()}
    nearest_width = min(named, key=lambda named_width: (abs(named_width - width), named_width))
    size = named[nearest_width]
    usual = SIZES[size]["num_heads"] if width in named else max(width // 64, 1)
    shape = {"embed_dim": width, "depth": depth, "num_heads": heads or usual}
    return StudentConfig(
        name=f"{'deit' if tokens else 'vit'}_{size}",
        image_size=side * patch,
        patch_size=patch,
        num_distillation_tokens=max(tokens, 1),
        **{name: None if SIZES[size][name] == value else value for name, value in shape.items()},
    )
