"""A run's student as float ONNX, held against the run; images as that file takes them."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deit.config.schema import Config
from deit.core.console import info
from deit.core.errors import CheckpointError
from deit.core.tensors import evenly_spaced
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.deploy.export import BATCHES, run_graph, split_normalization, verify
from deit.deploy.formats import (
    FORMATS,
    Graph,
    onnx_inference_fn,
    outputs_of,
    strip_node_metadata,
    write_onnx_with_metadata,
)
from deit.deploy.int8_layers import QuantizableLayers, attentions, prepare
from deit.distill.inference import evaluation_batches
from deit.evaluation.load_run import evaluation_images
from deit.models.saved import ModelInfo
from deit.models.student import Student
from deit.models.surgery.fake_quant import disable_fake_quant

CHUNK = 64
"""Images that a file is asked at once."""
_VERIFIED = 512


class OnnxStudent(NamedTuple):
    """A student as float ONNX.

    config: as the run is evaluated. run: its folder. normalise: turns views in [0, 1] into what the
    file takes. original: the file; prepared: the same with known shapes, as quantizing needs it.
    layers: what of it can become integers. test: the test images. checked: how it was held against
    the run. rounding: the run itself, which takes what the file takes, where its layers round: the
    file holds its weights as they are; None: it does not round, and answers as the file does.
    """

    config: Config
    facts: ModelInfo
    run: Path
    normalise: Callable[[Tensor], Tensor]
    original: Path
    prepared: Path
    layers: QuantizableLayers
    test: InMemoryImages | EncodedImages
    checked: dict[str, Any]
    rounding: Student | None

    def inputs(
        self, images: InMemoryImages | EncodedImages, rows: Tensor, *, size: int = CHUNK
    ) -> Iterator[Tensor]:
        """Images of a split in their evaluation view, normalised, so many at a time. rows: int64,
        their places."""
        device = torch.device("cpu")
        for views in evaluation_batches(
            images, rows.split(size), self.config.evaluation, device=device
        ):
            yield self.normalise(views)


def split_images(
    config: Config, facts: ModelInfo, run: Path, name: str
) -> InMemoryImages | EncodedImages:
    """The images of another split than test. Encoded ones stay so, whatever the run made of them:
    few of them are looked at. Raises DataError."""
    config = config.replace(data={"storage": "files"})
    return evaluation_images(config, facts, run, name, None, None).images


def export_float_onnx(
    config: Config, student: Student, facts: ModelInfo, *, run: Path, place: Path
) -> OnnxStudent:
    """Write the student of a run into a folder and hold it against the original.

    student: is made to take images as the file does, and stays with it where it rounds. Raises
    CheckpointError where it answers otherwise, or holds attention in another form than quantizing
    knows; ConfigError where it cannot be written.
    """
    test = evaluation_images(config, facts, run, "test", None, None).images
    bare, normalise = split_normalization(student)
    rounding = copy.deepcopy(bare) if facts.student.qat != "none" else None
    disable_fake_quant(bare.network)
    original, prepared = place / "model.onnx", place / "prepared.onnx"
    write_onnx_with_metadata(place, bare, facts)
    layers = prepare(original, prepared)
    strip_node_metadata(original)
    _check_products(layers, bare.network)
    known = (config, facts, run, normalise, original, prepared, layers, test)
    file = OnnxStudent(*known, {}, rounding)
    inputs = torch.cat(list(file.inputs(test, evenly_spaced(len(test.labels), _VERIFIED))))
    number = len(inputs)
    inputs = inputs[torch.arange(max(number, sum(BATCHES))) % number]
    expected = run_graph(Graph(bare), outputs_of(bare), inputs)
    tolerance = FORMATS["onnx"].tolerance
    one = verify("onnxruntime", onnx_inference_fn(original), inputs, expected, tolerance=tolerance)
    run = "the run's" if rounding is None else "those of the run's weights without roundings"
    info(f"verified  the float file: logits differ from {run} by {one.difference:.1e} at most")
    one = one._replace(loader="onnxruntime, before quantization", images=number)
    return file._replace(checked=one._asdict())


def _check_products(layers: QuantizableLayers, network: nn.Module) -> None:
    """Two products of activations in each block of attention, or they were not all found."""
    number = len(attentions(network))
    if number and len(layers.products) != 2 * number:
        raise CheckpointError(
            f"the ONNX file holds {len(layers.products)} products of activations, for "
            f"{number} layers of attention {2 * number} were expected: this release of "
            "PyTorch or ONNX Runtime writes attention otherwise than quantizing knows"
        )
