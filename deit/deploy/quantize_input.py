"""Export a run's student as float ONNX, verified against the run, as the input of quantization."""

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
from deit.deploy.export import fill_batches, run_graph, split_normalization, verify
from deit.deploy.export_formats import (
    FORMATS,
    Graph,
    onnx_inference_fn,
    outputs_of,
    strip_node_metadata,
    write_onnx_with_metadata,
)
from deit.deploy.int8_layers import QuantizableLayers, attentions, prepare
from deit.distill.inference import views_of_chunks
from deit.evaluation.load_run import evaluation_images
from deit.models.saved_student import ModelInfo
from deit.models.student import Student
from deit.models.surgery.fake_quant import disable_fake_quant

CHUNK = 64
"""Images per call of an ONNX file."""
_NUM_VERIFIED = 512


class OnnxStudent(NamedTuple):
    """A student as float ONNX.

    config: for evaluation. run: the run's folder. normalize: turns views in [0, 1] into the file's
    input. original: the file. prepared: the same with known shapes, as quantization needs it.
    layers: those that can be quantized. test: the test images. verification: the comparison with
    the run. fake_quant: the student with fake quantization, if it was trained with it (the file
    has its float weights); it takes the file's input. None: the student is the file's original.
    """

    config: Config
    model_info: ModelInfo
    run: Path
    normalize: Callable[[Tensor], Tensor]
    original: Path
    prepared: Path
    layers: QuantizableLayers
    test: InMemoryImages | EncodedImages
    verification: dict[str, Any]
    fake_quant: Student | None

    def inputs(
        self, images: InMemoryImages | EncodedImages, rows: Tensor, *, size: int = CHUNK
    ) -> Iterator[Tensor]:
        """Yield evaluation views of a split, normalized, in batches of `size`.

        rows: int64, the indices of the images.
        """
        settings, device = self.config.evaluation, torch.device("cpu")
        for views in views_of_chunks(images, rows.split(size), settings, device=device):
            yield self.normalize(views)

    def test_inputs(self, num_images: int) -> Tensor:
        """Return the inputs of test images, evenly spaced over the split."""
        rows = evenly_spaced(len(self.test.labels), num_images)
        return torch.cat(list(self.inputs(self.test, rows)))


def split_images(
    config: Config, model_info: ModelInfo, run: Path, name: str
) -> InMemoryImages | EncodedImages:
    """Return the images of a split other than test. Raises DataError.

    Encoded images are not decoded in advance, as only few of them are needed.
    """
    config = config.replace(data={"storage": "files"})
    return evaluation_images(config, model_info, run, name, None, None).images


def export_float_onnx(
    config: Config, student: Student, model_info: ModelInfo, *, run: Path, folder: Path
) -> OnnxStudent:
    """Write a run's student as float ONNX and verify it against the student.

    student: is changed to take normalized images. folder: for the files. Raises CheckpointError if
    the file differs from the student or if its attention is not recognized, ConfigError if the
    network cannot be exported.
    """
    test = evaluation_images(config, model_info, run, "test", None, None).images
    bare, normalize = split_normalization(student)
    fake_quant = copy.deepcopy(bare) if model_info.student.qat != "none" else None
    disable_fake_quant(bare.network)
    original, prepared = folder / "model.onnx", folder / "prepared.onnx"
    write_onnx_with_metadata(folder, bare, model_info)
    layers = prepare(original, prepared)
    strip_node_metadata(original)
    _check_products(layers, bare.network)
    file = OnnxStudent(
        config=config,
        model_info=model_info,
        run=run,
        normalize=normalize,
        original=original,
        prepared=prepared,
        layers=layers,
        test=test,
        verification={},
        fake_quant=fake_quant,
    )
    inputs = file.test_inputs(_NUM_VERIFIED)
    num_images = len(inputs)
    inputs = fill_batches(inputs)
    expected = run_graph(Graph(bare), outputs_of(bare), inputs)
    inference_fn, tolerance = onnx_inference_fn(original), FORMATS["onnx"].tolerance
    verification = verify("onnxruntime", inference_fn, inputs, expected, tolerance=tolerance)
    reference = "the run's" if fake_quant is None else "those of the run without fake quantization"
    info(
        f"verified  the float file: logits differ from {reference} by "
        f"{verification.difference:.1e} at most"
    )
    loader = "onnxruntime, before quantization"
    verification = verification._replace(loader=loader, images=num_images)
    return file._replace(verification=verification._asdict())


def _check_products(layers: QuantizableLayers, network: nn.Module) -> None:
    """Raise CheckpointError unless each attention layer has two products of activations."""
    num_layers = len(attentions(network))
    if num_layers and len(layers.products) != 2 * num_layers:
        raise CheckpointError(
            f"the ONNX file has {len(layers.products)} products of activations; "
            f"{num_layers} attention layers should have {2 * num_layers}: this release of PyTorch "
            "or ONNX Runtime exports attention in an unknown form"
        )
