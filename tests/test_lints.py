"""The lints of sizes and words: each reports what is planted in a copy of its folder layout."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FUNCTION = "def f(x):\n" + "    x += 1\n" * 60
SIZES = {
    "deit/core/long.py": ("x = 1\n" * 401, "deit/core/long.py: 401 lines"),
    "tests/long.py": (FUNCTION, "tests/long.py:1: f has 61 lines"),
    "models/surgery/long.py": (FUNCTION, "models/surgery/long.py:1: f has 61 lines"),
}
UNWANTED = {
    "README.md": ("It told the user.\n", "README.md:1: 'told'"),
    "docs/page.md": ("Text.\n\nThe colour of it.\n", "docs/page.md:3: 'colour'"),
    "deit/core/names.py": ("def f(neighbours):\n    pass\n", "deit/core/names.py:1: 'neighbours'"),
    "models/surgery/prose.py": (
        '"""Said so."""\n',
        "models/surgery/prose.py:1: 'Said'",
    ),
    "datasets/message.py": ("X = 'nobody is here'\n", "datasets/message.py:1: 'nobody'"),
    "tests/comment.py": ("# anew\n", "tests/comment.py:1: 'anew'"),
}
ALLOWED = {
    "README.md": "`told` and a [link](told.md) are code.\n",
    "docs/log.md": "It told us.\n",
    "tests/data.py": "X = 'input that told something'\n",
}


def lint(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of a lint on the files of a folder."""
    (folder / "scripts").mkdir(exist_ok=True)
    shutil.copy(ROOT / "scripts" / script, folder / "scripts" / script)
    command = [sys.executable, str(folder / "scripts" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)


def plant(folder: Path, file: str, content: str) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(content)


@pytest.mark.parametrize("file", SIZES)
def test_lint_sizes_reports_what_is_too_long(file, tmp_path):
    content, message = SIZES[file]
    plant(tmp_path, file, content)
    done = lint(tmp_path, "lint_sizes.py")
    assert (done.returncode, done.stdout.splitlines()) == (1, [message])


def test_lint_sizes_reports_a_folder_with_too_many_modules(tmp_path):
    for index in range(21):
        plant(tmp_path, f"deit/core/m{index}.py", "x = 1\n")
    done = lint(tmp_path, "lint_sizes.py")
    assert (done.returncode, done.stdout.splitlines()) == (1, ["deit/core: 21 modules"])


def test_lint_sizes_accepts_the_limits(tmp_path):
    plant(tmp_path, "deit/core/long.py", "x = 1\n" * 400)
    plant(tmp_path, "deit/core/function.py", FUNCTION.removesuffix("    x += 1\n"))
    assert lint(tmp_path, "lint_sizes.py").returncode == 0


@pytest.mark.parametrize("file", UNWANTED)
def test_lint_words_reports_unwanted_words(file, tmp_path):
    content, message = UNWANTED[file]
    plant(tmp_path, file, content)
    done = lint(tmp_path, "lint_words.py")
    assert done.returncode == 1
    assert done.stdout.startswith(message)


@pytest.mark.parametrize("file", ALLOWED)
def test_lint_words_accepts_code_records_and_input(file, tmp_path):
    plant(tmp_path, file, ALLOWED[file])
    done = lint(tmp_path, "lint_words.py")
    assert done.returncode == 0, done.stdout


def test_lint_words_unknown_path_is_an_error(tmp_path):
    done = lint(tmp_path, "lint_words.py", "nowhere.md")
    assert done.returncode == 2
    assert "nowhere.md" in done.stderr
