"""Export a finished run for other tools, and verify the export against the original."""

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deit.config.arguments import checks_types
from deit.config.command_choices import EXPORT_IMAGES, check_at_least, check_choice
from deit.config.schema import Config
from deit.core.console import info, obeys_verbose
from deit.core.errors import CheckpointError, ConfigError, SystemFault
from deit.core.filesystem import atomic_write_dir, check_writable
from deit.core.rng import unchanged_generators
from deit.core.tensors import evenly_spaced
from deit.datasets.splits import load_splits
from deit.deploy.export_formats import FORMATS, ExportFormat, Graph, Heads, InferenceFn, outputs_of
from deit.deploy.model_card import write_card
from deit.distill.inference import views_of_chunks
from deit.evaluation.evaluate import evaluate
from deit.evaluation.load_run import resolve_run
from deit.models.metadata import ModelInfo
from deit.models.saved_student import load_student
from deit.models.student import Student

BATCHES = (1, 5, 64)
"""The batch sizes in which exports are compared with the original."""


class Verification(NamedTuple):
    """The comparison of an export with the original.

    loader: the package that loaded the export. images: the number of test images. difference: the
    largest difference of a logit; allowed: the largest that passes.
    """

    loader: str
    images: int
    difference: float
    allowed: float


@checks_types
@obeys_verbose
@unchanged_generators()
def export(
    run: str | PathLike,
    out: str | PathLike | None = None,
    *,
    format: str,
    checkpoint: str = "best",
    root: str | PathLike | None = None,
    images: int = EXPORT_IMAGES,
    license: str | None = None,
    force: bool = False,
    verbose: bool = True,
) -> Path:
    """Write a run's student in a format, with a model card; return the folder.

    out: default: export-FORMAT in the run's folder. format: a key of FORMATS. checkpoint: of the
    run, best or last. root: the folder of the images, if they were moved. images: number of test
    images for the comparison with the original. license: of the weights, for the card. force:
    replace an existing export. verbose: show messages and progress; warnings are always shown.

    Raises ConfigError if there is no such format, or it does not support the network, SystemFault
    if a package is missing or the folder cannot be written, CheckpointError if the export differs
    from the original. Then nothing is written.

    >>> folder = export("checkpoints/digits", format="timm", verbose=False)
    >>> sorted(file.name for file in folder.iterdir())
    ['README.md', 'config.json', 'model.safetensors']
    """
    check_choice("format", format, FORMATS)
    check_at_least("images", images, 1)
    export_format = FORMATS[format]
    config, saved = resolve_run(run, checkpoint)
    student, model_info = load_student(saved)
    _check(export_format, student, model_info, Path(run))
    require_packages(export_format.needs, f"format {format}")
    folder = saved.parent / f"export-{format}" if out is None else Path(out)
    check_output_dir(folder, force=force)
    metrics = evaluate(run, checkpoint=checkpoint, root=root, device="cpu").metrics
    bare, normalize = split_normalization(student)
    inputs = normalize(_test_views(config, root, images))
    num_images = len(inputs)
    inputs = fill_batches(inputs)
    expected = run_graph(Graph(bare), outputs_of(bare), inputs)
    verified: list[Verification] = []

    def write(target: Path) -> None:
        export_format.write(target, bare, model_info)
        verified.extend(_verify_all(export_format, target, inputs, expected, num_images))
        write_card(
            target / "README.md",
            run=saved.parent,
            format=format,
            config=config,
            model_info=model_info,
            metrics=metrics,
            verified=[verification._asdict() for verification in verified],
            license=license,
        )

    return _write_folder(folder, write, force=force)


def _write_folder(folder: Path, write: Callable[[Path], None], *, force: bool) -> Path:
    """Write an export, log its files, and return its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_dir(folder, write, replace=force)
    files = sorted(folder.iterdir())
    size = sum(file.stat().st_size for file in files) / 1e6
    info(f"exported  {folder}: {', '.join(file.name for file in files)} ({size:.1f} MB)")
    return folder


def _check(export_format: ExportFormat, student: Student, model_info: ModelInfo, run: Path) -> None:
    """Raise ConfigError if the format does not support the network."""
    if model_info.student.qat != "none":
        raise ConfigError(
            f"{run}: student.qat = {model_info.student.qat!r}: a float export would predict "
            "differently from the run; use deit quantize, which writes the integers that it was "
            "trained for"
        )
    export_format.check(student, model_info)


def _verify_all(
    export_format: ExportFormat,
    folder: Path,
    inputs: Tensor,
    expected: dict[str, Tensor],
    num_images: int,
) -> list[Verification]:
    """Compare an export with the original, by every installed package that loads it.

    num_images: the number of distinct images in `inputs`.
    """
    verified = []
    for loader, load in export_format.load.items():
        if find_spec(loader) is None:
            info(f"          not verified with {loader}: it is not installed")
            continue
        tolerance = export_format.tolerance
        verification = verify(loader, load(folder), inputs, expected, tolerance=tolerance)
        verification = verification._replace(images=num_images)
        info(
            f"verified  {loader}: {num_images} test images in batches of "
            f"{', '.join(map(str, BATCHES))}; logits differ by {verification.difference:.1e} at "
            f"most ({verification.allowed:.1e} is allowed), no prediction differs"
        )
        verified.append(verification)
    return verified


def require_packages(packages: tuple[str, ...], needed_by: str) -> None:
    """Raise SystemFault if a package is not installed. needed_by: for the message."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise SystemFault(f"{needed_by} needs {', '.join(missing)}; pip install 'deit[export]'")


_EXPORT_FILES = {
    *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
    *("model.onnx", "model.pt2", "quantization.json"),
}


def check_output_dir(folder: Path, *, force: bool) -> None:
    """Raise SystemFault if a folder cannot be written, before the export takes its time.

    An existing export is replaced with `force` only; any other folder with files, such as a run, is
    never replaced.
    """
    if folder.exists():
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {"a file"}
        if names and not ("README.md" in names and names <= _EXPORT_FILES):
            raise SystemFault(
                f"out = {folder}: is not an export "
                f"({', '.join(sorted(names - _EXPORT_FILES)[:3]) or 'no README.md'}); give another "
                "folder"
            )
        if not force:
            raise SystemFault(
                f"out = {folder}: exists already; use force=True (--force) to replace it"
            )
    check_writable(folder, name="out")


def _test_views(config: Config, root: str | PathLike | None, num_images: int) -> Tensor:
    """Return evaluation views of evenly spaced test images, float32 in [0, 1]."""
    data = config.data if root is None else dataclasses.replace(config.data, root=fspath(root))
    test = load_splits(data).test
    chunks = evenly_spaced(len(test.labels), num_images).split(64)
    views = views_of_chunks(test, chunks, config.evaluation, device=torch.device("cpu"))
    return torch.cat(list(views))


def fill_batches(inputs: Tensor) -> Tensor:
    """Repeat images until there is one batch of each size of BATCHES."""
    return inputs[torch.arange(max(len(inputs), sum(BATCHES))) % len(inputs)]


def split_normalization(student: Student) -> tuple[Student, Callable[[Tensor], Tensor]]:
    """Move the normalization out of a student, as exported networks take normalized images.

    Returns the student (changed in place) and the normalization of views in [0, 1]: minus mean,
    over standard deviation.
    """
    mean, std = student.mean.clone(), student.std.clone()
    student.mean.zero_()
    student.std.fill_(1)
    return student.eval(), lambda views: (views - mean) / std


@torch.no_grad()
def run_graph(graph: Graph, names: tuple[str, ...], inputs: Tensor) -> Heads:
    """Return the logits [images, classes] of a network by output name.

    inputs: normalized images [images, 3, side, side].
    """
    outputs = [graph(batch) for batch in inputs.split(64)]
    return {name: torch.cat(logits) for name, logits in zip(names, zip(*outputs))}


@torch.no_grad()
def verify(
    loader: str, inference_fn: InferenceFn, inputs: Tensor, expected: Heads, *, tolerance: float
) -> Verification:
    """Compare an export with the original, in batches of several sizes.

    loader: the package that loaded it, for messages. expected: the original's logits [images,
    classes] by output. tolerance: largest difference of a logit, relative to the largest logit if
    that is above 1. Raises CheckpointError if a logit differs by more, or if a predicted class
    differs.
    """
    allowed = tolerance * max(1.0, *(float(logits.abs().max()) for logits in expected.values()))
    largest, start, sizes = 0.0, 0, iter(BATCHES)
    while start < len(inputs):
        rows = slice(start, start + next(sizes, BATCHES[-1]))
        outputs = inference_fn(inputs[rows])
        if "logits" not in outputs:
            raise CheckpointError(f"the export, loaded by {loader}, has no output `logits`")
        for name, logits in outputs.items():
            original = expected[name][rows]
            where = f"the export, loaded by {loader}, differs on images from {start}: {name}"
            if logits.shape != original.shape:
                raise CheckpointError(f"{where} has the shape {tuple(logits.shape)}")
            difference = float((logits - original).abs().max())
            if not difference <= allowed:  # also for NaN
                raise CheckpointError(f"{where} by {difference:.2g}, {allowed:.2g} is allowed")
            if not torch.equal(logits.argmax(dim=1), original.argmax(dim=1)):
                raise CheckpointError(f"{where} predicts another class")
            largest = max(largest, difference)
        start = rows.stop
    return Verification(loader, len(inputs), largest, allowed)
