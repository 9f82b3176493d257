"""Int8 files: which nodes are integers, what they answer, what is refused and leaves nothing."""

import json
import math
import re
import runpy
import shlex
import shutil
from unittest import mock

import numpy
import pytest
import torch
from PIL import Image

from deit.cli import run_command
from deit.config.choices import CALIBRATION_METHODS, QUANTIZATION_METHODS
from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.student_section import StudentConfig
from deit.config.validation import load_config
from deit.core import hardware
from deit.core.errors import CheckpointError, ConfigError
from deit.core.types import logits_by_head
from deit.datasets.splits import load_splits, stratified_indices
from deit.deploy import int8_compare, latency, onnx_student, quantize
from deit.deploy.export import BATCHES, split_normalization
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
from deit.deploy.quantize import QuantizeOptions
from deit.distill.inference import evaluation_batches
from deit.models.saved import ModelInfo, build_student, load_student
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.trained import trained

pytest.importorskip("sklearn")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4}
HALF = {"train_fraction": 0.5}
BRIEF = {"epochs": 5, "batch_size": 32, "warmup_epochs": 1, "lr": 3e-3}
ALONE = {"loss": LOSS_PRESETS["none"], "teacher": {"source": ()}}
PLAIN = {**SMALL, "name": "vit_micro", "depth": 1}
RUNS = {"distilled": {"student": SMALL}, "plain": {"student": PLAIN}}
ABLE = [("distilled", "static"), ("distilled", "dynamic"), ("plain", "static")]
ABLE += [("convnet", "static")]  # by dynamic it is refused
FILES = ["README.md", "model.onnx", "quantization.json"]


WRITTEN = {}


def write_once(folder, student, facts):
    """A network is exported once, which takes the most."""
    held = student.state_dict().values()
    key = (repr(facts), tuple(value.double().sum().item() for value in held))
    if key not in WRITTEN:
        write_onnx_with_metadata(folder, student, facts)
        WRITTEN[key] = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(WRITTEN[key])


@pytest.fixture(scope="module", autouse=True)
def _brief():
    with mock.patch.object(onnx_student, "write_onnx_with_metadata", write_once):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs: a distilled student, a plain one, a ConvNet."""
    folder = tmp_path_factory.mktemp("runs")
    trained(digits_teacher().replace(optim={"epochs": 3}), folder / "convnet")
    for name, sections in RUNS.items():
        train(digits().replace(data=HALF, optim=BRIEF, **ALONE, **sections), folder / name)
    return folder


@pytest.fixture(scope="module")
def folders(runs):
    """Every run by every method that serves it, as (run, method) -> folder."""
    return {
        (name, method): quantize.quantize(
            runs / name,
            None,
            QuantizeOptions(method=method),
            max_drop=5,
            command=f"deit quantize {name} --method {method}",
        )
        for name, method in ABLE
    }


def told(folder):
    return json.loads((folder / "quantization.json").read_text())


@torch.no_grad()
def split_of(run, name):
    """Normalised evaluation views of a whole split, their labels, and the run's own logits."""
    config = load_config(run / "config.json")
    student, _ = load_student(run / "best")
    images = getattr(load_splits(config.data), name)
    chunks = torch.arange(len(images.labels)).split(100)
    views = torch.cat(list(evaluation_batches(images, chunks, config, device=torch.device("cpu"))))
    heads = logits_by_head(student.eval()(views))
    _, normalise = split_normalization(student)
    return normalise(views), images.labels, heads


class Graph:
    """An ONNX file as what makes and what takes each tensor."""

    def __init__(self, path):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        self.model = model
        self.nodes = {node.name: node for node in model.graph.node}
        self.maker = {out: node for node in model.graph.node for out in node.output}
        self.constants = {one.name: one for one in model.graph.initializer}

    def kinds(self, *names):
        """What makes each input of a node."""
        node = next(self.nodes[name] for name in names if name in self.nodes)
        return [self.maker[name].op_type for name in node.input if name in self.maker]

    def integer_layers(self, layers):
        """The layers that are computed in integers, by static or dynamic."""
        found = set()
        for layer, names in layers.nodes.items():
            for name in names:
                quantized = [f"{name}_quant", f"{name}_MatMul_quant"]
                if any(one in self.nodes for one in quantized):
                    assert self.nodes[next(q for q in quantized if q in self.nodes)].op_type == (
                        "MatMulInteger"
                    )
                    found.add(layer)
                elif self.kinds(name, f"{name}_MatMul")[:2] == ["DequantizeLinear"] * 2:
                    found.add(layer)
        return found


def prepared_of(folder, name, *, size=8, classes=3, **settings):
    """A random network as float ONNX, prepared: its path, its layers, itself."""
    student = StudentConfig(name=name, image_size=size, **settings)
    facts = ModelInfo(student, tuple(map(str, range(classes))), (0.5,) * 3, (0.5,) * 3, 1.0)
    torch.manual_seed(0)
    network = build_student(facts)
    bare, _ = split_normalization(network)
    write_once(folder, bare, facts)
    layers = prepare(folder / "model.onnx", folder / "prepared.onnx")
    return folder / "prepared.onnx", layers, network.network


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A small DeiT of random weights, prepared: path, layers, network; and images for it."""
    folder = tmp_path_factory.mktemp("micro")
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return *prepared_of(folder, "deit_micro", patch_size=2, **SMALL), images


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
        ("deit_micro", 8, {"patch_size": 2, **SMALL}),
        ("vit_micro", 8, {"patch_size": 2, **SMALL, "depth": 1}),
        (
            "deit_micro",
            8,
            {"patch_size": 2, **SMALL, "num_distillation_tokens": 2, "shared_block_size": 2},
        ),
        ("small_convnet", 8, {}),
        ("dense", 8, {}),
        pytest.param("rednet_micro", 8, {}, marks=pytest.mark.slow),
        pytest.param("regnety_002_small_stem", 32, {}, marks=pytest.mark.slow),
    ],
)
def test_layers_have_the_names_of_the_network_and_none_is_missing(name, size, settings, tmp_path):
    path, layers, network = prepared_of(tmp_path, name, size=size, **settings)
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
    graph = Graph(tmp_path / "int8.onnx")
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
    graph = Graph(target)
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
    path, layers, _ = prepared_of(tmp_path, "deit_tiny", size=32, classes=1000, **settings)
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
    graph = Graph(target)
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
    graph = Graph(path)
    node = next(node for node in graph.model.graph.node if node.op_type == "Conv")
    return node.input[0]


@pytest.fixture(scope="module")
def convnet(tmp_path_factory):
    """A ConvNet of random weights, prepared: it has few tensors whose ranges are looked for."""
    return prepared_of(tmp_path_factory.mktemp("convnet"), "small_convnet")[0]


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
    assert Graph(tmp_path / "q.onnx").integer_layers(layers) == {"head"}


def test_heads_of_equal_weights_keep_their_names(tmp_path):
    """As after a fine-tuning that put the token in, a copy of the class token."""
    shape = {**SMALL, "depth": 1}
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


# calibration images


def test_calibration_sees_training_images_in_their_evaluation_view(runs, tmp_path, monkeypatch):
    seen = []

    def watched(path, batches, **how):
        batches = list(batches)
        seen.extend(torch.cat(batches))
        return calibrate(path, batches, **how)

    monkeypatch.setattr(quantize, "calibrate", watched)
    folder = quantize.quantize(
        runs / "distilled", tmp_path / "q", QuantizeOptions(images=40), max_drop=5
    )
    images, labels, _ = split_of(runs / "distilled", "train")
    others = torch.cat([split_of(runs / "distilled", name)[0] for name in ("validation", "test")])
    rows = stratified_indices(labels, 40, seed=0, stream="calibration")
    assert torch.equal(torch.stack(seen), images[rows])
    assert not any((one == others).flatten(1).all(1).any() for one in seen)
    assert told(folder)["calibration"] == {
        "split": "train",
        "view": "evaluation",
        "num_samples": 40,
        "seed": 0,
        "how": "minmax",
        "percentile": None,
    }


# a run, quantized


@pytest.mark.parametrize(("name", "method"), ABLE)
def test_what_is_told_is_what_the_file_answers(name, method, runs, folders):
    folder = folders[name, method]
    assert sorted(file.name for file in folder.iterdir()) == FILES
    found = told(folder)
    inputs, labels, heads = split_of(runs / name, "test")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    outputs = [one.name for one in session.get_outputs()]
    parts = [session.run(None, {"pixel_values": part.numpy()}) for part in inputs.split(64)]
    logits = {key: numpy.concatenate(values) for key, values in zip(outputs, zip(*parts))}
    order = {"class_logits": "class", "distillation_logits": "distillation", "logits": "fused"}
    named = {order[key] if len(logits) > 1 else "class": value for key, value in logits.items()}
    assert list(found["int8"]["heads"]) == [one for one in order.values() if one in named]
    for head, after in named.items():
        before = heads[head].numpy()
        for kind, one in (("float", before), ("int8", after)):
            top1 = (one.argmax(1) == labels.numpy()).mean()
            assert found[kind]["heads"][head]["top1"] == pytest.approx(top1)
        same = (before.argmax(1) == after.argmax(1)).mean()
        assert found["agreement"][head] == pytest.approx(same)
        assert same > 0.95
        ratio = 10 * numpy.log10((before**2).sum() / ((after - before) ** 2).sum())
        assert found["sqnr_db"][head] == pytest.approx(ratio, abs=0.05)
        assert ratio > 25
    assert (found["num_samples"], found["split"]) == (len(labels), "test")
    assert found["int8"]["bytes"] == (folder / "model.onnx").stat().st_size
    assert found["int8"]["bytes"] < 0.4 * found["float"]["bytes"]
    for kind in ("float", "int8"):
        assert list(found[kind]["latency"]) == ["1", "64"]
        assert all(one["p10_ms"] <= one["median_ms"] for one in found[kind]["latency"].values())
    assert found["command"] == f"deit quantize {name} --method {method}"
    assert found["environment"]["command"] == found["command"]
    assert found["environment"]["threads"] == 1
    assert found["environment"]["packages"]["onnxruntime"] == onnxruntime.__version__


@pytest.mark.parametrize(("name", "method"), ABLE)
def test_only_dynamic_depends_on_who_else_is_in_the_batch(name, method, runs, folders):
    found = told(folders[name, method])["batches"]
    inputs, _, _ = split_of(runs / name, "test")
    answer = onnx_inference_fn(folders[name, method] / "model.onnx")
    rows = torch.linspace(0, len(inputs) - 1, 64).round().long()
    alone = torch.cat([answer(one)["logits"] for one in inputs[rows].split(1)])
    difference = (alone - answer(inputs[rows])["logits"]).abs().max().item()
    assert difference <= found["difference"] + 1e-5
    assert (found["difference"] > 1e-3) == (method == "dynamic")
    assert found["other_answers"] <= 3


def test_the_file_keeps_its_metadata_and_knows_no_other_operations(runs, folders):
    for folder in folders.values():
        model = onnx.load(folder / "model.onnx")
        about = {one.key: one.value for one in model.metadata_props}
        assert json.loads(about["class_names"]) == [str(label) for label in range(10)]
        assert not any(key.startswith("onnx.") for key in about)
        assert {one.domain for one in model.opset_import} == {""}


def test_each_layer_alone_is_measured_on_validation_images(runs, tmp_path, capsys):
    place = tmp_path / "q"
    options = ("--out", place, "--sensitivity", "--json", tmp_path / "all.json", "--max-drop", 5)
    given = [str(word) for word in (runs / "distilled", *options, "--exclude", "head_dist")]
    assert run_command("quantize", given, "deit quantize") == 0
    said = capsys.readouterr().out
    found = told(place)
    assert found == json.loads((tmp_path / "all.json").read_text())
    assert found["environment"]["command"] == f"deit quantize {shlex.join(given)}"
    rows = found["sensitivity"]["layers"]
    assert {row["layer"] for row in rows} == set(found["int8_layers"])
    for row in rows:
        assert re.search(rf"{re.escape(row['layer'])}\D+{row['sqnr_db']:.1f}\b", said)
    assert "head_dist" in found["float_layers"]
    ratios = [row["sqnr_db"] for row in rows]
    assert ratios == sorted(ratios)
    assert sum(row["noise_share"] for row in rows) == pytest.approx(1)
    powers = [10 ** (-ratio / 10) for ratio in ratios]
    assert rows[0]["noise_share"] == pytest.approx(powers[0] / sum(powers))
    inputs, labels, heads = split_of(runs / "distilled", "validation")
    assert found["sensitivity"]["num_samples"] == len(labels)
    top1 = (heads["fused"].argmax(1) == labels).double().mean().item()
    assert found["sensitivity"]["top1"] == pytest.approx(top1)
    # The noises of the layers add up to that of the whole file, but for what they have in common.
    whole = onnx_inference_fn(place / "model.onnx")(inputs)["logits"]
    assert -10 * math.log10(sum(powers)) == pytest.approx(
        signal_to_noise(heads["fused"], whole), abs=2
    )
    # One layer, by another way: all others excluded.
    worst = rows[0]["layer"]
    others = f"(?!{re.escape(worst)}$).*"
    plan = QuantizeOptions(exclude=others)
    alone = quantize.quantize(runs / "distilled", tmp_path / "alone", plan, max_drop=5)
    assert told(alone)["int8_layers"] == [worst]
    logits = onnx_inference_fn(alone / "model.onnx")(inputs)["logits"]
    assert signal_to_noise(heads["fused"], logits) == pytest.approx(ratios[0], abs=0.01)


def test_the_card_tells_it_and_its_snippet_runs(runs, folders, tmp_path, monkeypatch, capsys):
    """The same snippet runs in a process of its own in tests/deploy/test_export.py."""
    folder = folders["distilled", "static"]
    card, found = (folder / "README.md").read_text(), told(folder)
    assert re.search(r"minmax\D*\b128\b", card)
    assert f"{len(found['products'])} products" in card
    assert f"| fused | {100 * found['int8']['heads']['fused']['top1']:.1f} |" in card
    assert f"metric_value: {found['int8']['heads']['fused']['top1']:.4f}".rstrip("0") in card or (
        "value:" in card
    )
    place = tmp_path / "alone"
    shutil.copytree(folder, place)
    config = load_config(runs / "distilled" / "config.json")
    pixels = load_splits(config.data).test.pixels[0]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / "picture.png")
    inputs, _, _ = split_of(runs / "distilled", "test")
    answer = onnx_inference_fn(place / "model.onnx")(inputs[:1])["logits"].argmax().item()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "snippet.py").write_text(snippet)
    monkeypatch.chdir(place)
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "snippet.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == str(answer)


# what is refused


def listing(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_a_file_that_answers_worse_is_not_kept(runs, tmp_path, capsys):
    before = listing(runs)
    given = [str(runs / "distilled"), "--percentile", "60", "--out", str(tmp_path / "q")]
    assert run_command("quantize", [*given, "--max-drop", "2.5"], "deit quantize") == 4
    said = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in said if line.startswith("deit: error")]
    assert len(lines) == 1
    drop, before_it, after_it = map(float, re.findall(r"\b\d+\.\d\d\b", lines[0]))
    assert drop == pytest.approx(before_it - after_it, abs=0.011)
    assert drop > 2.5
    for name in (f"{runs / 'distilled'}:", "--max-drop 2.5", "--method dynamic", "--sensitivity"):
        assert name in lines[0]
    assert not any(tmp_path.iterdir())
    assert listing(runs) == before


@pytest.mark.parametrize(
    ("right", "most", "refused"), [(99, 1.0, False), (98, 1.0, True), (100, 0.0, False)]
)
def test_the_drop_that_is_allowed_is_allowed(right, most, refused):
    heads = {"float": 1.0, "int8": right / 100}
    found = {name: {"heads": {"class": {"top1": one}}} for name, one in heads.items()}
    found |= {"calibration": None, "run": "runs/x"}
    worst = {"layer": "blocks.0.attn.qkv"}
    found["sensitivity"] = {"layers": [worst, {"layer": "head"}]}
    if refused:
        with raises(CheckpointError, "--max-drop 1", "--exclude 'blocks.0.attn.qkv'"):
            quantize.check_accuracy_drop(found, most, ["static"], trainable=False)
    else:
        drop = quantize.check_accuracy_drop(found, most, ["static"], trainable=True)
        assert drop["drop_points"] == pytest.approx(100 - right)


@pytest.mark.parametrize(
    ("how", "number", "ways"),
    [
        ("minmax", 128, ["--calibration-method percentile"]),
        ("entropy", 128, ["--calibration-method minmax", "--calibration-method percentile"]),
        ("percentile", 3, ["--calibration-method minmax", "--calibration-images 128"]),
        ("learnt", 0, []),
    ],
)
def test_ways_that_were_not_gone_are_named(how, number, ways):
    found = {name: {"heads": {"class": {"top1": one}}} for name, one in (("float", 1), ("int8", 0))}
    found |= {"calibration": {"how": how, "num_samples": number}, "run": "runs/x"}
    with raises(CheckpointError, "runs/x", "--max-drop 1", "--exclude") as refused:
        quantize.check_accuracy_drop(found, 1.0, [], trainable=False)
    assert re.findall(r"--calibration-\w+ \w+", str(refused.value)) == ways


def test_refusals_come_before_the_work_and_leave_nothing(runs, tmp_path, capsys, monkeypatch):
    def exported(*nothing):
        pytest.fail("a network was exported, which takes the most")

    monkeypatch.setattr(onnx_student, "write_onnx_with_metadata", exported)

    def refused(code, names, *arguments):
        before = listing(runs)
        given = [str(word) for word in arguments]
        assert run_command("quantize", given, "deit quantize") == code
        said = capsys.readouterr()
        assert all(name in said.err for name in names), said.err
        assert said.out == ""
        assert listing(runs) == before

    run = runs / "distilled"
    there = tmp_path / "there"
    there.mkdir()
    out = ("--out", there / "x")
    refused(2, ["--calibration-images 0"], run, "--calibration-images", 0)
    refused(2, ["--calibration-images -3"], run, "--calibration-images", -3)
    refused(2, ["--max-drop -1"], run, "--max-drop", -1)
    refused(2, ["--max-drop nan"], run, "--max-drop", "nan")
    refused(2, ["--percentile 101"], run, "--percentile", 101)
    refused(2, ["--percentile nan"], run, "--percentile", "nan")
    both = ["--percentile", "--calibration-method", "minmax"]
    refused(2, both, run, "--percentile", 99, "--calibration-method", "minmax")
    both = ["--calibration-images", "--method dynamic"]
    refused(2, both, run, "--method", "dynamic", "--calibration-images", 5)
    refused(2, ["--exclude blocks["], run, "--exclude", "blocks[")
    layers = "patch_embed.proj, blocks.0"
    refused(2, ["--exclude block.0.*", layers], run, "--exclude", "block.0.*", *out)
    refused(2, ["--exclude .*:"], run, "--exclude", ".*", *out)
    refused(2, ["--exclude .*query_key", layers], run, "--exclude", ".*query_key", *out)
    both = ["--method dynamic", "--method static"]
    refused(2, both, runs / "convnet", "--method", "dynamic", *out)
    refused(
        3,
        ["--calibration-images 5000", "--method dynamic"],
        run,
        "--calibration-images",
        5000,
        *out,
    )
    refused(4, [f"{runs / 'none'}"], runs / "none")
    refused(5, [f"--out {there}", "--force"], run, "--out", there)
    refused(5, [f"--out {run}", "best"], run, "--out", run, "--force")
    refused(5, [f"--json {there}"], run, *out, "--json", there)
    assert not any(there.iterdir())


def test_a_run_that_is_not_finished_is_refused(runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with raises(CheckpointError, tmp_path / "run", "--resume"):
        quantize.quantize(tmp_path / "run", tmp_path / "out", QuantizeOptions())
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(runs, monkeypatch, capsys):
    import deit.deploy.export

    monkeypatch.setattr(deit.deploy.export, "find_spec", lambda name: name != "onnxruntime" or None)
    assert run_command("quantize", [str(runs / "plain")], "deit quantize") == 5
    said = capsys.readouterr().err
    assert re.search(r"deit quantize\b.*\bonnxruntime\b.*pip install 'deit\[export\]'", said)


def test_a_file_that_fails_in_small_batches_is_not_kept(runs, tmp_path, monkeypatch):
    def broken(path, **options):
        answer = onnx_inference_fn(path, **options)
        if (
            "int8" not in str(path)
            and path.name == "model.onnx"
            and path.parent.name.startswith(".deit-new")
        ):
            return lambda images: {
                name: one + (len(images) == 1) for name, one in answer(images).items()
            }
        return answer

    monkeypatch.setattr(int8_compare, "onnx_inference_fn", broken)
    with raises(CheckpointError, "int8", "dB") as refused:
        quantize.quantize(runs / "plain", tmp_path / "out", QuantizeOptions(), max_drop=100)
    assert re.search(rf"\b{min(BATCHES)}\b.* dB\b.*\b{max(BATCHES)}\b", str(refused.value))
    assert not any(tmp_path.iterdir())


def test_attention_that_was_not_found_is_told(runs, tmp_path, monkeypatch):
    from deit.deploy import onnx_student

    def lacking(source, target):
        layers = prepare(source, target)
        return layers._replace(products=layers.products[1:])

    monkeypatch.setattr(onnx_student, "prepare", lacking)
    with raises(CheckpointError, "PyTorch", "ONNX Runtime") as refused:
        quantize.quantize(runs / "plain", tmp_path / "out", QuantizeOptions())
    assert re.findall(r"\d+", str(refused.value)) == ["1", "1", "2"]  # products, attention


@pytest.mark.slow
def test_the_command_from_elsewhere(runs, zygote, tmp_path):
    done = zygote.run(
        *("quantize", runs / "plain", "--method", "dynamic", "--out", "q", "--max-drop", "100"),
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    assert re.search(r"\bdynamic\b.*\b359\b", done.out)
    assert "Finding optimal" not in done.out
    assert sorted(file.name for file in (tmp_path / "q").iterdir()) == FILES


# the processor, the clock


@pytest.mark.parametrize(
    ("flags", "machine", "expected"),
    [
        ("avx2 avx512f avx512_vnni", "x86_64", False),
        ("avx2 avx_vnni", "x86_64", False),
        ("avx512f amx_int8", "AMD64", False),
        ("avx2", "x86_64", True),
        ("avx2 avx512f", "x86_64", True),
        ("", "AMD64", True),
        ("asimddp", "aarch64", False),
        ("", "arm64", False),
    ],
)
def test_sums_are_cut_off_on_x86_without_vnni(flags, machine, expected):
    assert hardware.int8_sums_saturate(tuple(flags.split()), machine) == expected


def test_flags_are_read_where_linux_tells_them(tmp_path, monkeypatch):
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "_CPUINFO", told)
    assert hardware.int8_flags() == ()
    told.write_text("model name\t: A CPU\nflags\t\t: fpu avx2 avx512_vnni_x avx_vnni\n")
    assert hardware.int8_flags() == ("avx2", "avx_vnni")
    assert hardware.cpu_name().startswith("A CPU, ")
    told.write_text("BogoMIPS\t: 50\nFeatures\t: fp asimd asimddp i8mm\n")
    assert hardware.int8_flags() == ("asimddp", "i8mm")


def test_a_timed_session_has_its_threads_and_lets_them_rest(micro, monkeypatch):
    asked, session = [], onnxruntime.InferenceSession

    def watched(path, options, **others):
        asked.append(options)
        return session(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    onnx_inference_fn(micro[0], threads=2)
    assert asked[0].intra_op_num_threads == 2
    assert asked[0].get_session_config_entry("session.force_spinning_stop") == "1"


def test_networks_are_timed_in_turns(monkeypatch):
    now, called = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def network(name, milliseconds):
        def call(images):
            called.append(name)
            now[0] += next(milliseconds) / 1000

        return call

    slow = iter([5.0, 10.0] * 20)  # each second call is the one that counts
    fast = iter([9.0, 1.0] * 19 + [9.0, 3.0])
    found = latency.latencies(
        {"slow": network("slow", slow), "fast": network("fast", fast)},
        torch.zeros(1),
        seconds=0.49,
    )
    assert found["slow"] == pytest.approx((10, 10, 10, 20))
    assert found["fast"] == pytest.approx((1, 1, 1, 20))
    assert called[:8] == ["slow", "slow", "fast", "fast", "fast", "fast", "slow", "slow"]


def test_ten_turns_are_made_and_long_calls_need_no_warming(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def network(images):
        calls.append(len(calls))
        now[0] += (100 + len(calls)) / 1000

    found = latency.latencies({"one": network}, torch.zeros(1), seconds=0)
    assert found["one"].turns == 10
    assert len(calls) == 11  # the first turn cannot know
    assert found["one"].median_ms == pytest.approx(106.5)
    assert found["one"].p10_ms == pytest.approx(102.9)
    assert found["one"].p90_ms == pytest.approx(110.1)
