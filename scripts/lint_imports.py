"""Check the layers of .importlinter on a copy of the code with the layout of a wheel.

In the checkout, models/ and datasets/ are next to deit/ and have no __init__.py, because they would
shadow Hugging Face's `datasets`. import-linter does not find them there.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Return the exit code of lint-imports: 1 if an import violates the layers."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "deit"
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "deit", package, ignore=skipped)
        for name in ("models", "datasets"):
            shutil.copytree(ROOT / name, package / name, ignore=skipped)
        for inner in (package, *package.rglob("*")):
            if inner.is_dir():
                (inner / "__init__.py").touch()
        shutil.copy(ROOT / ".importlinter", folder)
        linter = Path(sys.executable).with_name("lint-imports")
        return subprocess.run([linter, "--no-cache"], cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
