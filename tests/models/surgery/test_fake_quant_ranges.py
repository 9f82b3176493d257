"""Networks with fake quantization: ranges of activations, copies, graphs, exports, schedules."""

import copy
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from deit.config.finetune_schedules import FINETUNE_SCHEDULES, with_init
from deit.config.recipes.handwriting import digits
from deit.config.sections.student import StudentConfig
from deit.config.validation import validate
from deit.core.errors import ConfigError
from deit.deploy.export import split_normalization
from deit.deploy.export_formats import (
    Graph,
    onnx_inference_fn,
    outputs_of,
    write_onnx_with_metadata,
)
from deit.deploy.int8_calibration import ranges_from_training
from deit.deploy.int8_graph import signal_to_noise, write_int8
from deit.deploy.int8_layers import choose, prepare
from deit.models.onednn_linear import available, use_onednn
from deit.models.registry import create_network
from deit.models.saved_student import ModelInfo, student_from_info
from deit.models.student import Student
from deit.models.surgery import fake_quant
from deit.models.surgery.fake_quant import (
    MOMENTUM,
    ActivationRanges,
    disable_fake_quant,
    enable_fake_quant,
    fake_quant_layers,
    range_names,
)
from deit.models.surgery.structured_pruning import (
    KeptUnits,
    magnitudes,
    pruned_config,
    select_top,
    slice_weights,
)
from deit.models.surgery.token_merging import with_merging
from deit.models.weight_files import load_weights
from deit.training.optimizer import parameter_groups
from tests.helpers.errors import raises
from tests.helpers.exports import int8_inference_fn
from tests.helpers.images import random_batch

pytest.importorskip("sklearn")
TINY = StudentConfig(
    name="deit_micro",
    image_size=8,
    patch_size=2,
    embed_dim=16,
    depth=2,
    num_heads=2,
    qat="int8",
)
STUDENTS = {
    "distilled": TINY,
    "plain": replace(TINY, name="vit_micro", depth=1),
    "two distillation tokens": replace(TINY, num_distillation_tokens=2, depth=1),
    "pruned": replace(TINY, heads_per_block=(1, 2), mlp_hidden_per_block=(5, 9)),
    "scaled": replace(TINY, weight_init="scaled"),
}


def network_of(student: StudentConfig = TINY, **fields) -> nn.Module:
    torch.manual_seed(3)
    return create_network(replace(student, **fields), 5)


def all_logits(network: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Return the logits of all heads, [images, heads * classes]."""
    outputs = Student(network, mean=(0.0,) * 3, std=(1.0,) * 3).forward(given)
    return torch.cat([item.flatten(1) for item in outputs if item is not None], dim=1)


def with_ranges(network: nn.Module, given: torch.Tensor | None = None) -> nn.Module:
    """Train a network for one step, so that its ranges are set."""
    ranges = ActivationRanges(network)
    with torch.no_grad():
        all_logits(network.train(), random_batch(8, 64) if given is None else given)
    ranges.update()
    return network.eval()


# Ranges


def test_update_sets_then_moves_ranges():
    holder = nn.Sequential(nn.Linear(2, 1)).train()
    enable_fake_quant(holder)
    layer, ranges = holder[0], ActivationRanges(holder)
    assert layer.range.tolist() == [0, 0]
    holder(torch.tensor([[-1.0, 3.0]]))
    assert layer.range.tolist() == [0, 0]
    ranges.update()
    assert layer.range.tolist() == [-1, 3]
    holder(torch.tensor([[2.0, 5.0]]))  # 0 is always inside
    ranges.update()
    torch.testing.assert_close(layer.range, torch.tensor([-1 + MOMENTUM, 3 + 2 * MOMENTUM]))
    before = layer.range.clone()
    holder.eval()(torch.tensor([[-9.0, 9.0]]))
    assert torch.equal(layer.range, before)
    assert layer.observed.tolist() == [-math.inf, -math.inf]
    holder.train()(torch.tensor([[-9.0, 9.0]]))
    ActivationRanges(holder)  # ranges observed before a training are reset
    assert layer.observed.tolist() == [-math.inf, -math.inf]


def test_ranges_do_not_depend_on_micro_batches_or_repeats():
    result, given = [], random_batch(8, 12)
    for sizes in ([12], [4, 8], [12, 12]):
        network = with_ranges(network_of())  # so that roundings are the same
        ranges = ActivationRanges(network)
        network.train()
        for part in given.split(sizes) if sum(sizes) == 12 else (given, given):
            all_logits(network, part)
        ranges.update()
        result.append(torch.stack([layer.range for layer in fake_quant_layers(network).values()]))
    assert torch.equal(result[0], result[2])
    torch.testing.assert_close(result[0], result[1])
    moved = torch.stack(
        [layer.range for layer in fake_quant_layers(with_ranges(network_of())).values()]
    )
    assert (moved != result[0]).any(dim=1).all()


def test_unknown_range_uses_range_of_batch():
    """In evaluation as in training; the output is never zero."""
    network = network_of().eval()
    result = all_logits(network, random_batch(8))
    ranged = with_ranges(network_of(), random_batch(8))
    torch.testing.assert_close(result, all_logits(ranged, random_batch(8)))
    assert result.abs().min() > 0
    assert all_logits(network, torch.zeros(2, 3, 8, 8)).isfinite().all()


# The network


@pytest.mark.parametrize("name", STUDENTS)
def test_enable_keeps_names_weights_and_decay_groups(name):
    student = STUDENTS[name]
    rounded, plain = network_of(student), network_of(student, qat="none")
    kinds = (nn.Linear, nn.Conv2d)
    layers = [key for key, module in plain.named_modules() if isinstance(module, kinds)]
    assert list(fake_quant_layers(rounded)) == layers
    actual, expected = rounded.state_dict(), plain.state_dict()
    assert range_names(actual) == {f"{key}.range" for key in layers} == set(actual) - set(expected)
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    groups = [
        [len(group["params"]) for group in parameter_groups(module, 0.1)]
        for module in (rounded, plain)
    ]
    assert groups[0] == groups[1]
    with_ranges(rounded)
    before, result = all_logits(plain.eval(), random_batch(8)), all_logits(rounded, random_batch(8))
    assert 20 < signal_to_noise(before, result) < 60
    disable_fake_quant(rounded)
    assert str(rounded) == str(plain)
    assert set(vars(rounded.head)) == set(vars(plain.head))
    assert list(rounded.state_dict()) == list(expected)
    assert torch.equal(all_logits(rounded, random_batch(8)), before)


def test_copied_network_has_separate_ranges():
    network = with_ranges(network_of(STUDENTS["plain"]))
    other = copy.deepcopy(network)
    expected = network(random_batch(8))
    assert torch.equal(other(random_batch(8)), expected)
    for layer in fake_quant_layers(other).values():
        layer.range.fill_(0)
    with_ranges(other, 5 * random_batch(8))
    assert not torch.equal(other(random_batch(8)), expected)
    assert torch.equal(network(random_batch(8)), expected)


def test_compiled_network_outputs_are_equal(command_server, tmp_path):
    """In a separate process: after other compilations or exports, PyTorch 2.15 may find no kernel
    for its fake quantization of meta tensors."""
    script = tmp_path / "compiled.py"
    script.write_text(f"from {__name__} import check_compiled\n\ncheck_compiled()\n")
    done = command_server.run(script=str(script))
    assert done.code == 0, done.err


def check_compiled():
    """Assert that a compiled network has the same outputs and observed ranges."""
    network = with_ranges(network_of(STUDENTS["plain"]))
    traced = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(random_batch(8)), network(random_batch(8)))
    seen, twin = [], copy.deepcopy(network)
    for module in (network, twin):
        module.train()
        (torch.compile(module, fullgraph=True, backend="eager") if module is twin else module)(
            random_batch(8)
        )
        seen.append(torch.stack([layer.observed for layer in fake_quant_layers(module).values()]))
    torch.testing.assert_close(seen[0], seen[1])


def test_activation_checkpointing_gradients_and_ranges_are_equal():
    result = []
    for again in (False, True):
        network = with_ranges(network_of(drop_path=0.3)).train()
        network.set_grad_checkpointing(again)
        ranges = ActivationRanges(network)
        torch.manual_seed(9)
        all_logits(network, random_batch(8)).square().sum().backward()
        ranges.update()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        result.append(gradients | dict(network.named_buffers()))
    assert all(torch.equal(result[0][name], result[1][name]) for name in result[0])


@pytest.mark.skipif(not available(), reason="no oneDNN in this torch")
def test_onednn_outputs_match():
    network = with_ranges(network_of())
    other = copy.deepcopy(network)
    use_onednn(other)
    with mock.patch("deit.models.onednn_linear.product", wraps=fake_quant.linear) as product:
        result = other(random_batch(8))
    assert product.call_count == len(fake_quant_layers(other)) - 1
    torch.testing.assert_close(result, network(random_batch(8)), rtol=1e-4, atol=1e-5)


def test_ddp_does_not_broadcast_ranges():
    student = Student(network_of(), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert set(student._ddp_params_and_buffers_to_ignore) == {n for n, _ in student.named_buffers()}


def test_token_merging_works_with_fake_quant():
    network = with_ranges(network_of())
    merging = with_merging(network, 2)
    assert len(fake_quant_layers(merging)) == len(fake_quant_layers(network))
    assert merging(random_batch(8)).isfinite().all()
    assert torch.equal(with_merging(network, 0)(random_batch(8)), network(random_batch(8)))


def test_structured_pruning_keeps_ranges():
    network = with_ranges(network_of(depth=2, num_heads=4))
    scores = magnitudes(network)
    units = KeptUnits(
        select_top(scores.heads, 4, scope="global"), select_top(scores.hidden, 32, scope="global")
    )
    student = pruned_config(replace(TINY, num_heads=4), units)
    smaller = create_network(student, 5)
    load_weights(smaller, slice_weights(network.state_dict(), units, head_width=4), origin="cut")
    assert student.qat == "int8"
    assert smaller.eval()(random_batch(8)).isfinite().all()
    assert torch.equal(smaller.blocks[0].mlp.fc2.range, network.blocks[0].mlp.fc2.range)


# The file


@pytest.mark.parametrize("name", [name for name in STUDENTS if name != "scaled"])
def test_exported_file_matches_network(name, tmp_path):
    """Except for values halfway between two steps, where float rounding of sums decides."""
    pytest.importorskip("onnxruntime")
    model_info = ModelInfo(STUDENTS[name], tuple("abcde"), (0.5,) * 3, (0.5,) * 3, 1.0)
    torch.manual_seed(3)
    bare, _ = split_normalization(student_from_info(model_info))
    with_ranges(bare.network, random_batch(8, 128))
    given = random_batch(8, 128, seed=6)
    with torch.no_grad():
        actual = dict(zip(outputs_of(bare), Graph(bare)(given)))
    ranges = {key: layer.range for key, layer in fake_quant_layers(bare.network).items()}
    disable_fake_quant(bare.network)
    write_onnx_with_metadata(tmp_path, bare, model_info)
    layers = prepare(tmp_path / "model.onnx", tmp_path / "prepared.onnx")
    chosen = choose(layers, method="static", attention=False, exclude=None)
    assert set(chosen) == set(ranges)
    result = ranges_from_training(tmp_path / "prepared.onnx", layers, ranges)
    target = tmp_path / "int8.onnx"
    write_int8(
        tmp_path / "prepared.onnx", target, layers, chosen, ranges=result, reduce_range=False
    )
    expected, floats = (
        int8_inference_fn(target)(given),
        onnx_inference_fn(tmp_path / "model.onnx")(given),
    )
    for head, logits in expected.items():
        near = (actual[head] - logits).abs().amax(dim=1) < 1e-5 * logits.abs().max()
        assert near.double().mean() > 0.9, head
        ratio = signal_to_noise(actual[head], logits)
        assert ratio > 12 + signal_to_noise(floats[head], logits), head


# The configuration

REFUSED = {
    "a ConvNet": (
        {"student": {"name": "small_convnet"}},
        ("student.qat = 'int8'", "'small_convnet'"),
    ),
    "shared blocks": (
        {"student": {"shared_block_size": 2}},
        ("student.shared_block_size = 2", "student.qat"),
    ),
    "adapters": (
        {"student": {"adapters": "convpass"}},
        ("student.adapters = 'convpass'", "student.qat"),
    ),
    "heads alone": (
        {"optim": {"trainable": "heads"}, "init": {"weights": "x"}},
        ("optim.trainable = 'heads'", "int8"),
    ),
    "adapters alone": (
        {
            "optim": {"trainable": "adapters"},
            "student": {"adapters": "convpass"},
            "init": {"weights": "x"},
        },
        ("optim.trainable = 'adapters'", "int8"),
    ),
    "divided": ({"run": {"sharding": "fsdp"}}, ("run.sharding = 'fsdp'", "student.qat")),
    "another number": ({"student": {"qat": "int9"}}, ("student.qat = 'int9'", "'int8'")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_combination_raises(name):
    sections, names = REFUSED[name]
    config = digits().replace(student={"qat": "int8"})
    with raises(ConfigError, *names) as error:
        validate(config.replace(**sections))
    assert all(line.count(": ") < 4 for line in str(error.value).splitlines())


@pytest.mark.parametrize("reference", [None, 512])
def test_qat_schedule(reference):
    before = digits().replace(init={"weights": "x"}, optim={"lr_base_batch_size": reference})
    tuned = validate(FINETUNE_SCHEDULES["int8"](before))
    assert tuned.student == replace(before.student, qat="int8")
    assert tuned.optim.epochs == round(before.optim.epochs / 3)
    assert (tuned.loss, tuned.views, tuned.teacher) == (before.loss, before.views, before.teacher)
    assert tuned.optim.lr == pytest.approx(0.3 * before.optim.lr)
    ends = tuned.optim.min_lr, tuned.optim.warmup_lr
    assert ends == pytest.approx((tuned.optim.peak_lr / 10,) * 2)


def test_init_does_not_change_qat():
    """Like drop path, it is set by the configuration only."""
    assert with_init(digits(), "x", TINY).student.qat == "none"
    config = digits().replace(student={"qat": "int8"})
    assert with_init(config, "x", replace(TINY, qat="none")).student.qat == "int8"
