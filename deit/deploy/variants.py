"""`deit variants`: compare a run with its smaller variants in one table and one plot."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit.config.schema import Config, differing_split_field
from deit.config.sections.run import RunConfig
from deit.core import run_folder
from deit.core.accelerator import environment_info, own_accelerate_state
from deit.core.console import format_percent, info, progress, warn
from deit.core.errors import ConfigError, DataError, SystemFault
from deit.core.filesystem import (
    atomic_write,
    atomic_write_dir,
    check_file,
    check_writable,
    to_paths,
    write_json,
)
from deit.core.json_io import load_json_as
from deit.core.types import logits_by_head
from deit.deploy.export import require_packages
from deit.deploy.export_formats import FORMATS, OUTPUTS, onnx_inference_fn
from deit.deploy.int8_compare import final_head
from deit.deploy.latency import latencies
from deit.deploy.prune_options import CONTROLS, MANIFEST, RECOVERED
from deit.deploy.quantize_input import CHUNK
from deit.deploy.variants_tables import draw_variants, markdown, print_variants
from deit.distill.build import build_accelerator
from deit.distill.inference import views_of_chunks
from deit.evaluation.load_run import (
    evaluation_config,
    evaluation_images,
    resolve_run,
    warn_unfinished,
)
from deit.models.cost import cost_of
from deit.models.metadata import BASE
from deit.models.saved_student import WEIGHTS, ModelInfo, load_student, to_safetensors_bytes
from deit.models.student import Student
from deit.models.surgery.token_merging import with_merging
from deit.models.weight_files import digest_of, read_weights
from deit.viz.tables import HEADS

_LATENCY_BATCHES = (1, 64)
_TIMED_S = 1.5  # for each variant and batch size
_FILES = ("variants.json", "variants.md", "variants.png")
_MIN_FLOAT_AGREEMENT = 0.999  # rounding can decide between two classes
_MIN_INT8_AGREEMENT = 0.8  # less: the int8 file was made from other weights
_EVALUATED_ON = RunConfig(device="cpu", precision="fp32")
InferenceFn = Callable[[Tensor], dict[str, Tensor]]
"""Views [batch, 3, side, side] in [0, 1] -> logits [batch, classes] by head."""


class Variant(NamedTuple):
    """A student, or a smaller variant of it.

    run: the folder of the run that it was made from. onnx: its ONNX file; None: it is computed by
    PyTorch.
    merge: number of tokens merged in each block.
    """

    name: str
    run: Path
    onnx: Path | None = None
    merge: int = 0


@own_accelerate_state()
def variants(
    run: str | Path,
    other_runs: str | Path | Sequence[str | Path] = (),
    *,
    merge_tokens: Sequence[int] = (),
    root: str | None = None,
    json_file: str | Path | None = None,
    force: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Measure a run and its smaller variants: accuracy on the test images, size, MACs and latency.

    Variants are the ONNX files in the run's folder (of `export` and `quantize`) and the results of
    `prune` next to it, with their ONNX files. Latency is measured in interleaved turns. Writes
    variants.json, variants.md and variants.png into the folder `variants` of the run.

    other_runs: runs on the same classes, such as the levels of a lottery experiment. merge_tokens:
    numbers of tokens merged in each block, a variant each. root: the folder of the images, if they
    were moved. json_file: also write the result to this file. force: replace existing files.
    command: the command line, for the records.

    Returns the content of variants.json. Raises the errors of deit.core.errors.

    >>> from deit.core.console import quiet
    >>> with quiet():
    ...     result = variants("checkpoints/digits", merge_tokens=[2])
    >>> {name: round(1e9 * row["gmacs"]) for name, row in result["rows"].items()}  # MACs
    {'digits': 69056, 'digits, merging 2': 65472}
    """
    run, other_runs = Path(run), to_paths(other_runs)
    json_file = None if json_file is None else Path(json_file)
    run_folder.require_run(run)
    check_file(json_file, name="json_file", replace=force)
    all_variants = find_variants(run, other_runs, merge_tokens)
    if any(variant.onnx is not None for variant in all_variants):
        require_packages(FORMATS["onnx"].needs, "measuring an ONNX file")
    _check_output_dir(run / "variants", force=force)
    config, model_info, labels, views = _test_images(run, root)
    entries = {variant.name: _load_variant(variant, config, model_info) for variant in all_variants}
    predictions = {
        name: _predict(entry.infer, views(), len(labels), name) for name, entry in entries.items()
    }
    _exclude_stale_exports(all_variants, predictions)
    reference = final_head(predictions[all_variants[0].name])
    rows = _rows(entries, predictions, labels, reference, next(views()))
    result = {
        "run": str(run),
        "split": "test",
        "num_samples": len(labels),
        "image_size": config.student.image_size,
        "rows": rows,
        "command": command,
        "environment": environment_info(build_accelerator(_EVALUATED_ON), command),
    }
    print_variants(result)
    _write(result, run, json_file, force=force)
    return result


def _check_output_dir(folder: Path, *, force: bool) -> None:
    """Raise SystemFault if the output folder cannot be written, before anything is measured."""
    if folder.exists():
        others = sorted(path.name for path in folder.glob("*") if path.name not in _FILES)
        if others or not folder.is_dir():
            raise SystemFault(
                f"{folder}: is needed for the output of deit variants, but contains "
                f"{', '.join(others[:3]) or 'a file'}; move it away"
            )
        if not force:
            raise SystemFault(f"{folder}: exists already; use force=True (--force) to replace it")
    check_writable(folder, name="run")


def find_variants(
    run: Path, other_runs: Sequence[Path], merge_tokens: Sequence[int] = ()
) -> list[Variant]:
    """Return the run, its variants, and the other runs with their ONNX files.

    Raises CheckpointError, and ConfigError if a run is given twice.
    """
    _, saved = resolve_run(run, "best")
    warn_unfinished(saved.parent)
    variants = _variants_of_run(run, run.resolve().name)
    run_name = variants[0].name
    variants += [Variant(f"{run_name}, merging {num}", run, merge=num) for num in merge_tokens]
    digest = digest_of(read_weights(saved / WEIGHTS))
    for manifest in sorted(run.resolve().parent.glob(f"*/{MANIFEST}")):
        if load_json_as(manifest, dict[str, Any]).get("weights") != digest:
            continue
        for folder in (RECOVERED, *CONTROLS.values()):
            if run_folder.read_result(manifest.parent / folder) is not None:
                name = f"{manifest.parent.name}, {folder}"
                variants += _variants_of_run(manifest.parent / folder, name)
    pruned = {variant.run.resolve() for variant in variants[1:]} - {run.resolve()}
    for path in other_runs:
        warn_unfinished(resolve_run(path, "best")[1].parent)
        if path.resolve() in pruned:
            continue
        if path.resolve() in [variant.run.resolve() for variant in variants]:
            raise ConfigError(f"{path}: is given twice; give each run once")
        names = {variant.name for variant in variants}
        name = path.resolve().name
        variants += _variants_of_run(path, str(path) if name in names else name)
    return variants


def _variants_of_run(run: Path, name: str) -> list[Variant]:
    """Return a run and the ONNX files in its folder."""
    files = [*sorted(run.glob("export-*/model.onnx")), *sorted(run.glob("quantized-*/model.onnx"))]
    display_names = {
        "export-onnx": "ONNX",
        "quantized-static": "int8 static",
        "quantized-dynamic": "int8 dynamic",
    }
    exported = [
        Variant(f"{name}, {display_names.get(file.parent.name, file.parent.name)}", run, file)
        for file in files
    ]
    return [Variant(name, run), *exported]


def _test_images(
    run: Path, root: str | None
) -> tuple[Config, ModelInfo, Tensor, Callable[[], Iterator[Tensor]]]:
    """Return a run's configuration and model info, the test labels, and a function for the views.

    The function returns an iterator over the batches of test views, each time it is called.
    """
    config, saved = resolve_run(run, "best")
    config = evaluation_config(config, root=root, device="cpu")
    _, model_info = load_student(saved)
    test = evaluation_images(config, model_info, run, "test", None, None).images
    chunks = torch.arange(len(test.labels)).split(CHUNK)

    def views() -> Iterator[Tensor]:
        return views_of_chunks(test, chunks, config.evaluation, device=torch.device("cpu"))

    return config, model_info, test.labels, views


class VariantEntry(NamedTuple):
    """A loaded variant. properties: engine, parameters, nonzero parameters, GMACs and bytes."""

    infer: InferenceFn
    properties: dict[str, Any]


def _load_variant(variant: Variant, config: Config, model_info: ModelInfo) -> VariantEntry:
    """Load a variant and measure its size.

    config, model_info: of the run that it is compared with. Raises ConfigError and DataError if the
    two are not comparable.
    """
    variant_config, saved = resolve_run(variant.run, "best")
    student, variant_info = load_student(saved)
    _check_comparable(variant, variant_config, variant_info, config, model_info)
    student.eval()
    if variant.merge:
        student.network = with_merging(student.network, variant.merge)
    weights = student.network.state_dict()
    parameters = student.network.parameters()
    cost = cost_of(student, side=variant_info.student.image_size, batch=1)
    properties: dict[str, Any] = {
        "folder": str(variant.run),
        "engine": "PyTorch" if variant.onnx is None else "ONNX Runtime",
        "parameters": cost.parameters,
        "nonzero": sum(int(parameter.count_nonzero()) for parameter in parameters),
        "gmacs": cost.gmacs,
    }
    if variant.onnx is None:
        properties["bytes"] = (saved / WEIGHTS).stat().st_size
        if (saved / BASE).is_file():  # the file has the adapters only: count the base as well
            properties["bytes"] = len(to_safetensors_bytes(weights))
        return VariantEntry(_torch_inference_fn(student), properties)
    files = variant.onnx.parent.glob("model.onnx*")
    properties["bytes"] = sum(file.stat().st_size for file in files)
    return VariantEntry(_onnx_inference_fn(variant.onnx, student), properties)


def _check_comparable(
    variant: Variant,
    variant_config: Config,
    variant_info: ModelInfo,
    config: Config,
    model_info: ModelInfo,
) -> None:
    """Raise an error if a variant and the run differ in classes, splits or views.

    Raises DataError and ConfigError.
    """
    if variant_info.class_names != model_info.class_names:
        raise DataError(f"{variant.run}: has other classes than the run")
    field = differing_split_field(variant_config.data, config.data)
    if field not in (None, "data.root"):  # images may have been moved
        raise DataError(
            f"{variant.run}: has another {field} than the run, so it may have been trained on the "
            "run's test images"
        )
    views = {
        "image_size": (variant_info.student.image_size, model_info.student.image_size),
        "eval_crop_pct": (variant_info.evaluation_crop, model_info.evaluation_crop),
    }
    for name, (of_variant, of_run) in views.items():
        if of_variant != of_run:
            raise ConfigError(
                f"{variant.run}: is evaluated at {name} {of_variant}, the run at {of_run}; use "
                "deit evaluate to compare them"
            )


@torch.inference_mode()
def _infer(student: Student, views: Tensor) -> dict[str, Tensor]:
    heads = logits_by_head(student(views))
    return {head: heads[head] for head in HEADS if head in heads}


def _torch_inference_fn(student: Student) -> InferenceFn:
    return lambda views: _infer(student, views)


def _onnx_inference_fn(file: Path, student: Student) -> InferenceFn:
    """Return an ONNX file, which takes normalized images, as a function of views."""
    run_onnx = onnx_inference_fn(file, threads=torch.get_num_threads())
    mean, std = student.mean, student.std

    def infer(views: Tensor) -> dict[str, Tensor]:
        outputs = run_onnx((views - mean) / std)
        one_head = len(outputs) == 1
        return {"class" if one_head else OUTPUTS[name]: outputs[name] for name in outputs}

    return infer


def _predict(
    infer: InferenceFn, views: Iterator[Tensor], num_images: int, name: str
) -> dict[str, Tensor]:
    """Return the predicted class of each image by head, int64 [num_images]."""
    batches = [
        {head: logits.argmax(dim=1) for head, logits in infer(batch).items()}
        for batch in progress(views, total=-(-num_images // CHUNK), title=name)
    ]
    return {head: torch.cat([batch[head] for batch in batches]) for head in batches[0]}


def _exclude_stale_exports(
    variants: list[Variant], predictions: dict[str, dict[str, Tensor]]
) -> None:
    """Delete the predictions of ONNX files that were made from other weights than the run has now.

    A float file then predicts some other classes, an int8 file many.
    """
    run_names = {
        variant.run: variant.name
        for variant in variants
        if variant.onnx is None and not variant.merge
    }
    for variant in variants:
        if variant.onnx is None:
            continue
        of_file = final_head(predictions[variant.name])
        of_run = final_head(predictions[run_names[variant.run]])
        is_float = variant.onnx.parent.name.startswith("export-")
        agreement = _fraction_equal(of_file, of_run)
        if agreement < (_MIN_FLOAT_AGREEMENT if is_float else _MIN_INT8_AGREEMENT):
            warn(
                f"{variant.onnx}: skipped, its agreement with {variant.run}/best is only "
                f"{format_percent(agreement)} %; if it was exported from other weights, repeat "
                "deit export or deit quantize with --force"
            )
            del predictions[variant.name]


def _fraction_equal(predictions: Tensor | None, classes: Tensor) -> float | None:
    return None if predictions is None else (predictions == classes).double().mean().item()


def _rows(
    entries: dict[str, VariantEntry],
    predictions: dict[str, dict[str, Tensor]],
    labels: Tensor,
    reference: Tensor,
    images: Tensor,
) -> dict[str, dict[str, Any]]:
    """Return accuracy, agreement with `reference`, latency on `images` and size by variant."""
    latency = _latencies({name: entries[name].infer for name in predictions}, images)
    return {
        name: {
            **entries[name].properties,
            "top1": {head: _fraction_equal(by_head.get(head), labels) for head in HEADS},
            "agreement": _fraction_equal(final_head(by_head), reference),
            "latency": latency[name],
        }
        for name, by_head in predictions.items()
    }


def _latencies(inference_fns: dict[str, InferenceFn], images: Tensor) -> dict[str, dict[str, Any]]:
    """Return the latency by variant and batch size, measured in interleaved turns."""
    images = images[torch.arange(max(_LATENCY_BATCHES)) % len(images)]
    by_name: dict[str, dict[str, Any]] = {name: {} for name in inference_fns}
    for batch in progress(_LATENCY_BATCHES, total=len(_LATENCY_BATCHES), title="latency"):
        measured = latencies(inference_fns, images[:batch], seconds=_TIMED_S * len(inference_fns))
        for name, latency in measured.items():
            by_name[name][str(batch)] = latency._asdict()
    return by_name


def _write(result: dict[str, Any], run: Path, json_file: Path | None, *, force: bool) -> None:
    """Write the result as JSON, Markdown and plot into the run's folder, and as JSON elsewhere."""

    def write(folder: Path) -> None:
        write_json(folder / "variants.json", result)
        atomic_write(folder / "variants.md", markdown(result).encode())
        try:
            draw_variants(result, folder / "variants.png")
        except SystemFault as error:
            info(f"no plot: {error}")

    atomic_write_dir(run / "variants", write, replace=force)
    for name in sorted(path.name for path in (run / "variants").iterdir()):
        info(f"wrote {run / 'variants' / name}")
    if json_file is not None:
        write_json(json_file, result)
        info(f"wrote {json_file}")
