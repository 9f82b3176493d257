"""The formats of other tools: how a student is written, and how its users load it."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deit.config.choices import EXPORT_PACKAGES
from deit.core.errors import ConfigError, first_line, raise_transient
from deit.core.types import logits_by_head
from deit.models.saved import WEIGHTS, ModelInfo, save_weights
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
"""Normalised images [batch, 3, side, side] -> logits by output, those of them a format has."""

OUTPUTS = {"logits": "fused", "class_logits": "class", "distillation_logits": "distillation"}
"""The outputs of an exported network, and which of our heads they are; `logits` is the only one of
a network with one head."""


class ExportFormat(NamedTuple):
    """A way of writing a network.

    check: raises ConfigError where the network cannot be written so. write: the files, into a
    folder; the student takes normalised images. load: the folder by each package that loads it,
    without our code. needs: packages that must be there. tolerance: largest difference of a logit.
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
    """The names of a student's outputs."""
    return tuple(OUTPUTS) if has_distillation_head(student.network) else ("logits",)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_timm(folder: Path, student: Student, facts: ModelInfo) -> None:
    save_weights(folder / WEIGHTS, student.network.state_dict())
    _write_json(folder / "config.json", timm_config(facts, student.network))


def _with_timm(folder: Path) -> InferenceFn:
    network = load_from_timm(folder)
    return lambda images: {"logits": network(images)}


def _write_transformers(folder: Path, student: Student, facts: ModelInfo) -> None:
    save_weights(folder / WEIGHTS, to_transformers(student.network.state_dict()))
    _write_json(folder / "config.json", transformers_config(facts))
    _write_json(folder / "preprocessor_config.json", preprocessor_config(facts))


def _with_transformers(folder: Path) -> InferenceFn:
    network = load_from_transformers(folder)
    names = {"logits": "logits", "cls_logits": "class_logits"}
    names["distillation_logits"] = "distillation_logits"

    def answer(images: Tensor) -> Heads:
        found = network(pixel_values=images)
        return {ours: found[theirs] for theirs, ours in names.items() if theirs in found}

    return answer


_TRACED = 2  # images of the example: one alone would be taken for a batch that is always one


def _traced(student: Student, facts: ModelInfo) -> tuple[Graph, tuple[Tensor], dict[str, Any]]:
    """What an exporter needs: the network, an example, and which of its sides may vary."""
    side = facts.student.image_size
    batch = torch.export.Dim("batch")
    return (
        Graph(student).eval(),
        (torch.zeros(_TRACED, 3, side, side),),
        {"pixel_values": {0: batch}},
    )


def _write_onnx(folder: Path, student: Student, facts: ModelInfo) -> None:
    """One file: the weights lie in it, up to the 2 GB that ONNX allows."""
    import onnx

    model = _onnx_of(student, facts)
    _drop_notes(model)
    onnx.save(model, folder / "model.onnx")


def write_onnx_with_metadata(folder: Path, student: Student, facts: ModelInfo) -> None:
    """The same with what PyTorch notes on each node: the modules and lines that it comes from."""
    import onnx

    onnx.save(_onnx_of(student, facts), folder / "model.onnx")


def _onnx_of(student: Student, facts: ModelInfo) -> Any:
    import onnx

    graph, example, shapes = _traced(student, facts)
    with _tracing():
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
    onnx.helper.set_model_props(model, metadata(facts))
    return model


def strip_node_metadata(file: Path) -> None:
    """Leave them out of a file: of a small network they are a quarter."""
    import onnx

    model = onnx.load(file)
    _drop_notes(model)
    onnx.save(model, file)


def _drop_notes(model: Any) -> None:
    graph = model.graph
    values = (*graph.value_info, *graph.initializer, *graph.input, *graph.output)
    for part in (graph, *graph.node, *values):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _dedupe_weights(graph: Any) -> None:
    """Leave one of equal weights in an ONNX graph: the exporter folds those that blocks share into
    a copy for each use."""
    first: dict[tuple[Any, ...], str] = {}
    names: dict[str, str] = {}
    for weight in graph.initializer:
        key = (weight.data_type, tuple(weight.dims), weight.raw_data)
        if weight.raw_data:
            names[weight.name] = first.setdefault(key, weight.name)
    kept = [
        weight for weight in graph.initializer if names.get(weight.name, weight.name) == weight.name
    ]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _with_onnxruntime(folder: Path) -> InferenceFn:
    return onnx_inference_fn(folder / "model.onnx")


def onnx_inference_fn(path: Path, *, threads: int | None = None) -> InferenceFn:
    """An ONNX file as a call, on the CPU by ONNX Runtime.

    threads: as many compute, and none of them spins on for more work when an answer is there, as
    by default they do: several files can then be timed in turns. None: ONNX Runtime's own choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def answer(images: Tensor) -> Heads:
        found = session.run(None, {"pixel_values": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found)}

    return answer


def _write_pt2(folder: Path, student: Student, facts: ModelInfo) -> None:
    graph, example, shapes = _traced(student, facts)
    with _tracing():
        program = torch.export.export(graph, example, dynamic_shapes=shapes)
    extra = {"metadata.json": json.dumps(metadata(facts), indent=1)}
    with _quiet():
        torch.export.save(program, folder / "model.pt2", extra_files=extra)


def _with_torch(folder: Path) -> InferenceFn:
    with _quiet():
        network = torch.export.load(folder / "model.pt2").module()

    def answer(images: Tensor) -> Heads:
        found = network(images)
        names = tuple(OUTPUTS) if len(found) > 1 else ("logits",)
        return dict(zip(names, found))

    return answer


def metadata(facts: ModelInfo) -> dict[str, str]:
    """What the user of a lone file must know: what its input is, and what its outputs mean."""
    side = facts.student.image_size
    return {
        "network": facts.student.name,
        "input": "pixel_values: float32 [batch, 3, height, width], RGB / 255, minus mean, over std",
        "image_size": str(side),
        "resize_shortest_edge": str(round(side / facts.evaluation_crop)),
        "interpolation": "bicubic",
        "crop": "center",
        "mean": json.dumps(list(facts.mean)),
        "std": json.dumps(list(facts.std)),
        "class_names": json.dumps(list(facts.class_names)),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own innards; what matters is whether the file answers right."""
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
def _tracing() -> Iterator[None]:
    """Quietly; what an exporter cannot follow is one clear message. Raises ConfigError."""
    try:
        with _quiet():
            yield
    except Exception as error:  # exporters raise types of their own
        first: BaseException = error
        while first.__cause__ is not None:  # the outermost only says in which step it was
            first = first.__cause__
        raise_transient(first, "the exporter")
        raise ConfigError(
            f"the exporter cannot follow this network ({type(first).__name__}: "
            f"{first_line(first)}); --format timm keeps a network of timm, weights and all"
        ) from error


def _takes_any(student: Student, facts: ModelInfo) -> None:
    """Any network can be traced; where one cannot, the exporter says so."""


FORMATS: dict[str, ExportFormat] = {
    "timm": ExportFormat(
        check=lambda student, facts: timm_config(facts, student.network),
        write=_write_timm,
        load={"timm": _with_timm, "transformers": _with_transformers},
        needs=(),
        tolerance=1e-5,
    ),
    "transformers": ExportFormat(
        check=lambda student, facts: transformers_config(facts),
        write=_write_transformers,
        load={"transformers": _with_transformers},
        needs=EXPORT_PACKAGES["transformers"],
        tolerance=1e-5,
    ),
    "onnx": ExportFormat(
        check=_takes_any,
        write=_write_onnx,
        load={"onnxruntime": _with_onnxruntime},
        needs=EXPORT_PACKAGES["onnx"],
        tolerance=1e-4,
    ),
    "pt2": ExportFormat(
        check=_takes_any,
        write=_write_pt2,
        load={"torch": _with_torch},
        needs=(),
        tolerance=1e-5,
    ),
}
"""Every format by its name on the command line."""
