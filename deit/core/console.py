"""Output of the main process: messages, warnings and tables as log records; progress with an ETA.

Messages are records of the logger "deit". By default they are printed: up to INFO to standard
output, warnings and errors to standard error. `logging.getLogger("deit")` takes other levels and
handlers, as any logger.
"""

import functools
import io
import logging
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from deit.core.errors import SystemFault, printable, single_line

Item = TypeVar("Item")
Parameters, Result = ParamSpec("Parameters"), TypeVar("Result")
ProgressFn = Callable[[range], Iterable[int]]
"""Wraps the range of a long loop to show its progress; `iter` shows none."""
_PLAIN_INTERVAL_S = 10.0
_WIDE = 100  # characters: in wider tables, column heads are broken into lines


_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)


class _PrintingHandler(logging.Handler):
    """Prints records to the standard streams as they are at that moment.

    Raises SystemFault if a message cannot be written, for example on a full disk.
    """

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno > logging.INFO:
            complain(f"deit: {record.levelname.lower()}: {message}")
            return
        with _written():
            print(message, flush=True)


def _create_logger() -> logging.Logger:
    logger = logging.getLogger("deit")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_PrintingHandler())
        logger.propagate = False  # a handler of the root logger would print everything twice
    return logger


_LOGGER = _create_logger()


@contextmanager
def quiet(enabled: bool = True) -> Iterator[None]:
    """Log no messages and tables and show no progress in the block; warnings are logged.

    enabled: False changes nothing.

    >>> with quiet():
    ...     info("not printed")
    >>> info("printed")
    printed
    """
    token = _is_quiet.set(enabled or _is_quiet.get())
    try:
        yield
    finally:
        _is_quiet.reset(token)


def obeys_verbose(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make a function quiet in a call with `verbose=False`, which it has as a keyword.

    >>> @obeys_verbose
    ... def work(*, verbose: bool = True) -> None:
    ...     info("working")
    >>> work(verbose=False)
    >>> work()
    working
    """

    @functools.wraps(function)
    def wrapper(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        with quiet(not options.get("verbose", True)):
            return function(*args, **options)

    return wrapper


def is_main_process() -> bool:
    """Return whether this is the main process: launchers number the others by RANK."""
    return os.environ.get("RANK", "0") == "0"


def _prints() -> bool:
    return is_main_process() and not _is_quiet.get() and _LOGGER.isEnabledFor(logging.INFO)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False  # a closed stream


def terminal_width() -> int | None:
    """Return the width of the terminal in characters; None for files, pipes and notebooks."""
    return Console().width if is_terminal(sys.stdout) else None


def info(message: str = "") -> None:
    """Log a message in the main process, at level INFO; control characters are escaped."""
    if _prints():
        _LOGGER.info("%s", printable(message))


@contextmanager
def _written() -> Iterator[None]:
    """Raise SystemFault if standard output cannot be written, for example on a full disk."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the pipe has exited, which is not a fault
    except OSError as error:
        raise SystemFault(f"standard output: could not be written ({error.strerror})") from None


def complain(message: str) -> None:
    """Print a message to standard error, in any process; control characters are escaped."""
    print(printable(message), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Log a warning in the main process."""
    if is_main_process():
        _LOGGER.warning("%s", printable(message))


def format_duration(seconds: float) -> str:
    """Return a duration in one or two units.

    >>> format_duration(45), format_duration(200), format_duration(7500)
    ('45 s', '3 min 20 s', '2 h 05 min')
    """
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def format_count(count: int) -> str:
    """Return a number of parameters in millions or thousands: `5.72 M`, `98.3 k`."""
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def count_noun(count: int, noun: str) -> str:
    """Return a number with its noun: `1 epoch`, `3 epochs`, `2 processes`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def progress(items: Iterable[Item], *, total: int, title: str, done: int = 0) -> Iterator[Item]:
    """Yield the items, with a progress bar on a terminal or in a notebook, else a line every 10 s.

    done: how many of `total` were done before. A loop over a variable needs `contextlib.closing`:
    after an error, a traceback keeps the variable, and with it the bar.
    """
    if not _prints():
        yield from items
    elif is_terminal(sys.stderr):
        yield from _bar(items, total, title, done)
    elif in_notebook():
        yield from _notebook_bar(items, total, title, done)
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
        task = bar.add_task(single_line(title), total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython() if ipython else None, "kernel")


def _import_tqdm() -> Any:
    """Return the class of tqdm's bars: widgets, or text without ipywidgets."""
    from tqdm import TqdmWarning

    with warnings.catch_warnings():  # its import advises to install ipywidgets
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm
    return tqdm


if in_notebook():
    _import_tqdm()  # before timm, which imports it with that advice


def _notebook_bar(items: Iterable[Item], total: int, title: str, done: int) -> Iterator[Item]:
    tqdm = _import_tqdm()
    with tqdm(total=total, initial=done, desc=single_line(title), leave=False) as bar:
        for item in items:
            yield item
            bar.update()


def _lines(items: Iterable[Item], total: int, title: str, done_before: int) -> Iterator[Item]:
    started = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now, done = time.monotonic(), done_before + count
        if now - last >= _PLAIN_INTERVAL_S and done < total:
            last = now
            eta = format_duration((now - started) / count * (total - done))
            complain(f"{single_line(title)}: {done}/{total}, ETA {eta}")


class _Buffer(io.StringIO):
    """Text with the encoding of standard output, from which rich chooses the lines of a table."""

    encoding = property(lambda self: getattr(sys.stdout, "encoding", None))


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: bool = False,
    folds: str | None = None,
) -> None:
    """Log a table as one message, at level INFO.

    text: align all columns left; by default only the first, and the others right.
    folds: a column of sentences that may be broken into lines.

    Cells are never truncated, because names in them are typed or copied again. The heads of a wide
    table are broken into lines. If it is still wider than the terminal, the column `folds` is
    broken into lines; if that does not help, each row is printed as a record with a line per cell.
    Files and pipes have no width limit.
    """
    if not _prints():
        return
    title, columns = single_line(title), list(map(single_line, columns))
    cells = [tuple(map(single_line, row)) for row in rows]
    width = terminal_width()
    grid = _grid(columns, cells, text=text)
    output = _Buffer()
    console = Console(file=output, width=_ENDLESS, highlight=False, markup=False, emoji=False)
    if width is not None and console.measure(grid).maximum > width:
        grid = _folded(columns, cells, console, width, text=text, folds=folds)
    lines = [title]
    if grid is not None:
        console.print(grid)
        lines += output.getvalue().splitlines()
    for row in cells if grid is None else ():
        (first, head), *others = zip(row, columns)
        lines.append(f"{head}: {first}" if head else first)
        lines += [f"  {name}: {cell}" if name else f"  {cell}" for cell, name in others]
    info("\n".join(lines))


_ENDLESS = 100_000  # characters
_MIN_FOLD_WIDTH = 24  # characters


def _folded(
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    console: Console,
    width: int,
    *,
    text: bool,
    folds: str | None,
) -> Table | None:
    """Return the table with the column `folds` broken at spaces to fit a width.

    None if there is no such column, or it cannot be made narrow enough.
    """
    if folds is None:
        return None
    index = columns.index(folds)
    rest = [(*row[:index], "", *row[index + 1 :]) for row in cells]
    other_columns = _grid([*columns[:index], "", *columns[index + 1 :]], rest, text=text)
    free = width - console.measure(other_columns).maximum
    if free < max(_MIN_FOLD_WIDTH, *(len(word) for row in cells for word in row[index].split())):
        return None
    folded = [(*row[:index], _fill(row[index], free), *row[index + 1 :]) for row in cells]
    return _grid(columns, folded, text=text)


def _fill(text: str, width: int) -> str:
    """Break text at spaces only, so that names stay whole."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool) -> Table:
    grid = Table()
    for index, column in enumerate(_heads(columns, rows)):
        grid.add_column(column, justify="left" if text or index == 0 else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    return grid


def _heads(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the column heads; in a wide table broken at spaces to the width of their cells."""
    widths = [max((len(row[index]) for row in rows), default=0) for index in range(len(columns))]
    total = sum(max(len(head), width) + 3 for head, width in zip(columns, widths)) + 1
    if total <= _WIDE:
        return list(columns)
    longest_words = (max(map(len, head.split()), default=1) for head in columns)
    return [
        textwrap.fill(head, max(width, longest), break_on_hyphens=False)
        for head, width, longest in zip(columns, widths, longest_words)
    ]


def format_percent(fraction: float | None) -> str:
    """Return a fraction in [0, 1] as a percentage with one decimal; `-` for None."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"
