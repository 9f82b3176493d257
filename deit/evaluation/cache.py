"""What evaluation says of a finished run: asked once, kept beside it."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deit.config.data_section import DataConfig
from deit.core import run_folder
from deit.core.console import warn
from deit.core.errors import CheckpointError, DataError
from deit.core.file_reading import read_bytes
from deit.core.json_io import read_sealed, write_sealed
from deit.datasets.splits import digest_of_images, load_split
from deit.evaluation.evaluate import EvaluationResult, cost_of_run, evaluate_run
from deit.evaluation.load_run import evaluation_config, load_run_config
from deit.models.metadata import find_saved_model


@dataclass(frozen=True)
class CachedEvaluation:
    """An evaluation on the test split. found: as deit.evaluation.evaluate.evaluate returns it.
    answers: the class of each image by head and `teacher`, confidence: the probability it was given
    with;
    labels: the true ones. of: what it was made of, by name: `run`, the last link of the run's chain
    of hashes; digests of the `images` and of the files of the `teacher`, "" without one."""

    provenance: dict[str, str]
    found: dict[str, Any]
    answers: dict[str, list[int]]
    confidence: dict[str, list[float]]
    labels: list[int]


class EvaluationCache:
    """Evaluations of finished runs, each made once and kept; the images of a data set are looked at
    once for all runs."""

    def __init__(self) -> None:
        self._digests: dict[DataConfig, str] = {}

    def get(
        self,
        out: Path,
        *,
        cache_path: Path | None = None,
        root: str | None = None,
        teacher: str | None = None,
        cost: bool = False,
    ) -> CachedEvaluation:
        """The evaluation of a finished run: from the file beside its folder if that is of this run,
        these images and this teacher; where images or teacher are gone, of those there were.

        elsewhere: where it is written if there is none; None: beside the folder. root, teacher,
        cost: as deit.evaluation.evaluate.examine takes them. Raises the errors of deit.core.errors.
        """
        result = run_folder.read_result(out)
        if result is None:
            raise CheckpointError(f"{out}: is not finished; its own command goes on with it")
        beside = out.with_name(f"{out.name}.evaluation.json")
        for path in (cache_path, beside):
            before = None if path is None else read_sealed(path, CachedEvaluation)
            if before is None:
                continue
            if before.provenance["run"] == result["chain"] and self._holds(
                before, out, root, teacher
            ):
                if cost and "cost" not in before.found:
                    before.found["cost"] = cost_of_run(out)
                    write_sealed(cache_path or beside, asdict(before))
                return before
        examined = evaluate_run(out, root=root, teacher=teacher, cost=cost)
        now = _measured(examined, {"run": result["chain"], "teacher": ""})
        if examined.found["teacher"] is not None:
            now.provenance["teacher"] = _digest_of_files(_sources(out, teacher))
        write_sealed(cache_path or beside, asdict(now))
        return now

    def _holds(
        self, before: CachedEvaluation, out: Path, root: str | None, teacher: str | None
    ) -> bool:
        """Whether a kept evaluation is of the images and the teacher that are there now."""
        data = evaluation_config(load_run_config(out), root=root).data
        if data not in self._digests:
            try:
                names, images = load_split(data, "test")
                self._digests[data] = digest_of_images(names, (images,))
            except DataError as error:
                warn(f"evaluations are told as they were made: {error} (--data.root DIR: moved?)")
                self._digests[data] = ""
        images = self._digests[data] in ("", before.provenance["images"])
        return images and _digest_of_files(_sources(out, teacher)) in (
            "",
            before.provenance["teacher"],
        )


def _measured(examined: EvaluationResult, of: dict[str, str]) -> CachedEvaluation:
    return CachedEvaluation(
        {**of, "images": examined.digest},
        examined.found,
        {name: answer.tolist() for name, answer in examined.answers.items()},
        {
            name: [round(one, 5) for one in shares.tolist()]
            for name, shares in examined.confidence.items()
        },
        examined.labels.tolist(),
    )


def _sources(out: Path, teacher: str | None) -> list[str]:
    """Whom an evaluation asks beside the student: code in a run's configuration is not run."""
    if teacher is not None:
        return teacher.split(",")
    own = load_run_config(out).teacher
    return [] if own.code_sources else list(own.source)


def _digest_of_files(sources: list[str]) -> str:
    """SHA-256 over the files of teachers; "" where one of them is no file or folder here."""
    digest = hashlib.sha256()
    for source in sources:
        path = Path(source.rsplit(":", 1)[0] if ".py:" in source else source).expanduser()
        path = (find_saved_model(path) or path) if path.is_dir() else path
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if file.is_file()]
        if not files:
            return ""
        for file in files:
            digest.update(read_bytes(file))
    return digest.hexdigest() if sources else ""


_FEW, _MOST = 3, 12


def disagreement_matrix(runs: dict[str, CachedEvaluation]) -> dict[str, dict[str, float]]:
    """The share of images on which two answer differently (the DeiT paper's Table 4), for each two:
    the truth, the teacher, and the runs; of up to three runs every head, of more the fused answer.

    runs: by name. Empty where they are of different images, or more than twelve.
    """
    labels = [one.labels for one in runs.values()]
    if not labels or len(labels) > _MOST or any(one != labels[0] for one in labels):
        return {}
    voices = {"truth": labels[0]}
    for name, one in runs.items():
        said = one.answers.get("teacher")
        taught = [answers for voice, answers in voices.items() if voice.startswith("teacher")]
        if said is not None and said not in taught:
            voices[f"teacher of {name}" if taught else "teacher"] = said
    for name, one in runs.items():
        final = "fused" if "fused" in one.answers else "class"
        heads = [head for head in ("class", "distillation", "fused") if head in one.answers]
        for head in heads if len(runs) <= _FEW else [final]:
            voices[name if len(heads) == 1 or len(runs) > _FEW else f"{name}, {head}"] = (
                one.answers[head]
            )
    return {
        one: {other: _differing(mine, theirs) for other, theirs in voices.items()}
        for one, mine in voices.items()
    }


def _differing(first: list[int], second: list[int]) -> float:
    return sum(a != b for a, b in zip(first, second, strict=True)) / len(first)
