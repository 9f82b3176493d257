"""A copy of the code with the layout of a wheel, for tools that read the code without importing it.

In the checkout, models/ and datasets/ are next to deit/ and have no __init__.py, because they would
shadow Hugging Face's `datasets`. import-linter and griffe do not find them there.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copy_package(folder: Path) -> Path:
    """Copy the code to folder/deit, every folder with an __init__.py; return that path."""
    package = folder / "deit"
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "deit", package, ignore=skipped)
    for name in ("models", "datasets"):
        shutil.copytree(ROOT / name, package / name, ignore=skipped)
    for inner in (package, *package.rglob("*")):
        if inner.is_dir():
            (inner / "__init__.py").touch()
    return package
