"""What evaluation says of a finished run: asked once, kept beside it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deit import checkpoint
from deit.disk import write_json
from deit.errors import CheckpointError
from deit.evaluation import examine
from deit.typed_json import read_typed


@dataclass(frozen=True)
class Measured:
    """An evaluation on the test split. found: as deit.evaluation.evaluate returns it. answers: the
    class of each image by head and `teacher`, confidence: the probability it was given with;
    labels: the true ones. chain: the last link of the run's chain of hashes, by which another run
    in the same place is told."""

    chain: str
    found: dict[str, Any]
    answers: dict[str, list[int]]
    confidence: dict[str, list[float]]
    labels: list[int]


def measured(out: Path, *, elsewhere: Path | None = None, **asked: Any) -> Measured:
    """The evaluation of a finished run, from the file beside its folder if that is of this run.

    elsewhere: where it is written if there is none; None: beside the folder. asked: as
    deit.evaluation.examine takes it. Raises the errors of deit.errors.
    """
    result = checkpoint.result_of(out)
    if result is None:
        raise CheckpointError(f"{out}: is not finished; the same command with --resume goes on")
    beside = out.with_name(f"{out.name}.evaluation.json")
    for path in (beside, elsewhere):
        if path is not None and path.is_file():
            try:
                before = read_typed(path, Measured)
                if before.chain == result["chain"]:
                    return before
            except CheckpointError:
                pass  # cut off, or of another release: made anew
    examined = examine(out, **asked)
    answers = {name: answer.tolist() for name, answer in examined.answers.items()}
    confidence = {
        name: [round(one, 5) for one in shares.tolist()]
        for name, shares in examined.confidence.items()
    }
    labels = examined.labels.tolist()
    now = Measured(result["chain"], examined.found, answers, confidence, labels)
    write_json(elsewhere or beside, asdict(now))
    return now


_FEW, _MOST = 3, 12


def disagreement(runs: dict[str, Measured]) -> dict[str, dict[str, float]]:
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
