"""Console output: durations, progress, tables, and only in the main process."""

import io
import logging
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from deit.core import console
from deit.core.errors import StoppedBySignal, SystemFault
from tests.helpers.errors import raises


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_format_duration(seconds, text):
    assert console.format_duration(seconds) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_yields_every_item(monkeypatch, terminal, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    assert list(console.progress(iter(range(5)), total=5, title="five")) == [0, 1, 2, 3, 4]
    assert ("five" in capsys.readouterr().err) is terminal


def test_progress_without_a_terminal_prints_lines_with_an_eta(monkeypatch, capsys):
    times = iter(range(0, 1000, 6))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    list(console.progress(range(10), total=10, title="slow"))
    lines = capsys.readouterr().err.splitlines()
    assert re.search(r"^slow\b.*\b2/10\b.*\b48 s\b", lines[0])  # 12 s for 2 of 10
    assert len(lines) == 4


def test_only_the_main_process_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    console.info("hello")
    console.warn("careful")
    console.table("t", ("a",), [("b",)])
    assert list(console.progress([1], total=1, title="x")) == [1]
    assert capsys.readouterr() == ("", "")


def test_table_in_a_pipe_is_not_wrapped(capsys):
    console.table("title", ("name", "value"), [("row", "x" * 100)])
    assert "x" * 100 in capsys.readouterr().out


HEADS = ("", "distillation head", "of all parameters %", "KB", "no wider than its cell")


def printed(capsys, name):
    """Return the lines of heads of a table, its row, and its width."""
    console.table("title", HEADS, [(name, "98.5", "12.5", "819", "as wide as its head is")])
    lines = capsys.readouterr().out.splitlines()
    heads = [line.strip("┃").split("┃") for line in lines if "┃" in line]
    (row,) = [line.strip("│").split("│") for line in lines if "│" in line]
    above = [[cell.strip() for cell in line] for line in heads]
    return above, [cell.strip() for cell in row], max(map(len, lines))


def test_wide_table_breaks_its_heads_and_keeps_all_cells(capsys):
    narrow, wide = printed(capsys, "a run"), printed(capsys, "a run" * 5)
    assert narrow[0] == [list(HEADS)]
    assert wide[0][0] == ["", "", "of all", "", ""]
    assert [" ".join(filter(None, parts)) for parts in zip(*wide[0])] == list(HEADS)
    assert wide[1] == ["a run" * 5, *narrow[1][1:]]
    whole = narrow[2] + 20
    assert whole > 100
    assert wide[2] == whole - len(" head") - len("of all parameters %") + 10


def test_table_without_rows_prints_its_heads(capsys):
    console.table("nothing", ("a head", "another") * 6, [])
    assert "another" in capsys.readouterr().out


def test_table_prints_names_literally_and_the_title_unbroken(capsys):
    console.table(
        "a title much longer than its table: IMG[red].png, :dog: [/b]",
        ("", "[x]"),
        [("a[blue]", "1")],
    )
    output = capsys.readouterr().out
    for text in ("its table: IMG[red].png, :dog: [/b]\n", "a[blue]", "[x]"):
        assert text in output


NAMES = ("cifar10-micro-transformer-teacher", "checkpoints/a folder/tëst 中文", "98.5 +- 0.3")
SENTENCE = "A small DeiT distilled from `digits-teacher`: minutes on a laptop, nothing to download."


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that makes standard output a terminal of a given width."""

    def of(columns):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", str(columns))

    return of


@pytest.mark.parametrize("columns", [20, 30, 40, 60, 80, 100, 140, 200])
@pytest.mark.parametrize("folds", [None, "what"])
def test_narrow_terminal_truncates_no_cell(columns, folds, terminal, capsys):
    terminal(columns)
    heads = ("name", "folder", "top-1 % of the head", "what")
    console.table("a title", heads, [(*NAMES, SENTENCE)] * 2, text=True, folds=folds)
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert "…" not in output
    for name in NAMES:
        assert sum(name in line for line in lines) == 2
    cells = [word.strip("│ ") for word in output.split() if word.strip("│ ")]
    assert all(cells.count(word) >= 2 for word in SENTENCE.split())
    grid = any(line.startswith("┏") for line in lines)
    assert grid == (columns >= (140 if folds else 200))
    if grid:
        wide = {cell_len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in lines[1:]}
        assert len(wide) == 1
        assert wide.pop() <= columns


def test_too_wide_rows_are_printed_as_records(terminal, capsys):
    terminal(20)
    rows = [("a distilled student", "98.5"), ("b", "-")]
    console.table("t", ("", "class head"), rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["a distilled student", "  class head: 98.5", "b", "  class head: -"]


def test_control_characters_in_tables_and_messages_are_escaped(capsys):
    console.table("t\x1b[2J", ("a\nb", "c"), [("x\ny", "[red]z[/red]\x1b[31m")])
    console.info("\x1b]0;owned\x07 two\nlines")
    console.warn("caf\udce9")
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert "t\\x1b[2J" in lines
    assert any("x\\ny" in line and "[red]z[/red]\\x1b[31m" in line for line in lines)
    assert lines[-2:] == ["\\x1b]0;owned\\x07 two", "lines"]
    assert output.err == "deit: warning: caf\\xe9\n"
    assert "\x1b" not in output.out


@pytest.mark.parametrize("columns", [1, 20, 40])
def test_progress_fits_the_narrowest_terminal(columns, terminal, capsys):
    terminal(columns)
    title = "evaluating\n[a long] name \x1b[31m"
    assert list(console.progress(range(3), total=3, title=title)) == [0, 1, 2]


def test_full_disk_behind_standard_output_raises(monkeypatch):
    class Full:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = isatty = lambda self: False

    monkeypatch.setattr("sys.stdout", Full())
    with raises(SystemFault, "standard output", "No space left on device"):
        console.info("hello")


def fail_in_quiet():
    with console.quiet():
        console.info("hello")
        console.table("t", ("a",), [("b",)])
        assert list(console.progress([1, 2], total=2, title="x")) == [1, 2]
        with console.quiet():
            console.info("nested")
        console.info("after nested")
        console.warn("careful")
        raise KeyError


def test_quiet_prints_warnings_only_and_ends_with_its_block(capsys):
    with pytest.raises(KeyError):
        fail_in_quiet()
    out, err = capsys.readouterr()
    assert out == ""
    assert "careful" in err
    console.info("printed again")
    assert capsys.readouterr().out == "printed again\n"


def test_messages_are_records_of_a_logger(caplog, capsys):
    logger = logging.getLogger("deit")
    logger.addHandler(caplog.handler)
    try:
        console.info("50 % done")
        console.table("heads", ("head", "top-1"), [("class", "98.0")])
        console.warn("careful")
        logger.setLevel(logging.WARNING)
        console.info("hidden by the level")
        assert list(console.progress([1], total=1, title="hidden")) == [1]
    finally:
        logger.setLevel(logging.INFO)
        logger.removeHandler(caplog.handler)
    levels = [(record.levelname, record.getMessage().splitlines()[0]) for record in caplog.records]
    assert levels == [("INFO", "50 % done"), ("INFO", "heads"), ("WARNING", "careful")]
    assert "98.0" in caplog.records[1].getMessage()
    assert "hidden" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(("encoding", "corner"), [("ascii", "+"), ("utf-8", "┏")])
def test_tables_have_lines_that_the_output_can_encode(encoding, corner, monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", stream)
    console.table("heads", ("head", "top-1"), [("class", "98.0")])
    lines = raw.getvalue().decode(encoding).splitlines()
    assert lines[1].startswith(corner)
    assert "\\u" not in raw.getvalue().decode(encoding)


def test_progress_in_a_notebook_is_a_bar_without_a_warning(monkeypatch, capsys):
    kernel = SimpleNamespace(kernel=object(), config={})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    assert console.in_notebook()
    assert list(console.progress(range(3), total=5, done=2, title="epoch 1/2")) == [0, 1, 2]
    assert "epoch 1/2" in capsys.readouterr().err
    monkeypatch.setattr("sys.modules", {**sys.modules, "IPython": None})
    assert not console.in_notebook()


IN_A_NOTEBOOK = """
import sys, types
kernel = types.SimpleNamespace(kernel=object(), config={"IPKernelApp": {}})
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: kernel)
sys.modules["ipykernel.zmqshell"] = types.ModuleType("zmqshell")
sys.modules["ipywidgets"] = None
import deit
deit.Run
from deit.core.console import progress
print(list(progress(range(3), total=3, title="epoch 1/2")))
"""


def test_notebook_without_widgets_shows_no_warning():
    command = [sys.executable, "-c", IN_A_NOTEBOOK]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "[0, 1, 2]\n"
    assert "epoch 1/2" in result.stderr
    assert "Warning" not in result.stderr


def test_stop_is_a_keyboard_interrupt_and_no_exception():
    stop = StoppedBySignal(signal.SIGTERM)
    assert isinstance(stop, KeyboardInterrupt)
    assert not isinstance(stop, Exception)
    assert stop.exit_code == 143
