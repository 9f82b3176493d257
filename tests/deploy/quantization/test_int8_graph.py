"""The nodes of an int8 file: which are integers, their names, their ranges, what is excluded."""

import math

import numpy
import pytest
import torch

from deit.config.choices import CALIBRATION_METHODS, QUANTIZATION_METHODS
from deit.config.student_section import StudentConfig
from deit.core.errors import ConfigError
from deit.deploy.export import split_normalization
from deit.deploy.formats import onnx_inference_fn, write_onnx_with_metadata
from deit.deploy.int8_graph import CALIBRATIONS, calibrate, signal_to_noise, write_int8
from deit.deploy.int8_layers import (
    METHODS,
    QuantizableLayers,
    attentions,
    choose,
    covers_enough,
    layers_of,
    prepare,
)
from deit.models.saved import ModelInfo, build_student
from tests.helpers.errors import raises
from tests.helpers.exports import SMALL_DEIT, OnnxGraph, prepared_network

pytest.importorskip("sklearn")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_names_on_the_command_line_are_those_that_there_are():
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
def test_layers_have_the_names_of_the_network_and_none_is_missing(name, size, settings, tmp_path):
    path, layers, network = prepared_network(tmp_path, name, size=size, **settings)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    expected = {key for key, module in network.named_modules() if isinstance(module, kinds)}
    assert set(layers.nodes) - set(layers.products) == expected
    known = layers_of(network)  # without its graph
    assert set(known.products) == set(layers.products)
    assert known.weights == layers.weights
    for method in METHODS:
        assert covers_enough(known, method) == covers_enough(layers, method)
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
    able = choose(layers, method="static", attention=False, exclude=None)
    ranges = calibrate(path, inputs.split(3), how="minmax")
    write_int8(path, tmp_path / "int8.onnx", layers, able, ranges=ranges, reduce_range=False)
    assert (
        15
        < signal_to_noise(before, onnx_inference_fn(tmp_path / "int8.onnx")(inputs)["logits"])
        < 90
    )
    graph = OnnxGraph(tmp_path / "int8.onnx")
    assert graph.integer_layers(layers) == expected
    convolutions = [node for node in graph.model.graph.node if node.op_type == "Conv"]
    takers = {i: node.op_type for node in graph.model.graph.node for i in node.input}
    # Each of several is followed by integers, or its fast kernel is not taken; one alone is not.
    followed = ["QuantizeLinear" in _after(graph, node, takers) for node in convolutions]
    assert followed == [len(convolutions) > 1] * len(convolutions)
    scaled = [node for node in graph.model.graph.node if node.op_type == "QuantizeLinear"]
    kinds = {graph.constants[node.input[2]].data_type for node in scaled}
    assert kinds == {onnx.TensorProto.UINT8}


def _after(graph, node, takers):
    """What takes a node's output; what takes a ReLU's, for it is the same kernel."""
    kind = takers[node.output[0]]
    if kind == "Relu":
        relu = next(n for n in graph.model.graph.node if node.output[0] in n.input)
        return (kind, takers[relu.output[0]])
    return (kind,)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_attention_is_float_unless_asked(method, attention, micro, tmp_path):
    path, layers, _, images = micro
    assert len(layers.products) == 4
    chosen = choose(layers, method=method, attention=attention, exclude=None)
    ranges = calibrate(path, [images], how="minmax") if method == "static" else None
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
def test_blocks_of_a_deit_ti_take_a_third_of_the_bytes_at_most(tmp_path):
    settings = {"patch_size": 16, "depth": 4}
    path, layers, _ = prepared_network(tmp_path, "deit_tiny", size=32, classes=1000, **settings)
    images = torch.randn(4, 3, 32, 32)
    before = onnx_inference_fn(path)(images)["logits"]
    for method in METHODS:
        chosen = choose(layers, method=method, attention=False, exclude=None)
        ranges = calibrate(path, images.split(2), how="minmax") if method == "static" else None
        target = tmp_path / "int8.onnx"
        write_int8(path, target, layers, chosen, ranges=ranges, reduce_range=False)
        share = target.stat().st_size / (tmp_path / "model.onnx").stat().st_size
        assert 0.25 < share <= 0.35
        assert signal_to_noise(before, onnx_inference_fn(target)(images)["logits"]) > 25


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("reduce_range", "largest"), [(False, 127), (True, 64)])
def test_weights_are_int8_by_channel_and_of_7_bits_if_asked(
    method, reduce_range, largest, micro, tmp_path
):
    path, layers, network, images = micro
    ranges = calibrate(path, [images], how="minmax") if method == "static" else None
    target = tmp_path / "int8.onnx"
    chosen = ["blocks.1.mlp.fc1"]
    write_int8(path, target, layers, chosen, ranges=ranges, reduce_range=reduce_range)
    kind = onnx.TensorProto.INT8
    graph = OnnxGraph(target)
    held = [one for one in graph.constants.values() if one.data_type == kind and len(one.dims) == 2]
    assert [tuple(one.dims) for one in held] == [(48, 192)]
    values = onnx.numpy_helper.to_array(held[0])
    assert numpy.abs(values.astype(int)).max() == largest
    scales = onnx.numpy_helper.to_array(
        graph.constants[held[0].name.removesuffix("_quantized") + "_scale"]
    )
    expected = network.blocks[1].mlp.fc1.weight.detach().abs().amax(dim=1).numpy()
    numpy.testing.assert_allclose(scales * largest, expected, rtol=0.02)
    restored = values.T * scales[:, None]
    error = numpy.abs(restored - network.blocks[1].mlp.fc1.weight.detach().numpy())
    assert (error <= 0.51 * scales[:, None]).all()


def seen_first(path):
    """What the first convolution is given: the images, less 0 and over 1."""
    graph = OnnxGraph(path)
    node = next(node for node in graph.model.graph.node if node.op_type == "Conv")
    return node.input[0]


@pytest.fixture(scope="module")
def convnet(tmp_path_factory):
    """A ConvNet of random weights, prepared: it has few tensors whose ranges are looked for."""
    return prepared_network(tmp_path_factory.mktemp("convnet"), "small_convnet")[0]


@pytest.mark.parametrize("how", CALIBRATIONS)
def test_ranges_are_of_what_was_seen(how, convnet, micro):
    path, images = convnet, micro[3]
    level = 98.0 if how == "percentile" else None
    ranges = calibrate(path, images.split(8), how=how, percentile=level)
    low, high = (one.item() for one in ranges[seen_first(path)].range_value)
    values = images.flatten()
    if how == "minmax":
        assert (low, high) == (values.min().item(), values.max().item())
    if how == "percentile":
        inside = ((values >= low) & (values <= high)).double().mean().item()
        assert inside == pytest.approx(0.98, abs=0.005)
        assert low != -high  # not made symmetric
    assert values.min().item() <= low < -1 < 1 < high <= values.max().item() + 1e-6


def test_entropy_has_something_to_choose_from(convnet, micro):
    """With as many bins as levels there is but one candidate, the largest of all."""
    path, images = convnet, micro[3]
    outlier = images.clone()
    outlier[0, 0, 0, 0] = 100.0
    ranges = calibrate(path, [outlier], how="entropy")
    assert float(ranges[seen_first(path)].range_value[1]) < 100


def test_the_same_images_make_the_same_file(micro, tmp_path):
    path, layers, _, images = micro
    for name in ("one.onnx", "two.onnx"):
        ranges = calibrate(path, images.split(8), how="percentile", percentile=99.9)
        chosen = choose(layers, method="static", attention=False, exclude=None)
        write_int8(path, tmp_path / name, layers, chosen, ranges=ranges, reduce_range=False)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_layers_are_excluded_by_their_whole_names(micro, tmp_path):
    path, layers, _, _ = micro

    def kept(exclude, *, attention=False):
        return set(choose(layers, method="static", attention=attention, exclude=exclude))

    everything = kept(None)
    assert everything - kept("head") == {"head"}
    assert everything - kept("head.*") == {"head", "head_dist"}
    assert everything - kept(r"blocks\.0\.mlp\..*|patch_embed.proj") == {
        *("blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "patch_embed.proj")
    }
    assert kept(None, attention=True) - kept(".*query_key", attention=True) == {
        *("blocks.0.attn.query_key", "blocks.1.attn.query_key")
    }
    for nothing in ("fc1", "blocks.9.*", ".*query_key"):
        with raises(ConfigError, f"--exclude {nothing}:", "patch_embed.proj, blocks.0"):
            kept(nothing)
    with raises(ConfigError, "--exclude .*:") as refused:
        kept(".*")
    assert "patch_embed.proj" not in str(refused.value)
    write_int8(path, tmp_path / "q.onnx", layers, ["head"], ranges=None, reduce_range=False)
    assert OnnxGraph(tmp_path / "q.onnx").integer_layers(layers) == {"head"}


def test_heads_of_equal_weights_keep_their_names(tmp_path):
    """As after a fine-tuning that put the token in, a copy of the class token."""
    shape = {**SMALL_DEIT, "depth": 1}
    student = StudentConfig(name="deit_micro", image_size=8, patch_size=2, **shape)
    network = build_student(ModelInfo(student, tuple("abc"), (0.5,) * 3, (0.5,) * 3, 1.0))
    network.network.head_dist.load_state_dict(network.network.head.state_dict())
    facts = ModelInfo(student, tuple("abc"), (0.5,) * 3, (0.5,) * 3, 1.0)
    write_onnx_with_metadata(tmp_path, split_normalization(network)[0], facts)
    layers = prepare(tmp_path / "model.onnx", tmp_path / "prepared.onnx")
    assert {"head", "head_dist"} <= set(layers.nodes)


def test_dynamic_refuses_what_is_mostly_convolutions():
    nodes = {"stem": ("a",), "head": ("b",)}
    kinds = {"stem": "Conv", "head": "Gemm"}
    heavy = QuantizableLayers(nodes, (), {"stem": 60, "head": 40}, kinds, 100)
    with raises(ConfigError, "--method dynamic", "--method static"):
        choose(heavy, method="dynamic", attention=False, exclude=None)
    assert choose(heavy, method="static", attention=False, exclude=None) == ["stem", "head"]
    light = heavy._replace(weights={"stem": 40, "head": 60})
    assert choose(light, method="dynamic", attention=False, exclude=None) == ["head"]
