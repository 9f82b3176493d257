"""Unusual names of files, folders and classes: they work everywhere, or raise before any work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deit.config.recipes.handwriting import digits
from deit.config.schema import to_dict
from deit.config.validation import config_from_dict
from deit.core import run_folder
from deit.core.errors import ConfigError, name_problem, printable, single_line
from deit.viz.plots import legend, save_figure
from deit.viz.tables import markdown_table
from tests.helpers.errors import raises

ROOT = Path(__file__).parents[2]
RUN = "r [b] é"
ODD = ("Äpfel rot", "中文", "a$b$ [bold]x[red] | & 50%", "_emoji 🍎")
QUICK = (
    *("--optim.epochs", "1", "--optim.batch_size", "8", "--data.image_size", "18"),
    *(
        "--student.image_size",
        "16",
        "--student.drop_path",
        "0",
        "--data.validation_fraction",
        "0.3",
    ),
)


def write_images(
    root: Path, classes: tuple[str | bytes, ...], names: tuple[str | bytes, ...]
) -> Path:
    """Write class folders of two splits; names given as bytes can be invalid UTF-8."""
    for split in ("train", "test"):
        for index, kind in enumerate(classes):
            class_folder = os.path.join(os.fsencode(root), split.encode(), os.fsencode(kind))
            os.makedirs(class_folder)
            for name in names:
                pixels = np.full((20, 20, 3), 40 * index + 30, np.uint8)
                with open(os.path.join(class_folder, os.fsencode(name)), "wb") as file:
                    Image.fromarray(pixels).save(file, "png")
    return root


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Äpfel 中文 🍎 a\u0308", "Äpfel 中文 🍎 a\u0308"),
        ("caf\udce9", "caf\\xe9"),
        ("\ud83c", "\\ud83c"),
        ("a\x1b[31mred\r\x07\x9b", "a\\x1b[31mred\\r\\x07\\x9b"),
        ("left\u202egnp.exe\u2028", "left\\u202egnp.exe\\u2028"),
        ("two\nlines\tand a tab", "two\\nlines\\tand a tab"),
    ],
)
def test_in_line_escapes_control_characters(text, line):
    assert single_line(text) == line
    assert printable(text) == line.replace("\\n", "\n").replace("\\t", "\t")
    assert single_line(text).encode()


@pytest.mark.parametrize(
    ("name", "because_of_utf_8"),
    [("caf\udce9", True), ("bee\nsting", False), ("\x1b]0;title\x07", False)],
)
def test_name_problem_of_unwritable_names(name, because_of_utf_8):
    assert name_problem("Äpfel [b] 中 🏳️‍🌈 $") is None
    trouble = name_problem(name)
    assert trouble
    assert ("UTF-8" in trouble) == because_of_utf_8


def test_name_problem_without_utf8_allows_only_ascii(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    assert name_problem("plain") is None
    assert "PYTHONUTF8=1" in name_problem("CafÃ©")


def test_config_with_unwritable_names_raises():
    values = to_dict(digits())
    values["data"]["root"], values["teacher"]["source"] = "caf\udce9", ("a", "b\nc")
    with raises(ConfigError, "data.root = 'caf\\udce9'", "teacher.source = 'b\\nc'") as refused:
        config_from_dict(values)
    assert ["UTF-8" in problem.hint for problem in refused.value.problems] == [True, False]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    names = (*(f"bild {index} ü.PNG" for index in range(6)), b"caf\xe9.png")
    try:
        write_images(folder / "odd é", ODD, names)
    except OSError:
        pytest.skip("this file system only accepts UTF-8")
    return folder


@pytest.fixture(scope="module")
def trained(command_server, workspace) -> Path:
    """Train a teacher and a student with odd class names, in folders with odd names."""
    arguments = ("--data.root", "odd é", *QUICK)
    teacher = ("folder-teacher", *arguments, "--student.name", "small_convnet", "--out", "t [b] é")
    done = command_server.run("train", *teacher, cwd=workspace)
    assert done.code == 0, done.err
    arguments = (
        *arguments,
        "--student.depth",
        "1",
        "--teacher.source",
        "t [b] é",
        "--teacher.allow_near_chance",
    )
    done = command_server.run("train", "folder", *arguments, "--out", RUN, cwd=workspace)
    assert done.code == 0, done.err
    return workspace / RUN


def test_all_commands_read_a_run_with_odd_names(trained, workspace, command_server):
    files = sorted((workspace / "odd é" / "test").rglob("*.[pP]*"))
    images = [path for path in files if "caf" in path.name or "0" in path.name]
    assert len(images) == 2 * len(ODD)
    commands: list[tuple[object, ...]] = [
        ("evaluate", RUN),
        ("predict", RUN, *images, "--json", "said.json", "--attention", "seen.png"),
        ("check-data", "odd é", "--json", "scan.json", "--write-exclude-list", "bad.txt"),
        ("report", RUN, "--out", "page"),
        ("export", RUN, "--format", "pt2"),
        ("show-views", f"{RUN}/config.json", "--out", "views.png"),
        ("finetune", "--from", RUN, *QUICK[:2], "--print-config"),
    ]
    outputs = {}
    for arguments in commands:
        done = command_server.run(*arguments, cwd=workspace)
        assert done.code == 0, (arguments[0], done.err)
        outputs[arguments[0]] = done.out
    for name in ODD:
        assert all(name in outputs[command] for command in ("evaluate", "predict"))
    assert "caf\\xe9.png" in outputs["predict"]
    files = [row["file"] for row in json.loads((workspace / "said.json").read_text())["images"]]
    assert sorted(files) == sorted(map(str, images))
    page = (workspace / "page" / "index.html").read_text(encoding="utf-8")
    assert "[bold]x[red] | &amp; 50%" in page
    card = (workspace / RUN / "export-pt2" / "README.md").read_text(encoding="utf-8")
    assert "中文" in card


@pytest.mark.parametrize("kind", ["latin", "newline"])
def test_unwritable_class_names_raise_before_training(kind, command_server, tmp_path):
    classes = {"latin": ("ant", b"caf\xe9"), "newline": ("ant", "bee\nsting")}[kind]
    try:
        write_images(tmp_path / "set", classes, ("0.png", "1.png"))
    except OSError:
        pytest.skip("this file system only accepts UTF-8")
    named = {"latin": ("'caf\\xe9'", "UTF-8"), "newline": ("'bee\\nsting'",)}
    arguments = ("folder-teacher", "--data.root", "set", *QUICK, "--out", "run")
    for command in (("train", *arguments), ("check-data", "set")):
        done = command_server.run(*command, cwd=tmp_path)
        assert done.code == 3
        assert done.err.startswith("deit: error: set/train: ")
        assert all(word in done.err for word in named[kind])
        assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_unwritable_arguments_raise(command_server, tmp_path):
    for name in ("caf\udce9", "two\nlines"):
        for arguments in (("train", "digits", "--out", name), ("evaluate", name)):
            done = command_server.run(*arguments, cwd=tmp_path)
            assert done.code == 2
            assert done.err.startswith(f"deit: error: {single_line(name)}: ")
            assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def run_python(arguments: list[str], cwd: Path, *, closed: str = "", **environment: str):
    """Run Python in a new process. closed: redirections of a shell that close its streams."""
    shell = ["bash", "-c", f'"$@" {closed}', "sh"] if closed else []
    return subprocess.run(
        [*shell, sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        timeout=300,
        check=False,
    )


def test_unencodable_characters_are_printed_as_escapes(workspace):
    program = (
        "from deit.core.errors import open_streams; from deit.core.console import *; "
        "open_streams();"
    )
    program += f"info({'中 é'!a}); table({'ü'!a}, ('a',), [({'🍎'!a},)]); warn('\\xdf')"
    done = run_python(
        ["-c", program], workspace, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C"
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u4e2d \\xe9" in done.stdout
    assert b"\\U0001f34e" in done.stdout
    assert b"deit: warning: \\xdf" in done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_stream_is_replaced_by_the_null_device(closed, tmp_path):
    program = "import sys; from deit.cli import main; sys.argv[1:] = ['recipes']; code = main();"
    program += (
        "file = open('file', 'w'); print('said'); print('too', file=sys.stderr); sys.exit(code)"
    )
    done = run_python(["-c", program], tmp_path, closed=closed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == b""


def test_plots_show_names_without_mathtext(tmp_path):
    figure_of = pytest.importorskip("matplotlib.figure").Figure
    figure = figure_of(layout="constrained")
    axes = figure.subplots()
    for name in ("a$b$", "$\\frac$", "_x", "中文 caf\udce9"):
        axes.plot([1, 10], [1, 100], label=name)
    axes.set_yscale("log")
    axes.set_xticks([1, 10], ["$x", "y_{$"])
    axes.set_title("$\\bad{$ 🍎")
    legend(axes)
    save_figure(figure, tmp_path / "drawn.svg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
        save_figure(figure, tmp_path / "text.svg")
    drawn = (tmp_path / "text.svg").read_text(encoding="utf-8")
    for name in ("a$b$", "$\\frac$", "_x", "中文 caf\\xe9", "$x", "y_{$", "$\\bad{$ 🍎"):
        assert f">{name}<" in drawn or f"> {name}<" in drawn, name
    assert ">$\\mathdefault" not in drawn  # but the powers of ten are formulas


def test_names_are_escaped_in_markdown_tables():
    assert markdown_table(("a\nb",), [("c\rd",)]).splitlines() == [
        "| a\\nb |",
        "| :-- |",
        "| c\\rd |",
    ]


def test_relative_paths_are_resolved_where_the_run_was_started(
    trained, workspace, command_server, tmp_path
):
    """From another folder, also after everything was moved."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = tmp_path / "moved"
    shutil.copytree(workspace, moved)
    for run in (trained, moved / RUN):
        arguments = (os.path.relpath(run, elsewhere), "--json", "found.json", "--force")
        done = command_server.run("evaluate", *arguments, cwd=elsewhere)
        assert done.code == 0, done.err
        assert json.loads((elsewhere / "found.json").read_text())["teacher"] is not None
    shutil.rmtree(moved / "odd é")
    done = command_server.run("evaluate", moved / RUN, cwd=elsewhere)
    assert done.code == 3
    assert all(word in done.err for word in ("data.root odd é", "--data.root"))
    config = json.loads((trained / run_folder.CONFIG).read_text())
    assert config["data"]["root"] == "odd é"
