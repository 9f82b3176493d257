"""Networks, students and weight files against timm and safetensors."""

import dataclasses
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from deit.config.sections.student import SIZES, STUDENTS, StudentConfig
from deit.core.errors import CheckpointError, ConfigError
from deit.core.types import logits_by_head
from deit.models.metadata import ModelInfo, find_saved_model
from deit.models.registry import NETWORKS, create_network
from deit.models.registry import SIZES as SHAPES
from deit.models.saved_student import load_student, student_from_info, write_student
from deit.models.student import Student, has_distillation_head
from deit.models.weight_files import load_weights, read_weights
from tests.helpers.errors import raises

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
MICRO = StudentConfig(name="deit_micro", image_size=16, patch_size=4, embed_dim=24, depth=2)


def model_info(student=MICRO, classes=("a", "b", "c")):
    return ModelInfo(student, classes, MEAN, STD, 1.0)


def test_networks_match_configured_names():
    assert set(STUDENTS) == set(NETWORKS)
    assert set(SIZES) == set(SHAPES)


@pytest.mark.parametrize("name", STUDENTS)
def test_network_returns_logits_of_its_heads(name):
    student = StudentConfig(name=name, image_size=32, patch_size=16)
    network = create_network(student, 7)
    outputs = Student(network, mean=MEAN, std=STD)(torch.rand(2, 3, 32, 32))
    assert outputs.class_logits.shape == (2, 7)
    assert has_distillation_head(network) is student.has_distillation_token
    assert (outputs.distillation_logits is not None) is student.has_distillation_token


def test_mean_of_heads_equals_timm_output():
    reference = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=3,
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
    ).eval()
    student = student_from_info(model_info()).eval()
    load_weights(student.network, reference.state_dict(), origin="timm")
    images = torch.rand(5, 3, 16, 16)
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        outputs = student(images)
        expected = reference((images - mean) / std)
        reference.train()
        reference.set_distilled_training(True)
        class_logits, distillation_logits = reference((images - mean) / std)
    assert torch.allclose(logits_by_head(outputs)["fused"], expected, atol=1e-6)
    assert torch.allclose(outputs.class_logits, class_logits, atol=1e-6)
    assert torch.allclose(outputs.distillation_logits[:, 0], distillation_logits, atol=1e-6)


def test_output_type_is_equal_in_training_and_evaluation():
    student = student_from_info(model_info())
    images = torch.rand(2, 3, 16, 16)
    trained, evaluated = student.train()(images), student.eval()(images)
    assert torch.allclose(trained.class_logits, evaluated.class_logits, atol=1e-6)
    assert torch.allclose(trained.distillation_logits, evaluated.distillation_logits, atol=1e-6)


def test_parameter_names_equal_timm():
    names = student_from_info(model_info()).network.state_dict().keys()
    reference = timm.create_model("deit_tiny_distilled_patch16_224", depth=2)
    assert set(names) == set(reference.state_dict())


@pytest.mark.parametrize("name", ["deit_micro", "vit_micro"])
@pytest.mark.parametrize("weight_init", ["timm", "scaled"])
def test_initialization_sets_every_parameter(name, weight_init, monkeypatch):
    # Every tensor starts as NaN: a parameter that is not initialized stays NaN.
    empty = torch.empty

    def poisoned(*size, **settings):
        tensor = empty(*size, **settings)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    network = create_network(StudentConfig(name=name, weight_init=weight_init), 5)
    monkeypatch.undo()
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_scaled_initialization_preserves_variance_of_narrow_layers():
    network = create_network(StudentConfig(name="deit_micro", weight_init="scaled"), 10)
    tokens = torch.randn(4096, 96)
    projected = network.blocks[0].mlp.fc1(tokens)
    assert 0.6 < projected.var() < 1.1  # a normal cut at two deviations keeps 0.77
    assert network.pos_embed.std().item() == pytest.approx(0.5, rel=0.05)
    plain = create_network(StudentConfig(name="deit_micro"), 10)
    assert plain.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


def test_regnety_small_stem_keeps_image_size():
    network = create_network(StudentConfig(name="regnety_002_small_stem"), 10)
    assert network.stem(torch.rand(1, 3, 32, 32)).shape[-1] == 32
    reference = timm.create_model("regnety_002", num_classes=10)
    assert {n: p.shape for n, p in network.named_parameters()} == {
        n: p.shape for n, p in reference.named_parameters()
    }


def test_timm_model_is_created_by_name():
    assert create_network(StudentConfig(name="timm:resnet10t"), 4)(
        torch.rand(2, 3, 32, 32)
    ).shape == (2, 4)
    vit = create_network(StudentConfig(name="timm:vit_tiny_patch16_224", image_size=32), 4)
    assert vit(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    with raises(ConfigError, "student.name", "timm:resnet81", "resnet18"):
        create_network(StudentConfig(name="timm:resnet81"), 4)


def test_num_heads_not_dividing_width_raises():
    with raises(ConfigError, "student.num_heads", "student.embed_dim"):
        create_network(StudentConfig(name="deit_micro", num_heads=5), 4)


def test_saved_student_loads_bit_equal(tmp_path):
    student = student_from_info(model_info())
    folder = tmp_path / "best"
    folder.mkdir()
    write_student(folder, student.network.state_dict(), model_info())
    assert find_saved_model(tmp_path) == folder
    assert find_saved_model(folder) == folder
    again, facts_again = load_student(folder)
    assert facts_again == model_info()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(student.eval()(images)[0], again.eval()(images)[0])
    assert find_saved_model(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("damage", ["cut", "not json", "other field", "no file"])
def test_damaged_student_raises_with_name(tmp_path, damage):
    write_student(tmp_path, student_from_info(model_info()).network.state_dict(), model_info())
    weights, described = tmp_path / "model.safetensors", tmp_path / "model.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "not json":
        described.write_text("{")
    elif damage == "other field":
        described.write_text('{"student": {"nam": "x"}}')
    else:
        described.unlink()
    with raises(CheckpointError, weights if damage == "cut" else described):
        load_student(tmp_path)


@pytest.mark.fault("B9")
@pytest.mark.parametrize("container", [None, "model", "state_dict", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_read_weights_unwraps_trainer_checkpoints(tmp_path, container, prefix):
    weights = {f"{prefix}head.weight": torch.ones(2, 2)}
    content = weights if container is None else {container: weights, "epoch": 3}
    torch.save(content, tmp_path / "file.pth")
    assert torch.equal(read_weights(tmp_path / "file.pth")["head.weight"], torch.ones(2, 2))


def test_read_weights_prefers_averaged_weights(tmp_path):
    item, other = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    torch.save({"state_dict": item, "state_dict_ema": other}, tmp_path / "file.pth")
    assert read_weights(tmp_path / "file.pth")["w"] == 1


class _Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


def test_read_weights_runs_no_code(tmp_path):
    torch.save({"model": _Canary(tmp_path / "canary")}, tmp_path / "evil.pth")
    with raises(CheckpointError, tmp_path / "evil.pth", "mkdir"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("B14")
def test_unreadable_weight_file_raises_with_name(tmp_path):
    for name in ("empty.pth", "empty.safetensors"):
        (tmp_path / name).touch()
        with raises(CheckpointError, tmp_path / name):
            read_weights(tmp_path / name)
    (tmp_path / "noise.pth").write_bytes(b"\x00\x01noise" * 99)
    with raises(CheckpointError, tmp_path / "noise.pth"):
        read_weights(tmp_path / "noise.pth")
    with raises(CheckpointError, tmp_path / "missing.safetensors"):
        read_weights(tmp_path / "missing.safetensors")


@pytest.mark.fault("B6")
def test_load_weights_lists_differences_before_copying(tmp_path):
    network = student_from_info(model_info()).network
    before = network.state_dict()["head.bias"].clone()
    weights = dict(student_from_info(model_info(classes=("a", "b"))).network.state_dict())
    weights["extra"] = weights.pop("cls_token")
    save_file(weights, tmp_path / "w.safetensors")
    with raises(CheckpointError, "w:") as caught:
        load_weights(network, read_weights(tmp_path / "w.safetensors"), origin="w")
    message = str(caught.value)
    assert re.search(r"missing\b.*\bcls_token", message)
    assert re.search(r"unexpected\b.*\bextra", message)
    assert re.search(r"head\.weight\b.*\(2, 24\).*\(3, 24\)", message)
    assert torch.equal(network.state_dict()["head.bias"], before)


@pytest.mark.parametrize("tokens", [2, 3])
def test_distillation_tokens_have_own_position_and_head(tokens):
    student = dataclasses.replace(MICRO, num_distillation_tokens=tokens)
    parameter, many = create_network(MICRO, 3), create_network(student, 3)
    assert many.pos_embed.shape == (1, 16 + 1 + tokens, 24)
    more = sum(p.numel() for p in many.parameters()) - sum(
        p.numel() for p in parameter.parameters()
    )
    assert more == (tokens - 1) * (2 * 24 + 24 * 3 + 3)  # token, position, head
    wrapped = Student(many, mean=MEAN, std=STD)
    outputs = wrapped(torch.rand(5, 3, 16, 16))
    assert outputs.distillation_logits.shape == (5, tokens, 3)
    heads = logits_by_head(outputs)
    all_ids = [outputs.class_logits, *outputs.distillation_logits.unbind(dim=1)]
    assert torch.allclose(heads["fused"], sum(all_ids) / (1 + tokens), atol=1e-6)
    assert torch.equal(heads["distillation_2"], outputs.distillation_logits[:, 1])
    probabilities = sum(logits.softmax(dim=1) for logits in all_ids) / (1 + tokens)
    assert torch.allclose(heads["fused_softmax"].exp(), probabilities, atol=1e-6)
    # Each head reads its own token: the gradient of one reaches only its own weights.
    outputs.distillation_logits[:, 0].sum().backward()
    assert many.head_dist[0].weight.grad.any()
    assert not many.head_dist[1].weight.grad.any()


def test_saved_distillation_tokens_load_equal(tmp_path):
    student = dataclasses.replace(MICRO, num_distillation_tokens=2, weight_init="scaled")
    train_loader = student_from_info(model_info(student)).eval()
    write_student(tmp_path, train_loader.network.state_dict(), model_info(student))
    again, _ = load_student(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.eval()(images)[1], train_loader(images)[1])


def test_dropout_is_placed_as_in_paper_and_off_in_evaluation():
    """After the position embedding, attention and both layers of the MLP; not within attention
    and not before the heads."""
    network = create_network(StudentConfig(name="deit_micro", dropout=0.25), 10)
    shares = {
        name: module.p for name, module in network.named_modules() if isinstance(module, nn.Dropout)
    }
    ends = {name.rpartition("blocks.0.")[2] for name, share in shares.items() if share == 0.25}
    assert {"pos_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"} <= ends
    assert not any("attn_drop" in name or "head" in name for name in ends)
    images = torch.randn(4, 3, 32, 32)
    plain = create_network(StudentConfig(name="deit_micro"), 10)
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(images), plain.eval()(images))
    assert not torch.equal(network.train()(images)[0], plain.train()(images)[0])


def test_dense_network_by_hand():
    """784, 196 and 10 units for MNIST; gray images have equal channels."""
    network = create_network(StudentConfig(name="dense", image_size=28), 10)
    assert [tuple(parameter.shape) for parameter in network.parameters()] == [
        *((196, 784), (196,), (10, 196), (10,))
    ]
    gray = torch.rand(2, 1, 28, 28)
    hidden = (gray.flatten(1) @ network.hidden.weight.T + network.hidden.bias).clamp_min(0)
    expected = hidden @ network.head.weight.T + network.head.bias
    assert torch.allclose(network(gray.repeat(1, 3, 1, 1)), expected, atol=1e-5)
    with raises(ConfigError, "student.drop_path", 0.1, "dense"):
        create_network(StudentConfig(name="dense", drop_path=0.1), 10)
