"""The model card of an export: its table, its snippets, and what it must not show."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from deit.config.recipes.handwriting import digits
from deit.config.sections.student import StudentConfig
from deit.config.validation import load_config
from deit.datasets.decoding import center_square
from deit.datasets.splits import load_splits
from deit.datasets.views import evaluation_views
from deit.deploy.export_formats import FORMATS
from deit.deploy.model_card import usage_of, write_card
from deit.evaluation.predict import predict
from deit.models.saved_student import ModelInfo
from tests.helpers.exports import views_of_test_set

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

SNIPPETS = """
import contextlib, io, json, os, shutil, sys
snippet_outputs = {}
for name, snippet, folder in json.load(sys.stdin):
    os.chdir(folder)
    for image in sorted(os.listdir("images")):
        shutil.copy(f"images/{image}", "image.png")
        scope = {"__name__": "__main__"}
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(snippet, name, "exec"), scope)
        logits = scope["logits"].reshape(-1).tolist() if "logits" in scope else None
        snippet_outputs[f"{name} {image}"] = [out.getvalue(), logits]
assert not any(name.partition(".")[0] == "deit" for name in sys.modules)
print(json.dumps(snippet_outputs))
"""


def snippets_of(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def snippet_outputs(runs, exports, tmp_path_factory):
    """Return text and logits of the cards' snippets, by format, index and image.

    They run in one process that cannot import deit, as they all import the same libraries.
    """
    snippets = []
    for form in FORMATS:
        folder = tmp_path_factory.mktemp(form) / "export"
        shutil.copytree(exports["distilled", form], folder)
        _write_images(folder / "images", runs)
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


def _write_images(folder, runs):
    """Write a test image, a photo that is turned by its EXIF data, and a transparent image."""
    folder.mkdir()
    pixels = load_splits(load_config(runs / "distilled" / "config.json").data).test.pixels[:2]
    plain, digit = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels)
    plain.save(folder / "plain.png")
    wide = Image.new("RGB", (45, 32))
    wide.paste(digit.resize((32, 32)), (9, 0))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    wide.save(folder / "turned.jpg", exif=exif)
    hidden = wide.convert("RGBA")  # the left half is red where it is transparent
    hidden.paste((255, 0, 0, 0), (0, 0, 22, 32))
    hidden.save(folder / "transparent.png")


@pytest.mark.parametrize("form", FORMATS)
def test_model_card_code_predicts_as_deit_does(form, runs, exports, snippet_outputs, tmp_path):
    _write_images(tmp_path / "images", runs)
    predicted = predict(runs / "distilled", tmp_path / "images", top_k=10)["images"]
    assert len(predicted) == 3
    for row in predicted:
        top = row["heads"]["fused"]
        text, logits = snippet_outputs[f"{form} 0 {Path(row['file']).name}"]
        assert text.strip() == top[0]["class"]
        expected = {entry["class"]: entry["probability"] for entry in top}
        shares = torch.tensor(logits).softmax(dim=0).tolist()
        assert dict(zip("0123456789", shares, strict=True)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("side", "crop"), [(64, 1.0), (64, 0.9), (49, 0.875)])
def test_prepare_of_the_card_gives_the_pixels_of_evaluation(side, crop, tmp_path):
    student = StudentConfig(name="vit_micro", image_size=side)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    code = usage_of("onnx", ModelInfo(student, ("a", "b"), mean, std, crop))
    code = re.findall(r"```python\n(.*?)```", code, re.DOTALL)[0].partition("session = ")[0]
    assert not re.search(r"torch|deit", code)
    scope = {}
    exec(code, scope)
    generator = np.random.default_rng(0)
    for width, height in ((80, 61), (61, 80), (64, 64), (70, 70), (300, 201), (30, 45), (9, 70)):
        noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "noise.png")
        square = center_square(Image.fromarray(noise), round(side / crop))[None]
        views = evaluation_views(square, size=side, crop_pct=crop)
        channels = (torch.tensor(values)[:, None, None] for values in (mean, std))
        expected = (views - next(channels)) / next(channels)
        prepared = scope["prepare"](tmp_path / "noise.png")
        torch.testing.assert_close(torch.from_numpy(prepared), expected, atol=2e-6, rtol=0)


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
        printed = snippet_outputs[f"{form} {index} plain.png"][0].strip()
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
