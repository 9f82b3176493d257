"""Reads the progress lines of parallel runs."""

import re


def runs_over(text: str) -> list[tuple[int, int]]:
    """Return (finished runs, all runs) for each line that reports them with an ETA."""
    counts = re.findall(r"(\d+)[^\d\n|]+(\d+)[^\d\n|]+ETA", text)
    return [(int(finished), int(total)) for finished, total in counts]
