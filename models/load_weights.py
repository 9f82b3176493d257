"""What a student starts from: weights of any origin, found, understood, and fitted to it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from deit.config.fields import PosEmbedKernel
from deit.config.student_section import SIZES, InitConfig, StudentConfig
from deit.core.console import info
from deit.core.errors import CheckpointError, did_you_mean, first_line, raise_transient
from deit.core.file_reading import missing_file_reason, read_text
from deit.core.json_io import load_json_as
from deit.core.user_code import HUB_PREFIXES, address_hint
from deit.models.adapt_weights import LoadedWeights, Weights, adapt_weights, tokens_of
from deit.models.metadata import FACTS, WEIGHTS, ModelInfo, find_base, find_saved_model, read_base
from deit.models.networks import create_network
from deit.models.parameters import trainable_parameters
from deit.models.pos_embed import grid_side
from deit.models.surgery.pruning_masks import MASKS, read_masks
from deit.models.transformers_format import from_transformers
from deit.models.weight_files import read_weights

_FOREIGN = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)
"""What reading a file of unknown make may stumble over."""


def load_weights_from(source: str) -> LoadedWeights:
    """The weights a init.weights names: a run folder of ours, a timm or transformers folder, a
    weight file, a timm name with its published weights.

    Raises CheckpointError where there is nothing, it cannot be read without running code, or its
    numbers are not finite.
    """
    try:
        found = _found(source)
    except _FOREIGN as error:
        raise_transient(error, f"init.weights {source}")
        raise CheckpointError(
            f"init.weights {source}: not what its names say ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from None
    for name, value in found.weights.items():
        if value.is_floating_point() and value.numel() and not value.isfinite().all():
            raise CheckpointError(
                f"init.weights {source}: {name} holds numbers that are not finite"
            )
    return found


def _found(source: str) -> LoadedWeights:
    path = Path(source).expanduser()
    if path.is_dir():
        saved = find_saved_model(path)
        if saved is not None:
            return _from_run(saved, source)
        if (path / "config.json").is_file() and not (path / "metrics.jsonl").exists():
            return _from_folder(path, source)
        raise CheckpointError(
            f"init.weights {source}: holds no trained network (no best/model.safetensors of ours, "
            "no config.json of timm or transformers); let the run finish first"
        )
    if path.is_file() and path.name == WEIGHTS and (path.parent / FACTS).is_file():
        return _from_run(path.parent, source)  # what it is stands beside it
    if path.is_file():
        weights = read_weights(path)
        return LoadedWeights(
            weights, f"{path}", infer_student_config(weights), None, None, None, heads_known=False
        )
    if timm.is_model(source) or source.startswith(HUB_PREFIXES):
        return _from_timm(source)
    if path.exists():
        raise CheckpointError(f"init.weights {source}: {missing_file_reason(path)}")
    if (advice := address_hint(source)) is not None:
        raise CheckpointError(f"init.weights {source}: {advice}")
    known = "" if "/" in source or path.suffix else did_you_mean(source, timm.list_models())
    raise CheckpointError(f"init.weights {source}: no such file, folder or timm model{known}")


def _from_run(folder: Path, source: str) -> LoadedWeights:
    facts = load_json_as(folder / FACTS, ModelInfo)
    names, mean, std = facts.class_names, facts.mean, facts.std
    told = f"{facts.student.name} from {source}"
    masks = read_masks(folder / MASKS) if (folder / MASKS).is_file() else None
    weights, base = read_weights(folder / WEIGHTS), read_base(folder)
    if base is not None:
        below = find_base(folder, base, load_weights_from)
        weights, masks = _on_base(weights, below, base.kernel, facts), below.masks
    return LoadedWeights(weights, told, facts.student, names, mean, std, masks=masks)


def saved_weights(folder: Path, facts: ModelInfo) -> Weights:
    """All weights of a saved student; where adapters and heads alone were saved, the others are
    those of its base, fitted as they were then. Raises CheckpointError."""
    return reader_of(folder, facts)(WEIGHTS)


def reader_of(folder: Path, facts: ModelInfo) -> Callable[[str], Weights]:
    """What reads all weights of a saved student from model.safetensors, or from another file beside
    it that holds the same tensors: their base is looked for, and its digest taken, once for all.
    Both raise CheckpointError."""
    base = read_base(folder)
    if base is None:
        return lambda file: read_weights(folder / file)
    below = find_base(folder, base, load_weights_from)
    return lambda file: _on_base(read_weights(folder / file), below, base.kernel, facts)


def _on_base(
    saved: Weights, below: LoadedWeights, kernel: PosEmbedKernel, facts: ModelInfo
) -> Weights:
    """Saved adapters and heads, and all other weights of the student from its base."""
    with torch.device("meta"):
        network = create_network(facts.student, len(facts.class_names))
    fitted = adapt_weights(
        below, network, facts.class_names, InitConfig(head="new", pos_embed_resize=kernel)
    )
    own = trainable_parameters(network, "adapters")  # no numbers yet, or the base's
    return {name: value for name, value in fitted.weights.items() if name not in own} | saved


def _from_folder(folder: Path, source: str) -> LoadedWeights:
    """A folder as timm or transformers writes it."""
    try:
        about = json.loads(read_text(folder / "config.json"))
        if about.get("model_type") in ("deit", "vit"):
            return _from_transformers(folder, about, source)
        architecture = about["architecture"]
        known = about.get("pretrained_cfg", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"init.weights {folder / 'config.json'}: neither timm's nor transformers' of a DeiT or "
            f"ViT ({type(error).__name__}: {error})"
        ) from None
    weights = read_weights(_weights_in(folder, source))
    settings = about.get("model_args") or {}
    heads = _attention_heads(architecture, settings)
    student = infer_student_config(weights, heads=heads)
    strange = sorted(set(settings) - _SETTINGS)
    if student is not None and strange:
        raise CheckpointError(
            f"init.weights {source}: its model_args set {', '.join(strange)}, which a deit_* or "
            "vit_* does not have"
        )
    return LoadedWeights(
        weights,
        f"{architecture} from {source}",
        student,
        _names(about.get("label_names") or known.get("label_names")),
        _colour(known.get("mean")),
        _colour(known.get("std")),
        heads_known=heads is not None,
    )


_SETTINGS = {
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "in_chans"),
    *("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate"),
    "dynamic_img_size",
}
"""Arguments of timm's that a deit_* or vit_* has as well, or that change nothing in evaluation."""


def _names(labels: Any) -> tuple[str, ...] | None:
    """Class names, None for none. Raises ValueError where they are no list of different ones."""
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(one, str) for one in labels):
        raise ValueError(f"class names {str(labels)[:40]!r}")
    if len(set(labels)) != len(labels):
        raise ValueError("two classes of one name")
    return tuple(labels)


def _weights_in(folder: Path, source: str) -> Path:
    files = [folder / WEIGHTS, *sorted(folder.glob("*.safetensors")), folder / "pytorch_model.bin"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"init.weights {source}: no {WEIGHTS} in it")
    if "-of-" in file.name:
        raise CheckpointError(f"init.weights {source}: its weights lie in several files; join them")
    return file


def _from_transformers(folder: Path, about: dict[str, Any], source: str) -> LoadedWeights:
    """A DeiT or ViT as transformers writes it, with its preprocessing where that is beside it."""
    file = _weights_in(folder, source)
    if about.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(
            f"init.weights {source}: its activation is {about['hidden_act']}, that of a deit_* or "
            "vit_* gelu"
        )
    if not 0 < about.get("layer_norm_eps", 1e-12) <= 1e-5:
        raise CheckpointError(
            f"init.weights {source}: its layer_norm_eps is {about['layer_norm_eps']}, that of a "
            "deit_* or vit_* 1e-6"
        )
    try:
        weights = from_transformers(read_weights(file))
    except CheckpointError as error:
        raise CheckpointError(f"init.weights {file}: {error}") from None
    names = about.get("id2label") or {}
    labels = tuple(names[key] for key in sorted(names, key=int))
    prepared = folder / "preprocessor_config.json"
    colours = json.loads(read_text(prepared)) if prepared.is_file() else {}
    return LoadedWeights(
        weights,
        f"transformers' {about['model_type']} from {source}",
        infer_student_config(weights, heads=about.get("num_attention_heads")),
        None if not labels or labels[0] == "LABEL_0" else _names(list(labels)),
        _colour(colours.get("image_mean")),
        _colour(colours.get("image_std")),
    )


def _from_timm(name: str) -> LoadedWeights:
    info(f"start     fetching timm's {name}")
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub, network, parsing and shape errors of many types
        raise_transient(error, f"init.weights {name}")
        advice = "give a local folder or file instead"
        if name.startswith(HUB_PREFIXES):
            advice = f"it {address_hint(name)}"
        raise CheckpointError(
            f"init.weights {name}: its weights could not be loaded ({first_line(error)}); {advice}"
        ) from None
    weights, known = network.state_dict(), network.pretrained_cfg
    names = known.get("label_names")
    return LoadedWeights(
        weights,
        f"timm {name}",
        infer_student_config(weights, heads=_heads_within(network)),
        None if names is None else tuple(names),
        _colour(known.get("mean")),
        _colour(known.get("std")),
    )


def _colour(values: Any) -> tuple[float, ...] | None:
    return tuple(map(float, values)) if values is not None and len(values) == 3 else None


def _attention_heads(architecture: str, settings: dict[str, Any]) -> int | None:
    """How many attention heads a network of timm has; None where it has none, or timm does not
    know it. Of the folder's own settings only that number is believed: others could name files."""
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
    """The deit_* or vit_* that has weights of these names and shapes; None if it is no plain ViT.

    heads: attention heads, which leave no trace in the shapes. None: those of the named size of
    this width, else one for every 64 channels, as in all of DeiT's.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if any(name not in weights for name in needed):
        return None
    if not all(_PLAIN_VIT.fullmatch(name) for name in weights):
        return None
    width = weights["cls_token"].shape[-1]
    if weights["blocks.0.mlp.fc1.weight"].shape[0] != 4 * width:
        return None
    tokens = tokens_of(weights)
    patch = weights["patch_embed.proj.weight"].shape[-1]
    side = grid_side(weights["pos_embed"].shape[1], 1 + tokens)
    blocks = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
    depth = len(blocks)
    if max(blocks) >= depth:
        raise ValueError(f"block {max(blocks)} is there, and {depth} blocks in all")
    named = {shape["embed_dim"]: size for size, shape in SIZES.items()}
    nearest_width = min(named, key=lambda known: (abs(known - width), known))
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
