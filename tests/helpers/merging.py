"""Small networks for tests of token merging."""

import timm
import torch
from torch import nn

from deit.config.sections.student import StudentConfig
from deit.models.registry import create_network

SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
STUDENTS = {
    "distilled": {"name": "deit_micro"},
    "class token": {"name": "vit_micro", "drop_path": 0.3, "dropout": 0.2},
    "two teachers": {"name": "deit_micro", "num_distillation_tokens": 2},
    "pruned": {
        "name": "deit_micro",
        "heads_per_block": (1, 3, 2),
        "mlp_hidden_per_block": (5, 40, 17),
    },
}
TIMM_NETWORKS = {
    "layer scale": {"init_values": 0.5},
    "normalized keys": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "registers": {"reg_tokens": 3, "no_embed_class": True, "pre_norm": True},
    "no biases": {"qkv_bias": False, "drop_path_rate": 0.3},
}


def network(kind="distilled"):
    """Return a network of 16 patches, three blocks and six classes; its tokens differ clearly."""
    torch.manual_seed(0)
    if kind in STUDENTS:
        section = {"image_size": 16, "patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 3}
        built = create_network(StudentConfig(**section, **STUDENTS[kind]), 6)
    else:
        built = timm.create_model(
            "vit_tiny_patch16_224", num_classes=6, **SHAPE, **TIMM_NETWORKS.get(kind, {})
        )
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.3)
    for block in built.blocks if kind == "not fused" else ():
        block.attn.fused_attn = False
    return built.eval()


def images(count=3, side=16):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, side, side, generator=generator)
