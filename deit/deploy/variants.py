"""`deit variants`: every smaller version of a run beside it, in one table and one picture."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit.config.schema import Config, RunConfig, differing_split_field
from deit.core import run_folder
from deit.core.accelerator import environment_info
from deit.core.console import format_percent, info, progress, warn
from deit.core.errors import ConfigError, DataError, SystemFault
from deit.core.filesystem import (
    atomic_write,
    atomic_write_dir,
    check_file,
    check_writable,
    write_json,
)
from deit.core.json_io import load_json_as
from deit.core.types import logits_by_head
from deit.deploy.export import require_packages
from deit.deploy.formats import FORMATS, OUTPUTS, onnx_inference_fn
from deit.deploy.int8_compare import final_head
from deit.deploy.latency import latencies
from deit.deploy.onnx_student import CHUNK
from deit.deploy.prune_options import CONTROLS, MANIFEST, RECOVERED
from deit.deploy.variants_tables import draw_variants, markdown, print_variants
from deit.distill.build import build_accelerator
from deit.distill.inference import evaluation_batches
from deit.evaluation.load_run import (
    evaluation_config,
    evaluation_images,
    resolve_run,
    warn_unfinished,
)
from deit.models.cost import cost_of
from deit.models.metadata import BASE
from deit.models.saved import WEIGHTS, ModelInfo, load_student, to_safetensors_bytes
from deit.models.student import Student
from deit.models.surgery.token_merging import with_merging
from deit.models.weight_files import digest_of, read_weights
from deit.viz.tables import HEADS

_TIMED = (1, 64)
_TIMED_S = 1.5  # for each version and size of the batch
_FILES = ("variants.json", "variants.md", "variants.png")
_SAME = 0.999  # of a float file: the last bits may decide between two classes
_ALIKE = 0.8  # the share of equal answers below which an int8 file is of another network
_AS_MEASURED = RunConfig(device="cpu", precision="fp32")
InferenceFn = Callable[[Tensor], dict[str, Tensor]]
"""Views [batch, 3, side, side] in [0, 1] -> logits [batch, classes] by head."""


class Variant(NamedTuple):
    """A smaller version of a student, or the student itself. run: whose it is; onnx: its file,
    None where PyTorch computes it; merge: how many tokens each of its blocks merges."""

    name: str
    run: Path
    onnx: Path | None = None
    merge: int = 0


def variants(
    run: Path,
    more: list[Path],
    *,
    merges: tuple[int, ...],
    root: str | None,
    json_file: Path | None,
    force: bool,
    command: str = "",
) -> dict[str, Any]:
    """Measure a run and what was made smaller of it on the same test images, and its time on this
    machine in turns; write variants.json, variants.md and variants.png into the run's folder
    `variants`.

    Found by itself: what `deit export --format onnx` and `deit quantize` left in the run's folder,
    and what `deit prune` made of it beside it, with files of theirs. more: other runs (levels of a
    search for tickets, runs adapted or trained otherwise) of the same classes. merges: how many
    tokens the run's blocks merge, a version each. force: replaces the ladder that is there, and the
    JSON file. Returns what variants.json holds.
    Raises the errors of deit.core.errors.
    """
    run_folder.require_run(run)  # beside which everything else is looked for
    check_file(json_file, option="--json", replace=force)
    versions = versions_of(run, more, merges)
    if any(version.onnx is not None for version in versions):
        require_packages(FORMATS["onnx"].needs, "measuring an ONNX file")
    _check_place(run / "variants", force=force)
    config, facts, labels, views = _images(run, root)
    rungs = {version.name: _rung(version, config, facts) for version in versions}
    answers = {name: _answers(rung.ask, views(), len(labels), name) for name, rung in rungs.items()}
    _drop_stale_files(versions, answers)
    first = final_head(answers[versions[0].name])
    rows: dict[str, dict[str, Any]] = {}
    for name, own in answers.items():
        rows[name] = {
            **rungs[name].about,
            "top1": {head: _share(own.get(head), labels) for head in HEADS},
            "same_answers": _share(final_head(own), first),
        }
    rungs = {name: rungs[name] for name in rows}
    images = next(views())
    for batch, taken in _times(rungs, images).items():
        for name, latency in taken.items():
            rows[name].setdefault("latency", {})[batch] = latency
    result = {
        "run": str(run),
        "split": "test",
        "num_samples": len(labels),
        "image_size": config.student.image_size,
        "rows": rows,
        "command": command,
        "environment": environment_info(build_accelerator(_AS_MEASURED), command),
    }
    print_variants(result)
    _write(result, run, json_file, force=force)
    return result


def _check_place(folder: Path, *, force: bool) -> None:
    """Refuse, before the long work, a ladder that is there and may not be replaced, and what is
    none. Raises SystemFault."""
    if folder.exists():
        others = sorted(path.name for path in folder.glob("*") if path.name not in _FILES)
        if others or not folder.is_dir():
            raise SystemFault(
                f"{folder}: is to hold the ladder, and holds {', '.join(others[:3]) or 'a file'}; "
                "move it away"
            )
        if not force:
            raise SystemFault(f"{folder}: exists already; --force replaces it")
    check_writable(folder, option="RUN")


def versions_of(run: Path, more: list[Path], merges: tuple[int, ...] = ()) -> list[Variant]:
    """The run, what was made of it, and the other runs with their files. Raises CheckpointError,
    and ConfigError where one is named twice."""
    _, saved = resolve_run(run, "best")
    warn_unfinished(saved.parent)
    found = _of_run(run, run.resolve().name)
    own_name = found[0].name
    found += [Variant(f"{own_name}, merging {one}", run, merge=one) for one in merges]
    own = digest_of(read_weights(saved / WEIGHTS))
    for manifest in sorted(run.resolve().parent.glob(f"*/{MANIFEST}")):
        if load_json_as(manifest, dict[str, Any]).get("weights") != own:
            continue
        for part in (RECOVERED, *CONTROLS.values()):
            if run_folder.read_result(manifest.parent / part) is not None:
                name = f"{manifest.parent.name}, {part}"
                found += _of_run(manifest.parent / part, name)
    by_itself = {version.run.resolve() for version in found[1:]} - {run.resolve()}
    for one in more:
        warn_unfinished(resolve_run(one, "best")[1].parent)
        if one.resolve() in by_itself:
            continue
        known = [version.run.resolve() for version in found]
        if one.resolve() in known:
            raise ConfigError(f"{one}: is among the versions already; name it once or not at all")
        names = {version.name for version in found}
        called = one.resolve().name
        found += _of_run(one, str(one) if called in names else called)
    return found


def _of_run(run: Path, name: str) -> list[Variant]:
    """A run, and the ONNX files in its folder."""
    files = [*sorted(run.glob("export-*/model.onnx")), *sorted(run.glob("quantized-*/model.onnx"))]
    kinds = {"export-onnx": "ONNX", "quantized-static": "int8 static"}
    kinds["quantized-dynamic"] = "int8 dynamic"
    made = [
        Variant(f"{name}, {kinds.get(file.parent.name, file.parent.name)}", run, file)
        for file in files
    ]
    return [Variant(name, run), *made]


def _images(
    run: Path, root: str | None
) -> tuple[Config, ModelInfo, Tensor, Callable[[], Iterator[Tensor]]]:
    """The configuration of a run and its facts, the labels of the test images, and these as all
    versions are shown them, batch by batch, as often as they are wanted."""
    config, saved = resolve_run(run, "best")
    config = evaluation_config(config, root=root, device="cpu")
    _, facts = load_student(saved)
    test = evaluation_images(config, facts, run, "test", None, None).images
    chunks = torch.arange(len(test.labels)).split(CHUNK)

    def views() -> Iterator[Tensor]:
        return evaluation_batches(test, chunks, config.evaluation, device=torch.device("cpu"))

    return config, facts, test.labels, views


class VariantEntry(NamedTuple):
    ask: InferenceFn
    about: dict[str, Any]


def _rung(version: Variant, config: Config, facts: ModelInfo) -> VariantEntry:
    """How a version is asked, and what it is: engine, parameters, those that are not 0, bytes,
    arithmetic. config, facts: of the run they stand beside. Raises ConfigError and DataError where
    it would not be asked as by its own evaluation."""
    own_config, saved = resolve_run(version.run, "best")
    student, own = load_student(saved)
    if own.class_names != facts.class_names:
        raise DataError(f"{version.run}: knows other classes than the run")
    field = differing_split_field(own_config.data, config.data)
    if field not in (None, "data.root"):  # images may have been moved
        raise DataError(
            f"{version.run}: has another {field} than the run, so it may have learnt from images "
            "that the run is tested on"
        )
    for name in ("image_size", "eval_crop_pct"):
        mine, theirs = (
            one.student.image_size if name == "image_size" else one.evaluation_crop
            for one in (own, facts)
        )
        if mine != theirs:
            raise ConfigError(
                f"{version.run}: is evaluated at {name} {mine}, the run at {theirs}; deit evaluate "
                "puts different ones into one table"
            )
    student.eval()
    if version.merge:
        student.network = with_merging(student.network, version.merge)
    weights = student.network.state_dict()
    parameters = student.network.parameters()
    cost = cost_of(student, side=own.student.image_size, batch=1)
    about: dict[str, Any] = {
        "folder": str(version.run),
        "engine": "PyTorch" if version.onnx is None else "ONNX Runtime",
        "parameters": cost.parameters,
        "nonzero": sum(int(one.count_nonzero()) for one in parameters),
        "gmacs": cost.gmacs,
    }
    if version.onnx is None:
        about["bytes"] = (saved / WEIGHTS).stat().st_size
        if (saved / BASE).is_file():  # a file of adapters is of no use without what they belong to
            about["bytes"] = len(to_safetensors_bytes(weights))
        return VariantEntry(_by_torch(student), about)
    folder = version.onnx.parent
    about["bytes"] = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    return VariantEntry(_by_onnx(version.onnx, student), about)


@torch.inference_mode()
def _ask(student: Student, views: Tensor) -> dict[str, Tensor]:
    heads = logits_by_head(student(views))
    return {head: heads[head] for head in HEADS if head in heads}


def _by_torch(student: Student) -> InferenceFn:
    return lambda views: _ask(student, views)


def _by_onnx(file: Path, student: Student) -> InferenceFn:
    """An ONNX file, which takes normalised images."""
    answer, mean, std = (
        onnx_inference_fn(file, threads=torch.get_num_threads()),
        student.mean,
        student.std,
    )

    def ask(views: Tensor) -> dict[str, Tensor]:
        outputs = answer((views - mean) / std)
        alone = len(outputs) == 1
        return {"class" if alone else OUTPUTS[name]: one for name, one in outputs.items()}

    return ask


def _answers(
    ask: InferenceFn, views: Iterator[Tensor], number: int, name: str
) -> dict[str, Tensor]:
    """The class of each image by head, int64 [number]."""
    parts = [
        {head: logits.argmax(dim=1) for head, logits in ask(part).items()}
        for part in progress(views, total=-(-number // CHUNK), title=name)
    ]
    return {head: torch.cat([part[head] for part in parts]) for head in parts[0]}


def _drop_stale_files(versions: list[Variant], answers: dict[str, dict[str, Tensor]]) -> None:
    """Drop the ONNX files that were made of other weights than the run has now: a float one gives
    other answers, an integer one many others."""
    of = {version.run: version.name for version in versions if not (version.onnx or version.merge)}
    for version in versions:
        if version.onnx is None:
            continue
        theirs, ours = (final_head(answers[name]) for name in (version.name, of[version.run]))
        least = _SAME if version.onnx.parent.name.startswith("export-") else _ALIKE
        same = _share(theirs, ours)
        if same < least:
            warn(
                f"{version.onnx}: left out, {format_percent(same)} % of its answers are those of "
                f"{version.run}/best; made of other weights? (deit export, deit quantize --force)"
            )
            del answers[version.name]


def _share(answers: Tensor | None, labels: Tensor) -> float | None:
    return None if answers is None else (answers == labels).double().mean().item()


def _times(rungs: dict[str, VariantEntry], images: Tensor) -> dict[str, dict[str, Any]]:
    """How long every version takes for a batch of each size, in turns."""
    images = images[torch.arange(max(_TIMED)) % len(images)]
    asks = {name: rung.ask for name, rung in rungs.items()}
    found = {}
    for batch in progress(_TIMED, total=len(_TIMED), title="timing in turns"):
        taken = latencies(asks, images[:batch], seconds=_TIMED_S * len(asks))
        found[str(batch)] = {name: one._asdict() for name, one in taken.items()}
    return found


def _write(result: dict[str, Any], run: Path, json_file: Path | None, *, force: bool) -> None:
    """Numbers, table and picture into the run's folder; the numbers where they were asked for."""

    def write(folder: Path) -> None:
        write_json(folder / "variants.json", result)
        atomic_write(folder / "variants.md", markdown(result).encode())
        try:
            draw_variants(result, folder / "variants.png")
        except SystemFault as error:
            info(f"no picture: {error}")

    atomic_write_dir(run / "variants", write, replace=force)
    for name in sorted(path.name for path in (run / "variants").iterdir()):
        info(f"wrote {run / 'variants' / name}")
    if json_file is not None:
        write_json(json_file, result)
        info(f"wrote {json_file}")
