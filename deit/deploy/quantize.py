"""Quantize a finished run's student to int8 for ONNX Runtime, and measure what that changes."""

import math
import shutil
import tempfile
from contextlib import closing
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

from deit.config.arguments import checks_types
from deit.config.schema import Config
from deit.config.sections.student import STUDENTS, StudentConfig
from deit.core.accelerator import environment_info, own_accelerate_state
from deit.core.console import info, obeys_verbose, progress
from deit.core.errors import CheckpointError, ConfigError, DataError
from deit.core.filesystem import atomic_write_dir, check_file, write_json
from deit.core.hardware import int8_flags, int8_sums_saturate
from deit.core.rng import unchanged_generators
from deit.core.run_folder import read_result
from deit.datasets.splits import stratified_indices
from deit.deploy.export import check_output_dir, require_packages
from deit.deploy.export_formats import FORMATS
from deit.deploy.int8_calibration import calibrate, ranges_from_training
from deit.deploy.int8_compare import (
    check_batch_invariance,
    compare_on_test,
    compare_to_run,
    final_head,
    interleaved_latency,
    layer_sensitivity,
)
from deit.deploy.int8_graph import write_int8
from deit.deploy.int8_layers import (
    METHODS,
    QuantizableLayers,
    choose,
    covers_enough,
    layers_of,
)
from deit.deploy.int8_tables import (
    describe,
    print_quantization,
    print_sensitivity,
    quantization_card,
)
from deit.deploy.model_card import write_card
from deit.deploy.prune_options import MANIFEST, PRUNED, RECOVERED
from deit.deploy.quantize_input import OnnxStudent, export_float_onnx, split_images
from deit.deploy.quantize_options import CALIBRATION_IMAGES, QuantizeOptions, check_options
from deit.distill.build import build_accelerator
from deit.evaluation.load_run import evaluation_config, resolve_run
from deit.models.saved_student import ModelInfo, load_student
from deit.models.student import Student
from deit.models.surgery.fake_quant import fake_quant_layers

_CALIBRATION_BATCH = 8  # all activations of a batch are in memory


@checks_types
@obeys_verbose
@own_accelerate_state()
@unchanged_generators()
def quantize(
    run: str | PathLike,
    out: str | PathLike | None = None,
    options: QuantizeOptions = QuantizeOptions(),
    *,
    checkpoint: str = "best",
    root: str | PathLike | None = None,
    json_file: str | PathLike | None = None,
    force: bool = False,
    verbose: bool = True,
    command: str = "",
) -> Path:
    """Write a run's student as int8, with a model card and measurements; return the folder.

    out: default: quantized-METHOD in the run's folder. checkpoint: of the run, best or last. root:
    the folder of the images, if they were moved. json_file: also write the measurements to this
    file. force: replace folder and file. verbose: show messages and progress; warnings are always
    shown. command: the command line, for the records.

    Raises SystemFault if a package is missing or a file cannot be written, ConfigError if the
    options are invalid or do not apply to the network, DataError with too few training images,
    CheckpointError if the run is not finished or if too much accuracy is lost. Then nothing is
    written.

    >>> folder = quantize("checkpoints/digits", None, QuantizeOptions(max_drop=50), verbose=False)
    >>> sorted(file.name for file in folder.iterdir())
    ['README.md', 'model.onnx', 'quantization.json']
    """
    run, json_file = Path(run), None if json_file is None else Path(json_file)
    check_options(options)
    require_packages(FORMATS["onnx"].needs, "deit quantize")
    config, saved = resolve_run(run, checkpoint)
    _check_finished(saved.parent)
    _check_fake_quant(config, options, run)
    folder = saved.parent / f"quantized-{options.method}" if out is None else Path(out)
    check_output_dir(folder, force=force)
    check_file(json_file, name="json_file", replace=force)
    config = evaluation_config(config, root=root, device="cpu")
    student, model_info = load_student(saved)
    _check_before_export(options, config, student, model_info, saved.parent)
    report: dict[str, Any] = {"run": str(run), "checkpoint": saved.name, "command": command}
    report["environment"] = _environment(config, command)
    with tempfile.TemporaryDirectory(prefix="deit-") as name:
        scratch = Path(name)
        file = export_float_onnx(config, student, model_info, run=saved.parent, folder=scratch)
        target = scratch / "int8.onnx"
        report |= _write_and_describe(report, file, options, target)
        report |= _compare(report, file, options, target)

        def write(new_folder: Path) -> None:
            copied = Path(shutil.copyfile(target, new_folder / "model.onnx"))
            report["batches"] = check_batch_invariance(file, copied)
            _add_costs(report, file, copied)
            write_json(new_folder / "quantization.json", report)
            _write_card(new_folder / "README.md", file, report)

        folder.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_dir(folder, write, replace=force)
    _print(report, folder, json_file)
    return folder


def _print(report: dict[str, Any], folder: Path, json_file: Path | None) -> None:
    """Print the measurements and the written files; also write the measurements to `json_file`."""
    print_quantization(report)
    if json_file is not None:
        write_json(json_file, report)
        info(f"wrote {json_file}")
    info(f"quantized {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _compare(
    report: dict[str, Any], file: OnnxStudent, options: QuantizeOptions, target: Path
) -> dict[str, Any]:
    """Return the report with the comparison of float and int8. Raises CheckpointError."""
    report = report | compare_on_test(file, target)
    if file.fake_quant is not None:
        report["vs_run"] = compare_to_run(file, target)
    other_methods = _other_methods(file, options)
    trainable = _is_trainable(file.config.student)
    return report | check_accuracy_drop(
        report, options.max_drop, other_methods, trainable=trainable
    )


def _check_finished(run: Path) -> None:
    """Raise CheckpointError if a run is not finished."""
    pruning = run.parent
    if run.name == PRUNED and (pruning / MANIFEST).is_file():
        raise CheckpointError(
            f"{run}: was pruned and not trained after that; quantize {pruning / RECOVERED}"
        )
    if read_result(run) is None:
        raise CheckpointError(
            f"{run}: is not finished; resume it first (its own command with --resume)"
        )


def _other_methods(file: OnnxStudent, options: QuantizeOptions) -> list[str]:
    """Return methods that may lose less accuracy; none for a run trained with fake quantization."""
    if file.fake_quant is not None:
        return []
    return [name for name in METHODS if name != options.method and covers_enough(file.layers, name)]


def _check_fake_quant(config: Config, options: QuantizeOptions, run: Path) -> None:
    """Raise ConfigError if a run was trained with a quantization that differs from the options."""
    qat = config.student.qat
    if qat == "none":
        return
    default = QuantizeOptions()
    for name in (
        *("method", "calibration_images", "calibration_method", "percentile"),
        "quantize_attention",
    ):
        if (value := getattr(options, name)) != getattr(default, name):
            raise ConfigError(
                f"{name} = {value}: {run} was trained with fake quantization (student.qat {qat}), "
                "which fixes static ranges and keeps products of attention in float; omit this "
                "option"
            )


def _check_before_export(
    options: QuantizeOptions, config: Config, student: Student, model_info: ModelInfo, run: Path
) -> None:
    """Check all that is known before the export, which takes most of the time.

    Raises ConfigError, DataError and CheckpointError.
    """
    fake_quant = fake_quant_layers(student.network).values()
    if fake_quant and not any(layer.range.any() for layer in fake_quant):
        raise CheckpointError(
            f"{run}: student.qat = {config.student.qat!r}, but there are no activation ranges "
            "because the run was never trained; resume training first"
        )
    # The layers of adapters and of other timm networks are only known from the graph.
    if config.student.name in STUDENTS and config.student.adapters == "none":
        layers = layers_of(student.network)
        _choose(layers, options)
    if options.method == "static" and config.student.qat == "none":
        num_images = len(split_images(config, model_info, run, "train").labels)
        if num_images < options.num_images:
            raise DataError(
                f"calibration_images = {options.num_images}: there are only {num_images} training "
                "images; use fewer, or the dynamic method, which needs none"
            )


def _choose(layers: QuantizableLayers, options: QuantizeOptions) -> list[str]:
    """Return the layers to quantize. Raises ConfigError."""
    return choose(
        layers,
        method=options.method,
        attention=options.quantize_attention,
        exclude=options.exclude,
    )


def _write_and_describe(
    report: dict[str, Any], file: OnnxStudent, options: QuantizeOptions, target: Path
) -> dict[str, Any]:
    """Write the int8 file; return the report with its layers, ranges and sensitivity."""
    layers = file.layers
    chosen = _choose(layers, options)
    reduce_range = int8_sums_saturate(int8_flags())
    report = {
        **report,
        "method": options.method,
        "int8_layers": chosen,
        "products": list(layers.products),
        "float_layers": [name for name in layers.nodes if name not in chosen],
        "int8_share": sum(layers.weights[name] for name in chosen) / layers.parameters,
        "calibration": None,
        "reduce_range": reduce_range,
    }
    ranges = None
    if file.fake_quant is not None:
        ranges, report["calibration"] = _trained_ranges(file)
    elif options.method == "static":
        ranges, report["calibration"] = _calibrate(file, options)
    for line in describe(report):
        info(f"quantize  {line}")

    def write(path: Path, names: list[str]) -> None:
        write_int8(file.prepared, path, layers, names, ranges=ranges, reduce_range=reduce_range)

    write(target, chosen)
    if options.sensitivity:
        report["sensitivity"] = layer_sensitivity(file, chosen, write, target.parent)
        print_sensitivity(report["sensitivity"])
    return report


def _environment(config: Config, command: str) -> dict[str, Any]:
    environment = environment_info(build_accelerator(config.run), command)
    for package in FORMATS["onnx"].needs:
        environment["packages"][package] = metadata.version(package)
    return {**environment, "int8_flags": list(int8_flags())}


def _trained_ranges(file: OnnxStudent) -> tuple[Any, dict[str, Any]]:
    """Return the ranges of activations from training, and where they are from."""
    layers = fake_quant_layers(file.fake_quant.network)
    ranges = {name: layer.range for name, layer in layers.items()}
    calibration = {"split": "train", "view": "training", "method": "trained"}
    return ranges_from_training(file.prepared, file.layers, ranges), calibration


def _calibrate(file: OnnxStudent, options: QuantizeOptions) -> tuple[Any, dict[str, Any]]:
    """Return the ranges of activations, and the images and method. Raises DataError."""
    train = split_images(file.config, file.model_info, file.run, "train")
    method, percentile = options.range_method, options.range_percentile
    seed = file.config.data.split_seed
    rows = stratified_indices(train.labels, options.num_images, seed=seed, stream="calibration")
    batches = file.inputs(train, rows, size=_CALIBRATION_BATCH)
    total = math.ceil(len(rows) / _CALIBRATION_BATCH)
    with closing(progress(batches, total=total, title="calibrating")) as images:
        ranges = calibrate(file.prepared, images, method=method, percentile=percentile)
    return ranges, {
        "split": "train",
        "view": "evaluation",
        "num_samples": len(rows),
        "method": method,
        "percentile": percentile,
        "seed": seed,
    }


def check_accuracy_drop(
    report: dict[str, Any], max_drop: float, other_methods: list[str], *, trainable: bool
) -> dict[str, float]:
    """Return the loss of top-1 [percentage points]; raise CheckpointError if it is too large.

    other_methods: methods to suggest in the message. trainable: whether to suggest training with
    fake quantization.
    """
    before, after = (final_head(report[name]["heads"])["top1"] for name in ("float", "int8"))
    drop = round(100 * (before - after), 9)
    if drop <= max_drop:
        return {"drop_points": drop, "max_drop_points": max_drop}
    suggestions = [f"method {name}" for name in other_methods]
    calibration = report["calibration"]
    if calibration is not None and calibration["method"] != "trained":
        suggestions += [
            f"calibration_method {method}"
            for method in ("minmax", "percentile")
            if method != calibration["method"]
        ]
        if calibration["num_samples"] < CALIBRATION_IMAGES:
            suggestions.append(f"calibration_images {CALIBRATION_IMAGES}")
    noisiest = "the noisiest layers, as listed by sensitivity"
    if "sensitivity" in report:
        noisiest = f"'{report['sensitivity']['layers'][0]['layer']}', the noisiest layer"
    suggestions.append(f"exclude {noisiest}")
    if trainable:
        suggestions.append(
            f"deit finetune --from {report['run']} --schedule int8 --out {report['run']}-int8"
        )
    raise CheckpointError(
        f"{report['run']}: int8 lowers top-1 by {drop:.2f} points ({100 * before:.2f} to "
        f"{100 * after:.2f} %), max_drop {max_drop:g} is allowed; nothing was written; try "
        f"{', or '.join(suggestions)}"
    )


def _is_trainable(student: StudentConfig) -> bool:
    """Return whether a student can be trained with fake quantization, and was not yet."""
    plain = student.qat == "none" and student.adapters == "none" and student.shared_block_size == 1
    return plain and student.is_transformer


def _add_costs(report: dict[str, Any], file: OnnxStudent, target: Path) -> None:
    """Add size and latency of both files to the report."""
    latency = interleaved_latency(file, target, threads=report["environment"]["threads"])
    for name, path in (("float", file.original), ("int8", target)):
        report[name]["bytes"] = path.stat().st_size
        report[name]["latency"] = latency[name]


def _write_card(path: Path, file: OnnxStudent, report: dict[str, Any]) -> None:
    heads = {"distillation": None, **report["int8"]["heads"]}
    heads.setdefault("fused", heads["class"])
    images = {name: report[name] for name in ("split", "num_samples")}
    write_card(
        path,
        run=file.run,
        format="onnx",
        config=file.config,
        model_info=file.model_info,
        metrics={**images, "heads": heads, "teacher": None},
        verified=[file.verification],
        license=None,
        quantized=quantization_card(report),
    )
