"""An int8 file beside the float one that it was made of: answers, noise, layers, time."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit.core.console import progress
from deit.core.errors import CheckpointError
from deit.core.metrics import agreement, topk_accuracy
from deit.core.tensors import evenly_spaced
from deit.deploy.export import BATCHES, run_graph
from deit.deploy.formats import OUTPUTS, Graph, Heads, InferenceFn, onnx_inference_fn, outputs_of
from deit.deploy.int8_graph import signal_to_noise
from deit.deploy.latency import latencies
from deit.deploy.onnx_student import CHUNK, OnnxStudent, split_images
from deit.evaluation.evaluate import head_metrics
from deit.viz.tables import HEADS

_SENSITIVE_ON = 512
_TIMED = (1, 64)
_TIMED_S = 3.0
_WORSE_DB = 6.0
"""The noise in small batches may have twice the amplitude of that in large ones."""


def final_head(heads: dict[str, Any]) -> Any:
    """Of what is told by head that of the student's answer: fused, of one head the class head's."""
    return heads.get("fused", heads["class"])


def compare_on_test(file: OnnxStudent, target: Path) -> dict[str, Any]:
    """What both files answer to all test images: `float` and `int8`, each with `heads` as
    deit.evaluation.evaluate measures them; by head their `agreement` in [0, 1] and `sqnr_db`, the
    signal to noise of the int8 logits, None where there is no noise."""
    files = {"float": onnx_inference_fn(file.original), "int8": onnx_inference_fn(target)}
    labels = file.test.labels
    batches = file.inputs(file.test, torch.arange(len(labels)))
    total = math.ceil(len(labels) / CHUNK)
    logits = _ask(files, progress(batches, total=total, title="comparing on test images"))
    pairs = {head: (logits["float"][head], after) for head, after in logits["int8"].items()}
    measured = {
        name: {"heads": {head: head_metrics(one, labels) for head, one in heads.items()}}
        for name, heads in logits.items()
    }
    return {
        "split": "test",
        "num_samples": len(labels),
        **measured,
        "agreement": {head: agreement(a.argmax(1), b.argmax(1)) for head, (a, b) in pairs.items()},
        "sqnr_db": {head: _finite(signal_to_noise(a, b)) for head, (a, b) in pairs.items()},
    }


def compare_to_run(file: OnnxStudent, target: Path) -> dict[str, Any]:
    """How an int8 file answers beside a run whose layers round, to all test images: by head the
    `agreement` in [0, 1] and `sqnr_db`, None where they are equal."""
    graph, names = Graph(file.rounding), outputs_of(file.rounding)
    files = {
        "run": lambda images: run_graph(graph, names, images),
        "int8": onnx_inference_fn(target),
    }
    batches = file.inputs(file.test, torch.arange(len(file.test.labels)))
    logits = _ask(files, batches)
    pairs = {head: (logits["run"][head], after) for head, after in logits["int8"].items()}
    return {
        "agreement": {head: agreement(a.argmax(1), b.argmax(1)) for head, (a, b) in pairs.items()},
        "sqnr_db": {head: _finite(signal_to_noise(a, b)) for head, (a, b) in pairs.items()},
    }


def layer_sensitivity(
    file: OnnxStudent, layers: list[str], write: Callable[[Path, list[str]], None], place: Path
) -> dict[str, Any]:
    """The signal to noise and top-1 with each layer alone in integers, the noisiest first.

    Alone, because its noise is then its own: that of one layer less drowns in that of all others.
    On validation images, because what stays float for their sake must not have seen the test
    images. write: the file of some layers in integers. place: where files are written and removed.
    """
    images = split_images(file.config, file.facts, file.run, "validation")
    rows = evenly_spaced(len(images.labels), _SENSITIVE_ON)
    inputs, labels = list(file.inputs(images, rows)), images.labels[rows]
    before = final_head(_ask({"float": onnx_inference_fn(file.original)}, inputs)["float"])
    target = place / "one-layer.onnx"
    found = []
    for layer in progress(layers, total=len(layers), title="layers alone in int8"):
        write(target, [layer])
        after = final_head(_ask({"int8": onnx_inference_fn(target)}, inputs)["int8"])
        ratio = signal_to_noise(before, after)
        one = {"layer": layer, "sqnr_db": _finite(ratio), "noise_share": 10 ** (-ratio / 10)}
        weights = file.layers.weights[layer]
        found.append({**one, "top1": topk_accuracy(after, labels), "weights": weights})
    target.unlink(missing_ok=True)
    noise = sum(row["noise_share"] for row in found) or 1.0
    for row in found:
        row["noise_share"] /= noise
    return {
        "split": "validation",
        "num_samples": len(rows),
        "top1": topk_accuracy(before, labels),
        "layers": sorted(found, key=lambda row: -row["noise_share"]),
    }


def interleaved_latency(
    file: OnnxStudent, target: Path, *, threads: int
) -> dict[str, dict[str, dict[str, float]]]:
    """The latency of `float` and `int8` by size of the batch, as deit.deploy.latency tells it."""
    paths = {"float": file.original, "int8": target}
    answers = {name: onnx_inference_fn(path, threads=threads) for name, path in paths.items()}
    inputs = torch.cat(
        list(file.inputs(file.test, evenly_spaced(len(file.test.labels), max(_TIMED))))
    )
    inputs = inputs[torch.arange(max(_TIMED)) % len(inputs)]
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in paths}
    for batch in progress(_TIMED, total=len(_TIMED), title="timing in turns"):
        timed = latencies(answers, inputs[:batch], seconds=_TIMED_S)
        for name, latency in timed.items():
            found[name][str(batch)] = latency._asdict()
    return found


def check_batch_invariance(file: OnnxStudent, target: Path) -> dict[str, Any]:
    """How much the answer to an image depends on those it is asked with, on some test images.

    difference: the largest of a logit; other_answers: to so many images. Raises CheckpointError
    where batches of some size are far noisier.
    """
    answer = onnx_inference_fn(target)
    inputs = torch.cat(
        list(file.inputs(file.test, evenly_spaced(len(file.test.labels), max(BATCHES))))
    )
    before = onnx_inference_fn(file.original)(inputs)["logits"]
    logits = [torch.cat([answer(part)["logits"] for part in inputs.split(n)]) for n in BATCHES]
    ratios = {number: signal_to_noise(before, one) for number, one in zip(BATCHES, logits)}
    usual = ratios[max(BATCHES)]
    for number, ratio in ratios.items():
        if not ratio >= usual - _WORSE_DB:  # nor a NaN
            raise CheckpointError(
                f"the int8 file answers otherwise in batches of {number}: {ratio:.1f} dB of signal "
                f"to noise, {usual:.1f} in batches of {max(BATCHES)}"
            )
    every = torch.stack(logits)
    answers = every.argmax(dim=2)
    return {
        "sizes": list(BATCHES),
        "num_samples": len(inputs),
        "difference": (every.amax(dim=0) - every.amin(dim=0)).max().item(),
        "other_answers": int((answers != answers[0]).any(dim=0).sum()),
        "sqnr_db": {str(number): _finite(ratio) for number, ratio in ratios.items()},
    }


def _ask(files: dict[str, InferenceFn], batches: Iterable[Tensor]) -> dict[str, Heads]:
    """The logits [images, classes] of several files for the same images, by our names of heads."""
    parts: dict[str, list[Heads]] = {name: [] for name in files}
    for images in batches:
        for name, answer in files.items():
            parts[name].append(answer(images))
    return {
        name: _by_head({output: torch.cat([one[output] for one in given]) for output in given[0]})
        for name, given in parts.items()
    }


def _test_inputs(file: OnnxStudent, number: int) -> Tensor:
    """Return the inputs of `number` images, evenly spaced over the test split."""
    rows = evenly_spaced(len(file.test.labels), number)
    return torch.cat(list(file.inputs(file.test, rows)))


def _by_head(outputs: Heads) -> Heads:
    heads = {OUTPUTS[name] if len(outputs) > 1 else "class": one for name, one in outputs.items()}
    return {head: heads[head] for head in HEADS if head in heads}


def _finite(decibels: float) -> float | None:
    """As JSON can hold it: None where there is no noise."""
    return None if math.isinf(decibels) else decibels
