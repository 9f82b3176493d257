"""What a person sees: messages, progress with an ETA, tables. Only the main process speaks."""

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Item = TypeVar("Item")
Watch = Callable[[range], Iterable[int]]
"""Wraps the range that a long loop goes through, to show progress; `iter` shows none."""
_PLAIN_INTERVAL_S = 10.0
_WIDE = 100  # of a table, in characters


def is_main_process() -> bool:
    """Whether this process may speak (the launchers name the others by RANK)."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str = "") -> None:
    """One message to standard output, exactly as given."""
    if is_main_process():
        print(message, flush=True)


def warn(message: str) -> None:
    """One warning to standard error."""
    if is_main_process():
        print(f"deit: warning: {message}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """A duration a person can read: `45 s`, `3 min 20 s`, `2 h 05 min`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def progress(items: Iterable[Item], *, total: int, title: str, done: int = 0) -> Iterator[Item]:
    """The same items, with a progress bar on a terminal and a line now and then elsewhere.

    done: how many of the total lie behind already.
    """
    if not is_main_process():
        yield from items
    elif sys.stderr.isatty():
        yield from _bar(items, total, title, done)
    else:
        yield from _lines(items, total, title, done)


def _bar(items: Iterable[Item], total: int, title: str, done: int) -> Iterator[Item]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task)


def _lines(items: Iterable[Item], total: int, title: str, behind: int) -> Iterator[Item]:
    started = last = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now, done = time.monotonic(), behind + number
        if now - last >= _PLAIN_INTERVAL_S and done < total:
            last = now
            eta = clock((now - started) / number * (total - done))
            print(f"{title}: {done}/{total}, ETA {eta}", file=sys.stderr, flush=True)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, text: bool = False
) -> None:
    """A table to standard output: the first column aligned left, the others right; with `text`
    all of them left. Where it would be wide, the heads take several lines."""
    if not is_main_process():
        return
    rows = [tuple(row) for row in rows]
    grid = Table()
    for index, column in enumerate(_heads(columns, rows)):
        grid.add_column(column, justify="left" if text or index == 0 else "right")
    for row in rows:
        grid.add_row(*row)
    # A file or a pipe has no width: never wrap a table there.
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    console.print(title, style="italic", soft_wrap=True)  # in a narrow table it would be broken
    console.print(grid)


def _heads(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The heads of columns, broken at spaces to the width of their cells in a wide table."""
    cells = [max((len(row[place]) for row in rows), default=0) for place in range(len(columns))]
    whole = sum(max(len(head), width) + 3 for head, width in zip(columns, cells)) + 1
    if whole <= _WIDE:
        return list(columns)
    longest = (max(map(len, head.split()), default=1) for head in columns)
    return [
        textwrap.fill(head, max(width, least), break_on_hyphens=False)
        for head, width, least in zip(columns, cells, longest)
    ]


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage, `-` for none."""
    return "-" if share is None else f"{100 * share:.1f}"
