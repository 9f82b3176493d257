"""A finished run's student as an int8 file for ONNX Runtime, measured beside its float one."""

import math
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from deit.config.schema import Config
from deit.config.student_section import STUDENTS, StudentConfig
from deit.core.accelerator import environment_info
from deit.core.console import info, progress
from deit.core.errors import CheckpointError, ConfigError, DataError
from deit.core.filesystem import atomic_write_dir, check_file, write_json
from deit.core.hardware import int8_flags, int8_sums_saturate
from deit.core.run_folder import read_result
from deit.datasets.splits import stratified_indices
from deit.deploy.export import check_output_dir, require_packages
from deit.deploy.formats import FORMATS
from deit.deploy.int8_compare import (
    check_batch_invariance,
    compare_on_test,
    compare_to_run,
    final_head,
    interleaved_latency,
    layer_sensitivity,
)
from deit.deploy.int8_graph import calibrate, ranges_from_training, write_int8
from deit.deploy.int8_layers import METHODS, choose, covers_enough, layers_of
from deit.deploy.int8_tables import (
    describe,
    print_quantization,
    print_sensitivity,
    quantization_card,
)
from deit.deploy.model_card import write_card
from deit.deploy.onnx_student import OnnxStudent, export_float_onnx, split_images
from deit.deploy.prune_options import MANIFEST, PRUNED, RECOVERED
from deit.distill.build import build_accelerator
from deit.evaluation.load_run import evaluation_config, resolve_run
from deit.models.saved import ModelInfo, load_student
from deit.models.student import Student
from deit.models.surgery.fake_quant import fake_quant_layers

_CALIBRATED_ON = 128
_CALIBRATED_AT_ONCE = 8  # with all their activations in memory


class QuantizeOptions(NamedTuple):
    """What is asked of a quantization.

    method: of deit.deploy.int8_layers.METHODS. images: training images that static calibrates on,
    None: 128; range_method: of deit.deploy.int8_graph.CALIBRATIONS, None: minmax; percentile: of
    `percentile`.
    attention: whether products of two activations become integers. exclude: a regular expression,
    the layers that stay float.
    """

    method: str = "static"
    images: int | None = None
    range_method: str | None = None
    percentile: float | None = None
    attention: bool = False
    exclude: str | None = None


def quantize(
    run: Path,
    out: Path | None,
    plan: QuantizeOptions,
    *,
    max_drop: float = 1.0,
    sensitivity: bool = False,
    checkpoint: str = "best",
    root: str | None = None,
    json_file: Path | None = None,
    force: bool = False,
    command: str = "",
) -> Path:
    """Write a run's student as int8, with a card and what was measured; the folder.

    out: default: quantized-METHOD in the run's folder. max_drop: percentage points of top-1 on the
    test images that may be lost. sensitivity: also measure each layer alone. root: where the images
    are now. json_file: also write the numbers here. force: replace folder and file.

    Raises SystemFault where a package is missing or a file cannot be written, ConfigError where
    nothing can be quantized, DataError with too few training images, CheckpointError where the run
    is not finished or too much accuracy is lost; nothing is written then.
    """
    require_packages(FORMATS["onnx"].needs, "deit quantize")
    config, saved = resolve_run(run, checkpoint)
    _check_finished(saved.parent)
    _check_learnt(config, plan, run)
    folder = out or saved.parent / f"quantized-{plan.method}"
    check_output_dir(folder, force=force)
    check_file(json_file, option="--json", replace=force)
    config = evaluation_config(config, root=root, device="cpu")
    student, facts = load_student(saved)
    _check_early(plan, config, student, facts, saved.parent)
    found = {"run": str(run), "checkpoint": saved.name, **_about(config, command)}
    with tempfile.TemporaryDirectory(prefix="deit-") as scratch:
        file = export_float_onnx(config, student, facts, run=saved.parent, place=Path(scratch))
        target = Path(scratch) / "int8.onnx"
        found = _written(found, file, plan, target, sensitivity=sensitivity)
        found |= compare_on_test(file, target)
        if file.rounding is not None:
            found["as_the_run"] = compare_to_run(file, target)
        others = _other_methods(file, plan)
        found |= check_accuracy_drop(found, max_drop, others, trainable=_trainable(config.student))

        def write(place: Path) -> None:
            copied = Path(shutil.copyfile(target, place / "model.onnx"))
            found["batches"] = check_batch_invariance(file, copied)
            _add_costs(found, file, copied)
            write_json(place / "quantization.json", found)
            _write_card(place / "README.md", file, found)

        folder.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_dir(folder, write, replace=force)
    print_quantization(found)
    if json_file is not None:
        write_json(json_file, found)
        info(f"wrote {json_file}")
    info(f"quantized {folder}: {', '.join(sorted(one.name for one in folder.iterdir()))}")
    return folder


def _about(config: Config, command: str) -> dict[str, Any]:
    return {"command": command, "environment": _environment(config, command)}


def _check_finished(run: Path) -> None:
    """Refuse a run that is not trained to its end. Raises CheckpointError."""
    out_of_prune = run.parent
    if run.name == PRUNED and (out_of_prune / MANIFEST).is_file():
        raise CheckpointError(
            f"{run}: was pruned and is not trained; quantize {out_of_prune / RECOVERED}"
        )
    if read_result(run) is None:
        raise CheckpointError(
            f"{run}: is not finished; resume it first (its own command with --resume)"
        )


def _other_methods(file: OnnxStudent, plan: QuantizeOptions) -> list[str]:
    """The methods that may lose less accuracy; none for a run trained for its own."""
    if file.rounding is not None:
        return []
    return [name for name in METHODS if name != plan.method and covers_enough(file.layers, name)]


def _check_learnt(config: Config, plan: QuantizeOptions, run: Path) -> None:
    """Refuse to quantize a run that was trained for one file in another way. Raises ConfigError."""
    rounding = config.student.qat
    if rounding == "none":
        return
    asked = {
        "--method dynamic": plan.method == "dynamic",
        "--calibration-images": plan.images is not None,
        "--calibration-method": plan.range_method is not None,
        "--quantize-attention": plan.attention,
    }
    if wrong := [option for option, given in asked.items() if given]:
        raise ConfigError(
            f"{wrong[0]}: {run} was trained for one file (student.qat {rounding}): static, by "
            "the ranges it has learnt, products of attention in float; leave it out"
        )


def _check_early(
    plan: QuantizeOptions, config: Config, student: Student, facts: ModelInfo, run: Path
) -> None:
    """Refuse, before the export, which takes the most, what can be known without it. Raises
    ConfigError, DataError and CheckpointError."""
    rounded = fake_quant_layers(student.network).values()
    if rounded and not any(layer.range.any() for layer in rounded):
        raise CheckpointError(
            f"{run}: student.qat = {config.student.qat!r}: has learnt no ranges, no "
            "update was made; train it on"
        )
    # What adapters, and timm's others, call the functions that they compute only the graph tells.
    if config.student.name in STUDENTS and config.student.adapters == "none":
        layers = layers_of(student.network)
        choose(layers, method=plan.method, attention=plan.attention, exclude=plan.exclude)
    if plan.method == "static" and config.student.qat == "none":
        number = len(split_images(config, facts, run, "train").labels)
        if number < _images(plan):
            raise DataError(
                f"--calibration-images {_images(plan)}: there are {number} training images; ask "
                "for no "
                "more, or take --method dynamic, which needs none"
            )


def _images(plan: QuantizeOptions) -> int:
    return plan.images or _CALIBRATED_ON


def _written(
    known: dict[str, Any],
    file: OnnxStudent,
    plan: QuantizeOptions,
    target: Path,
    *,
    sensitivity: bool,
) -> dict[str, Any]:
    """Write the int8 file; what is known, with what was done, and each layer alone if asked."""
    layers = file.layers
    chosen = choose(layers, method=plan.method, attention=plan.attention, exclude=plan.exclude)
    reduce_range = int8_sums_saturate(int8_flags())
    found = {
        **known,
        "method": plan.method,
        "int8_layers": chosen,
        "products": list(layers.products),
        "float_layers": [name for name in layers.nodes if name not in chosen],
        "int8_share": sum(layers.weights[name] for name in chosen) / layers.parameters,
        "calibration": None,
        "reduce_range": reduce_range,
    }
    ranges = None
    if file.rounding is not None:
        ranges, found["calibration"] = _learnt(file)
    elif plan.method == "static":
        ranges, found["calibration"] = _calibrate(file, plan)
    for line in describe(found):
        info(f"quantizes {line}")

    def write(path: Path, names: list[str]) -> None:
        write_int8(file.prepared, path, layers, names, ranges=ranges, reduce_range=reduce_range)

    write(target, chosen)
    if sensitivity:
        found["sensitivity"] = layer_sensitivity(file, chosen, write, target.parent)
        print_sensitivity(found["sensitivity"])
    return found


def _environment(config: Config, command: str) -> dict[str, Any]:
    about = environment_info(build_accelerator(config.run), command)
    for package in FORMATS["onnx"].needs:
        about["packages"][package] = metadata.version(package)
    return {**about, "int8_flags": list(int8_flags())}


def _learnt(file: OnnxStudent) -> tuple[Any, dict[str, Any]]:
    """The ranges of activations as training left them."""
    layers = fake_quant_layers(file.rounding.network)
    ranges = {name: layer.range for name, layer in layers.items()}
    told = {"split": "train", "view": "training", "how": "learnt"}
    return ranges_from_training(file.prepared, file.layers, ranges), told


def _calibrate(file: OnnxStudent, plan: QuantizeOptions) -> tuple[Any, dict[str, Any]]:
    """The ranges of activations, and what they were found on. Raises DataError."""
    train = split_images(file.config, file.facts, file.run, "train")
    how, seed = plan.range_method or "minmax", file.config.data.split_seed
    rows = stratified_indices(train.labels, _images(plan), seed=seed, stream="calibration")
    batches = file.inputs(train, rows, size=_CALIBRATED_AT_ONCE)
    total = math.ceil(len(rows) / _CALIBRATED_AT_ONCE)
    watched = progress(batches, total=total, title="calibrating")
    ranges = calibrate(file.prepared, watched, how=how, percentile=plan.percentile)
    asked = {"how": how, "percentile": plan.percentile, "seed": seed}
    return ranges, {"split": "train", "view": "evaluation", "num_samples": len(rows), **asked}


def check_accuracy_drop(
    found: dict[str, Any], most: float, others: list[str], *, trainable: bool
) -> dict[str, float]:
    """By how many points top-1 falls. others: methods that may do better; trainable: whether
    training under roundings may. Raises CheckpointError where that is more than may be."""
    before, after = (final_head(found[name]["heads"])["top1"] for name in ("float", "int8"))
    drop = round(100 * (before - after), 9)
    if drop <= most:
        return {"drop_points": drop, "max_drop_points": most}
    ways = [f"--method {name}" for name in others]
    seen = found["calibration"]
    if seen is not None and seen["how"] != "learnt":
        ways += [
            f"--calibration-method {how}" for how in ("minmax", "percentile") if how != seen["how"]
        ]
        if seen["num_samples"] < _CALIBRATED_ON:
            ways.append(f"--calibration-images {_CALIBRATED_ON}")
    noisiest = "the layers that --sensitivity shows to be the noisiest"
    if "sensitivity" in found:
        noisiest = f"'{found['sensitivity']['layers'][0]['layer']}', the noisiest layer"
    ways.append(f"--exclude {noisiest}")
    if trainable:
        ways.append(
            f"deit finetune --from {found['run']} --schedule int8 --out {found['run']}-int8"
        )
    raise CheckpointError(
        f"{found['run']}: int8 takes {drop:.2f} points off its top-1 ({100 * before:.2f} to "
        f"{100 * after:.2f} %), --max-drop {most:g} is allowed; nothing is kept; try "
        f"{', or '.join(ways)}"
    )


def _trainable(student: StudentConfig) -> bool:
    """Whether a student could be, and was not yet, trained under roundings."""
    plain = student.qat == "none" and student.adapters == "none" and student.shared_block_size == 1
    return plain and student.is_transformer


def _add_costs(found: dict[str, Any], file: OnnxStudent, target: Path) -> None:
    """Bytes and times of both files."""
    times = interleaved_latency(file, target, threads=found["environment"]["threads"])
    for name, path in (("float", file.original), ("int8", target)):
        found[name]["bytes"] = path.stat().st_size
        found[name]["latency"] = times[name]


def _write_card(path: Path, file: OnnxStudent, found: dict[str, Any]) -> None:
    heads = {"distillation": None, **found["int8"]["heads"]}
    heads.setdefault("fused", heads["class"])
    measured = {name: found[name] for name in ("split", "num_samples")}
    write_card(
        path,
        run=file.run,
        name="onnx",
        config=file.config,
        facts=file.facts,
        found={**measured, "heads": heads, "teacher": None},
        verified=[file.checked],
        licence=None,
        quantized=quantization_card(found),
    )
