"""Compare an int8 file with its float original: predictions, noise, layers, latency."""

import math
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit.core.console import progress
from deit.core.errors import CheckpointError
from deit.core.metrics import agreement, topk_accuracy
from deit.core.tensors import evenly_spaced
from deit.deploy.export import BATCHES, run_graph
from deit.deploy.export_formats import (
    OUTPUTS,
    Graph,
    Heads,
    InferenceFn,
    onnx_inference_fn,
    outputs_of,
)
from deit.deploy.int8_graph import signal_to_noise
from deit.deploy.latency import latencies
from deit.deploy.quantize_input import CHUNK, OnnxStudent, split_images
from deit.evaluation.evaluate import head_metrics
from deit.viz.tables import HEADS

_NUM_SENSITIVITY_IMAGES = 512
_LATENCY_BATCHES = (1, 64)
_TIMED_S = 3.0
_MAX_LOSS_DB = 6.0
"""Small batches may have twice the noise amplitude of large ones."""


def final_head(by_head: dict[str, Any]) -> Any:
    """Return the value of the final head: fused, or class for a student with one head."""
    return by_head.get("fused", by_head["class"])


def compare_on_test(file: OnnxStudent, target: Path) -> dict[str, Any]:
    """Compare the float and the int8 file on all test images.

    Returns `float` and `int8`, each with `heads` as deit.evaluation.evaluate measures them; by head
    the `agreement` in [0, 1], and `sqnr_db`, the signal-to-noise ratio of the int8 logits (None
    where they are equal).
    """
    files = {"float": onnx_inference_fn(file.original), "int8": onnx_inference_fn(target)}
    labels = file.test.labels
    batches = file.inputs(file.test, torch.arange(len(labels)))
    total = math.ceil(len(labels) / CHUNK)
    with closing(progress(batches, total=total, title="comparing on test images")) as images:
        logits = _run_all(files, images)
    metrics = {
        name: {"heads": {head: head_metrics(values, labels) for head, values in heads.items()}}
        for name, heads in logits.items()
    }
    return {
        "split": "test",
        "num_samples": len(labels),
        **metrics,
        **_differences(logits["float"], logits["int8"]),
    }


def compare_to_run(file: OnnxStudent, target: Path) -> dict[str, Any]:
    """Compare an int8 file with a run trained with fake quantization, on all test images.

    Returns by head the `agreement` in [0, 1] and `sqnr_db`, None where the logits are equal.
    """
    graph, names = Graph(file.fake_quant), outputs_of(file.fake_quant)
    networks = {
        "run": lambda images: run_graph(graph, names, images),
        "int8": onnx_inference_fn(target),
    }
    batches = file.inputs(file.test, torch.arange(len(file.test.labels)))
    logits = _run_all(networks, batches)
    return _differences(logits["run"], logits["int8"])


def _differences(before: Heads, after: Heads) -> dict[str, dict[str, float | None]]:
    pairs = {head: (before[head], after[head]) for head in after}
    return {
        "agreement": {head: agreement(a.argmax(1), b.argmax(1)) for head, (a, b) in pairs.items()},
        "sqnr_db": {head: _finite(signal_to_noise(a, b)) for head, (a, b) in pairs.items()},
    }


def layer_sensitivity(
    file: OnnxStudent, layers: list[str], write: Callable[[Path, list[str]], None], folder: Path
) -> dict[str, Any]:
    """Measure signal to noise and top-1 with only one layer in int8, for each layer.

    The noise of one layer can only be seen without that of the others. Validation images are used,
    as the test images must not decide which layers stay float. write: writes a file with some
    layers in int8. folder: for temporary files. The layers come sorted, the noisiest first.
    """
    images = split_images(file.config, file.model_info, file.run, "validation")
    rows = evenly_spaced(len(images.labels), _NUM_SENSITIVITY_IMAGES)
    inputs, labels = list(file.inputs(images, rows)), images.labels[rows]
    before = final_head(_run_all({"float": onnx_inference_fn(file.original)}, inputs)["float"])
    target = folder / "one-layer.onnx"
    table = []
    for layer in progress(layers, total=len(layers), title="each layer alone in int8"):
        write(target, [layer])
        after = final_head(_run_all({"int8": onnx_inference_fn(target)}, inputs)["int8"])
        decibels = signal_to_noise(before, after)
        table.append(
            {
                "layer": layer,
                "sqnr_db": _finite(decibels),
                "noise_share": 10 ** (-decibels / 10),
                "top1": topk_accuracy(after, labels),
                "weights": file.layers.weights[layer],
            }
        )
    target.unlink(missing_ok=True)
    noise = sum(row["noise_share"] for row in table) or 1.0
    for row in table:
        row["noise_share"] /= noise
    return {
        "split": "validation",
        "num_samples": len(rows),
        "top1": topk_accuracy(before, labels),
        "layers": sorted(table, key=lambda row: -row["noise_share"]),
    }


def interleaved_latency(
    file: OnnxStudent, target: Path, *, threads: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure the latency of `float` and `int8` by batch size, as deit.deploy.latency does."""
    paths = {"float": file.original, "int8": target}
    networks = {name: onnx_inference_fn(path, threads=threads) for name, path in paths.items()}
    inputs = file.test_inputs(max(_LATENCY_BATCHES))
    inputs = inputs[torch.arange(max(_LATENCY_BATCHES)) % len(inputs)]
    by_file: dict[str, dict[str, dict[str, float]]] = {name: {} for name in paths}
    for batch in progress(_LATENCY_BATCHES, total=len(_LATENCY_BATCHES), title="latency"):
        for name, latency in latencies(networks, inputs[:batch], seconds=_TIMED_S).items():
            by_file[name][str(batch)] = latency._asdict()
    return by_file


def check_batch_invariance(file: OnnxStudent, target: Path) -> dict[str, Any]:
    """Measure how much the output for an image depends on the batch size, on test images.

    Returns among others `difference`, the largest difference of a logit, and
    `num_changed_predictions`, the number of images whose prediction depends on the batch size.
    Raises CheckpointError if one batch size is far noisier than the largest.
    """
    inference_fn = onnx_inference_fn(target)
    inputs = file.test_inputs(max(BATCHES))
    before = onnx_inference_fn(file.original)(inputs)["logits"]
    by_size = {
        size: torch.cat([inference_fn(batch)["logits"] for batch in inputs.split(size)])
        for size in BATCHES
    }
    decibels = {size: signal_to_noise(before, after) for size, after in by_size.items()}
    usual = decibels[max(BATCHES)]
    for size, value in decibels.items():
        if not value >= usual - _MAX_LOSS_DB:  # also for NaN
            raise CheckpointError(
                f"the int8 file is less exact in batches of {size}: {value:.1f} dB signal to "
                f"noise, {usual:.1f} dB in batches of {max(BATCHES)}"
            )
    logits = torch.stack(list(by_size.values()))
    predictions = logits.argmax(dim=2)
    return {
        "sizes": list(BATCHES),
        "num_samples": len(inputs),
        "difference": (logits.amax(dim=0) - logits.amin(dim=0)).max().item(),
        "num_changed_predictions": int((predictions != predictions[0]).any(dim=0).sum()),
        "sqnr_db": {str(size): _finite(value) for size, value in decibels.items()},
    }


def _run_all(networks: dict[str, InferenceFn], batches: Iterable[Tensor]) -> dict[str, Heads]:
    """Return the logits [images, classes] of several networks for the same images, by head."""
    outputs: dict[str, list[Heads]] = {name: [] for name in networks}
    for images in batches:
        for name, inference_fn in networks.items():
            outputs[name].append(inference_fn(images))
    return {name: _by_head(parts) for name, parts in outputs.items()}


def _by_head(parts: list[Heads]) -> Heads:
    """Concatenate the outputs of batches, and rename outputs to heads."""
    outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    heads = {
        OUTPUTS[name] if len(outputs) > 1 else "class": logits for name, logits in outputs.items()
    }
    return {head: heads[head] for head in HEADS if head in heads}


def _finite(decibels: float) -> float | None:
    """Return None for infinity (no noise), which JSON cannot represent."""
    return None if math.isinf(decibels) else decibels
