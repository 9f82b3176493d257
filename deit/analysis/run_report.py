"""What a report shows of a finished run, and the CSV files that it writes."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit.config.schema import Config
from deit.core.run_folder import RecordedEnvironment
from deit.evaluation.cache import CachedEvaluation


@dataclass(frozen=True)
class RunReport:
    """What a report shows of a finished run.

    name: title of its section. slug: prefix of its file names. rows: of its metrics.jsonl.
    summary: as deit.training.summary.summary_of returns it.
    """

    name: str
    slug: str
    config: Config
    environment: RecordedEnvironment
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    evaluation: CachedEvaluation

    @property
    def final_head(self) -> str:
        """The head with the final prediction: `fused`, or the only head."""
        return "fused" if "fused" in self.evaluation.predictions else "class"


def final_top1(evaluation: CachedEvaluation) -> float:
    """Return the test top-1 in [0, 1] of the fused heads, or of the only head."""
    return evaluation.metrics["heads"]["fused"]["top1"]


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as CSV; a column that a row lacks is empty."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
