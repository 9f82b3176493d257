"""What a person sees: durations, progress on a terminal and elsewhere, one speaker."""

import pytest

from deit import console


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds, text):
    assert console.clock(seconds) == text


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
    assert lines[0] == "slow: 2/10, ETA 48 s"  # 12 s for 2 of 10
    assert len(lines) == 4


def test_only_the_main_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    console.say("hello")
    console.warn("careful")
    console.table("t", ("a",), [("b",)])
    assert list(console.progress([1], total=1, title="x")) == [1]
    assert capsys.readouterr() == ("", "")


def test_a_table_in_a_pipe_is_not_wrapped(capsys):
    console.table("title", ("name", "value"), [("row", "x" * 100)])
    assert "x" * 100 in capsys.readouterr().out


def test_a_table_shows_names_as_they_are_and_its_title_whole(capsys):
    console.table(
        "a title much longer than its table: IMG[red].png, :dog: [/b]",
        ("", "[x]"),
        [("a[blue]", "1")],
    )
    said = capsys.readouterr().out
    for words in ("its table: IMG[red].png, :dog: [/b]\n", "a[blue]", "[x]"):
        assert words in said
