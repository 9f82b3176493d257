"""The notebook of the documentation runs, and its stored outputs are of the same kinds."""

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("sklearn")

from scripts.notebook import NOTEBOOK, run_notebook  # noqa: E402

_MAX_BYTES = 400_000


def kinds(notebook):
    """Return the types of the outputs of each code cell."""
    return [
        [sorted(output.get("data", [output.output_type])) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_notebook_runs_and_gives_outputs_of_the_stored_kinds(tmp_path):
    stored = nbformat.read(NOTEBOOK, as_version=4)
    executed = run_notebook(NOTEBOOK, tmp_path)
    assert kinds(executed) == kinds(stored)
    assert any("image/png" in kind for outputs in kinds(stored) for kind in outputs)
    assert executed.cells[1].outputs == stored.cells[1].outputs  # the list of recipes
    assert NOTEBOOK.stat().st_size < _MAX_BYTES
    assert (tmp_path / "exports" / "digits" / "config.json").is_file()
