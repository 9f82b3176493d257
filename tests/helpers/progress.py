"""What runs beside each other tell of how far they are."""

import re


def runs_over(text: str) -> list[tuple[int, int]]:
    """How many runs are over, and of how many, each time that it is told with an ETA."""
    told = re.findall(r"(\d+)[^\d\n|]+(\d+)[^\d\n|]+ETA", text)
    return [(int(done), int(total)) for done, total in told]
