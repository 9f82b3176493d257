"""Packaging: metadata in setup.cfg only, declared dependencies, wheel and editable install."""

import ast
import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import deit

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {
    "PIL": "pillow",
    "griffe": "griffelib",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
METADATA_FILES = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "CITATION.cff")
DATA_FILES = {"deit/py.typed", "deit/viz/page.css", "deit/viz/page.js"}
MAX_WHEEL_BYTES = 2**20  # 0.64 MB in November 2026; an image or a result file would exceed it
BUILD_SDIST = "from setuptools.build_meta import build_sdist; build_sdist({!r})"
MODULES = ("deit", "deit.models.student", "deit.datasets.views")
FIND = f"""
from importlib.util import find_spec
for name in {MODULES}:
    print(find_spec(name).origin)
"""


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> set[str]:
    """Return the distributions of a requirement list, without versions and comments."""
    lines = (line.split(" #")[0].strip() for line in text.splitlines())
    return {re.match(r"[\w.-]+", line)[0].lower() for line in lines if line}


LIBRARY = ("deit", "models", "datasets")


def imported_distributions(folders: tuple[str, ...] = LIBRARY) -> set[str]:
    """Return the distributions that folders and the files next to them import."""
    modules = set()
    files = [*ROOT.glob("*.py")]
    for folder in folders:
        files += (ROOT / folder).rglob("*.py")
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    third_party = modules - set(sys.stdlib_module_names) - {"deit", "scripts", "tests"}
    return {DISTRIBUTIONS.get(name, name) for name in third_party}


def test_metadata_is_in_setup_cfg_only():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(pyproject) == {"build-system", "tool"}
    assert set(pyproject["tool"]) == {"ruff"}
    metadata = settings()["metadata"]
    assert metadata["name"] == "deit"
    assert metadata["version"] == "attr: deit.__version__"
    assert metadata["license"] == "Apache-2.0"


def test_files_named_in_the_metadata_exist():
    metadata = settings()["metadata"]
    assert (ROOT / metadata["long_description"].removeprefix("file:").strip()).is_file()
    assert (ROOT / metadata["license_files"]).is_file()


def test_every_import_is_declared():
    """In the library without the extra `dev`, in the scripts with it."""
    extras = dict(settings()["options.extras_require"])
    development = requirements(extras.pop("dev"))
    texts = (settings()["options"]["install_requires"], *extras.values())
    declared = set().union(*map(requirements, texts))
    assert imported_distributions() - declared == set()
    assert imported_distributions(("scripts",)) - declared - development == set()


def test_every_requirement_is_imported():
    required = requirements(settings()["options"]["install_requires"])
    assert required - imported_distributions() == set()


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command that must succeed, without PYTHONPATH and network, and return its output."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_checkout(target: Path) -> Path:
    """Copy the files of a build to `target`, so that the checkout stays clean."""
    for folder in ("deit", "models", "datasets"):
        shutil.copytree(
            ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for path in [*ROOT.glob("*.md"), *map(ROOT.joinpath, METADATA_FILES)]:
        shutil.copy(path, target)
    (target / "tests").mkdir()
    shutil.copy(__file__, target / "tests")
    return target


def python_files(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("sdist")
    checkout = copy_checkout(folder / "checkout")
    run(sys.executable, "-c", BUILD_SDIST.format(str(folder)), cwd=checkout)
    (file,) = folder.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the source distribution, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*build, "-w", folder, sdist, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


def test_sdist_contains_library_license_and_citation_but_no_tests(sdist):
    top = f"deit-{deit.__version__}"
    assert sdist.name == f"{top}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    modules = {name for name in names if name.endswith(".py")}
    assert modules == python_files("deit") | python_files("models") | python_files("datasets")
    assert names >= {*DATA_FILES, *METADATA_FILES, "README.md", "CHANGELOG.md"} - {"MANIFEST.in"}


def test_wheel_contains_exactly_the_library(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {name for name in names if name.endswith(".py")}
    mapped = {f"deit/{name}" for name in python_files("models") | python_files("datasets")}
    assert modules == python_files("deit") | mapped
    dist_info = f"deit-{deit.__version__}.dist-info"
    assert f"{dist_info}/licenses/LICENSE" in names
    assert names >= DATA_FILES
    assert all(name in modules | DATA_FILES or name.startswith(f"{dist_info}/") for name in names)
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_wheel_metadata_matches_setup_cfg(wheel):
    dist_info = f"deit-{deit.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(f"{dist_info}/entry_points.txt").decode()
        metadata = Parser().parsestr(archive.read(f"{dist_info}/METADATA").decode())
    assert entry_points.split() == ["[console_scripts]", "deit", "=", "deit.cli:program"]
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    declared = requirements(settings()["options"]["install_requires"])
    assert requirements("\n".join(required)) == declared
    assert set(metadata.get_all("Provides-Extra")) == set(settings()["options.extras_require"])


def import_again():
    """Import MODULES again without the checkout on the path and print their files.

    Runs in a fork of a process with all imports, which saves the seconds of importing torch.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == "deit"]:
        del sys.modules[name]
    sys.path[:] = [os.environ["DEIT_TEST_SITE"]] + [
        path for path in sys.path if Path(path or ".").resolve() != ROOT
    ]
    for name in MODULES:
        print(importlib.import_module(name).__file__)
    return 0


def test_installed_wheel_works_without_the_checkout(wheel, command_server, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = (sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel)
    run(*install, cwd=elsewhere)
    main = f"{__name__}:{import_again.__name__}"
    done = command_server.run(cwd=elsewhere, MAIN_FUNCTION=main, DEIT_TEST_SITE=str(site))
    assert done.code == 0, done.err
    files = ["deit/__init__.py", "deit/models/student.py", "deit/datasets/views.py"]
    assert done.out.split() == [str(site / name) for name in files]
    origins = run(sys.executable, "-c", FIND, cwd=elsewhere, PYTHONPATH=str(site))
    assert origins.split() == [str(site / name) for name in files]
    listed = run(sys.executable, "-m", "deit", "recipes", cwd=elsewhere, PYTHONPATH=str(site))
    assert "digits-teacher" in listed
    version = run(site / "bin" / "deit", "--version", cwd=elsewhere, PYTHONPATH=str(site))
    assert version.split() == ["deit", deit.__version__]


def test_editable_install_follows_the_checkout(tmp_path):
    pytest.importorskip("setuptools")
    checkout = copy_checkout(tmp_path / "checkout")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # torch and other packages are imported from the environment that runs the tests.
    (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = (python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", checkout)
    run(*install, cwd=elsewhere)
    origins = run(python, "-c", FIND, cwd=elsewhere)
    files = ["deit/__init__.py", "models/student.py", "datasets/views.py"]
    assert origins.split() == [str(checkout / name) for name in files]
    assert "digits-teacher" in run(python.with_name("deit"), "recipes", cwd=elsewhere)
