"""Token merging: against loops, by its properties, and from the command line."""

import json
import re

import pytest
import timm
import torch
from PIL import Image
from timm.layers import Attention
from torch import nn

from deit.cli import run_command
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.student_section import StudentConfig
from deit.core.errors import ConfigError
from deit.evaluation.evaluate import evaluate
from deit.models.attention import token_cosines
from deit.models.cost import cost_of
from deit.models.networks import create_network
from deit.models.onednn_linear import OneDNNLinear, available, use_onednn
from deit.models.student import Student
from deit.models.surgery.token_merging import (
    attend,
    check_merging,
    merge,
    token_numbers,
    with_merging,
)
from deit.training.train import train
from tests.helpers.errors import raises

SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
OURS = {
    "distilled": {"name": "deit_micro"},
    "class token": {"name": "vit_micro", "drop_path": 0.3, "dropout": 0.2},
    "two teachers": {"name": "deit_micro", "num_distillation_tokens": 2},
    "pruned": {
        "name": "deit_micro",
        "heads_per_block": (1, 3, 2),
        "mlp_hidden_per_block": (5, 40, 17),
    },
}
TIMM = {
    "layer scale": {"init_values": 0.5},
    "normalised keys": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "registers": {"reg_tokens": 3, "no_embed_class": True, "pre_norm": True},
    "no biases": {"qkv_bias": False, "drop_path_rate": 0.3},
}
KINDS = (*OURS, *TIMM, "not fused")


def network(kind="distilled"):
    """Sixteen patches, three blocks, six classes; weights large enough for tokens to differ."""
    torch.manual_seed(0)
    if kind in OURS:
        section = {"image_size": 16, "patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 3}
        built = create_network(StudentConfig(**section, **OURS[kind]), 6)
    else:
        built = timm.create_model(
            "vit_tiny_patch16_224", num_classes=6, **SHAPE, **TIMM.get(kind, {})
        )
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.3)
    for block in built.blocks if kind == "not fused" else ():
        block.attn.fused_attn = False
    return built.eval()


def images(number=3, side=16):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(number, 3, side, side, generator=generator)


def answers(built, batch):
    """What all heads say, [batch, heads * classes]: timm's own forward knows two at most."""
    outputs = Student(built, mean=(0.5,) * 3, std=(0.25,) * 3).eval()(batch)
    return torch.cat([head.flatten(1) for head in outputs if head is not None], dim=1)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


# The same by loops


def merged_by_loops(tokens, sizes, keys, number, prefix):
    """One image: lists of vectors, of sizes and of keys [heads, channels]; what is left of both."""
    places = range(prefix, len(tokens))
    even = [place for place in places if place % 2 == 0]
    odd = [place for place in places if place % 2 == 1]
    mean = [sum(heads) / len(heads) for heads in keys]
    edges = []
    for place in even:
        cosines = [float(torch.cosine_similarity(mean[place], mean[other], dim=0)) for other in odd]
        best = max(cosines)
        edges.append((-round(best, 6), place, odd[cosines.index(best)]))
    pairs = {place: other for _, place, other in sorted(edges)[:number]}
    weight = {other: sizes[other] for other in odd}
    total = {other: tokens[other] * sizes[other] for other in odd}
    for place, other in pairs.items():
        weight[other] += sizes[place]
        total[other] = total[other] + tokens[place] * sizes[place]
    kept = [*range(prefix), *(place for place in even if place not in pairs)]
    left = [tokens[place] for place in kept] + [total[other] / weight[other] for other in odd]
    return left, [sizes[place] for place in kept] + [weight[other] for other in odd]


def attended_by_loops(attention, tokens, sizes):
    """One image, [tokens, width]: every key counts as often as its size says; and the keys."""
    heads, width = attention.num_heads, attention.head_dim
    queries, keys, values = attention.qkv(tokens).unflatten(1, (3, heads, width)).unbind(1)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    said = []
    for query in queries:
        parts = []
        for head in range(heads):
            logits = (keys[:, head] @ query[head]) * width**-0.5
            shares = torch.tensor(sizes, dtype=tokens.dtype) * (logits - logits.max()).exp()
            parts.append(shares @ values[:, head] / shares.sum())
        said.append(torch.cat(parts))
    return attention.proj(attention.norm(torch.stack(said))), keys


def tokens_by_loops(built, image, numbers):
    """The tokens of one image after all blocks and the last norm, and their sizes."""
    tokens = built.norm_pre(built._pos_embed(built.patch_embed(image[None])))[0]
    sizes = [1.0] * len(tokens)
    for block, number in zip(built.blocks, numbers, strict=True):
        attended, keys = attended_by_loops(block.attn, block.norm1(tokens), sizes)
        tokens = tokens + block.ls1(attended)
        number = min(number, (len(tokens) - built.num_prefix_tokens) // 2)
        if number:
            left, sizes = merged_by_loops(
                list(tokens), sizes, list(keys), number, built.num_prefix_tokens
            )
            tokens = torch.stack(left)
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return built.norm(tokens), sizes


@pytest.mark.parametrize("numbers", [(3, 3, 3), (8, 8, 8), (0, 5, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_what_loops_say(kind, numbers):
    built = network(kind).double()
    merging = with_merging(built, numbers)
    found = merging.forward_features(images().double())
    for image, tokens in zip(images().double(), found, strict=True):
        expected, sizes = tokens_by_loops(built, image, numbers)
        assert sum(sizes) == 16 + built.num_prefix_tokens
        torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
@pytest.mark.parametrize("patches", [2, 3, 8, 9])
@pytest.mark.parametrize("alike", [False, True])
def test_merging_is_what_loops_say(alike, patches, prefix):
    """alike: keys are unit vectors, so that many pairs are as similar to the bit."""
    tokens = torch.randn(4, prefix + patches, 5)
    sizes = torch.randint(1, 5, tokens.shape[:2]).float()
    keys = torch.randn(4, 2, prefix + patches, 3)
    if alike:
        keys = torch.eye(3)[torch.randint(3, (4, prefix + patches))][:, None].expand_as(keys)
    for number in range(1, patches // 2 + 1):
        found, weights = merge(tokens, sizes, keys, number=number, prefix=prefix)
        assert found.shape == (4, prefix + patches - number, 5)
        for one in range(4):
            left, expected = merged_by_loops(
                list(tokens[one]),
                sizes[one].tolist(),
                list(keys[one].transpose(0, 1)),
                number,
                prefix,
            )
            torch.testing.assert_close(found[one], torch.stack(left))
            assert weights[one].tolist() == expected
        alone = merge(tokens, None, keys, number=number, prefix=prefix)
        ones = merge(tokens, torch.ones_like(sizes), keys, number=number, prefix=prefix)
        assert all(map(torch.equal, alone, ones))


def test_of_equally_similar_pairs_the_first_merge_each_time():
    tokens = torch.arange(8.0).view(1, 8, 1)
    found, sizes = merge(tokens, None, torch.ones(1, 1, 8, 2), number=3, prefix=0)
    # 0, 2 and 4 go to 1, the first of those that are alike; 6 stays, before the odd ones.
    assert found.flatten().tolist() == [6, (0 + 2 + 4 + 1) / 4, 3, 5, 7]
    assert sizes.flatten().tolist() == [1, 4, 1, 1, 1]


def test_a_cosine_not_a_product_and_of_all_heads_tells_who_is_similar():
    # Token 0 of the patches against 1 and 3: in the first head it is like 1, over both like 3.
    keys = torch.zeros(1, 2, 4, 2)
    keys[0, :, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys[0, :, 1] = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    keys[0, :, 3] = torch.tensor([[0.1, 0.1], [0.1, 0.1]])
    keys[0, :, 2] = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    tokens = torch.tensor([1.0, 2.0, 3.0, 7.0]).view(1, 4, 1)
    found, _ = merge(tokens, None, keys, number=1, prefix=0)
    assert found.flatten().tolist() == [3, 2, 4]


# The network that merges nothing, and the one that is left as it was


@pytest.mark.parametrize("kind", KINDS)
def test_no_merging_is_the_network_to_the_bit(kind):
    built = network(kind)
    expected = answers(built, images())
    for numbers in (0, [0, 0, 0]):
        assert torch.equal(answers(with_merging(built, numbers), images()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_and_the_names_of_its_weights_stay(kind):
    built = network(kind)
    before, names = answers(built, images()), list(built.state_dict())
    merging = with_merging(built, 4)
    assert not torch.allclose(answers(merging, images()), before, atol=1e-3)
    assert torch.equal(answers(built, images()), before)
    assert list(built.state_dict()) == list(merging.state_dict()) == names
    for one, other in zip(built.parameters(), merging.parameters(), strict=True):
        assert one is other
    assert not any(module._forward_hooks for module in built.modules())


def test_a_student_answers_with_all_its_heads():
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
def test_tokens_are_counted(kind, numbers, expected):
    merging = with_merging(network(kind), numbers)
    seen = []
    for block in merging.blocks:
        block.mlp.register_forward_pre_hook(lambda layer, given: seen.append(given[0].shape[1]))
    answers(merging, images())
    assert token_numbers(merging) == seen == expected
    assert token_numbers(network(kind)) == [16 + merging.num_prefix_tokens] * 3


@pytest.mark.parametrize("prefix", [1, 2, 3, 5])
def test_tokens_of_the_prefix_never_merge_however_alike(prefix):
    tokens = torch.randn(2, prefix + 8, 4)
    keys = torch.ones(2, 2, prefix + 8, 3)
    keys[:, :, prefix:] = torch.randn(2, 2, 8, 3)  # the prefix is alike, patches are not
    found, sizes = merge(tokens, None, keys, number=4, prefix=prefix)
    assert torch.equal(found[:, :prefix], tokens[:, :prefix])
    assert (sizes[:, :prefix] == 1).all()
    assert found.shape[1] == prefix + 4
    torch.testing.assert_close(sizes.sum(dim=1), torch.full((2,), prefix + 8.0))
    torch.testing.assert_close((found * sizes[..., None]).sum(dim=1), tokens.sum(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_merged_alike_alone_and_among_others(kind):
    merging = with_merging(network(kind), 4)
    together = answers(merging, images(5))
    alone = torch.cat([answers(merging, image[None]) for image in images(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# Proportional attention


@pytest.mark.parametrize("fused", [True, False])
def test_equal_tokens_are_heard_as_one_of_their_number(fused):
    attention = Attention(12, num_heads=3, qkv_bias=True).eval()
    attention.fused_attn = fused
    several = torch.randn(2, 6, 12)
    several[:, 3:] = several[:, 3:4]
    expected, keys = attend(attention, several, None)
    assert torch.equal(expected, attention(several))
    sizes = torch.tensor([1.0, 1.0, 1.0, 3.0]).expand(2, -1)
    found, fewer = attend(attention, several[:, :4], sizes)
    torch.testing.assert_close(found, expected[:, :4])
    torch.testing.assert_close(fewer, keys[:, :, :4])
    unweighted, _ = attend(attention, several[:, :4], None)
    assert not torch.allclose(unweighted, found, atol=1e-4)
    assert not attention.k_norm._forward_hooks


@pytest.mark.parametrize("kind", ["distilled", "class token", "layer scale", "normalised keys"])
def test_merging_equal_patches_changes_nothing(kind):
    """An image of one colour, patches without positions: all are the same token in every block."""
    built = network(kind)
    built.pos_embed[:, built.num_prefix_tokens :] = 0
    plain = torch.rand(2, 3, 1, 1).expand(2, 3, 16, 16)
    for number in (3, 8):
        found = with_merging(built, number)(plain)
        torch.testing.assert_close(found, built(plain), rtol=1e-4, atol=1e-4)


# Other ways of computing


@pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")
def test_layers_of_onednn_merge_the_same():
    built = network("pruned")
    expected = with_merging(built, 4)(images())
    merging = with_merging(built, 4)
    use_onednn(merging)
    assert type(merging.blocks[0].attn.qkv) is OneDNNLinear
    torch.testing.assert_close(merging(images()), expected, rtol=1e-4, atol=1e-4)


def test_half_the_precision_keeps_sizes_whole_and_the_tokens_their_type():
    tokens = torch.randn(1, 9, 4).bfloat16()
    sizes = torch.tensor([[1.0, 300.0, 301.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    keys = torch.ones(1, 1, 9, 2).bfloat16()
    found, sums = merge(tokens, sizes, keys, number=1, prefix=1)
    assert found.dtype == torch.bfloat16
    assert 601 in sums.tolist()[0]
    built = network()
    expected = with_merging(built, 2)(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert with_merging(built, 0)(images()).equal(built(images()))
        found = with_merging(built, 2)(images())
    assert torch.cosine_similarity(found.float(), expected).min() > 0.95


def test_in_autocast_pairs_are_ranked_in_full_precision():
    """Two cosines that are one in bfloat16."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.0, 1.0]]).view(1, 1, 4, 2)
    tokens = torch.arange(4.0).view(1, 4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = merge(tokens, None, keys, number=1, prefix=0)
    assert found.flatten().tolist() == [0, 1, 2.5]


def test_costs_are_those_of_the_tokens_that_are_left():
    built = network("distilled")
    width = 48
    macs = 16 * 3 * 16 * width + 2 * width * 6
    for before, after in ((18, 14), (14, 10), (10, 6)):
        macs += 4 * before * width**2 + 2 * before**2 * width + 8 * after * width**2
        macs += ((before - 2) // 2) ** 2 * width / 3  # cosines
    cost = cost_of(with_merging(built, 4), side=16, batch=2)
    assert cost.gmacs * 1e9 == pytest.approx(macs, rel=1e-6)
    assert cost.parameters == sum(one.numel() for one in built.parameters())


def test_tokens_over_depth_are_those_of_the_merged_network():
    built = network("distilled")
    merging = with_merging(built, 4)
    expected, seen = [], []
    for block in merging.blocks:
        block.norm1.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    seen.append(merging.forward_features(images()))
    expected = [torch.cosine_similarity(one[:, 0], one[:, 1]) for one in seen]
    torch.testing.assert_close(token_cosines(merging, images()), torch.stack(expected, dim=1))


# What cannot be


def pooled():
    return timm.create_model("vit_tiny_patch16_224", global_pool="avg", **SHAPE)


def parallel():
    return timm.create_model(
        "vit_tiny_patch16_224",
        **SHAPE,
        block_fn=timm.models.vision_transformer.ParallelScalingBlock,
    )


def differential():
    return timm.create_model("vit_tiny_patch16_224", **SHAPE, attn_layer="diff")


def ours(**section):
    shape = {"image_size": 16, "patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 3}
    return create_network(StudentConfig(name="deit_tiny", **shape, **section), 6)


REFUSED = {
    "a convnet": (
        lambda: create_network(StudentConfig(name="small_convnet"), 4),
        1,
        ("--merge-tokens", "SmallConvNet"),
    ),
    "a pool": (pooled, 1, ("--merge-tokens", "avg")),
    "other blocks": (parallel, 1, ("--merge-tokens", "VisionTransformer ", "deit_*")),
    "other attention": (differential, 1, ("--merge-tokens", "VisionTransformer ", "deit_*")),
    "merged before": (
        lambda: with_merging(network(), 1),
        1,
        ("--merge-tokens", "VisionTransformerDistilled", "deit_*"),
    ),
    "adapters": (lambda: ours(adapters="convpass"), 1, ("--merge-tokens", "student.adapters")),
    "shared blocks": (
        lambda: ours(shared_block_size=3),
        1,
        ("--merge-tokens", "student.shared_block_size"),
    ),
    "negative": (network, -1, ("--merge-tokens -1", "8", "16")),
    "too many": (network, 9, ("--merge-tokens 9", "8", "16")),
    "one too many": (network, [0, 9, 0], ("--merge-tokens 9", "8", "16")),
    "too few numbers": (network, [1, 2], ((1, 2), "3")),
}
"""What cannot be merged, by how many, and what the error names."""


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_merged_is_refused(what):
    build, numbers, names = REFUSED[what]
    for refuse in (check_merging, with_merging):
        with raises(ConfigError, *names) as caught:
            refuse(build(), numbers)
        assert "\n" not in str(caught.value)


def test_a_network_that_would_be_computed_again_in_training_merges():
    """timm's blocks are computed again one by one, without what merging hands on."""
    plain, again = network().eval(), network().eval()
    again.set_grad_checkpointing(True)
    expected = with_merging(plain, 2)(images())
    assert torch.equal(with_merging(again, 2)(images()), expected)


def test_training_is_refused():
    for merging in (with_merging(network().train(), 2), with_merging(network(), 2).train()):
        with raises(ConfigError, "eval()"):
            merging(images())
        assert merging.eval()(images()).shape == (3, 6)


# From the command line


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A student of two blocks and its teacher, which is no ViT."""
    folder = tmp_path_factory.mktemp("runs")
    with torch.enable_grad():
        train(digits_teacher().replace(optim={"epochs": 3}), folder / "teacher")
        config = digits().replace(
            student={"depth": 2, "embed_dim": 32, "num_heads": 2},
            teacher={"source": (str(folder / "teacher"),)},
            optim={"epochs": 3, "batch_size": 64, "warmup_epochs": 1, "lr": 3e-3},
        )
        train(config, folder / "student")
    return folder


def test_several_numbers_make_one_table(runs, tmp_path, capsys):
    words = [str(runs / "student"), "--merge-tokens", "0,2,8", "--teacher", "none"]
    words += ["--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "f.json")]
    assert run_command("evaluate", words, "evaluate") == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert list(rows) == ["student, merge 0", "student, merge 2", "student, merge 8"]
    assert all(name in said for name in rows)
    assert [row["merge"] for row in rows.values()] == [0, 2, 8]
    assert [row["tokens"] for row in rows.values()] == [[18, 18], [16, 14], [10, 6]]
    plain = evaluate(runs / "student", cost=True, teacher="none")
    assert "merge" not in plain
    none, two, eight = rows.values()
    assert none["heads"] == plain["heads"]
    assert none["cost"]["gmacs"] == pytest.approx(plain["cost"]["gmacs"], rel=1e-9)
    assert eight["cost"]["gmacs"] < two["cost"]["gmacs"] < none["cost"]["gmacs"]
    assert eight["heads"] != none["heads"]
    assert two["heads"] == evaluate(runs / "student", merge_tokens=2, teacher="none")["heads"]
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 500


def test_a_single_number_is_said_in_the_title(zygote, runs, tmp_path):
    words = (runs / "student", "--merge-tokens", "4", "--json", tmp_path / "f.json")
    done = zygote.run(*words, script="evaluate_deit.py")
    assert done.code == 0, done.err
    assert re.search(r"\b8 px\b.*\b4 tokens\b", " ".join(done.out.split()))
    assert "14, 10" in done.out
    found = json.loads((tmp_path / "f.json").read_text())
    assert (found["merge"], found["tokens"]) == (4, [14, 10])
    assert len(found["token_cosine"]) == 3


def test_more_patches_at_another_resolution_let_more_merge(runs, tmp_path):
    words = [
        str(runs / "student"),
        "--resolution",
        "16",
        "--merge-tokens",
        "9,32",
        "--teacher",
        "none",
    ]
    assert run_command("evaluate", [*words, "--json", str(tmp_path / "f.json")], "evaluate") == 0
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["tokens"] for row in rows.values()] == [[57, 48], [34, 18]]
    assert list(rows) == ["student, 16 px, merge 9", "student, 16 px, merge 32"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--merge-tokens", "-1"), ["--merge-tokens -1"]),
        (("--merge-tokens", "2,x"), ["--merge-tokens 2,x"]),
        (("--merge-tokens", "2,2"), ["--merge-tokens 2,2"]),
        (("--merge-tokens", "9"), ["--merge-tokens 9", "8", "16"]),
        (("--merge-tokens", "0,9"), ["--merge-tokens 9", "8", "16"]),
        (("--merge-tokens", "9", "--resolution", "16,8"), ["--merge-tokens 9", "8", "16"]),
    ],
)
def test_bad_numbers_are_one_line_before_the_work(words, names, runs, capsys):
    first, *rest = words
    words = [f"{first}={rest[0]}", *rest[1:]]
    assert run_command("evaluate", [str(runs / "student"), *words], "evaluate") == 2
    said = capsys.readouterr()
    assert all(name in said.err for name in names), said.err
    assert len(said.err.strip().splitlines()) == 1
    assert said.out == ""


@pytest.mark.parametrize("numbers", ["0", "0,1"])
def test_a_run_that_is_no_vit_is_refused_at_once(numbers, runs, capsys):
    words = [str(runs / "student"), str(runs / "teacher"), "--merge-tokens", numbers]
    for asked in (words, words[1:]):
        assert run_command("evaluate", asked, "evaluate") == 2
        said = capsys.readouterr()
        assert "--merge-tokens: SmallConvNet" in said.err
        assert said.out == ""
