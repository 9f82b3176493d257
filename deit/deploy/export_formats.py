"""Export formats: how a student is written, and how other packages load it."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deit.config.command_choices import EXPORT_PACKAGES
from deit.core.errors import ConfigError, first_line, raise_if_transient
from deit.core.types import logits_by_head
from deit.models.saved_student import WEIGHTS, ModelInfo, save_weights
from deit.models.student import Student, has_distillation_head
from deit.models.timm_format import load_from_timm, timm_config
from deit.models.transformers_format import (
    load_from_transformers,
    preprocessor_config,
    to_transformers,
    transformers_config,
)

Heads = dict[str, Tensor]
InferenceFn = Callable[[Tensor], Heads]
"""Normalized images [batch, 3, side, side] -> logits [batch, classes] by output name.

A format can lack some of the outputs.
"""

OUTPUTS = {"logits": "fused", "class_logits": "class", "distillation_logits": "distillation"}
"""The outputs of an exported network, and the heads they are.

A network with one head has the output `logits` only.
"""


class ExportFormat(NamedTuple):
    """An export format.

    check: raises ConfigError if the format does not support the network. write: writes a student
    that takes normalized images into a folder. load: loads the folder, by the package that does it
    without our code. needs: packages needed to write. tolerance: largest difference of a logit.
    """

    check: Callable[[Student, ModelInfo], object]
    write: Callable[[Path, Student, ModelInfo], None]
    load: dict[str, Callable[[Path], InferenceFn]]
    needs: tuple[str, ...]
    tolerance: float


class Graph(nn.Module):
    """A student with plain tensors as outputs, in the order of `outputs_of`."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        heads = logits_by_head(self.student(pixel_values))
        return tuple(heads.get(OUTPUTS[name], heads["class"]) for name in outputs_of(self.student))


def outputs_of(student: Student) -> tuple[str, ...]:
    """Return the names of a student's outputs."""
    return tuple(OUTPUTS) if has_distillation_head(student.network) else ("logits",)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_timm(folder: Path, student: Student, model_info: ModelInfo) -> None:
    save_weights(folder / WEIGHTS, student.network.state_dict())
    _write_json(folder / "config.json", timm_config(model_info, student.network))


def _load_with_timm(folder: Path) -> InferenceFn:
    network = load_from_timm(folder)
    return lambda images: {"logits": network(images)}


def _write_transformers(folder: Path, student: Student, model_info: ModelInfo) -> None:
    save_weights(folder / WEIGHTS, to_transformers(student.network.state_dict()))
    _write_json(folder / "config.json", transformers_config(model_info))
    _write_json(folder / "preprocessor_config.json", preprocessor_config(model_info))


def _load_with_transformers(folder: Path) -> InferenceFn:
    network = load_from_transformers(folder)
    names = {
        "logits": "logits",
        "cls_logits": "class_logits",
        "distillation_logits": "distillation_logits",
    }

    def infer(images: Tensor) -> Heads:
        outputs = network(pixel_values=images)
        return {name: outputs[key] for key, name in names.items() if key in outputs}

    return infer


_EXAMPLE_IMAGES = 2  # with one image, exporters would fix the batch size to one


def _graph_and_example(
    student: Student, model_info: ModelInfo
) -> tuple[Graph, tuple[Tensor], dict[str, Any]]:
    """Return what exporters take: the network, an example input, and its dynamic dimensions."""
    side = model_info.student.image_size
    batch = torch.export.Dim("batch")
    return (
        Graph(student).eval(),
        (torch.zeros(_EXAMPLE_IMAGES, 3, side, side),),
        {"pixel_values": {0: batch}},
    )


def _write_onnx(folder: Path, student: Student, model_info: ModelInfo) -> None:
    """Write one file, with the weights inside; ONNX allows 2 GB."""
    import onnx

    model = _export_onnx(student, model_info)
    _clear_metadata(model)
    onnx.save(model, folder / "model.onnx")


def write_onnx_with_metadata(folder: Path, student: Student, model_info: ModelInfo) -> None:
    """Write an ONNX file that with PyTorch's metadata of each node (modules, source lines)."""
    import onnx

    onnx.save(_export_onnx(student, model_info), folder / "model.onnx")


def _export_onnx(student: Student, model_info: ModelInfo) -> Any:
    import onnx

    graph, example, shapes = _graph_and_example(student, model_info)
    # onnxscript 0.6 prints the number of its rewrite rules.
    with _translate_errors(), redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            input_names=["pixel_values"],
            output_names=list(outputs_of(student)),
            dynamic_shapes=shapes,
            verbose=False,
        )
    model = program.model_proto
    _dedupe_weights(model.graph)
    onnx.helper.set_model_props(model, metadata(model_info))
    return model


def strip_node_metadata(file: Path) -> None:
    """Remove PyTorch's metadata from an ONNX file, a quarter of the bytes of a small network."""
    import onnx

    model = onnx.load(file)
    _clear_metadata(model)
    onnx.save(model, file)


def _clear_metadata(model: Any) -> None:
    graph = model.graph
    values = (*graph.value_info, *graph.initializer, *graph.input, *graph.output)
    for message in (graph, *graph.node, *values):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")


def _dedupe_weights(graph: Any) -> None:
    """Keep one of several equal weights of an ONNX graph.

    The exporter writes a copy of a weight for each block that shares it.
    """
    first: dict[tuple[Any, ...], str] = {}
    names: dict[str, str] = {}
    for weight in graph.initializer:
        key = (weight.data_type, tuple(weight.dims), weight.raw_data)
        if weight.raw_data:
            names[weight.name] = first.setdefault(key, weight.name)
    weights = [
        weight for weight in graph.initializer if names.get(weight.name, weight.name) == weight.name
    ]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def _load_with_onnxruntime(folder: Path) -> InferenceFn:
    return onnx_inference_fn(folder / "model.onnx")


def onnx_inference_fn(path: str | Path, *, threads: int | None = None) -> InferenceFn:
    """Return an ONNX file as a function, run by ONNX Runtime on the CPU.

    threads: number of threads. They then do not spin while they wait for work, as they do by
    default, so that the timing of several files in turns is fair. Default: ONNX Runtime's choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def infer(images: Tensor) -> Heads:
        outputs = session.run(None, {"pixel_values": images.numpy()})
        return {name: torch.from_numpy(logits) for name, logits in zip(names, outputs)}

    return infer


def _write_pt2(folder: Path, student: Student, model_info: ModelInfo) -> None:
    graph, example, shapes = _graph_and_example(student, model_info)
    with _translate_errors():
        program = torch.export.export(graph, example, dynamic_shapes=shapes)
    extra = {"metadata.json": json.dumps(metadata(model_info), indent=1)}
    with _quiet_exporters():
        torch.export.save(program, folder / "model.pt2", extra_files=extra)


def _load_with_torch(folder: Path) -> InferenceFn:
    with _quiet_exporters():
        network = torch.export.load(folder / "model.pt2").module()

    def infer(images: Tensor) -> Heads:
        outputs = network(images)
        names = tuple(OUTPUTS) if len(outputs) > 1 else ("logits",)
        return dict(zip(names, outputs))

    return infer


def metadata(model_info: ModelInfo) -> dict[str, str]:
    """Return what users of a single file need: how to prepare its input, and the class names."""
    side = model_info.student.image_size
    return {
        "network": model_info.student.name,
        "input": "pixel_values: float32 [batch, 3, height, width], RGB / 255, minus mean, over std",
        "image_size": str(side),
        "resize_shortest_edge": str(round(side / model_info.evaluation_crop)),
        "interpolation": "bicubic",
        "crop": "center",
        "mean": json.dumps(list(model_info.mean)),
        "std": json.dumps(list(model_info.std)),
        "class_names": json.dumps(list(model_info.class_names)),
    }


@contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Hide warnings of exporters about their internals: `verify` checks the outputs instead."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Turn errors of an exporter into one ConfigError, and hide its warnings."""
    try:
        with _quiet_exporters():
            yield
    except Exception as error:  # exporters raise types of their own
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outermost error only names the failed step
            cause = cause.__cause__
        raise_if_transient(cause, "the exporter")
        raise ConfigError(
            f"the exporter cannot trace this network ({type(cause).__name__}: "
            f"{first_line(cause)}); format timm supports timm's networks"
        ) from error


def _accept_any(student: Student, model_info: ModelInfo) -> None:
    """Accept any network: the exporter raises if it cannot trace it."""


FORMATS: dict[str, ExportFormat] = {
    "timm": ExportFormat(
        check=lambda student, model_info: timm_config(model_info, student.network),
        write=_write_timm,
        load={"timm": _load_with_timm, "transformers": _load_with_transformers},
        needs=(),
        tolerance=1e-5,
    ),
    "transformers": ExportFormat(
        check=lambda student, model_info: transformers_config(model_info),
        write=_write_transformers,
        load={"transformers": _load_with_transformers},
        needs=EXPORT_PACKAGES["transformers"],
        tolerance=1e-5,
    ),
    "onnx": ExportFormat(
        check=_accept_any,
        write=_write_onnx,
        load={"onnxruntime": _load_with_onnxruntime},
        needs=EXPORT_PACKAGES["onnx"],
        tolerance=1e-4,
    ),
    "pt2": ExportFormat(
        check=_accept_any,
        write=_write_pt2,
        load={"torch": _load_with_torch},
        needs=(),
        tolerance=1e-5,
    ),
}
"""All formats, by the name on the command line."""
