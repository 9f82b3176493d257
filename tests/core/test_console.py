"""What a person sees: durations, progress on a terminal and elsewhere, one speaker."""

import re

import pytest
from rich.cells import cell_len

from deit.cli import run_command
from deit.config.recipes import RECIPES
from deit.core import console
from deit.core.errors import SystemFault
from tests.helpers.errors import raises


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds, text):
    assert console.format_duration(seconds) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_hands_every_item_through(monkeypatch, terminal, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    assert list(console.progress(iter(range(5)), total=5, title="five")) == [0, 1, 2, 3, 4]
    assert ("five" in capsys.readouterr().err) is terminal


def test_progress_without_a_terminal_is_a_line_now_and_then_with_an_eta(monkeypatch, capsys):
    times = iter(range(0, 1000, 6))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    list(console.progress(range(10), total=10, title="slow"))
    lines = capsys.readouterr().err.splitlines()
    assert re.search(r"^slow\b.*\b2/10\b.*\b48 s\b", lines[0])  # 12 s for 2 of 10
    assert len(lines) == 4


def test_only_the_main_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    console.info("hello")
    console.warn("careful")
    console.table("t", ("a",), [("b",)])
    assert list(console.progress([1], total=1, title="x")) == [1]
    assert capsys.readouterr() == ("", "")


def test_a_table_in_a_pipe_is_not_wrapped(capsys):
    console.table("title", ("name", "value"), [("row", "x" * 100)])
    assert "x" * 100 in capsys.readouterr().out


HEADS = ("", "distillation head", "of all parameters %", "KB", "no wider than its cell")


def printed(capsys, name):
    """The heads of a table line by line, its row, and how wide it is."""
    console.table("title", HEADS, [(name, "98.5", "12.5", "819", "as wide as its head is")])
    lines = capsys.readouterr().out.splitlines()
    heads = [line.strip("┃").split("┃") for line in lines if "┃" in line]
    (row,) = [line.strip("│").split("│") for line in lines if "│" in line]
    above = [[cell.strip() for cell in line] for line in heads]
    return above, [cell.strip() for cell in row], max(map(len, lines))


def test_heads_of_a_wide_table_are_broken_and_nothing_is_lost(capsys):
    narrow, wide = printed(capsys, "a run"), printed(capsys, "a run" * 5)
    assert narrow[0] == [list(HEADS)]
    assert wide[0][0] == ["", "", "of all", "", ""]
    assert [" ".join(filter(None, parts)) for parts in zip(*wide[0])] == list(HEADS)
    assert wide[1] == ["a run" * 5, *narrow[1][1:]]
    whole = narrow[2] + 20
    assert whole > 100
    assert wide[2] == whole - len(" head") - len("of all parameters %") + 10


def test_a_table_without_rows_has_its_heads(capsys):
    console.table("nothing", ("a head", "another") * 6, [])
    assert "another" in capsys.readouterr().out


def test_a_table_shows_names_as_they_are_and_its_title_whole(capsys):
    console.table(
        "a title much longer than its table: IMG[red].png, :dog: [/b]",
        ("", "[x]"),
        [("a[blue]", "1")],
    )
    said = capsys.readouterr().out
    for text in ("its table: IMG[red].png, :dog: [/b]\n", "a[blue]", "[x]"):
        assert text in said


NAMES = ("cifar10-micro-transformer-teacher", "checkpoints/a folder/tëst 中文", "98.5 +- 0.3")
SENTENCE = "A small DeiT distilled from `digits-teacher`: minutes on a laptop, nothing to download."


@pytest.fixture
def terminal(monkeypatch):
    """Standard output on a terminal of a number of columns."""

    def of(columns):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", str(columns))

    return of


@pytest.mark.parametrize("columns", [20, 30, 40, 60, 80, 100, 140, 200])
@pytest.mark.parametrize("folds", [None, "what"])
def test_no_terminal_is_so_narrow_that_a_name_or_a_number_is_cut(columns, folds, terminal, capsys):
    terminal(columns)
    heads = ("name", "folder", "top-1 % of the head", "what")
    console.table("a title", heads, [(*NAMES, SENTENCE)] * 2, text=True, folds=folds)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert "…" not in said
    for name in NAMES:
        assert sum(name in line for line in lines) == 2
    cells = [word.strip("│ ") for word in said.split() if word.strip("│ ")]
    assert all(cells.count(word) >= 2 for word in SENTENCE.split())
    grid = any(line.startswith("┏") for line in lines)
    assert grid == (columns >= (140 if folds else 200))
    if grid:
        wide = {cell_len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in lines[1:]}
        assert len(wide) == 1
        assert wide.pop() <= columns


def test_a_row_that_is_too_wide_is_a_record(terminal, capsys):
    terminal(20)
    rows = [("a distilled student", "98.5"), ("b", "-")]
    console.table("t", ("", "class head"), rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["a distilled student", "  class head: 98.5", "b", "  class head: -"]


def test_names_in_a_table_and_a_message_are_not_interpreted(capsys):
    console.table("t\x1b[2J", ("a\nb", "c"), [("x\ny", "[red]z[/red]\x1b[31m")])
    console.info("\x1b]0;owned\x07 two\nlines")
    console.warn("caf\udce9")
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert "t\\x1b[2J" in lines
    assert any("x\\ny" in line and "[red]z[/red]\\x1b[31m" in line for line in lines)
    assert lines[-2:] == ["\\x1b]0;owned\\x07 two", "lines"]
    assert said.err == "deit: warning: caf\\xe9\n"
    assert "\x1b" not in said.out


@pytest.mark.parametrize("columns", [1, 20, 40])
def test_progress_fits_the_narrowest_terminal(columns, terminal, capsys):
    terminal(columns)
    title = "evaluating\n[a long] name \x1b[31m"
    assert list(console.progress(range(3), total=3, title=title)) == [0, 1, 2]


def test_a_full_disk_behind_standard_output_is_told(monkeypatch):
    class Full:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = isatty = lambda self: False

    monkeypatch.setattr("sys.stdout", Full())
    with raises(SystemFault, "standard output", "No space left on device"):
        console.info("hello")


def test_what_recipes_are_is_said_in_whole_sentences(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    assert run_command("recipes", [], "deit recipes") == 0
    rows = [
        line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")
    ]
    assert {row[1].strip() for row in rows} == set(RECIPES)
    assert all(row[4].strip().endswith(".") for row in rows)


def test_quiet_prints_warnings_only(capsys):
    with pytest.raises(ValueError), console.quiet():  # noqa: PT011, PT012
        console.info("hello")
        console.table("t", ("a",), [("b",)])
        assert list(console.progress([1, 2], total=2, title="x")) == [1, 2]
        with console.quiet():
            console.info("nested")
        console.info("after nested")
        console.warn("careful")
        raise ValueError
    out, err = capsys.readouterr()
    assert out == ""
    assert "careful" in err
    console.info("printed again")
    assert capsys.readouterr().out == "printed again\n"
