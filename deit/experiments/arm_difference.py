"""One sentence about the two arms of a study: accuracies and whether they differ; no torch."""

import statistics
from typing import Any

from deit.core.console import count_noun
from deit.viz.tables import final_top1_percent, mean_std


def difference_line(result: dict[str, Any]) -> str:
    """Return a sentence that compares the final top-1 of a study's two arms.

    It gives the mean and sample standard deviation of each arm and of the differences seed by seed,
    over the seeds that both arms have finished. It names a winner only if the intervals mean +-
    standard deviation do not overlap. This describes these runs and is no significance test: seeds
    change initial weights and views, but neither the images nor the teacher.

    result: content of results.json. Returns "" unless it is of a study with exactly two arms that
    have at least two seeds in common.

    >>> def row(*shares):
    ...     top1 = [{"class": share, "fused": share} for share in shares]
    ...     return {"values": {"run": "an arm"}, "seeds": [0, 1], "top1": top1}
    >>> result = {"study": "table-3", "split": "test", "num_samples": 100,
    ...           "rows": {"hard": row(0.90, 0.92), "token": row(0.95, 0.98)}}
    >>> print(difference_line(result).replace("): ", "):\\n"))
    hard 91.0 +- 1.4 %, token 96.5 +- 2.1 % (test top-1, 100 images, 2 seeds):
    token is ahead by 5.5 points (+- 0.7 from seed to seed), more than the spread of the seeds
    """
    rows = {name: row for name, row in result["rows"].items() if row["values"]}
    if result["study"] is None or len(rows) != 2:
        return ""
    by_seed = [dict(zip(row["seeds"], final_top1_percent(row))) for row in rows.values()]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    if len(seeds) < 2:
        return ""
    first, second = ([top1[seed] for seed in seeds] for top1 in by_seed)
    num_seeds = count_noun(len(seeds), "seed")
    arms = ", ".join(
        f"{_LABELS.get(name, name)} {mean_std(top1)} %" for name, top1 in zip(rows, (first, second))
    )
    verdict = _verdict(list(rows), first, second)
    images = f"{result['split']} top-1, {result['num_samples']} images, {num_seeds}"
    return f"{arms} ({images}): {verdict}"


_LABELS = {"distilled": "with the teacher", "undistilled": "without the teacher"}


def _verdict(names: list[str], first: list[float], second: list[float]) -> str:
    """Return what the difference of two arms means. first, second: top-1 in %, seed by seed."""
    gaps = [a - b for a, b in zip(first, second)]
    gap, spread = statistics.mean(gaps), statistics.stdev(first) + statistics.stdev(second)
    size = f"{abs(gap):.1f} points (+- {statistics.stdev(gaps):.1f} from seed to seed)"
    if abs(gap) <= spread:
        return f"no difference beyond the spread of the seeds: {size}"
    if names == list(_LABELS):
        verdict = f"the teacher {'is worth' if gap > 0 else 'costs'} {size}"
    else:
        verdict = f"{names[0] if gap > 0 else names[1]} is ahead by {size}"
    return f"{verdict}, more than the spread of the seeds"
