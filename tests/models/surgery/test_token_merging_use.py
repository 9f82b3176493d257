"""Token merging in use: cost, precision, evaluation, and errors."""

import json
import re

import pytest
import timm
import torch
from PIL import Image
from timm.layers import Attention

from deit.cli import run_command
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.sections.student import StudentConfig
from deit.core.errors import ConfigError
from deit.evaluation.evaluate import evaluate
from deit.models.attention_rollout import token_cosines
from deit.models.cost import cost_of
from deit.models.onednn_linear import OneDNNLinear, available, use_onednn
from deit.models.registry import create_network
from deit.models.surgery.token_merging import (
    attend,
    check_merging,
    merge,
    with_merging,
)
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.merging import SHAPE, images, network


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


# Proportional attention


@pytest.mark.parametrize("fused", [True, False])
def test_attend_weights_token_by_size(fused):
    attention = Attention(12, num_heads=3, qkv_bias=True).eval()
    attention.fused_attn = fused
    multiple = torch.randn(2, 6, 12)
    multiple[:, 3:] = multiple[:, 3:4]
    expected, keys = attend(attention, multiple, None)
    assert torch.equal(expected, attention(multiple))
    sizes = torch.tensor([1.0, 1.0, 1.0, 3.0]).expand(2, -1)
    result, fewer = attend(attention, multiple[:, :4], sizes)
    torch.testing.assert_close(result, expected[:, :4])
    torch.testing.assert_close(fewer, keys[:, :, :4])
    unweighted, _ = attend(attention, multiple[:, :4], None)
    assert not torch.allclose(unweighted, result, atol=1e-4)
    assert not attention.k_norm._forward_hooks


@pytest.mark.parametrize("kind", ["distilled", "class token", "layer scale", "normalized keys"])
def test_merging_equal_patches_changes_nothing(kind):
    """For an image of one color without positions, all patches are equal in every block."""
    built = network(kind)
    built.pos_embed[:, built.num_prefix_tokens :] = 0
    plain = torch.rand(2, 3, 1, 1).expand(2, 3, 16, 16)
    for count in (3, 8):
        result = with_merging(built, count)(plain)
        torch.testing.assert_close(result, built(plain), rtol=1e-4, atol=1e-4)


# Other ways of computing


@pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")
def test_merging_with_onednn_matches():
    built = network("pruned")
    expected = with_merging(built, 4)(images())
    merging = with_merging(built, 4)
    use_onednn(merging)
    assert type(merging.blocks[0].attn.qkv) is OneDNNLinear
    torch.testing.assert_close(merging(images()), expected, rtol=1e-4, atol=1e-4)


def test_merge_in_half_precision_keeps_sizes_exact_and_dtype():
    tokens = torch.randn(1, 9, 4).bfloat16()
    sizes = torch.tensor([[1.0, 300.0, 301.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    keys = torch.ones(1, 1, 9, 2).bfloat16()
    result, sums = merge(tokens, sizes, keys, count=1, prefix=1)
    assert result.dtype == torch.bfloat16
    assert 601 in sums.tolist()[0]
    built = network()
    expected = with_merging(built, 2)(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert with_merging(built, 0)(images()).equal(built(images()))
        result = with_merging(built, 2)(images())
    assert torch.cosine_similarity(result.float(), expected).min() > 0.95


def test_merge_under_autocast_ranks_in_float32():
    """Two cosines that are equal in bfloat16."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.0, 1.0]]).view(1, 1, 4, 2)
    tokens = torch.arange(4.0).view(1, 4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = merge(tokens, None, keys, count=1, prefix=0)
    assert result.flatten().tolist() == [0, 1, 2.5]


def test_cost_counts_remaining_tokens():
    built = network("distilled")
    width = 48
    macs = 16 * 3 * 16 * width + 2 * width * 6
    for before, after in ((18, 14), (14, 10), (10, 6)):
        macs += 4 * before * width**2 + 2 * before**2 * width + 8 * after * width**2
        macs += ((before - 2) // 2) ** 2 * width / 3  # cosines
    cost = cost_of(with_merging(built, 4), side=16, batch=2)
    assert cost.gmacs * 1e9 == pytest.approx(macs, rel=1e-6)
    assert cost.parameters == sum(parameter.numel() for parameter in built.parameters())


def test_token_cosines_of_merging_network():
    built = network("distilled")
    merging = with_merging(built, 4)
    expected, seen = [], []
    for block in merging.blocks:
        block.norm1.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    seen.append(merging.forward_features(images()))
    expected = [torch.cosine_similarity(item[:, 0], item[:, 1]) for item in seen]
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


def small_vit(**section):
    shape = {"image_size": 16, "patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 3}
    return create_network(StudentConfig(name="deit_tiny", **shape, **section), 6)


REFUSED = {
    "a convnet": (
        lambda: create_network(StudentConfig(name="small_convnet"), 4),
        1,
        ("merge_tokens", "SmallConvNet"),
    ),
    "a pool": (pooled, 1, ("merge_tokens", "avg")),
    "other blocks": (parallel, 1, ("merge_tokens", "VisionTransformer ", "deit_*")),
    "other attention": (differential, 1, ("merge_tokens", "VisionTransformer ", "deit_*")),
    "merged before": (
        lambda: with_merging(network(), 1),
        1,
        ("merge_tokens", "VisionTransformerDistilled", "deit_*"),
    ),
    "adapters": (lambda: small_vit(adapters="convpass"), 1, ("merge_tokens", "student.adapters")),
    "shared blocks": (
        lambda: small_vit(shared_block_size=3),
        1,
        ("merge_tokens", "student.shared_block_size"),
    ),
    "negative": (network, -1, ("merge_tokens = -1", "8", "16")),
    "too many": (network, 9, ("merge_tokens = 9", "8", "16")),
    "one too many": (network, [0, 9, 0], ("merge_tokens = 9", "8", "16")),
    "too few numbers": (network, [1, 2], ("merge_tokens = 1,2", "3")),
}
"""What cannot be merged, by how many, and what the error names."""


@pytest.mark.parametrize("what", REFUSED)
def test_unsupported_network_raises(what):
    build, numbers, names = REFUSED[what]
    for refuse in (check_merging, with_merging):
        with raises(ConfigError, *names) as caught:
            refuse(build(), numbers)
        assert "\n" not in str(caught.value)


def test_network_with_grad_checkpointing_merges():
    """timm's checkpointing would recompute blocks one by one, without token sizes."""
    plain, again = network().eval(), network().eval()
    again.set_grad_checkpointing(True)
    expected = with_merging(plain, 2)(images())
    assert torch.equal(with_merging(again, 2)(images()), expected)


def test_merging_in_training_mode_raises():
    for merging in (with_merging(network().train(), 2), with_merging(network(), 2).train()):
        with raises(ConfigError, "eval()"):
            merging(images())
        assert merging.eval()(images()).shape == (3, 6)


# From the command line


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a student of two blocks and of its teacher, a ConvNet."""
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


def test_several_merge_counts_make_one_table(runs, tmp_path, capsys):
    arguments = [str(runs / "student"), "--merge-tokens", "0,2,8", "--teacher", "none"]
    arguments += ["--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "f.json")]
    assert run_command("evaluate", arguments, "evaluate") == 0
    output = capsys.readouterr().out
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert list(rows) == ["student, merge 0", "student, merge 2", "student, merge 8"]
    assert all(name in output for name in rows)
    assert [row["merge"] for row in rows.values()] == [0, 2, 8]
    assert [row["tokens"] for row in rows.values()] == [[18, 18], [16, 14], [10, 6]]
    plain = evaluate(runs / "student", cost=True, teacher="none").metrics
    assert "merge" not in plain
    none, two, eight = rows.values()
    assert none["heads"] == plain["heads"]
    assert none["cost"]["gmacs"] == pytest.approx(plain["cost"]["gmacs"], rel=1e-9)
    assert eight["cost"]["gmacs"] < two["cost"]["gmacs"] < none["cost"]["gmacs"]
    assert eight["heads"] != none["heads"]
    assert (
        two["heads"] == evaluate(runs / "student", merge_tokens=2, teacher="none").metrics["heads"]
    )
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 500


def test_single_merge_count_is_in_title(command_server, runs, tmp_path):
    arguments = (runs / "student", "--merge-tokens", "4", "--json", tmp_path / "f.json")
    done = command_server.run(*arguments, script="evaluate_deit.py")
    assert done.code == 0, done.err
    assert re.search(r"\b8 px\b.*\b4 tokens\b", " ".join(done.out.split()))
    assert "14, 10" in done.out
    result = json.loads((tmp_path / "f.json").read_text())
    assert (result["merge"], result["tokens"]) == (4, [14, 10])
    assert len(result["token_cosine"]) == 3


def test_higher_resolution_allows_more_merging(runs, tmp_path):
    arguments = [
        str(runs / "student"),
        "--resolution",
        "16",
        "--merge-tokens",
        "9,32",
        "--teacher",
        "none",
    ]
    assert (
        run_command("evaluate", [*arguments, "--json", str(tmp_path / "f.json")], "evaluate") == 0
    )
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["tokens"] for row in rows.values()] == [[57, 48], [34, 18]]
    assert list(rows) == ["student, 16 px, merge 9", "student, 16 px, merge 32"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--merge-tokens", "-1"), ["--merge-tokens -1"]),
        (("--merge-tokens", "2,x"), ["--merge-tokens 2,x"]),
        (("--merge-tokens", "2,2"), ["--merge-tokens 2,2"]),
        (("--merge-tokens", "9"), ["--merge-tokens 9", "8", "16"]),
        (("--merge-tokens", "0,9"), ["--merge-tokens 9", "8", "16"]),
        (("--merge-tokens", "9", "--resolution", "16,8"), ["--merge-tokens 9", "8", "16"]),
    ],
)
def test_invalid_merge_counts_raise_in_one_line(arguments, names, runs, capsys):
    first, *rest = arguments
    arguments = [f"{first}={rest[0]}", *rest[1:]]
    assert run_command("evaluate", [str(runs / "student"), *arguments], "evaluate") == 2
    output = capsys.readouterr()
    assert all(name in output.err for name in names), output.err
    assert len(output.err.strip().splitlines()) == 1
    assert output.out == ""


@pytest.mark.parametrize("numbers", ["0", "0,1"])
def test_merging_of_convnet_run_raises_immediately(numbers, runs, capsys):
    arguments = [str(runs / "student"), str(runs / "teacher"), "--merge-tokens", numbers]
    for requested in (arguments, arguments[1:]):
        assert run_command("evaluate", requested, "evaluate") == 2
        output = capsys.readouterr()
        assert "merge_tokens: SmallConvNet" in output.err
        assert output.out == ""
