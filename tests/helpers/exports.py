"""Exported files, and the images and outputs that they are compared with."""

import functools
import json

import torch

from deit.config.presets import LOSS_PRESETS
from deit.config.sections.student import StudentConfig
from deit.config.validation import load_config
from deit.core.hardware import int8_flags, int8_sums_saturate
from deit.core.types import logits_by_head
from deit.datasets.splits import load_splits
from deit.deploy.export import split_normalization
from deit.deploy.export_formats import onnx_inference_fn, write_onnx_with_metadata
from deit.deploy.int8_layers import prepare
from deit.distill.inference import views_of_chunks
from deit.models.saved_student import ModelInfo, load_student, student_from_info

SMALL_DEIT = {"depth": 2, "embed_dim": 48, "num_heads": 4}
QUANTIZABLE = [("distilled", "static"), ("distilled", "dynamic"), ("plain", "static")]
QUANTIZABLE += [("convnet", "static")]  # dynamic does not support it
WITHOUT_TEACHER = {"loss": LOSS_PRESETS["none"], "teacher": {"source": ()}}
ONE_BLOCK = {**SMALL_DEIT, "depth": 1}  # a second block takes a third of the time of an export
STUDENTS = {
    "distilled": {"student": SMALL_DEIT, **WITHOUT_TEACHER},
    "plain": {"student": {**SMALL_DEIT, "name": "vit_micro"}, **WITHOUT_TEACHER},
    "cropped": {"student": ONE_BLOCK, "views": {"eval_crop_pct": 0.8}, **WITHOUT_TEACHER},
    "two tokens": {"student": {**ONE_BLOCK, "num_distillation_tokens": 2}},
}
WRITTEN = {}


def write_once(folder, student, model_info):
    """Write an ONNX file; export each network only once, as that takes most of the time."""
    weights = student.state_dict().values()
    key = (repr(model_info), tuple(weight.double().sum().item() for weight in weights))
    if key not in WRITTEN:
        write_onnx_with_metadata(folder, student, model_info)
        WRITTEN[key] = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(WRITTEN[key])


def int8_inference_fn(path):
    """Return an int8 file with 8-bit weights as a function that is exact on any CPU.

    On x86 without VNNI, ONNX Runtime's integer kernels saturate sums of 8-bit products. There, its
    graph optimizations are disabled, so that layers compute in float with the quantized values.
    """
    if not int8_sums_saturate(int8_flags()):
        return onnx_inference_fn(path)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def infer(images):
        outputs = session.run(None, {"pixel_values": images.numpy()})
        return {name: torch.from_numpy(logits) for name, logits in zip(names, outputs)}

    return infer


def quantization_report(folder):
    return json.loads((folder / "quantization.json").read_text())


@torch.no_grad()
def split_views(run, name):
    """Return normalized evaluation views of a split, their labels, and the run's logits by head."""
    config = load_config(run / "config.json")
    student, _ = load_student(run / "best")
    images = getattr(load_splits(config.data), name)
    chunks = torch.arange(len(images.labels)).split(100)
    views = torch.cat(
        list(views_of_chunks(images, chunks, config.evaluation, device=torch.device("cpu")))
    )
    heads = logits_by_head(student.eval()(views))
    _, normalize = split_normalization(student)
    return normalize(views), images.labels, heads


class OnnxGraph:
    """An ONNX graph with the producer of each tensor."""

    def __init__(self, path):
        import onnx

        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        self.model = model
        self.nodes = {node.name: node for node in model.graph.node}
        self.producers = {out: node for node in model.graph.node for out in node.output}
        self.constants = {constant.name: constant for constant in model.graph.initializer}

    def kinds(self, *names):
        """Return the operations that produce the inputs of a node, given by one of its names."""
        node = next(self.nodes[name] for name in names if name in self.nodes)
        return [self.producers[name].op_type for name in node.input if name in self.producers]

    def integer_layers(self, layers):
        """Return the layers that are computed in int8, by static or dynamic quantization."""
        int8_layers = set()
        for layer, names in layers.nodes.items():
            for name in names:
                quantized = [f"{name}_quant", f"{name}_MatMul_quant"]
                matches = [node for node in quantized if node in self.nodes]
                if matches:
                    assert self.nodes[matches[0]].op_type == "MatMulInteger"
                    int8_layers.add(layer)
                elif self.kinds(name, f"{name}_MatMul")[:2] == ["DequantizeLinear"] * 2:
                    int8_layers.add(layer)
        return int8_layers


def prepared_network(folder, name, *, size=8, classes=3, **settings):
    """Return a prepared float ONNX file of a random network, its layers, and the network."""
    student = StudentConfig(name=name, image_size=size, **settings)
    model_info = ModelInfo(student, tuple(map(str, range(classes))), (0.5,) * 3, (0.5,) * 3, 1.0)
    torch.manual_seed(0)
    network = student_from_info(model_info)
    bare, _ = split_normalization(network)
    write_once(folder, bare, model_info)
    layers = prepare(folder / "model.onnx", folder / "prepared.onnx")
    return folder / "prepared.onnx", layers, network.network


@functools.cache
@torch.no_grad()
def views_of_test_set(run):
    """Return all test images as inputs of an export, and the run's logits by head."""
    config = load_config(run / "config.json")
    student, _ = load_student(run / "best")
    test = load_splits(config.data).test
    chunks = torch.arange(len(test.labels)).split(100)
    views = torch.cat(
        list(views_of_chunks(test, chunks, config.evaluation, device=torch.device("cpu")))
    )
    return (views - student.mean) / student.std, logits_by_head(student.eval()(views))
