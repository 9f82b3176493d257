"""Check the layers of .importlinter on a copy of the code with the layout of a wheel."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.wheel_layout import copy_package

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Return the exit code of lint-imports: 1 if an import violates the layers."""
    with tempfile.TemporaryDirectory() as folder:
        copy_package(Path(folder))
        shutil.copy(ROOT / ".importlinter", folder)
        linter = Path(sys.executable).with_name("lint-imports")
        return subprocess.run([linter, "--no-cache"], cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
