"""Blocks with shared weights: counts and outputs by hand, training, saving and exporting."""

import copy
import dataclasses
import json
import re

import onnx
import pytest
import torch
from safetensors.torch import load_file

from deit.config.recipes.handwriting import digits
from deit.config.schema import Config
from deit.config.sections.student import StudentConfig
from deit.config.validation import validate
from deit.core import run_folder
from deit.core.errors import CheckpointError, ConfigError
from deit.deploy.export import split_normalization
from deit.deploy.export_formats import FORMATS
from deit.models.adapt_weights import adapt_weights
from deit.models.attention_rollout import check_attention, token_cosines
from deit.models.cost import cost_of
from deit.models.load_weights import load_weights_from
from deit.models.registry import create_network
from deit.models.saved_student import ModelInfo, load_student, student_from_info, write_student
from deit.models.surgery.pruning_masks import prunable
from deit.models.surgery.weight_sharing import MixedAttention
from deit.models.weight_files import load_weights
from deit.training.optimizer import parameter_groups
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import assert_same_end, stop_and_resume

SMALL = StudentConfig(
    name="deit_micro", image_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=3
)


def sharing(share: int) -> StudentConfig:
    return dataclasses.replace(SMALL, shared_block_size=share)


def network_of(share: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_network(sharing(share), 5)


def facts_of(share: int) -> ModelInfo:
    return ModelInfo(sharing(share), tuple("abcde"), (0.5,) * 3, (0.5,) * 3, 1.0)


def test_shared_weights_are_registered_once():
    """By hand: of four blocks two keep 12 d^2 + 9 d weights of attention and MLP... each."""
    width, heads = 24, 3
    of_layers = 12 * width**2 + (3 + 1 + 4 + 1) * width
    whole, shared = (
        sum(parameter.numel() for parameter in network_of(n).parameters()) for n in (1, 2)
    )
    assert whole - shared == 2 * of_layers - 4 * 2 * heads**2
    names = [name for name in network_of(2).state_dict() if name.startswith("blocks.1.")]
    assert names == [
        *("blocks.1.norm1.weight", "blocks.1.norm1.bias", "blocks.1.attn.before"),
        *("blocks.1.attn.after", "blocks.1.norm2.weight", "blocks.1.norm2.bias"),
    ]
    tiny = StudentConfig(name="deit_tiny", image_size=224, patch_size=16, shared_block_size=2)
    count = sum(parameter.numel() for parameter in create_network(tiny, 1000).parameters())
    assert 3.2e6 < count < 3.3e6  # Mini-DeiT-Ti, 3 M, with a second token and head


def with_copies(shared: torch.nn.Module) -> torch.nn.Module:
    """Return a network without head mixing whose blocks have copies of the shared weights."""
    plain, weights = network_of(1).eval(), dict(shared.state_dict())
    for name in list(plain.state_dict()):
        if name not in weights:
            folder = int(name.split(".")[1])
            weights[name] = weights[name.replace(f"blocks.{folder}.", f"blocks.{folder - 1}.")]
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain


def test_initial_outputs_equal_blocks_with_equal_weights():
    shared = network_of(2).eval()
    plain = with_copies(shared)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected, result = plain.forward_features(images), shared.forward_features(images)
    assert (expected - result).abs().max() < 1e-5


def test_heads_are_mixed_before_and_after_the_softmax():
    """The output for one token by loops, in float64."""
    network = network_of(2).double().eval()
    attention = network.blocks[1].attn
    with torch.no_grad():
        attention.before.normal_()
        attention.after.normal_()
        tokens = torch.randn(1, 6, 24, dtype=torch.float64)
        result = attention(tokens)
        core = network.blocks[0].attn
        queries, keys, values = core.qkv(tokens)[0].view(6, 3, 3, 8).permute(1, 2, 0, 3)
        logits = torch.stack([queries[h] @ keys[h].T / 8**0.5 for h in range(3)])
        mixed = torch.stack(
            [sum(attention.before[g, h] * logits[h] for h in range(3)) for g in range(3)]
        )
        maps = mixed.softmax(dim=-1)
        maps = torch.stack(
            [sum(attention.after[g, h] * maps[h] for h in range(3)) for g in range(3)]
        )
        quantized = torch.cat([maps[h] @ values[h] for h in range(3)], dim=-1)
        expected = core.proj(quantized)
    assert (result[0] - expected).abs().max() < 1e-12


def test_shared_weight_gradient_is_sum_over_uses():
    """Compared with a network whose blocks have copies of the weights."""
    shared = network_of(2).double().eval()
    plain = with_copies(shared).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for network in (shared, plain):
        network(images).square().sum().backward()
    for folder in (0, 2):
        blocks = shared.blocks[folder], plain.blocks[folder], plain.blocks[folder + 1]
        for path in ("attn.qkv", "mlp.fc2"):
            actual, first, second = (item.get_submodule(path).weight.grad for item in blocks)
            assert (actual - first - second).abs().max() < 1e-10


def test_copied_network_shares_within_itself_only():
    network = network_of(2)
    other = copy.deepcopy(network)
    assert len(list(other.parameters())) == len(list(network.parameters()))
    tokens = torch.randn(1, 18, 24)
    for part in ("attn", "mlp"):
        actual, copied = (item.blocks[1].get_submodule(part) for item in (network, other))
        with torch.no_grad():
            before = actual(tokens)
            assert torch.equal(copied(tokens), before)
            for parameter in other.blocks[0].get_submodule(part).parameters():
                parameter.add_(1)
            assert torch.equal(actual(tokens), before)
            assert not torch.equal(copied(tokens), before)


def test_sharing_keeps_macs():
    """The same as without sharing, plus the mixing of heads."""
    costs = [cost_of(network_of(share).eval(), side=16, batch=2) for share in (1, 2)]
    tokens = 18
    mixing = 4 * 2 * 3 * 3 * tokens**2
    assert costs[1].gmacs * 1e9 - costs[0].gmacs * 1e9 == pytest.approx(mixing, rel=1e-3)
    assert costs[1].parameters < 0.6 * costs[0].parameters


def test_prunable_weights_and_decay():
    network = network_of(2)
    assert len(prunable(network)) == 2 * 4
    groups = {group["weight_decay"]: group["params"] for group in parameter_groups(network, 0.05)}
    still = {id(item) for item in groups[0.0]}
    for block in network.blocks:
        assert id(block.attn.before) in still
        assert id(block.attn.after) in still


def test_activation_checkpointing_gradients_are_equal():
    images = torch.randn(2, 3, 16, 16)
    result = []
    for recompute in (False, True):
        network = network_of(2)
        network.set_grad_checkpointing(recompute)
        network.eval()(images).square().sum().backward()
        result.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*result))


def test_attention_of_shared_blocks_raises_and_cosines_work():
    network = network_of(2).eval()
    with raises(ConfigError, type(network).__name__, "student.shared_block_size"):
        check_attention(network)
    assert token_cosines(network, torch.randn(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("student", "names"),
    [
        ({"shared_block_size": 4}, ("student.shared_block_size = 4", "6")),
        (
            {"shared_block_size": 2, "heads_per_block": (2,)},
            ("student.shared_block_size = 2", "student.heads_per_block"),
        ),
        (
            {"name": "small_convnet", "shared_block_size": 2},
            ("student.shared_block_size = 2", "'small_convnet'"),
        ),
    ],
)
def test_invalid_sharing_raises(student, names):
    config = Config().replace(student={"name": "deit_micro", **student}, loss={"kind": "none"})
    with raises(ConfigError, *names):
        validate(config)


def test_sharing_with_fsdp_raises():
    config = digits().replace(student={"shared_block_size": 2}, run={"sharding": "fsdp"})
    with raises(ConfigError, "student.shared_block_size = 2", "run.sharding"):
        validate(config)


# Files


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_export_of_shared_blocks_to_other_libraries_raises(name):
    model_info = facts_of(2)
    with raises(ConfigError, "student.shared_block_size = 2", "format onnx"):
        FORMATS[name].check(student_from_info(model_info), model_info)


@pytest.mark.slow
def test_shared_weights_are_saved_and_exported_once(tmp_path):
    images, bytes_of, parameters = torch.rand(2, 3, 16, 16), {}, {}
    for share in (1, 4):
        torch.manual_seed(0)
        student, folder = student_from_info(facts_of(share)).eval(), tmp_path / str(share)
        folder.mkdir()
        write_student(folder, student.network.state_dict(), facts_of(share))
        copied, _ = load_student(folder)
        bare, normalize = split_normalization(student)
        FORMATS["onnx"].write(folder, bare, facts_of(share))
        result = FORMATS["onnx"].load["onnxruntime"](folder)(normalize(images))
        with torch.no_grad():
            expected = copied.eval()(images).class_logits
        assert (result["class_logits"] - expected).abs().max() < 1e-5
        weights = onnx.load(folder / "model.onnx").graph.initializer
        bytes_of[share] = sum(len(parameter.raw_data) for parameter in weights)
        parameters[share] = sum(parameter.numel() for parameter in student.parameters())
    for share, count in parameters.items():
        assert bytes_of[share] == pytest.approx(4 * count, rel=0.1)
    assert bytes_of[4] < 0.35 * bytes_of[1]


def test_init_from_unshared_student(tmp_path):
    model_info = facts_of(1)
    torch.manual_seed(1)
    write_student(tmp_path, student_from_info(model_info).network.state_dict(), model_info)
    network = network_of(2)
    fitted = adapt_weights(
        load_weights_from(str(tmp_path)), network, model_info.class_names, Config().init
    )
    assert fitted.weights.keys() == network.state_dict().keys()
    before = load_file(tmp_path / "model.safetensors")
    for name, value in fitted.weights.items():
        if name in before:
            assert torch.equal(value, before[name])
        else:
            assert torch.equal(value, torch.eye(3)), name
    assert ["2", "4"] in [re.findall(r"\d+", note) for note in fitted.notes]


# A run


@pytest.mark.slow
def test_shared_run_learns_resumes_bit_equal_and_averages(tmp_path, command_server):
    teacher = tmp_path / "teacher"
    arguments = ("--optim.epochs", "3", "--optim.warmup_epochs", "1", "--out", teacher)
    assert command_server.run("train", "digits-teacher", *arguments, cwd=tmp_path).code == 0
    config = digits().replace(
        data={"train_fraction": 0.2},
        student={
            "depth": 4,
            "embed_dim": 32,
            "num_heads": 2,
            "shared_block_size": 2,
            "drop_path": 0.1,
        },
        teacher={"source": (str(teacher),), "allow_near_chance": True},
        optim={"epochs": 2, "batch_size": 64, "warmup_epochs": 1, "ema_epochs": 0.5},
        run={"linear_backend": "torch"},
    )
    torch.set_num_threads(1)
    train(config, tmp_path / "uninterrupted")
    stop_and_resume(config, tmp_path / "run", "step:3:term")
    assert_same_end(tmp_path / "run", tmp_path / "uninterrupted")
    weights = load_file(
        run_folder.latest_checkpoint(tmp_path / "uninterrupted") / "model.safetensors"
    )
    moved = [
        name
        for name, item in weights.items()
        if name.endswith((".before", ".after")) and not torch.equal(item, torch.eye(2))
    ]
    assert len(moved) == 2 * 4
    student, _ = load_student(tmp_path / "uninterrupted" / "best")
    assert isinstance(student.network.blocks[3].attn, MixedAttention)
    done = command_server.run(
        "evaluate", tmp_path / "uninterrupted", "--json", tmp_path / "e.json", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "e.json").read_text())["cost"]["parameters"] == sum(
        item.numel() for item in weights.values()
    )


def test_structured_pruning_of_shared_blocks_raises(tmp_path, command_server):
    arguments = ("--loss", "none", "--student.shared_block_size", "2", "--optim.epochs", "2")
    arguments = (
        *arguments,
        "--optim.warmup_epochs",
        "1",
        "--data.train_fraction",
        "0.2",
        "--out",
        "run",
    )
    assert command_server.run("train", "digits", *arguments, cwd=tmp_path).code == 0
    done = command_server.run("prune", "run", "--out", "out", cwd=tmp_path)
    assert done.code == 2
    assert "run: student.shared_block_size = 2" in done.err


def test_weights_of_other_sharing_raise_with_names(tmp_path):
    model_info = facts_of(2)
    write_student(tmp_path, student_from_info(model_info).network.state_dict(), model_info)
    fitted = adapt_weights(
        load_weights_from(str(tmp_path)), network_of(1), model_info.class_names, Config().init
    )
    with raises(CheckpointError, "x:", "blocks.1.attn.qkv.weight"):
        load_weights(network_of(1), fitted.weights, origin="x")
