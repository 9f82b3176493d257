"""The notebook of the documentation runs, and its stored outputs are of the same kinds."""

import os

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("sklearn")

from scripts.notebook import NOTEBOOK, ROOT, run_notebook  # noqa: E402

_MAX_BYTES = 400_000
_TIMEOUT_S = 300
_EPOCHS, _FEWER_EPOCHS = (rf"optim={{\"epochs\": {epochs}}}" for epochs in (20, 2))


def kinds(notebook):
    """Return the types of the outputs of each code cell."""
    return [
        [sorted(output.get("data", [output.output_type])) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_notebook_runs_and_gives_outputs_of_the_stored_kinds(tmp_path):
    stored = nbformat.read(NOTEBOOK, as_version=4)
    shortened = tmp_path / NOTEBOOK.name
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert text.count(_EPOCHS) == 1
    shortened.write_text(text.replace(_EPOCHS, _FEWER_EPOCHS), encoding="utf-8")
    executed = run_notebook(shortened, tmp_path)
    assert kinds(executed) == kinds(stored)
    assert any("image/png" in kind for outputs in kinds(stored) for kind in outputs)
    assert executed.cells[1].outputs == stored.cells[1].outputs  # the list of recipes
    assert NOTEBOOK.stat().st_size < _MAX_BYTES
    assert (tmp_path / "exports" / "digits" / "config.json").is_file()


TRAIN = """
import deit
config = deit.recipe(
    "digits", loss="none", data={"train_fraction": 0.2}, optim={"epochs": 200, "batch_size": 32},
    student={"depth": 1, "embed_dim": 16, "num_heads": 2}, run={"eval_every_epochs": 100},
)
deit.train(config, "run", resume=True, callbacks=[lambda row: print("epoch", row["epoch"])])
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A client of a kernel that runs in tmp_path."""
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with open(os.devnull, "w") as ignored:
        options = {"cwd": str(tmp_path), "stderr": ignored}
        manager, client = start_new_kernel(startup_timeout=_TIMEOUT_S, **options)
    client.manager = manager
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_stop_button_of_a_notebook_saves_a_checkpoint_and_raises(kernel, tmp_path):
    request = kernel.execute(TRAIN, stop_on_error=False)  # ipykernel 6 skips the next cell too
    printed = ""
    while "epoch 3\n" not in printed:
        message = kernel.get_iopub_msg(timeout=_TIMEOUT_S)
        printed += message["content"].get("text", "")
    kernel.manager.interrupt_kernel()
    reply = None
    while reply is None or reply["parent_header"]["msg_id"] != request:  # of earlier requests
        reply = kernel.get_shell_msg(timeout=_TIMEOUT_S)
    reply = reply["content"]
    assert reply["status"] == "error"
    assert reply["ename"] in ("KeyboardInterrupt", "StoppedBySignal")
    assert "resume" in reply["evalue"]
    assert list((tmp_path / "run").glob("checkpoint-*/model.safetensors"))
    kernel.execute('print("epochs", len(deit.load_run("run").metrics) >= 3)')
    while "epochs True" not in printed:  # the kernel is alive
        message = kernel.get_iopub_msg(timeout=_TIMEOUT_S)
        printed += message["content"].get("text", "")
