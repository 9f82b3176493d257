"""Exported files, and the images and outputs that they are compared with."""

import functools
import json

import torch

from deit.config.presets import LOSS_PRESETS
from deit.config.student_section import StudentConfig
from deit.config.validation import load_config
from deit.core.types import logits_by_head
from deit.datasets.splits import load_splits
from deit.deploy.export import split_normalization
from deit.deploy.formats import write_onnx_with_metadata
from deit.deploy.int8_layers import (
    prepare,
)
from deit.distill.inference import evaluation_batches
from deit.models.saved import ModelInfo, build_student, load_student

SMALL_DEIT = {"depth": 2, "embed_dim": 48, "num_heads": 4}
QUANTIZABLE = [("distilled", "static"), ("distilled", "dynamic"), ("plain", "static")]
QUANTIZABLE += [("convnet", "static")]  # by dynamic it is refused
WITHOUT_TEACHER = {"loss": LOSS_PRESETS["none"], "teacher": {"source": ()}}
ONE_BLOCK = {**SMALL_DEIT, "depth": 1}  # a second block takes a third of the time of an export
STUDENTS = {
    "distilled": {"student": SMALL_DEIT, **WITHOUT_TEACHER},
    "plain": {"student": {**SMALL_DEIT, "name": "vit_micro"}, **WITHOUT_TEACHER},
    "cropped": {"student": ONE_BLOCK, "views": {"eval_crop_pct": 0.8}, **WITHOUT_TEACHER},
    "two tokens": {"student": {**ONE_BLOCK, "num_distillation_tokens": 2}},
}
WRITTEN = {}


def write_once(folder, student, facts):
    """A network is exported once, which takes the most."""
    held = student.state_dict().values()
    key = (repr(facts), tuple(value.double().sum().item() for value in held))
    if key not in WRITTEN:
        write_onnx_with_metadata(folder, student, facts)
        WRITTEN[key] = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(WRITTEN[key])


def quantization_report(folder):
    return json.loads((folder / "quantization.json").read_text())


@torch.no_grad()
def split_views(run, name):
    """Normalised evaluation views of a whole split, their labels, and the run's own logits."""
    config = load_config(run / "config.json")
    student, _ = load_student(run / "best")
    images = getattr(load_splits(config.data), name)
    chunks = torch.arange(len(images.labels)).split(100)
    views = torch.cat(
        list(evaluation_batches(images, chunks, config.evaluation, device=torch.device("cpu")))
    )
    heads = logits_by_head(student.eval()(views))
    _, normalise = split_normalization(student)
    return normalise(views), images.labels, heads


class OnnxGraph:
    """An ONNX file as what makes and what takes each tensor."""

    def __init__(self, path):
        import onnx

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


def prepared_network(folder, name, *, size=8, classes=3, **settings):
    """A random network as float ONNX, prepared: its path, its layers, itself."""
    student = StudentConfig(name=name, image_size=size, **settings)
    facts = ModelInfo(student, tuple(map(str, range(classes))), (0.5,) * 3, (0.5,) * 3, 1.0)
    torch.manual_seed(0)
    network = build_student(facts)
    bare, _ = split_normalization(network)
    write_once(folder, bare, facts)
    layers = prepare(folder / "model.onnx", folder / "prepared.onnx")
    return folder / "prepared.onnx", layers, network.network


@functools.cache
@torch.no_grad()
def views_of_test_set(run):
    """All test images as an exported network takes them, and the run's logits by head."""
    config = load_config(run / "config.json")
    student, _ = load_student(run / "best")
    test = load_splits(config.data).test
    chunks = torch.arange(len(test.labels)).split(100)
    views = torch.cat(
        list(evaluation_batches(test, chunks, config.evaluation, device=torch.device("cpu")))
    )
    return (views - student.mean) / student.std, logits_by_head(student.eval()(views))
