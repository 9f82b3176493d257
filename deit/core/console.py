"""What a person sees: messages, progress with an ETA, tables. Only the main process speaks."""

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from deit.core.errors import SystemFault, in_line, printable

Item = TypeVar("Item")
ProgressFn = Callable[[range], Iterable[int]]
"""Wraps the range that a long loop goes through, to show progress; `iter` shows none."""
_PLAIN_INTERVAL_S = 10.0
_WIDE = 100  # of a table, in characters


_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Print no messages, tables and progress inside the block; warnings and errors still show.

    Example:
        >>> with quiet():
        ...     info("not printed")
        >>> info("printed")
        printed
    """
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def is_main_process() -> bool:
    """Return whether this is the main process: launchers number the others by RANK."""
    return os.environ.get("RANK", "0") == "0"


def _prints() -> bool:
    return is_main_process() and not _is_quiet.get()


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sees a stream on a terminal as it is written."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False  # it is closed


def info(message: str = "") -> None:
    """Print a message to standard output in the main process; control characters are escaped."""
    if _prints():
        with _written():
            print(printable(message), flush=True)


@contextmanager
def _written() -> Iterator[None]:
    """Raises SystemFault where standard output takes nothing, as on a full disk."""
    try:
        yield
    except BrokenPipeError:
        raise  # who read has enough
    except OSError as error:
        raise SystemFault(f"standard output: could not be written ({error.strerror})") from None


def complain(message: str) -> None:
    """One message to standard error, of whichever process; likewise."""
    print(printable(message), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """One warning to standard error."""
    if is_main_process():
        complain(f"deit: warning: {message}")


def format_duration(seconds: float) -> str:
    """A duration a person can read: `45 s`, `3 min 20 s`, `2 h 05 min`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def format_count(number: int) -> str:
    """Return a number of parameters in millions or thousands: `5.72 M`, `98.3 k`."""
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number / 1e3:.1f} k"


def count_noun(number: int, noun: str) -> str:
    """Return a number with its noun: `1 epoch`, `3 epochs`, `2 processes`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def progress(items: Iterable[Item], *, total: int, title: str, done: int = 0) -> Iterator[Item]:
    """The same items, with a progress bar on a terminal and a line now and then elsewhere.

    done: how many of the total lie behind already.
    """
    if not _prints():
        yield from items
    elif is_terminal(sys.stderr):
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
        task = bar.add_task(in_line(title), total=total, completed=done)
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
            eta = format_duration((now - started) / number * (total - done))
            complain(f"{in_line(title)}: {done}/{total}, ETA {eta}")


class _Console(Console):
    """rich's, but that a pipe that nobody reads is an error as everywhere, not the end."""

    def on_broken_pipe(self) -> None:
        raise  # the error that is being handled


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: bool = False,
    folds: str | None = None,
) -> None:
    """A table to standard output: the first column aligned left, the others right; with `text`
    all of them left.

    No cell is ever cut: names in it are typed again. Where the table would be wide, the heads take
    several lines. Where it is wider than the terminal, cells of the column `folds`, which holds
    sentences, take several lines; else each row is printed as a record, a line a cell. A file or a
    pipe has no width.
    """
    if not _prints():
        return
    title, columns = in_line(title), list(map(in_line, columns))
    cells = [tuple(map(in_line, row)) for row in rows]
    width = Console().width if is_terminal(sys.stdout) else None
    grid = _grid(columns, cells, text=text)
    console = _Console(width=_ENDLESS, highlight=False, markup=False, emoji=False)
    if width is not None and console.measure(grid).maximum > width:
        grid = _folded(columns, cells, console, width, text=text, folds=folds)
    with _written():
        console.print(title, style="italic", soft_wrap=True)  # in a narrow table it would be broken
        if grid is not None:
            console.print(grid)
    for row in cells if grid is None else ():
        (first, head), *others = zip(row, columns)
        info(f"{head}: {first}" if head else first)
        for cell, name in others:
            info(f"  {name}: {cell}" if name else f"  {cell}")


_ENDLESS = 100_000  # characters
_LEAST = 24  # of a column that folds


def _folded(
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    console: Console,
    width: int,
    *,
    text: bool,
    folds: str | None,
) -> Table | None:
    """The table with the cells of a column folded at spaces to fit a width; None where they
    cannot be, or have no column."""
    if folds is None:
        return None
    place = columns.index(folds)
    rest = [(*row[:place], "", *row[place + 1 :]) for row in cells]
    bare = _grid([*columns[:place], "", *columns[place + 1 :]], rest, text=text)
    room = width - console.measure(bare).maximum
    if room < max(_LEAST, *(len(word) for row in cells for word in row[place].split())):
        return None
    folded = [(*row[:place], _fill(row[place], room), *row[place + 1 :]) for row in cells]
    return _grid(columns, folded, text=text)


def _fill(text: str, width: int) -> str:
    """Broken at spaces alone: a name is never divided."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool) -> Table:
    grid = Table()
    for index, column in enumerate(_heads(columns, rows)):
        grid.add_column(column, justify="left" if text or index == 0 else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    return grid


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


def format_percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage, `-` for none."""
    return "-" if share is None else f"{100 * share:.1f}"
