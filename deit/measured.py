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
    class of each image by head and `teacher`; labels: the true ones. chain: the last link of the
    run's chain of hashes, by which another run in the same place is told."""

    chain: str
    found: dict[str, Any]
    answers: dict[str, list[int]]
    labels: list[int]


def measured(out: Path) -> Measured:
    """The evaluation of a finished run, from the file beside its folder if that is of this run.

    Raises the errors of deit.errors.
    """
    path, chain = out.with_name(f"{out.name}.evaluation.json"), checkpoint.result_of(out)["chain"]
    if path.is_file():
        try:
            before = read_typed(path, Measured)
            if before.chain == chain:
                return before
        except CheckpointError:
            pass  # cut off, or of another release: made anew
    examined = examine(out)
    answers = {name: answer.tolist() for name, answer in examined.answers.items()}
    now = Measured(chain, examined.found, answers, examined.labels.tolist())
    write_json(path, asdict(now))
    return now
