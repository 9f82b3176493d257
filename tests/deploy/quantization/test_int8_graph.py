"""Tests of the graph of int8 files: quantized nodes, their names and ranges, excluded layers."""

import math

import numpy
import pytest
import torch

from deit.config.command_choices import CALIBRATION_METHODS, QUANTIZATION_METHODS
from deit.config.sections.student import StudentConfig
from deit.core.errors import ConfigError
from deit.deploy.export import split_normalization
from deit.deploy.export_formats import onnx_inference_fn, write_onnx_with_metadata
from deit.deploy.int8_calibration import CALIBRATIONS, calibrate
from deit.deploy.int8_graph import signal_to_noise, write_int8
from deit.deploy.int8_layers import (
    METHODS,
    QuantizableLayers,
    attentions,
    choose,
    covers_enough,
    layers_of,
    prepare,
)
from deit.models.saved_student import ModelInfo, student_from_info
from tests.helpers.errors import raises
from tests.helpers.exports import SMALL_DEIT, OnnxGraph, int8_inference_fn, prepared_network

pytest.importorskip("sklearn")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_methods_equal_those_of_command_line():
    assert tuple(METHODS) == QUANTIZATION_METHODS
    assert tuple(CALIBRATIONS) == CALIBRATION_METHODS


# noise, ranges, layers


def test_signal_to_noise_by_hand():
    reference = torch.tensor([3.0, 4.0])
    assert signal_to_noise(reference, torch.tensor([3.0, 4.5])) == pytest.approx(20)
    assert signal_to_noise(reference, torch.tensor([6.0, 8.0])) == pytest.approx(0)
    assert signal_to_noise(reference, reference) == math.inf
    assert signal_to_noise(torch.zeros(2), reference) < -1000


@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        ("deit_micro", 8, {"patch_size": 2, **SMALL_DEIT}),
        ("vit_micro", 8, {"patch_size": 2, **SMALL_DEIT, "depth": 1}),
        (
            "deit_micro",
            8,
            {"patch_size": 2, **SMALL_DEIT, "num_distillation_tokens": 2, "shared_block_size": 2},
        ),
        ("small_convnet", 8, {}),
        ("dense", 8, {}),
        pytest.param("rednet_micro", 8, {}, marks=pytest.mark.slow),
        pytest.param("regnety_002_small_stem", 32, {}, marks=pytest.mark.slow),
    ],
)
def test_prepare_layers_have_names_of_network(name, size, settings, tmp_path):
    path, layers, network = prepared_network(tmp_path, name, size=size, **settings)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    expected = {key for key, module in network.named_modules() if isinstance(module, kinds)}
    assert set(layers.nodes) - set(layers.products) == expected
    predicted = layers_of(network)
    assert set(predicted.products) == set(layers.products)
    assert predicted.weights == layers.weights
    for method in METHODS:
        assert covers_enough(predicted, method) == covers_enough(layers, method)
    assert not attentions(network) or len(layers.products) == 2 * len(attentions(network))
    weights = {key: network.get_submodule(key).weight.numel() for key in expected}
    assert {key: layers.weights[key] for key in expected} == weights
    blocks = len(network.blocks) if "micro" in name and "net" not in name else 0
    assert layers.products == tuple(
        f"blocks.{block}.attn.{product}"
        for block in range(blocks)
        for product in ("query_key", "attention_value")
    )
    inputs = torch.randn(6, 3, size, size)
    before = onnx_inference_fn(path)(inputs)["logits"]
    chosen = choose(layers, method="static", attention=False, exclude=None)
    ranges = calibrate(path, inputs.split(3), method="minmax")
    write_int8(path, tmp_path / "int8.onnx", layers, chosen, ranges=ranges, reduce_range=False)
    assert (
        15
        < signal_to_noise(before, int8_inference_fn(tmp_path / "int8.onnx")(inputs)["logits"])
        < 90
    )
    graph = OnnxGraph(tmp_path / "int8.onnx")
    assert graph.integer_layers(layers) == expected
    convolutions = [node for node in graph.model.graph.node if node.op_type == "Conv"]
    consumers = {i: node.op_type for node in graph.model.graph.node for i in node.input}
    # A single convolution has a float output; several have int8 outputs, for the fast kernel.
    quantized = ["QuantizeLinear" in _consumers(graph, node, consumers) for node in convolutions]
    assert quantized == [len(convolutions) > 1] * len(convolutions)
    scaled = [node for node in graph.model.graph.node if node.op_type == "QuantizeLinear"]
    kinds = {graph.constants[node.input[2]].data_type for node in scaled}
    assert kinds == {onnx.TensorProto.UINT8}


def _consumers(graph, node, consumers):
    """Return the operation after a node; also the one after a ReLU, which is fused into it."""
    kind = consumers[node.output[0]]
    if kind == "Relu":
        relu = next(n for n in graph.model.graph.node if node.output[0] in n.input)
        return (kind, consumers[relu.output[0]])
    return (kind,)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_write_int8_attention_is_float_by_default(method, attention, micro, tmp_path):
    path, layers, _, images = micro
    assert len(layers.products) == 4
    chosen = choose(layers, method=method, attention=attention, exclude=None)
    ranges = calibrate(path, [images], method="minmax") if method == "static" else None
    target = tmp_path / "int8.onnx"
    write_int8(path, target, layers, chosen, ranges=ranges, reduce_range=False)
    graph = OnnxGraph(target)
    assert graph.integer_layers(layers) == set(chosen)
    assert (set(layers.products) <= set(chosen)) == attention
    assert ("patch_embed.proj" in chosen) == (method == "static")
    integers = {"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"}
    if not attention:
        for node in graph.model.graph.node:
            if node.op_type in ("LayerNormalization", "Softmax", "Gelu", "Add"):
                assert not integers & set(graph.kinds(node.name)), node.name


@pytest.mark.slow
def test_write_int8_deit_tiny_is_a_third_of_float_size(tmp_path):
    settings = {"patch_size": 16, "depth": 4}
    path, layers, _ = prepared_network(tmp_path, "deit_tiny", size=32, classes=1000, **settings)
    images = torch.randn(4, 3, 32, 32)
    before = onnx_inference_fn(path)(images)["logits"]
    for method in METHODS:
        chosen = choose(layers, method=method, attention=False, exclude=None)
        ranges = calibrate(path, images.split(2), method="minmax") if method == "static" else None
        target = tmp_path / "int8.onnx"
        write_int8(path, target, layers, chosen, ranges=ranges, reduce_range=False)
        share = target.stat().st_size / (tmp_path / "model.onnx").stat().st_size
        assert 0.25 < share <= 0.35
        assert signal_to_noise(before, onnx_inference_fn(target)(images)["logits"]) > 25


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("reduce_range", "largest"), [(False, 127), (True, 64)])
def test_write_int8_weights_per_channel_have_8_or_7_bits(
    method, reduce_range, largest, micro, tmp_path
):
    path, layers, network, images = micro
    ranges = calibrate(path, [images], method="minmax") if method == "static" else None
    target = tmp_path / "int8.onnx"
    chosen = ["blocks.1.mlp.fc1"]
    write_int8(path, target, layers, chosen, ranges=ranges, reduce_range=reduce_range)
    kind = onnx.TensorProto.INT8
    graph = OnnxGraph(target)
    matrices = [c for c in graph.constants.values() if c.data_type == kind and len(c.dims) == 2]
    assert [tuple(matrix.dims) for matrix in matrices] == [(48, 192)]
    values = onnx.numpy_helper.to_array(matrices[0])
    assert numpy.abs(values.astype(int)).max() == largest
    scales = onnx.numpy_helper.to_array(
        graph.constants[matrices[0].name.removesuffix("_quantized") + "_scale"]
    )
    expected = network.blocks[1].mlp.fc1.weight.detach().abs().amax(dim=1).numpy()
    numpy.testing.assert_allclose(scales * largest, expected, rtol=0.02)
    restored = values.T * scales[:, None]
    error = numpy.abs(restored - network.blocks[1].mlp.fc1.weight.detach().numpy())
    assert (error <= 0.51 * scales[:, None]).all()


def first_conv_input(path):
    """Return the name of the first convolution's input: the images (normalized by 0 and 1)."""
    graph = OnnxGraph(path)
    node = next(node for node in graph.model.graph.node if node.op_type == "Conv")
    return node.input[0]


@pytest.fixture(scope="module")
def convnet(tmp_path_factory):
    """Return a prepared ONNX file of a random ConvNet, which has few activations to calibrate."""
    return prepared_network(tmp_path_factory.mktemp("convnet"), "small_convnet")[0]


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_calibrate_ranges_match_activations(method, convnet, micro):
    path, images = convnet, micro[3]
    level = 98.0 if method == "percentile" else None
    ranges = calibrate(path, images.split(8), method=method, percentile=level)
    low, high = (bound.item() for bound in ranges[first_conv_input(path)].range_value)
    values = images.flatten()
    if method == "minmax":
        assert (low, high) == (values.min().item(), values.max().item())
    if method == "percentile":
        inside = ((values >= low) & (values <= high)).double().mean().item()
        assert inside == pytest.approx(0.98, abs=0.005)
        assert low != -high  # not made symmetric
    assert values.min().item() <= low < -1 < 1 < high <= values.max().item() + 1e-6


def test_calibrate_entropy_ignores_outlier(convnet, micro):
    """With as many bins as levels, the only candidate would be the largest range."""
    path, images = convnet, micro[3]
    outlier = images.clone()
    outlier[0, 0, 0, 0] = 100.0
    ranges = calibrate(path, [outlier], method="entropy")
    assert float(ranges[first_conv_input(path)].range_value[1]) < 100


def test_write_int8_same_images_write_same_bytes(micro, tmp_path):
    path, layers, _, images = micro
    for name in ("one.onnx", "two.onnx"):
        ranges = calibrate(path, images.split(8), method="percentile", percentile=99.9)
        chosen = choose(layers, method="static", attention=False, exclude=None)
        write_int8(path, tmp_path / name, layers, chosen, ranges=ranges, reduce_range=False)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_choose_exclude_matches_whole_names(micro, tmp_path):
    path, layers, _, _ = micro

    def select(exclude, *, attention=False):
        return set(choose(layers, method="static", attention=attention, exclude=exclude))

    all_layers = select(None)
    assert all_layers - select("head") == {"head"}
    assert all_layers - select("head.*") == {"head", "head_dist"}
    assert all_layers - select(r"blocks\.0\.mlp\..*|patch_embed.proj") == {
        *("blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "patch_embed.proj")
    }
    assert select(None, attention=True) - select(".*query_key", attention=True) == {
        *("blocks.0.attn.query_key", "blocks.1.attn.query_key")
    }
    for pattern in ("fc1", "blocks.9.*", ".*query_key"):
        with raises(ConfigError, f"exclude = {pattern}:", "patch_embed.proj, blocks.0"):
            select(pattern)
    with raises(ConfigError, "exclude = .*:") as refused:
        select(".*")
    assert "patch_embed.proj" not in str(refused.value)
    write_int8(path, tmp_path / "q.onnx", layers, ["head"], ranges=None, reduce_range=False)
    assert OnnxGraph(tmp_path / "q.onnx").integer_layers(layers) == {"head"}


def test_prepare_heads_with_equal_weights_keep_names(tmp_path):
    """As after a fine-tuning that added the distillation token as a copy of the class token."""
    shape = {**SMALL_DEIT, "depth": 1}
    student = StudentConfig(name="deit_micro", image_size=8, patch_size=2, **shape)
    model_info = ModelInfo(student, tuple("abc"), (0.5,) * 3, (0.5,) * 3, 1.0)
    network = student_from_info(model_info)
    network.network.head_dist.load_state_dict(network.network.head.state_dict())
    write_onnx_with_metadata(tmp_path, split_normalization(network)[0], model_info)
    layers = prepare(tmp_path / "model.onnx", tmp_path / "prepared.onnx")
    assert {"head", "head_dist"} <= set(layers.nodes)


def test_choose_dynamic_mostly_convolutions_raises():
    nodes = {"stem": ("a",), "head": ("b",)}
    kinds = {"stem": "Conv", "head": "Gemm"}
    heavy = QuantizableLayers(nodes, (), {"stem": 60, "head": 40}, kinds, 100)
    with raises(ConfigError, "method = dynamic", "use method static"):
        choose(heavy, method="dynamic", attention=False, exclude=None)
    assert choose(heavy, method="static", attention=False, exclude=None) == ["stem", "head"]
    light = heavy._replace(weights={"stem": 40, "head": 60})
    assert choose(light, method="dynamic", attention=False, exclude=None) == ["head"]
