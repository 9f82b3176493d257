"""A finished run written for other tools, and held against the original before it may stay."""

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deit.config.schema import Config
from deit.core.console import info
from deit.core.errors import CheckpointError, ConfigError, SystemFault
from deit.core.filesystem import atomic_write_dir, check_writable
from deit.core.tensors import evenly_spaced
from deit.datasets.splits import load_splits
from deit.deploy.formats import FORMATS, ExportFormat, Graph, Heads, InferenceFn, outputs_of
from deit.deploy.model_card import write_card
from deit.distill.inference import evaluation_batches
from deit.evaluation.evaluate import evaluate
from deit.evaluation.load_run import resolve_run
from deit.models.metadata import ModelInfo
from deit.models.saved import load_student
from deit.models.student import Student

BATCHES = (1, 5, 64)
"""Sizes in which whatever is exported must answer alike."""


class Verification(NamedTuple):
    """What came of holding an export against the original: by which package it was loaded, on how
    many images, the largest difference of a logit, and the largest that was allowed."""

    loader: str
    images: int
    difference: float
    allowed: float


def export(
    run: Path,
    out: Path | None,
    *,
    name: str,
    checkpoint: str = "best",
    root: str | None = None,
    images: int = 512,
    licence: str | None = None,
    force: bool = False,
) -> Path:
    """Write a run's student in a format, with a model card; the folder.

    name: of the format. out: None: export-NAME in the run's folder. root: where the images lie now.
    images: of the test split, on which the export has to answer as the original does.
    licence: of the weights, for the card. force: replaces a folder.

    Raises ConfigError where the format cannot hold the network, SystemFault where a package
    is missing or the folder cannot be written, CheckpointError where the export answers otherwise;
    nothing is left behind then.
    """
    form = FORMATS[name]
    config, saved = resolve_run(run, checkpoint)
    student, facts = load_student(saved)
    _check(form, student, facts, run)
    require_packages(form.needs, f"--format {name}")
    folder = out or saved.parent / f"export-{name}"
    check_output_dir(folder, force=force)
    found = evaluate(run, checkpoint=checkpoint, root=root, device="cpu")
    bare, normalise = split_normalization(student)
    inputs = normalise(_views(config, root, images))
    number = len(inputs)
    inputs = inputs[torch.arange(max(number, sum(BATCHES))) % number]  # enough for every batch
    expected = run_graph(Graph(bare), outputs_of(bare), inputs)
    verified: list[Verification] = []

    def write(place: Path) -> None:
        form.write(place, bare, facts)
        verified.extend(_verify_all(form, place, inputs, expected, number))
        write_card(
            place / "README.md",
            run=saved.parent,
            name=name,
            config=config,
            facts=facts,
            found=found,
            verified=[one._asdict() for one in verified],
            licence=licence,
        )

    folder.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_dir(folder, write, replace=force)
    files = sorted(folder.iterdir())
    size = sum(file.stat().st_size for file in files) / 1e6
    info(f"exported  {folder}: {', '.join(file.name for file in files)} ({size:.1f} MB)")
    return folder


def _check(form: ExportFormat, student: Student, facts: ModelInfo, run: Path) -> None:
    """Refuse a network that the format cannot hold. Raises ConfigError."""
    if facts.student.qat != "none":
        raise ConfigError(
            f"{run}: student.qat = {facts.student.qat!r}: a file of floats would answer "
            "otherwise than the run; deit quantize writes the integers it was trained for"
        )
    form.check(student, facts)


def _verify_all(
    form: ExportFormat, folder: Path, inputs: Tensor, expected: dict[str, Tensor], images: int
) -> list[Verification]:
    """Compare an export with the original by every installed package that loads it. images: how
    many different ones the inputs are."""
    found = []
    for loader, load in form.load.items():
        if find_spec(loader) is None:
            info(f"          not tried with {loader}: it is not installed")
            continue
        one = verify(loader, load(folder), inputs, expected, tolerance=form.tolerance)
        one = one._replace(images=images)
        info(
            f"verified  {one.loader}: {one.images} test images in batches of "
            f"{', '.join(map(str, BATCHES))}; logits differ by {one.difference:.1e} at most "
            f"({one.allowed:.1e} is allowed), no answer differs"
        )
        found.append(one)
    return found


def require_packages(packages: tuple[str, ...], what: str) -> None:
    """Refuse, before the long work, what packages that are not there would have to do. what: the
    option or command. Raises SystemFault."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise SystemFault(f"{what} needs {', '.join(missing)}; pip install 'deit[export]'")


_OURS = {
    *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
    *("model.onnx", "model.pt2", "quantization.json"),
}


def check_output_dir(folder: Path, *, force: bool) -> None:
    """Refuse, before the long work, a folder that cannot be written, or is there and may not be
    replaced, or is no export: a run, or anything else of somebody's. Raises SystemFault."""
    if folder.exists():
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {"a file"}
        if names and not ("README.md" in names and names <= _OURS):
            raise SystemFault(
                f"--out {folder}: holds other things than an export "
                f"({', '.join(sorted(names - _OURS)[:3]) or 'no README.md'}); give another --out"
            )
        if not force:
            raise SystemFault(f"--out {folder}: exists already; --force replaces it")
    check_writable(folder, option="--out")


def _views(config: Config, root: str | None, number: int) -> Tensor:
    """The evaluation views of so many images, spread over the test split, float32 in [0, 1]."""
    data = config.data if root is None else dataclasses.replace(config.data, root=root)
    test = load_splits(data).test
    chunks = evenly_spaced(len(test.labels), number).split(64)
    return torch.cat(
        list(evaluation_batches(test, chunks, config.evaluation, device=torch.device("cpu")))
    )


def split_normalization(student: Student) -> tuple[Student, Callable[[Tensor], Tensor]]:
    """The student made to take images as an exported network does, and what turns views into those:
    minus mean, over standard deviation."""
    mean, std = student.mean.clone(), student.std.clone()
    student.mean.zero_()
    student.std.fill_(1)
    return student.eval(), lambda views: (views - mean) / std


@torch.no_grad()
def run_graph(graph: Graph, names: tuple[str, ...], inputs: Tensor) -> Heads:
    """The logits [images, classes] of a network by the names of its outputs, for normalised images
    [images, 3, side, side]."""
    parts = [graph(part) for part in inputs.split(64)]
    return {name: torch.cat(values) for name, values in zip(names, zip(*parts))}


@torch.no_grad()
def verify(
    loader: str, answer: InferenceFn, inputs: Tensor, expected: Heads, *, tolerance: float
) -> Verification:
    """Hold an export against the original, in batches of several sizes.

    expected: the original's logits [images, classes] by output. tolerance: of a logit where the
    largest is below 1, else in proportion to it. Raises CheckpointError where a logit differs by
    more, or an answer at all.
    """
    allowed = tolerance * max(1.0, *(float(logits.abs().max()) for logits in expected.values()))
    largest, done, sizes = 0.0, 0, iter(BATCHES)
    while done < len(inputs):
        part = slice(done, done + next(sizes, BATCHES[-1]))
        found = answer(inputs[part])
        if "logits" not in found:
            raise CheckpointError(f"the export, loaded by {loader}, gives no logits")
        for name, theirs in found.items():
            ours = expected[name][part]
            where = f"the export, loaded by {loader}, differs on images from {done}: {name}"
            if theirs.shape != ours.shape:
                raise CheckpointError(f"{where} has the shape {tuple(theirs.shape)}")
            difference = float((theirs - ours).abs().max())
            if not difference <= allowed:  # nor a NaN
                raise CheckpointError(f"{where} by {difference:.2g}, {allowed:.2g} is allowed")
            if not torch.equal(theirs.argmax(dim=1), ours.argmax(dim=1)):
                raise CheckpointError(f"{where} answers with another class")
            largest = max(largest, difference)
        done = part.stop
    return Verification(loader, len(inputs), largest, allowed)
