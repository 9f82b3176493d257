"""The model card of an export: its table, its snippets, and what it must not show."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from deit.config.recipes.handwriting import digits
from deit.config.validation import load_config
from deit.datasets.splits import load_splits
from deit.deploy.export_formats import FORMATS
from deit.deploy.model_card import write_card
from deit.models.saved_student import ModelInfo
from tests.helpers.exports import views_of_test_set

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

SNIPPETS = """
import contextlib, io, json, os, sys
snippet_outputs = {}
for name, snippet, folder in json.load(sys.stdin):
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(snippet, name, "exec"), {"__name__": "__main__"})
    snippet_outputs[name] = out.getvalue()
assert not any(name.partition(".")[0] == "deit" for name in sys.modules)
print(json.dumps(snippet_outputs))
"""


def snippets_of(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def snippet_outputs(runs, exports, tmp_path_factory):
    """Return the output of the cards' snippets, by format and index.

    They run in one process that cannot import deit, as they all import the same libraries.
    """
    pixels = load_splits(load_config(runs / "distilled" / "config.json").data).test.pixels[0]
    snippets = []
    for form in FORMATS:
        folder = tmp_path_factory.mktemp(form) / "export"
        shutil.copytree(exports["distilled", form], folder)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / "image.png")
        for index, snippet in enumerate(snippets_of(folder)):
            snippets.append((f"{form} {index}", snippet, str(folder)))
    hidden = ("PYTHONPATH", "PYTHONSTARTUP")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={**environment, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        input=json.dumps(snippets),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", FORMATS)
def test_model_card_snippets_run_and_predict(form, runs, exports, snippet_outputs):
    folder = exports["distilled", form]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ")
    assert "| fused | " in card
    assert "`train_deit.py distilled`" in card
    for loader in FORMATS[form].load:
        assert f"| {loader} | " in card
    _, heads = views_of_test_set(runs / "distilled")
    predicted = str(heads["fused"][0].argmax().item())
    snippets = snippets_of(folder)
    assert snippets
    for index in range(len(snippets)):
        printed = snippet_outputs[f"{form} {index}"].strip()
        assert printed == predicted or f"'label': '{predicted}'" in printed.split("}")[0]


@pytest.mark.fault("E14")
def test_model_card_omits_folders_and_escapes_class_names(tmp_path):
    home = "/home/ann"
    config = digits().replace(
        data={"source": "folder", "root": f"{home}/data/pets"},
        teacher={"source": (f"{home}/runs/convnet", "checkpoints/other")},
        init={"weights": f"{home}/weights.pth"},
    )
    names = ("a|b", "<script>", "snow_leopard_", "two\nlines")
    model_info = ModelInfo(config.student, names, (0.5,) * 3, (0.5,) * 3, 1.0)
    command = f"train_deit.py digits --data.root={home}/data/pets --out '~/runs/pets'"
    environment = {
        "command": command,
        "deit": "0",
        "commit": "c",
        "packages": {"torch": "2", "timm": "1"},
        "device_name": "CPU",
        "processes": 1,
        "threads": 1,
        "precision": "no",
    }
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    values = {"top1": 0.5, "top5": 1.0, "calibration_error": 0.1}
    heads = dict.fromkeys(("class", "distillation", "fused"), values)
    metrics = {"heads": heads, "teacher": None, "num_samples": 4, "split": "test"}
    card = tmp_path / "README.md"
    write_card(
        card,
        run=tmp_path,
        format="onnx",
        config=config,
        model_info=model_info,
        metrics=metrics,
        verified=[],
        license=None,
    )
    text = card.read_text()
    assert home not in text
    assert "~" not in text
    assert all(f" {name}" in text for name in ("`pets`", "convnet", "checkpoints/other"))
    assert " weights.pth" in text
    assert "`train_deit.py digits --data.root=pets --out pets`" in text
    assert r"a\|b, \<script\>, snow\_leopard\_, two lines" in text
