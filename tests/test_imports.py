"""Imports between folders, code that no file may contain, and which `datasets` is imported."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import fake_datasets_package

ROOT = Path(__file__).parents[1]
FOLDERS = ("deit", "models", "datasets", "scripts")


def library() -> dict[str, Path]:
    """Return every file of the library and the root scripts by its module name."""
    files = {path.stem: path for path in ROOT.glob("*.py")}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            prefix = ("deit",) if folder in ("models", "datasets") else ()
            name = ".".join(prefix + parts).removesuffix(".__init__")
            files[name] = path
    return files


LIBRARY = library()
EVERYTHING = {**LIBRARY, **{str(path): path for path in (ROOT / "tests").rglob("*.py")}}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the full names of all imported modules, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "system"}


def unsafe_lines(source: str) -> list[str]:
    """List what could run untrusted code: pickles, unsafe torch.load, shells, eval."""
    problems = []
    tree = ast.parse(source)
    for name in imported(tree):
        if name.split(".")[0] in UNSAFE_MODULES:
            problems.append(f"imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "os"):
            names = {alias.name for alias in node.names}
            problems += [f"from {node.module} import {name}" for name in names & {"load", "system"}]
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        if called in UNSAFE_CALLS:
            problems.append(f"line {node.lineno}: {called}")
        if called.endswith("torch.load") and not _true(keywords.get("weights_only")):
            problems.append(f"line {node.lineno}: torch.load without weights_only=True")
        for keyword in ("shell", "allow_pickle"):
            if keyword in keywords:
                problems.append(f"line {node.lineno}: {keyword}=")
    return problems


def _true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def bare_imports(source: str) -> list[str]:
    return [
        name for name in imported(ast.parse(source)) if name.split(".")[0] in ("models", "datasets")
    ]


def test_folders_import_only_from_lower_layers():
    done = python("scripts/lint_imports.py")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("deit/distill/losses.py", "from deit.training.train import train"),
        ("deit/core/types.py", "def late():\n    import deit.cli"),
        ("deit/config/schema.py", "import torch"),
        ("models/student.py", "from deit.datasets.views import to_unit_float"),
        ("datasets/views.py", "import deit.models.weight_files"),
        ("deit/experiments/sweep.py", "from deit.cli.run_args import RunArguments"),
    ],
)
def test_lint_imports_planted_import_is_reported(file, source, tmp_path):
    for folder in ("deit", "models", "datasets"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in (".importlinter", "scripts"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    with (tmp_path / file).open("a") as planted:
        planted.write(f"\n\n{source}\n")
    done = python(str(tmp_path / "scripts" / "lint_imports.py"))
    assert done.returncode == 1
    assert file.removesuffix(".py").replace("/", ".") in done.stdout


@pytest.mark.fault("B13")
def test_no_file_can_run_untrusted_code():
    problems = {name: unsafe_lines(path.read_text()) for name, path in LIBRARY.items()}
    assert {name: lines for name, lines in problems.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_unsafe_lines_planted_danger_is_reported(source):
    assert len(unsafe_lines(source)) == 1


def test_unsafe_lines_safe_calls_are_not_reported():
    assert unsafe_lines("network.eval()\ntorch.load('x', weights_only=True)") == []


def test_no_file_imports_models_or_datasets_bare():
    imports = {name: bare_imports(path.read_text()) for name, path in EVERYTHING.items()}
    assert {name: names for name, names in imports.items() if names} == {}


def test_bare_imports_planted_import_is_reported():
    source = "import datasets\nfrom models import student\nimport models.student"
    assert bare_imports(source) == ["datasets", "models", "models.student"]


@pytest.mark.parametrize("folder", ["models", "datasets"])
def test_models_and_datasets_have_no_init(folder):
    assert list((ROOT / folder).rglob("__init__.py")) == []


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a new interpreter in the root of the checkout, as a user does."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_line_is_parsed_without_torch():
    code = (
        "import sys, deit.cli, deit.config.schema, deit.config.validation, deit.config.recipes, "
        "deit.cli.run_args\n"
        "print(sorted({'torch', 'timm', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_hugging_face_datasets_is_not_shadowed_for_accelerate(tmp_path):
    """(test_peers.py trains with it installed.)"""
    code = (
        "import sys\n"
        "from accelerate.data_loader import prepare_data_loader\n"
        "from torch.utils.data import DataLoader\n"
        "assert 'datasets' not in sys.modules\n"
        "prepare_data_loader(DataLoader([0, 1]), num_processes=2, process_index=0)\n"
        "assert 'datasets' in sys.modules\n"
        "import datasets, deit.datasets.views\n"
        "print(datasets.__file__, deit.datasets.views.__file__, sep='\\n')"
    )
    site = fake_datasets_package(tmp_path / "site")
    done = python("-c", code, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr
    message, hugging_face_file, deit_file = done.stdout.splitlines()
    assert message == "stand-in imported"
    assert Path(hugging_face_file) == Path(site) / "datasets" / "__init__.py"
    assert Path(deit_file) == ROOT / "datasets" / "views.py"


def test_no_test_file_imports_another():
    """Shared code is in tests/helpers, so that a test file can be renamed, moved or removed."""
    importing = re.compile(
        r"^\s*(from tests(\.\w+)*\.test_\w+ import|from tests(\.\w+)* import test_)", re.M
    )
    files = (ROOT / "tests").rglob("*.py")
    assert [path.name for path in files if importing.search(path.read_text(encoding="utf-8"))] == []
