"""Build the networks that can be trained, by name; `timm:NAME` is any other timm model."""

from collections.abc import Callable

import timm
import torch
from timm.layers import Attention, Mlp
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from deit.config.sections.student import SIZES, StudentConfig
from deit.core.errors import ConfigError, did_you_mean
from deit.core.user_code import HUB_PREFIXES
from deit.models.rednet import DEPTHS, RedNet
from deit.models.small_networks import Dense, SmallConvNet
from deit.models.surgery.convpass import add_adapters
from deit.models.surgery.fake_quant import enable_fake_quant
from deit.models.surgery.weight_sharing import share_weights


def create_vit(student: StudentConfig, num_classes: int) -> nn.Module:
    """Build timm's ViT, with a distillation token for deit_*, at any image and patch size.

    Parameters have timm's names, so weights can be exchanged with timm in both directions. Raises
    ConfigError if num_heads does not divide embed_dim.
    """
    distilled = student.has_distillation_token
    shape = dict(SIZES[student.name.split("_")[1]])
    for name in shape:
        shape[name] = getattr(student, name) or shape[name]
    if shape["embed_dim"] % shape["num_heads"]:
        raise ConfigError(
            f"student.num_heads = {shape['num_heads']}: should divide "
            f"student.embed_dim = {shape['embed_dim']}"
        )
    network = timm.create_model(
        "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224",
        num_classes=num_classes,
        img_size=student.image_size,
        patch_size=student.patch_size,
        drop_path_rate=student.drop_path,
        pos_drop_rate=student.dropout,
        proj_drop_rate=student.dropout,
        **shape,
    )
    if student.heads_per_block or student.mlp_hidden_per_block:
        _resize_blocks(network, student)
    if student.shared_block_size > 1:
        share_weights(network, student.shared_block_size)
    if student.num_distillation_tokens > 1:
        _add_tokens(network, student.num_distillation_tokens)
    if student.weight_init == "scaled":
        _scale_initial_weights(network)
    if student.adapters != "none":
        add_adapters(
            network,
            mlp=student.adapters == "convpass",
            hidden=student.adapter_dim,
            scale=student.adapter_scale,
            drop_path=student.drop_path,
        )
    if student.qat != "none":
        enable_fake_quant(network)
    return network


def _resize_blocks(network: nn.Module, student: StudentConfig) -> None:
    """Give each block its own number of heads, of unchanged width, and of hidden units."""
    width = network.embed_dim
    head_width = width // student.heads
    shapes = zip(network.blocks, student.block_heads, student.block_hidden, strict=True)
    for block, heads, hidden in shapes:
        drop = {"proj_drop": student.dropout}
        block.attn = Attention(width, heads, attn_head_dim=head_width, qkv_bias=True, **drop)
        block.mlp = Mlp(width, hidden, drop=student.dropout)
    network.init_weights()


def check_plain_blocks(student: StudentConfig) -> None:
    """Raise ConfigError if timm and transformers cannot build the student's blocks."""
    if student.heads_per_block or student.mlp_hidden_per_block:
        raise ConfigError(
            "student.heads_per_block, student.mlp_hidden_per_block: timm and transformers build "
            "blocks of one shape only; export a pruned network with format onnx or pt2"
        )
    if student.shared_block_size > 1:
        raise ConfigError(
            f"student.shared_block_size = {student.shared_block_size}: timm and transformers have "
            "no blocks that share weights; export the network with format onnx or pt2"
        )
    if student.adapters != "none":
        raise ConfigError(
            f"student.adapters = {student.adapters!r}: timm and transformers have no adapters, and "
            "nonlinear ones cannot be merged into other layers; export the network with --format "
            "onnx or pt2"
        )


def _add_tokens(network: VisionTransformerDistilled, num_tokens: int) -> None:
    """Give timm's network several distillation tokens, each with its own position and head.

    One token per teacher, as in Co-advise (Ren et al. 2022); unlike there, the tokens are
    initialized at random and not by convolutional stems.
    """
    width, classes = network.embed_dim, network.num_classes
    network.num_prefix_tokens = 1 + num_tokens
    network.dist_token = nn.Parameter(torch.empty(1, num_tokens, width))
    positions = network.patch_embed.num_patches + network.num_prefix_tokens
    network.pos_embed = nn.Parameter(torch.empty(1, positions, width))
    network.head_dist = nn.ModuleList(nn.Linear(width, classes) for _ in range(num_tokens))
    network.init_weights()


def _scale_initial_weights(network: nn.Module) -> None:
    """Initialize a narrow transformer (measurements: docs/log.md). Heads are not changed.

    A standard deviation of 0.02 suits a width of 768. At a width of 64 it is a sixth of the value
    that preserves the variance (LeCun et al. 1998). The position embedding, also of 0.02, is small
    compared with patch embeddings of about 0.6, so tokens lack their positions for many epochs.
    """
    for block in network.blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                std = layer.in_features**-0.5
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.normal_(network.pos_embed, std=0.5)


def create_small(student: StudentConfig, num_classes: int) -> nn.Module:
    """Build the small ConvNet or the dense network for handwritten digits.

    Raises ConfigError if drop_path is set, which they do not support.
    """
    _check_no_drop_path(student)
    if student.name == "dense":
        return Dense(student.image_size, num_classes)
    return SmallConvNet(num_classes)


def create_rednet(student: StudentConfig, num_classes: int) -> nn.Module:
    """Build a RedNet: micro for handwritten digits, tiny for 32 px without a GPU, or as published.

    Raises ConfigError if drop_path is set, which it does not support.
    """
    _check_no_drop_path(student)
    size, small_stem = student.name.split("_")[1], student.name.endswith("_small_stem")
    if size == "micro":
        return RedNet(num_classes, depths=(1, 1), width=32, side=5, stem_stride=1)
    if size == "tiny":
        return RedNet(num_classes, depths=(1, 2, 2), width=32, side=5, stem_stride=2)
    return RedNet(num_classes, depths=DEPTHS[size], stem_stride=1 if small_stem else 4)


def _check_no_drop_path(student: StudentConfig) -> None:
    if student.drop_path:
        raise ConfigError(
            f"student.drop_path = {student.drop_path}: {student.name} has no drop path; use 0"
        )


def create_regnety_small_stem(student: StudentConfig, num_classes: int) -> nn.Module:
    """Build timm's RegNetY with a stem of stride 1, for images of 32 px."""
    name = student.name.removesuffix("_small_stem")
    network = timm.create_model(name, num_classes=num_classes, drop_path_rate=student.drop_path)
    network.stem.conv.stride = (1, 1)
    return network


def is_published_name(source: str) -> bool:
    """Return whether a source is a name of timm or of the Hugging Face Hub, not a path.

    >>> is_published_name("deit_tiny_patch16_224"), is_published_name("checkpoints/digits")
    (True, False)
    """
    return timm.is_model(source) or source.startswith(HUB_PREFIXES)


def create_timm(student: StudentConfig, num_classes: int) -> nn.Module:
    """Build any timm model with random weights; student.name is `timm:NAME`.

    Raises ConfigError if timm has no model of this name.
    """
    name = student.name.removeprefix("timm:")
    if not timm.is_model(name):
        raise ConfigError(
            f"student.name = {student.name!r}: timm has no model {name!r}"
            + did_you_mean(name, timm.list_models())
        )
    settings = {"drop_path_rate": student.drop_path} if student.drop_path else {}
    # Models with a position embedding are built for one size; the others reject the argument.
    if timm.get_pretrained_cfg(name).fixed_input_size:
        settings["img_size"] = student.image_size
    return timm.create_model(name, num_classes=num_classes, **settings)


NETWORKS: dict[str, Callable[[StudentConfig, int], nn.Module]] = {
    **{f"{kind}_{size}": create_vit for kind in ("deit", "vit") for size in SIZES},
    "small_convnet": create_small,
    "dense": create_small,
    "rednet_micro": create_rednet,
    "rednet_tiny": create_rednet,
    **{f"rednet_{depth}": create_rednet for depth in DEPTHS},
    "rednet_26_small_stem": create_rednet,
    "regnety_002_small_stem": create_regnety_small_stem,
    "regnety_004_small_stem": create_regnety_small_stem,
}
"""Every named network: (student section, number of classes) -> module with random weights."""


def create_network(student: StudentConfig, num_classes: int) -> nn.Module:
    """Build the network of a student section, with random weights from torch's generator.

    The network takes normalized images, float [batch, 3, image_size, image_size]. Raises
    ConfigError for an unknown name or an impossible shape.

    >>> network = create_network(StudentConfig("deit_micro", image_size=8, depth=1), 10)
    >>> tuple(network.pos_embed.shape)  # class token, distillation token, 2 x 2 patches
    (1, 6, 96)
    """
    return NETWORKS.get(student.name, create_timm)(student, num_classes)
