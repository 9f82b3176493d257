"""`deit ladder`: every smaller version of a run beside it, in one table and one picture."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit import checkpoint
from deit.config import Config, RunConfig, other_images
from deit.console import percent, progress, say, warn
from deit.disk import check_file, check_writable, put_file, put_folder, write_json
from deit.environment import create_accelerator, describe
from deit.errors import ConfigError, DataError, EnvironmentFault
from deit.evaluation import as_asked, find_run, images_of, warn_unfinished
from deit.export import require
from deit.float_file import CHUNK
from deit.formats import FORMATS, OUTPUTS, answer_of
from deit.ladder_page import draw_ladder, markdown, print_ladder
from deit.latency import latencies
from deit.models.base import BASE
from deit.models.cost import cost_of
from deit.models.merging import with_merging
from deit.models.saved import WEIGHTS, Facts, load_student, serialised
from deit.models.student import Student
from deit.models.weights import digest_of, read_weights
from deit.prediction import shown
from deit.prune_options import CONTROLS, MANIFEST, RECOVERED
from deit.records import head_logits
from deit.side_by_side import final
from deit.typed_json import read_typed

_TIMED = (1, 64)
_TIMED_S = 1.5  # for each version and size of the batch
_HEADS = ("class", "distillation", "fused")
_FILES = ("ladder.json", "ladder.md", "ladder.png")
_SAME = 0.999  # of a float file: the last bits may decide between two classes
_ALIKE = 0.8  # the share of equal answers below which an int8 file is of another network
_AS_MEASURED = RunConfig(device="cpu", precision="fp32")
Ask = Callable[[Tensor], dict[str, Tensor]]
"""Views [batch, 3, side, side] in [0, 1] -> logits [batch, classes] by head."""


class Version(NamedTuple):
    """A smaller version of a student, or the student itself. run: whose it is; onnx: its file,
    None where PyTorch computes it; merge: how many tokens each of its blocks merges."""

    name: str
    run: Path
    onnx: Path | None = None
    merge: int = 0


def ladder(
    run: Path,
    more: list[Path],
    *,
    merges: tuple[int, ...],
    root: str | None,
    json_file: Path | None,
    force: bool,
    arguments: list[str],
) -> dict[str, Any]:
    """Measure a run and what was made smaller of it on the same test images, and its time on this
    machine in turns; write ladder.json, ladder.md and ladder.png into the run's folder `ladder`.

    Found by itself: what `deit export --format onnx` and `deit quantize` left in the run's folder,
    and what `deit prune` made of it beside it, with files of theirs. more: other runs (levels of a
    search for tickets, runs adapted or trained otherwise) of the same classes. merges: how many
    tokens the run's blocks merge, a version each. force: replaces the ladder that is there, and the
    JSON file. Returns what ladder.json holds.
    Raises the errors of deit.errors.
    """
    checkpoint.check_run(run)  # beside which everything else is looked for
    check_file(json_file, option="--json", replace=force)
    versions = versions_of(run, more, merges)
    if any(version.onnx is not None for version in versions):
        require(FORMATS["onnx"].needs, "measuring an ONNX file")
    _check_place(run / "ladder", force=force)
    config, facts, labels, views = _images(run, root)
    rungs = {version.name: _rung(version, config, facts) for version in versions}
    answers = {name: _answers(rung.ask, views(), len(labels), name) for name, rung in rungs.items()}
    _leave_out_strangers(versions, answers)
    first = final(answers[versions[0].name])
    rows: dict[str, dict[str, Any]] = {}
    for name, own in answers.items():
        rows[name] = {
            **rungs[name].about,
            "top1": {head: _share(own.get(head), labels) for head in _HEADS},
            "same_answers": _share(final(own), first),
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
        "command": f"deit ladder {shlex.join(arguments)}",
        "environment": describe(create_accelerator(_AS_MEASURED), arguments),
    }
    print_ladder(result)
    _write(result, run, json_file, force=force)
    return result


def _check_place(folder: Path, *, force: bool) -> None:
    """Refuse, before the long work, a ladder that is there and may not be replaced, and what is
    none. Raises EnvironmentFault."""
    if folder.exists():
        others = sorted(path.name for path in folder.glob("*") if path.name not in _FILES)
        if others or not folder.is_dir():
            raise EnvironmentFault(
                f"{folder}: is to hold the ladder, and holds {', '.join(others[:3]) or 'a file'}; "
                "move it away"
            )
        if not force:
            raise EnvironmentFault(f"{folder}: exists already; --force replaces it")
    check_writable(folder, option="RUN")


def versions_of(run: Path, more: list[Path], merges: tuple[int, ...] = ()) -> list[Version]:
    """The run, what was made of it, and the other runs with their files. Raises CheckpointError,
    and ConfigError where one is named twice."""
    _, saved = find_run(run, "best")
    warn_unfinished(saved.parent)
    found = _of_run(run, run.resolve().name)
    own_name = found[0].name
    found += [Version(f"{own_name}, merging {one}", run, merge=one) for one in merges]
    own = digest_of(read_weights(saved / WEIGHTS))
    for manifest in sorted(run.resolve().parent.glob(f"*/{MANIFEST}")):
        if read_typed(manifest, dict[str, Any]).get("weights") != own:
            continue
        for part in (RECOVERED, *CONTROLS.values()):
            if checkpoint.result_of(manifest.parent / part) is not None:
                name = f"{manifest.parent.name}, {part}"
                found += _of_run(manifest.parent / part, name)
    by_itself = {version.run.resolve() for version in found[1:]} - {run.resolve()}
    for one in more:
        warn_unfinished(find_run(one, "best")[1].parent)
        if one.resolve() in by_itself:
            continue
        known = [version.run.resolve() for version in found]
        if one.resolve() in known:
            raise ConfigError(f"{one}: is among the versions already; name it once or not at all")
        names = {version.name for version in found}
        called = one.resolve().name
        found += _of_run(one, str(one) if called in names else called)
    return found


def _of_run(run: Path, name: str) -> list[Version]:
    """A run, and the ONNX files in its folder."""
    files = [*sorted(run.glob("export-*/model.onnx")), *sorted(run.glob("quantized-*/model.onnx"))]
    kinds = {"export-onnx": "ONNX", "quantized-static": "int8 static"}
    kinds["quantized-dynamic"] = "int8 dynamic"
    made = [
        Version(f"{name}, {kinds.get(file.parent.name, file.parent.name)}", run, file)
        for file in files
    ]
    return [Version(name, run), *made]


def _images(
    run: Path, root: str | None
) -> tuple[Config, Facts, Tensor, Callable[[], Iterator[Tensor]]]:
    """The configuration of a run and its facts, the labels of the test images, and these as all
    versions are shown them, batch by batch, as often as they are wanted."""
    config, saved = find_run(run, "best")
    config = as_asked(config, root=root, device="cpu")
    _, facts = load_student(saved)
    test = images_of(config, facts, run, "test", None, None).images
    chunks = torch.arange(len(test.labels)).split(CHUNK)

    def views() -> Iterator[Tensor]:
        return shown(test, chunks, config, device=torch.device("cpu"))

    return config, facts, test.labels, views


class _Rung(NamedTuple):
    ask: Ask
    about: dict[str, Any]


def _rung(version: Version, config: Config, facts: Facts) -> _Rung:
    """How a version is asked, and what it is: engine, parameters, those that are not 0, bytes,
    arithmetic. config, facts: of the run they stand beside. Raises ConfigError and DataError where
    it would not be asked as by its own evaluation."""
    own_config, saved = find_run(version.run, "best")
    student, own = load_student(saved)
    if own.class_names != facts.class_names:
        raise DataError(f"{version.run}: knows other classes than the run")
    field = other_images(own_config.data, config.data)
    if field not in (None, "data.root"):  # images may have been moved
        raise DataError(
            f"{version.run}: has another {field} than the run, so it may have learnt from images "
            "that the run is tested on"
        )
    for name in ("image_size", "evaluation_crop"):
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
            about["bytes"] = len(serialised(weights))
        return _Rung(_by_torch(student), about)
    folder = version.onnx.parent
    about["bytes"] = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    return _Rung(_by_onnx(version.onnx, student), about)


@torch.inference_mode()
def _ask(student: Student, views: Tensor) -> dict[str, Tensor]:
    heads = head_logits(student(views))
    return {head: heads[head] for head in _HEADS if head in heads}


def _by_torch(student: Student) -> Ask:
    return lambda views: _ask(student, views)


def _by_onnx(file: Path, student: Student) -> Ask:
    """An ONNX file, which takes normalised images."""
    answer, mean, std = answer_of(file, threads=torch.get_num_threads()), student.mean, student.std

    def ask(views: Tensor) -> dict[str, Tensor]:
        outputs = answer((views - mean) / std)
        alone = len(outputs) == 1
        return {"class" if alone else OUTPUTS[name]: one for name, one in outputs.items()}

    return ask


def _answers(ask: Ask, views: Iterator[Tensor], number: int, name: str) -> dict[str, Tensor]:
    """The class of each image by head, int64 [number]."""
    parts = [
        {head: logits.argmax(dim=1) for head, logits in ask(part).items()}
        for part in progress(views, total=-(-number // CHUNK), title=name)
    ]
    return {head: torch.cat([part[head] for part in parts]) for head in parts[0]}


def _leave_out_strangers(versions: list[Version], answers: dict[str, dict[str, Tensor]]) -> None:
    """Drop the ONNX files that were made of other weights than the run has now: a float one gives
    other answers, an integer one many others."""
    of = {version.run: version.name for version in versions if not (version.onnx or version.merge)}
    for version in versions:
        if version.onnx is None:
            continue
        theirs, ours = (final(answers[name]) for name in (version.name, of[version.run]))
        least = _SAME if version.onnx.parent.name.startswith("export-") else _ALIKE
        same = _share(theirs, ours)
        if same < least:
            warn(
                f"{version.onnx}: left out, {percent(same)} % of its answers are those of "
                f"{version.run}/best; made of other weights? (deit export, deit quantize --force)"
            )
            del answers[version.name]


def _share(answers: Tensor | None, labels: Tensor) -> float | None:
    return None if answers is None else (answers == labels).double().mean().item()


def _times(rungs: dict[str, _Rung], images: Tensor) -> dict[str, dict[str, Any]]:
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
        write_json(folder / "ladder.json", result)
        put_file(folder / "ladder.md", markdown(result).encode())
        try:
            draw_ladder(result, folder / "ladder.png")
        except EnvironmentFault as error:
            say(f"no picture: {error}")

    put_folder(run / "ladder", write, replace=force)
    for name in sorted(path.name for path in (run / "ladder").iterdir()):
        say(f"wrote {run / 'ladder' / name}")
    if json_file is not None:
        write_json(json_file, result)
        say(f"wrote {json_file}")
