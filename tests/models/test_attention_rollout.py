"""Attention rollout by hand, and the similarity of tokens over depth."""

import pytest
import torch

from deit.config.sections.student import StudentConfig
from deit.core.errors import ConfigError
from deit.models.attention_rollout import rollout, token_cosines
from deit.models.registry import create_network
from tests.helpers.errors import raises

KINDS = {
    "deit_micro": {},
    "vit_micro": {},
    "two": {"name": "deit_micro", "num_distillation_tokens": 2},
}


def network(kind="deit_micro", depth=3, **fields):
    torch.manual_seed(0)
    section = {"name": kind, "image_size": 16, "depth": depth, **KINDS[kind], **fields}
    built = create_network(StudentConfig(**section), 5).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built


@torch.no_grad()
def attention_by_timm(kind, images, **fields):
    """What each block of `network` computes, without its fused kernel: [batch, heads, tokens,
    tokens]."""
    built, result = network(kind, **fields), []
    for block in built.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda *seen: result.append(seen[-1]))
    built.forward_features(images)
    return result


@pytest.mark.parametrize("kind", ["deit_micro", "vit_micro"])
def test_attention_matrices_equal_the_networks_attention(kind):
    images = torch.randn(2, 3, 16, 16)
    built = network(kind, depth=1)
    (attention,) = attention_by_timm(kind, images, depth=1)
    prefix = built.num_prefix_tokens
    expected = attention.mean(dim=1)[:, :prefix, prefix:] / 2
    maps = rollout(built, images).maps
    torch.testing.assert_close(maps, expected.reshape(2, prefix, 4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_rollout_equals_product_by_hand(kind):
    images = torch.randn(2, 3, 16, 16)
    built = network(kind)
    prefix = built.num_prefix_tokens
    expected = torch.eye(16 + prefix).expand(2, -1, -1)
    matrices = attention_by_timm(kind, images)
    assert len(matrices) == 3
    for attention in matrices:
        mean = attention.mean(dim=1)
        residual = 0.5 * mean + 0.5 * torch.eye(16 + prefix)
        expected = residual @ expected
    looks = rollout(built, images)
    torch.testing.assert_close(looks.maps, expected[:, :prefix, prefix:].reshape(2, prefix, 4, 4))
    names = {1: ("class",), 2: ("class", "distillation")}
    assert looks.names == names.get(prefix, ("class", "distillation 1", "distillation 2"))
    assert (looks.maps.sum(dim=(2, 3)) < 1).all()  # the rest is what tokens take from tokens


def test_rollout_of_token_attending_to_one_patch_marks_it():
    """One block, in which the class token attends to one patch in the second row."""
    built = network(depth=1)
    attention = built.blocks[0].attn
    width = built.embed_dim
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
        built.blocks[0].norm1.weight.fill_(1)
        built.cls_token[..., 0] = 1.0
        built.pos_embed[0, 2 + 6, 1] = 1.0  # patch 6 of 4 x 4: row 1, column 2
        attention.qkv.weight[0, 0] = 50.0  # query of the class token
        attention.qkv.weight[width, 1] = 50.0  # key of that patch
    looks = rollout(built, torch.zeros(1, 3, 16, 16))
    assert looks.maps[0, 0].argmax() == 6
    assert looks.maps[0, 0].flatten()[6] > 5 * looks.maps[0, 0].flatten().median()
    assert looks.maps[0, 1].flatten().std() < 1e-6  # the other token looks everywhere alike


def test_rollout_removes_its_hooks():
    built = network()
    images = torch.randn(1, 3, 16, 16)
    rollout(built, images)
    token_cosines(built, images)
    for block in built.blocks:
        assert not block._forward_hooks
        assert not block._forward_pre_hooks
        assert not block.attn._forward_pre_hooks


def test_token_cosines_over_depth_by_hand():
    built = network()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = built.patch_embed(images)
        heads = torch.cat([built.cls_token, built.dist_token], dim=1).expand(2, -1, -1)
        tokens = torch.cat([heads, tokens], dim=1) + built.pos_embed
        states = [tokens]
        for block in built.blocks:
            tokens = block(tokens)
            states.append(tokens)
        states[-1] = built.norm(tokens)
        expected = [torch.cosine_similarity(s[:, 0], s[:, 1], dim=-1) for s in states]
    torch.testing.assert_close(token_cosines(built, images), torch.stack(expected, dim=1))


def test_token_cosines_of_equal_tokens_are_one():
    built = network()
    with torch.no_grad():
        built.dist_token.copy_(built.cls_token)
        built.pos_embed[:, 1] = built.pos_embed[:, 0]
    cosines = token_cosines(built, torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(cosines, torch.ones(2, 4))


def test_unsupported_network_raises():
    with raises(ConfigError, "SmallConvNet", "student.shared_block_size"):
        rollout(create_network(StudentConfig(name="small_convnet"), 5), torch.zeros(1, 3, 8, 8))
    built = network("vit_micro")
    with raises(ConfigError, type(built).__name__, "deit_*"):
        token_cosines(built, torch.zeros(1, 3, 16, 16))
