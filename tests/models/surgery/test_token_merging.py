"""Token merging: compared with loops, and its properties."""

import pytest
import torch

from deit.models.student import Student
from deit.models.surgery.token_merging import (
    merge,
    num_tokens_per_block,
    with_merging,
)
from tests.helpers.merging import STUDENTS, TIMM_NETWORKS, images, network

KINDS = (*STUDENTS, *TIMM_NETWORKS, "not fused")


def all_logits(built, batch):
    """Return the logits of all heads, [batch, heads * classes]."""
    outputs = Student(built, mean=(0.5,) * 3, std=(0.25,) * 3).eval()(batch)
    return torch.cat([head.flatten(1) for head in outputs if head is not None], dim=1)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


# The same by loops


def merged_by_loops(tokens, sizes, keys, count, prefix):
    """Merge one image: lists of vectors, sizes and keys [heads, channels]; return both, merged."""
    rows = range(prefix, len(tokens))
    even = [index for index in rows if index % 2 == 0]
    odd = [index for index in rows if index % 2 == 1]
    mean = [sum(heads) / len(heads) for heads in keys]
    edges = []
    for index in even:
        cosines = [float(torch.cosine_similarity(mean[index], mean[other], dim=0)) for other in odd]
        best = max(cosines)
        edges.append((-round(best, 6), index, odd[cosines.index(best)]))
    pairs = {index: other for _, index, other in sorted(edges)[:count]}
    weight = {other: sizes[other] for other in odd}
    total = {other: tokens[other] * sizes[other] for other in odd}
    for index, other in pairs.items():
        weight[other] += sizes[index]
        total[other] = total[other] + tokens[index] * sizes[index]
    remaining = [*range(prefix), *(index for index in even if index not in pairs)]
    left = [tokens[index] for index in remaining] + [total[other] / weight[other] for other in odd]
    return left, [sizes[index] for index in remaining] + [weight[other] for other in odd]


def attended_by_loops(attention, tokens, sizes):
    """Attend in one image, [tokens, width], with keys weighted by size; return also the keys."""
    heads, width = attention.num_heads, attention.head_dim
    queries, keys, values = attention.qkv(tokens).unflatten(1, (3, heads, width)).unbind(1)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    output = []
    for query in queries:
        parts = []
        for head in range(heads):
            logits = (keys[:, head] @ query[head]) * width**-0.5
            shares = torch.tensor(sizes, dtype=tokens.dtype) * (logits - logits.max()).exp()
            parts.append(shares @ values[:, head] / shares.sum())
        output.append(torch.cat(parts))
    return attention.proj(attention.norm(torch.stack(output))), keys


def tokens_by_loops(built, image, numbers):
    """Return the tokens of one image after all blocks and the last norm, and their sizes."""
    tokens = built.norm_pre(built._pos_embed(built.patch_embed(image[None])))[0]
    sizes = [1.0] * len(tokens)
    for block, count in zip(built.blocks, numbers, strict=True):
        attended, keys = attended_by_loops(block.attn, block.norm1(tokens), sizes)
        tokens = tokens + block.ls1(attended)
        count = min(count, (len(tokens) - built.num_prefix_tokens) // 2)
        if count:
            left, sizes = merged_by_loops(
                list(tokens), sizes, list(keys), count, built.num_prefix_tokens
            )
            tokens = torch.stack(left)
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return built.norm(tokens), sizes


@pytest.mark.parametrize("numbers", [(3, 3, 3), (8, 8, 8), (0, 5, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_network_equals_loops(kind, numbers):
    built = network(kind).double()
    merging = with_merging(built, numbers)
    result = merging.forward_features(images().double())
    for image, tokens in zip(images().double(), result, strict=True):
        expected, sizes = tokens_by_loops(built, image, numbers)
        assert sum(sizes) == 16 + built.num_prefix_tokens
        torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
@pytest.mark.parametrize("patches", [2, 3, 8, 9])
@pytest.mark.parametrize("equal", [False, True])
def test_merge_equals_loops(equal, patches, prefix):
    """alike: keys are unit vectors, so that many pairs are exactly equally similar."""
    tokens = torch.randn(4, prefix + patches, 5)
    sizes = torch.randint(1, 5, tokens.shape[:2]).float()
    keys = torch.randn(4, 2, prefix + patches, 3)
    if equal:
        keys = torch.eye(3)[torch.randint(3, (4, prefix + patches))][:, None].expand_as(keys)
    for index in range(1, patches // 2 + 1):
        result, weights = merge(tokens, sizes, keys, count=index, prefix=prefix)
        assert result.shape == (4, prefix + patches - index, 5)
        for item in range(4):
            left, expected = merged_by_loops(
                list(tokens[item]),
                sizes[item].tolist(),
                list(keys[item].transpose(0, 1)),
                index,
                prefix,
            )
            torch.testing.assert_close(result[item], torch.stack(left))
            assert weights[item].tolist() == expected
        without_sizes = merge(tokens, None, keys, count=index, prefix=prefix)
        ones = merge(tokens, torch.ones_like(sizes), keys, count=index, prefix=prefix)
        assert all(map(torch.equal, without_sizes, ones))


def test_merge_of_equal_pairs_takes_the_first():
    tokens = torch.arange(8.0).view(1, 8, 1)
    result, sizes = merge(tokens, None, torch.ones(1, 1, 8, 2), count=3, prefix=0)
    # 0, 2 and 4 go to 1, the first of those that are alike; 6 stays, before the odd ones.
    assert result.flatten().tolist() == [6, (0 + 2 + 4 + 1) / 4, 3, 5, 7]
    assert sizes.flatten().tolist() == [1, 4, 1, 1, 1]


def test_merge_ranks_by_cosine_over_all_heads():
    # Token 0 of the patches against 1 and 3: in the first head it is like 1, over both like 3.
    keys = torch.zeros(1, 2, 4, 2)
    keys[0, :, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys[0, :, 1] = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    keys[0, :, 3] = torch.tensor([[0.1, 0.1], [0.1, 0.1]])
    keys[0, :, 2] = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    tokens = torch.tensor([1.0, 2.0, 3.0, 7.0]).view(1, 4, 1)
    result, _ = merge(tokens, None, keys, count=1, prefix=0)
    assert result.flatten().tolist() == [3, 2, 4]


# The network that merges nothing, and the one that is left as it was


@pytest.mark.parametrize("kind", KINDS)
def test_merging_zero_tokens_is_bit_equal(kind):
    built = network(kind)
    expected = all_logits(built, images())
    for numbers in (0, [0, 0, 0]):
        assert torch.equal(all_logits(with_merging(built, numbers), images()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_network_and_weight_names(kind):
    built = network(kind)
    before, names = all_logits(built, images()), list(built.state_dict())
    merging = with_merging(built, 4)
    assert not torch.allclose(all_logits(merging, images()), before, atol=1e-3)
    assert torch.equal(all_logits(built, images()), before)
    assert list(built.state_dict()) == list(merging.state_dict()) == names
    for parameter, other in zip(built.parameters(), merging.parameters(), strict=True):
        assert parameter is other
    assert not any(module._forward_hooks for module in built.modules())


def test_merging_student_returns_all_heads():
    for kind, tokens in (("distilled", 1), ("two teachers", 2)):
        built = network(kind)
        merging = with_merging(built, 3)
        settings = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
        outputs = Student(merging, **settings).eval()(images())
        features = merging.forward_features((images() - 0.5) / 0.25)
        assert outputs.distillation_logits.shape[1] == tokens
        torch.testing.assert_close(outputs.class_logits, built.head(features[:, 0]))


# Which tokens, and how many


@pytest.mark.parametrize(
    ("kind", "numbers", "expected"),
    [
        ("class token", 4, [13, 9, 5]),
        ("distilled", 4, [14, 10, 6]),
        ("registers", 4, [16, 12, 8]),
        ("class token", 8, [9, 5, 3]),
        ("distilled", (8, 0, 3), [10, 10, 7]),
        ("two teachers", (7, 7, 7), [12, 8, 6]),  # 9 patches, then of 9 four, of 5 two
    ],
)
def test_num_tokens_per_block(kind, numbers, expected):
    merging = with_merging(network(kind), numbers)
    seen = []
    for block in merging.blocks:
        block.mlp.register_forward_pre_hook(lambda layer, given: seen.append(given[0].shape[1]))
    all_logits(merging, images())
    assert num_tokens_per_block(merging) == seen == expected
    assert num_tokens_per_block(network(kind)) == [16 + merging.num_prefix_tokens] * 3


@pytest.mark.parametrize("prefix", [1, 2, 3, 5])
def test_prefix_tokens_never_merge(prefix):
    tokens = torch.randn(2, prefix + 8, 4)
    keys = torch.ones(2, 2, prefix + 8, 3)
    keys[:, :, prefix:] = torch.randn(2, 2, 8, 3)  # the prefix is alike, patches are not
    result, sizes = merge(tokens, None, keys, count=4, prefix=prefix)
    assert torch.equal(result[:, :prefix], tokens[:, :prefix])
    assert (sizes[:, :prefix] == 1).all()
    assert result.shape[1] == prefix + 4
    torch.testing.assert_close(sizes.sum(dim=1), torch.full((2,), prefix + 8.0))
    torch.testing.assert_close((result * sizes[..., None]).sum(dim=1), tokens.sum(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_does_not_depend_on_batch(kind):
    merging = with_merging(network(kind), 4)
    as_batch = all_logits(merging, images(5))
    one_by_one = torch.cat([all_logits(merging, image[None]) for image in images(5)])
    torch.testing.assert_close(as_batch, one_by_one, rtol=1e-4, atol=1e-5)
