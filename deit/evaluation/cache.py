"""Evaluations of finished runs, kept in a file next to each run and reused."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deit.config.sections.data import DataConfig
from deit.config.teachers import given_sources
from deit.core import run_folder
from deit.core.console import warn
from deit.core.errors import CheckpointError, DataError
from deit.core.file_reading import read_bytes
from deit.core.json_io import read_sealed, write_sealed
from deit.datasets.splits import digest_of_images, load_split
from deit.evaluation.evaluate import EvaluationResult, cost_of_run, evaluate
from deit.evaluation.load_run import evaluation_config, load_run_config
from deit.models.metadata import find_saved_model


@dataclass(frozen=True)
class CachedEvaluation:
    """An evaluation on the test split, as it is stored on disk.

    provenance: what it was computed from: `run`, the last link of the run's hash chain; `images`
    and `teacher`, SHA-256 digests of the test images and of the teacher's files ("" without a
    teacher). metrics: as deit.evaluation.evaluate.evaluate returns them. predictions: the predicted
    class of each image, by head and `teacher`. confidence: the probability of each prediction.
    labels: the true classes.
    """

    provenance: dict[str, str]
    metrics: dict[str, Any]
    predictions: dict[str, list[int]]
    confidence: dict[str, list[float]]
    labels: list[int]


class EvaluationCache:
    """Evaluations of finished runs: each is computed once and stored on disk.

    The test images of a data set are read once to compute their digest, for all runs.
    """

    def __init__(self) -> None:
        self._digests: dict[DataConfig, str] = {}

    def get(
        self,
        run: str | Path,
        *,
        cache_path: str | Path | None = None,
        root: str | None = None,
        teacher: str | Sequence[str] | None = None,
        cost: bool = False,
    ) -> CachedEvaluation:
        """Return the evaluation of a finished run, from the cache or by evaluating the run.

        A stored evaluation is reused if it is of this run, these images and this teacher. Images
        and teachers that are missing now are not checked.

        cache_path: the file to read and write; default: RUN.evaluation.json next to the run
        folder, which is also read where `cache_path` holds no match. root, teacher, cost: as in
        deit.evaluation.evaluate.evaluate. Raises the errors of deit.core.errors.
        """
        run = Path(run)
        result = run_folder.read_result(run)
        if result is None:
            raise CheckpointError(
                f"{run}: is not finished; resume it first (its own command with --resume)"
            )
        default_path = run.with_name(f"{run.name}.evaluation.json")
        target = default_path if cache_path is None else Path(cache_path)
        for path in dict.fromkeys((target, default_path)):
            cached = read_sealed(path, CachedEvaluation)
            if cached is None or cached.provenance["run"] != result["chain"]:
                continue
            if self._is_current(cached, run, root, teacher):
                if cost and "cost" not in cached.metrics:
                    cached.metrics["cost"] = cost_of_run(run)
                    write_sealed(target, asdict(cached))
                return cached
        evaluated = evaluate(run, root=root, teacher=teacher, cost=cost)
        cached = _to_cached(evaluated, {"run": result["chain"], "teacher": ""})
        if evaluated.metrics["teacher"] is not None:
            cached.provenance["teacher"] = _digest_of_files(_teacher_sources(run, teacher))
        write_sealed(target, asdict(cached))
        return cached

    def _is_current(
        self,
        cached: CachedEvaluation,
        run: Path,
        root: str | None,
        teacher: str | Sequence[str] | None,
    ) -> bool:
        """Return whether an evaluation is of the images and the teacher that are on disk now."""
        data = evaluation_config(load_run_config(run), root=root).data
        if data not in self._digests:
            try:
                names, images = load_split(data, "test")
                self._digests[data] = digest_of_images(names, (images,))
            except DataError as error:
                warn(
                    f"cannot check whether stored evaluations are of the same images: {error} "
                    "(if the images were moved, give data.root)"
                )
                self._digests[data] = ""
        if self._digests[data] not in ("", cached.provenance["images"]):
            return False
        digest = _digest_of_files(_teacher_sources(run, teacher))
        return digest in ("", cached.provenance["teacher"])


def _to_cached(evaluated: EvaluationResult, provenance: dict[str, str]) -> CachedEvaluation:
    return CachedEvaluation(
        {**provenance, "images": evaluated.digest},
        evaluated.metrics,
        {name: classes.tolist() for name, classes in evaluated.predictions.items()},
        {
            name: [round(probability, 5) for probability in probabilities.tolist()]
            for name, probabilities in evaluated.confidence.items()
        },
        evaluated.labels.tolist(),
    )


def _teacher_sources(run: Path, teacher: str | Sequence[str] | None) -> list[str]:
    """Return the sources of the teachers; none where the run's own teacher is code."""
    if teacher is not None:
        return list(given_sources(teacher))
    config = load_run_config(run).teacher
    return [] if config.code_sources else list(config.source)


def _digest_of_files(sources: list[str]) -> str:
    """Return the SHA-256 of all teachers' files; "" where a source is not on disk."""
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


_MAX_RUNS_BY_HEAD, _MAX_RUNS = 3, 12


def disagreement_matrix(runs: dict[str, CachedEvaluation]) -> dict[str, dict[str, float]]:
    """Return the share of images on which two predictions differ, for each pair (Table 4 of DeiT).

    The pairs are of the truth, the teacher and the runs. Up to three runs are listed by head, more
    by their final prediction only. The result is empty for runs on different images and for more
    than twelve runs.

    runs: by name.
    """
    labels = [run.labels for run in runs.values()]
    if not labels or len(labels) > _MAX_RUNS or any(truth != labels[0] for truth in labels):
        return {}
    predictions = {"truth": labels[0]}
    for name, run in runs.items():
        of_teacher = run.predictions.get("teacher")
        teachers = [classes for key, classes in predictions.items() if key.startswith("teacher")]
        if of_teacher is not None and of_teacher not in teachers:
            predictions[f"teacher of {name}" if teachers else "teacher"] = of_teacher
    for name, run in runs.items():
        heads = [head for head in ("class", "distillation", "fused") if head in run.predictions]
        if len(runs) > _MAX_RUNS_BY_HEAD:
            heads = ["fused" if "fused" in run.predictions else "class"]
        for head in heads:
            predictions[name if len(heads) == 1 else f"{name}, {head}"] = run.predictions[head]
    return {
        a: {b: _disagreement(predictions[a], predictions[b]) for b in predictions}
        for a in predictions
    }


def _disagreement(first: list[int], second: list[int]) -> float:
    return sum(a != b for a, b in zip(first, second, strict=True)) / len(first)
