"""Run the notebook of the documentation in a temporary folder and store its outputs.

python scripts/notebook.py [--check]

--check: only run it; the file stays as it is.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"
_TIMEOUT_S = 600  # of a cell


def run_notebook(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a run in this folder, in a kernel of this Python.

    Progress bars and warnings (standard error) are left out.
    Raises RuntimeError if a cell fails or takes too long, or the kernel dies.
    """
    notebook = nbformat.read(path, as_version=4)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["HF_HUB_OFFLINE"] = "1"
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=_TIMEOUT_S,
        startup_timeout=_TIMEOUT_S,
        resources=resources,
        record_timing=False,
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise RuntimeError(f"{path}: {error}") from error
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # Pillow gives PNG as well
    return notebook


def main() -> int:
    """Run the notebook; without --check, store its outputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Do not write the file.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        notebook = run_notebook(NOTEBOOK, Path(folder))
    if not options.check:
        nbformat.write(notebook, NOTEBOOK)
        print(f"wrote {NOTEBOOK} ({NOTEBOOK.stat().st_size / 1000:.0f} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
