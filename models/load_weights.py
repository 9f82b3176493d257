"""What a student starts from: weights of any origin, found, understood, and fitted to it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from deit.config.fields import PosEmbedKernel
from deit.config.student_section import SIZES, InitConfig, StudentConfig
from deit.core.console import info
from deit.core.errors import CheckpointError, did_you_mean, first_line, raise_transient
from deit.core.file_reading import no_file, read_text
from deit.core.json_io import load_json_as
from deit.core.user_code import HUB, about_address
from deit.models.metadata import FACTS, WEIGHTS, ModelInfo, find_base, find_saved_model, read_base
from deit.models.networks import create_network
from deit.models.parameters import classifier_names, trainable_parameters
from deit.models.pos_embed import grid_side, resize_positions
from deit.models.surgery.convpass import adapters_of
from deit.models.surgery.fake_quant import ranges_in
from deit.models.surgery.pruning_masks import MASKS, Masks, read_masks
from deit.models.transformers_format import from_transformers
from deit.models.weight_files import read_weights

Weights = dict[str, Tensor]


class LoadedWeights(NamedTuple):
    """Weights as they were found, with what is known of them.

    student: their network, as a student section; None where it is not one of ours.
    class_names, mean, std: None where the origin does not say.
    """

    weights: Weights
    description: str
    student: StudentConfig | None
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    heads_known: bool = True
    """Whether the origin says how many attention heads there are: they leave no trace in shapes."""
    masks: Masks | None = None
    """Those of a pruned network of ours."""


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
    if timm.is_model(source) or source.startswith(HUB):
        return _from_timm(source)
    if path.exists():
        raise CheckpointError(f"init.weights {source}: {no_file(path)}")
    if (advice := about_address(source)) is not None:
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
        if name.startswith(HUB):
            advice = f"it {about_address(name)}"
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
    tokens = _tokens_of(weights)
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


def _tokens_of(weights: Weights) -> int:
    """Distillation tokens among these weights."""
    return weights["dist_token"].shape[1] if "dist_token" in weights else 0


class AdaptedWeights(NamedTuple):
    """Weights that fit a network by name and shape, and what was done to them, for a person."""

    weights: Weights
    notes: tuple[str, ...]


def adapt_weights(
    found: LoadedWeights, network: nn.Module, class_names: tuple[str, ...], start: InitConfig
) -> AdaptedWeights:
    """Weights fitted to a network with random weights: positions resized, distillation tokens put
    in or left out, class rows matched by name, other heads left random where that was asked for;
    adapters as they begin where the weights have none; ranges of rounded layers likewise.

    What still differs in name or shape is for `load_weights` to refuse.
    Raises CheckpointError where the classes do not match.
    """
    own = network.state_dict()
    weights = {
        name: value.to(own[name].dtype) if name in own else value
        for name, value in found.weights.items()
    }
    notes: list[str] = []
    if "pos_embed" in weights and "pos_embed" in own:
        weights = _fit_tokens(weights, own, notes)
        weights = _fit_positions(weights, network, start.pos_embed_resize, notes)
    weights = _fit_heads(weights, network, found.class_names, class_names, start, notes)
    weights = _fit_shared(weights, own, notes)
    weights = _fit_adapters(weights, network, notes)
    weights = _fit_ranges(weights, own, notes)
    return AdaptedWeights(weights, tuple(notes))


def _fit_shared(weights: Weights, own: Weights, notes: list[str]) -> Weights:
    """For blocks that share attention and MLP, from weights of blocks that do not: those of the
    first of each group, and heads that are not mixed so far."""
    mixing = [name for name in own if name.endswith((".attn.before", ".attn.after"))]
    if not mixing or any(name in weights for name in mixing):
        return weights
    blocks = {name.rsplit(".attn.", 1)[0] for name in mixing}
    gone = [
        name
        for name in weights
        if name not in own and name.split(".attn.")[0].split(".mlp.")[0] in blocks
    ]
    kept = {name: value for name, value in weights.items() if name not in gone}
    left = len({name.split(".attn.")[0].split(".mlp.")[0] for name in gone})
    notes.append(
        f"attention and MLP of {left} of {len(blocks)} blocks left out: they share those of the "
        "first of their group; heads are not mixed so far"
    )
    return {**kept, **{name: own[name] for name in mixing}}


def _fit_tokens(weights: Weights, own: Weights, notes: list[str]) -> Weights:
    """As many distillation tokens as the network has: the last are left out, or the class token is
    copied, with its row of the position embedding and its head."""
    before, after = _tokens_of(weights), _tokens_of(own)
    if before == after:
        return weights
    weights = dict(weights)
    positions = weights.pop("pos_embed")
    heads = {kind: _pop_distillation_heads(weights, kind) for kind in ("weight", "bias")}
    tokens = weights.pop("dist_token", weights["cls_token"][:, :0])
    kept = min(before, after)
    copies = [1] * (after - kept)
    rows = positions[:, 1 : 1 + kept], positions[:, [0] * len(copies)]
    weights["pos_embed"] = torch.cat([positions[:, :1], *rows, positions[:, 1 + before :]], dim=1)
    if after:
        cls = weights["cls_token"]
        weights["dist_token"] = torch.cat([tokens[:, :kept], *(cls for _ in copies)], dim=1)
    for kind, values in heads.items():
        if f"head.{kind}" in weights:
            values = values[:kept] + [weights[f"head.{kind}"]] * len(copies)
        for place, value in enumerate(values):
            name = f"head_dist.{kind}" if after == 1 else f"head_dist.{place}.{kind}"
            weights[name] = value
    if after > before:
        said = "a copy of the class token, with its position and head"
        notes.append(f"{after - before} distillation token(s) put in: {said}")
    else:
        notes.append(f"{before - after} distillation token(s) left out, with position and head")
    return weights


def _fit_adapters(weights: Weights, network: nn.Module, notes: list[str]) -> Weights:
    """All adapters as they begin, where the weights were trained without any."""
    own, adapters = network.state_dict(), tuple(f"{name}." for name in adapters_of(network))
    names = [name for name in own if name.startswith(adapters)]
    if not names or any(name in weights for name in names):
        return weights
    notes.append(f"{len(adapters)} new adapters, which add nothing until they are trained")
    return {**weights, **{name: own[name] for name in names}}


def _fit_ranges(weights: Weights, own: Weights, notes: list[str]) -> Weights:
    """The ranges of the layers that round: those of layers that did not so far begin as unknown,
    those of layers that do no more are left out."""
    before, after = ranges_in(weights), ranges_in(own)
    if new := after - before:
        notes.append(f"{len(new)} layers round from now on: their ranges begin with what they hear")
    if before and not after:
        notes.append(f"{len(before)} layers compute in float again: their ranges are left out")
    kept = {name: value for name, value in weights.items() if name not in before - after}
    return {**kept, **{name: own[name] for name in new}}


def _pop_distillation_heads(weights: Weights, kind: str) -> list[Tensor]:
    """Takes the distillation heads' weights or biases out, in the order of their tokens."""
    names = [name for name in weights if re.fullmatch(rf"head_dist(\.\d+)?\.{kind}", name)]
    return [weights.pop(name) for name in sorted(names, key=lambda n: (len(n), n))]


def _fit_positions(
    weights: Weights, network: nn.Module, kernel: PosEmbedKernel, notes: list[str]
) -> Weights:
    theirs, ours = weights["pos_embed"], network.state_dict()["pos_embed"]
    if theirs.shape[-1] != ours.shape[-1]:
        return weights  # another width: `load_weights` will list it with the others
    # In some networks of timm's the tokens before the patches have no position.
    bare = getattr(network, "no_embed_class", False)
    prefix = 0 if bare else getattr(network, "num_prefix_tokens", 0)
    side = grid_side(ours.shape[1], prefix)
    resized = resize_positions(theirs, prefix=prefix, side=side, kernel=kernel)
    before, after = resized.sides
    if before != after:
        norms = f"mean norm {resized.norms[0]:.3f} -> {resized.norms[1]:.3f}"
        notes.append(
            f"position embedding {before} x {before} -> {after} x {after} patches ({kernel}'s "
            f"bicubic kernel; {norms}), the rows of its {prefix} token(s) as they were"
        )
    return {**weights, "pos_embed": resized.positions}


def _fit_heads(
    weights: Weights,
    network: nn.Module,
    known: tuple[str, ...] | None,
    wanted: tuple[str, ...],
    start: InitConfig,
    notes: list[str],
) -> Weights:
    """The rows of the heads for the data's classes, or none of them."""
    own, where = network.state_dict(), f"init.weights {start.weights}:"
    names = [f"{head}.{kind}" for head in classifier_names(network) for kind in ("weight", "bias")]
    names = [name for name in names if name in own]
    if start.head != "keep":
        zero = start.head == "zero"
        said = "the start had" if known is None else f"the start knew {len(known)}, and had"
        had = sum(name in weights for name in names if name.endswith("weight"))
        kind = "zeros" if zero else "random"
        notes.append(f"{len(wanted)} classes: new heads, {kind} ({said} {had} head(s))")
        new = {name: torch.zeros_like(own[name]) if zero else own[name] for name in names}
        return {**weights, **new}
    present = [name for name in names if name in weights]
    if not present:
        raise CheckpointError(f"{where} has no head; --init.head new begins with random ones")
    if known is not None and any(len(weights[name]) != len(known) for name in present):
        raise CheckpointError(f"{where} names {len(known)} classes, its heads have others")
    if known is None:
        counts = {len(weights[name]) for name in present} - {len(wanted)}
        if counts:
            raise CheckpointError(
                f"{where} its heads answer with {counts.pop()} classes, the data has "
                f"{len(wanted)}, and no names say which is which; --init.head new begins with "
                "random heads"
            )
        notes.append(f"{len(wanted)} classes, taken to be in the data's order: it names none")
        return weights
    if known == wanted:
        return weights
    rows = {name: row for row, name in enumerate(known)}
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise CheckpointError(
            f"{where} knows {len(known)} classes, but of the data's {len(wanted)} it lacks "
            f"{len(missing)}: {', '.join(map(repr, missing[:5]))}{did_you_mean(missing[0], rows)}; "
            "--init.head new begins with random heads"
        )
    picked = torch.tensor([rows[name] for name in wanted])
    notes.append(f"{len(wanted)} classes: their rows of its {len(known)}, by name")
    return {**weights, **{name: weights[name][picked] for name in present}}
