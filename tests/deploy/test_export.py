"""Exports: loaded by other tools without our code, equal in their answers, refused where not."""

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deit.cli import run_command
from deit.config.choices import EXPORT_PACKAGES
from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.student_section import StudentConfig
from deit.config.validation import load_config
from deit.core.errors import CheckpointError, ConfigError, SystemFault
from deit.core.types import logits_by_head
from deit.datasets.decoding import decode_square
from deit.datasets.splits import load_splits
from deit.datasets.views import evaluation_views
from deit.deploy.export import export, verify
from deit.deploy.formats import FORMATS
from deit.deploy.model_card import write_card
from deit.distill.inference import evaluation_batches
from deit.models.adapt_weights import adapt_weights
from deit.models.load_weights import load_weights_from
from deit.models.networks import create_network
from deit.models.saved import ModelInfo, build_student, load_student
from deit.models.timm_format import timm_config
from deit.models.transformers_format import from_transformers, to_transformers, transformers_config
from deit.models.weight_files import load_weights
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.trained import trained

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
NAMES = tuple("abc")
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4}
BRIEF = {"epochs": 2, "batch_size": 32, "warmup_epochs": 1, "lr": 3e-3}
FEW = {"train_fraction": 0.3}
ALONE = {"loss": LOSS_PRESETS["none"], "teacher": {"source": ()}}
ONE = {**SMALL, "depth": 1}  # where it is not of blocks: a second one takes a third of an export
STUDENTS = {
    "distilled": {"student": SMALL, **ALONE},
    "plain": {"student": {**SMALL, "name": "vit_micro"}, **ALONE},
    "cropped": {"student": ONE, "views": {"eval_crop_pct": 0.8}, **ALONE},
    "two tokens": {"student": {**ONE, "num_distillation_tokens": 2}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Students of each kind, trained for long enough that their answers differ, and a ConvNet."""
    folder = tmp_path_factory.mktemp("runs")
    trained(digits_teacher().replace(optim={"epochs": 3}), folder / "convnet")
    two = {"source": (str(folder / "convnet"),) * 2, "combine": "tokens"}
    for name, sections in STUDENTS.items():
        config = digits().replace(optim=BRIEF, data=FEW, **{"teacher": two, **sections})
        train(config, folder / name, command=f"train_deit.py {name}")
    return folder


@pytest.fixture(scope="module")
def exports(runs):
    """Every run in every format that can hold it, as (run, format) -> folder."""
    found = {}
    for name in (*STUDENTS, "convnet"):
        for form in FORMATS:
            try:
                found[name, form] = export(runs / name, None, name=form, images=64)
            except ConfigError:
                continue
    return found


@functools.cache
@torch.no_grad()
def whole_test_set(run):
    """All test images as an exported network takes them, and the run's logits by head."""
    config = load_config(run / "config.json")
    student, _ = load_student(run / "best")
    test = load_splits(config.data).test
    chunks = torch.arange(len(test.labels)).split(100)
    views = torch.cat(list(evaluation_batches(test, chunks, config, device=torch.device("cpu"))))
    return (views - student.mean) / student.std, logits_by_head(student.eval()(views))


def test_formats_are_those_of_the_command_line():
    assert tuple(FORMATS) == tuple(EXPORT_PACKAGES)


def test_what_can_be_exported_is(exports):
    everything = {(name, form) for name in (*STUDENTS, "convnet") for form in FORMATS}
    refused = {(n, f) for n in ("two tokens", "convnet") for f in ("timm", "transformers")}
    assert set(exports) == everything - refused


@pytest.mark.parametrize("name", ["distilled", "plain", "cropped"])
def test_timm_and_transformers_load_one_folder_with_equal_answers(name, runs, exports):
    from transformers import AutoModelForImageClassification

    images, heads = whole_test_set(runs / name)
    expected = heads.get("fused", heads["class"])
    folder = exports[name, "timm"]
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(wrapped).__name__.startswith("TimmWrapper")
    with torch.no_grad():
        for logits in (by_timm(images), wrapped(pixel_values=images).logits):
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
            assert torch.equal(logits.argmax(1), expected.argmax(1))
    assert wrapped.config.id2label == {label: str(label) for label in range(10)}


@pytest.mark.parametrize("name", ["distilled", "plain", "cropped"])
def test_transformers_own_classes_answer_the_same_with_both_heads(name, runs, exports):
    import transformers

    images, heads = whole_test_set(runs / name)
    folder = exports[name, "transformers"]
    network, report = transformers.AutoModelForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain = name == "plain"
    expected = "ViTForImageClassification" if plain else "DeiTForImageClassificationWithTeacher"
    assert type(network).__name__ == expected
    with torch.no_grad():
        found = network.eval()(pixel_values=images)
    pairs = {"logits": "class"} if plain else {"logits": "fused", "cls_logits": "class"}
    if not plain:
        pairs["distillation_logits"] = "distillation"
    for theirs, ours in pairs.items():
        torch.testing.assert_close(found[theirs], heads[ours], atol=1e-5, rtol=0)
        assert torch.equal(found[theirs].argmax(1), heads[ours].argmax(1))


@pytest.mark.parametrize("name", [*STUDENTS, "convnet"])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_onnx_answers_the_same_in_any_batch(name, batch, runs, exports):
    import onnxruntime

    images, heads = whole_test_set(runs / name)
    session = onnxruntime.InferenceSession(exports[name, "onnx"] / "model.onnx")
    outputs = [output.name for output in session.get_outputs()]
    two = "fused" in heads
    assert outputs == (["logits", "class_logits", "distillation_logits"] if two else ["logits"])
    for start in range(0, 128, batch):
        part = slice(start, start + batch)
        found = session.run(None, {"pixel_values": images[part].numpy()})
        wanted = ("fused", "class", "distillation") if two else ("class",)
        for logits, head in zip(found, wanted):
            logits = torch.from_numpy(logits)
            torch.testing.assert_close(logits, heads[head][part], atol=1e-4, rtol=0)
            assert torch.equal(logits.argmax(1), heads[head][part].argmax(1))


def test_the_onnx_file_stands_alone_and_says_what_it_takes(runs, exports, tmp_path):
    import onnxruntime

    alone = tmp_path / "alone.onnx"
    shutil.copy(exports["cropped", "onnx"] / "model.onnx", alone)
    session = onnxruntime.InferenceSession(alone)
    about = session.get_modelmeta().custom_metadata_map
    facts = load_student(runs / "cropped" / "best")[1]
    assert json.loads(about["mean"]) == list(facts.mean)
    assert json.loads(about["class_names"]) == list(facts.class_names)
    assert (about["image_size"], about["resize_shortest_edge"]) == ("8", "10")
    assert list(session.get_inputs()[0].shape) == ["batch", 3, 8, 8]
    content = alone.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content  # nobody's own paths
    assert b"pkg.torch" not in content


@pytest.mark.parametrize("name", [*STUDENTS, "convnet"])
def test_torch_export_answers_the_same(name, runs, exports):
    images, heads = whole_test_set(runs / name)
    network = torch.export.load(exports[name, "pt2"] / "model.pt2").module()
    for number in (1, 5, 64):
        logits = network(images[:number])[0]
        expected = heads.get("fused", heads["class"])[:number]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_pipeline_of_transformers_answers_on_pictures(runs, exports, tmp_path):
    from transformers import pipeline

    config = load_config(runs / "distilled" / "config.json")
    pixels = load_splits(config.data).test.pixels[:5]
    _, heads = whole_test_set(runs / "distilled")
    expected = heads["fused"][:5].softmax(1)
    for form in ("timm", "transformers"):
        answer = pipeline("image-classification", model=str(exports["distilled", form]), top_k=10)
        for row, picture in enumerate(pixels):
            found = answer(Image.fromarray(picture.permute(1, 2, 0).numpy()))
            scores = {one["label"]: one["score"] for one in found}
            for label in range(10):
                assert scores[str(label)] == pytest.approx(expected[row, label].item(), abs=1e-4)


def test_timm_and_transformers_prepare_a_picture_alike(exports, tmp_path):
    """One that is no square, cut to four fifths. (Of an odd border each takes another half.)"""
    from transformers import AutoImageProcessor

    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (30, 50, 3), dtype=torch.uint8, generator=generator)
    picture = Image.fromarray(noise.numpy())
    network = timm.create_model(f"local-dir:{exports['cropped', 'timm']}", pretrained=True)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    theirs = AutoImageProcessor.from_pretrained(exports["cropped", "transformers"])
    other = theirs(picture, return_tensors="pt")["pixel_values"][0]
    one = prepare(picture)
    assert one.shape == other.shape == (3, 8, 8)
    assert (one - other).abs().mean() < 0.02
    student, facts = load_student(exports["cropped", "timm"].parent / "best")
    picture.save(tmp_path / "picture.png")
    square = decode_square((tmp_path / "picture.png").read_bytes(), "picture", 10)
    ours = evaluation_views(square[None], size=8, crop=facts.evaluation_crop)
    ours = ((ours - student.mean) / student.std)[0]
    assert (one - ours).abs().mean() < 0.03


@pytest.mark.parametrize("side", [8, 16, 32, 48, 64, 224, 384])
@pytest.mark.parametrize("crop", [1.0, 0.95, 0.9, 0.875, 0.8, 64 / 72])
def test_timm_resizes_to_the_edge_that_we_round_to(side, crop):
    facts = ModelInfo(
        StudentConfig(image_size=side, patch_size=4), NAMES, (0.5,) * 3, (0.5,) * 3, crop
    )
    share = timm_config(facts, build_student(facts).network)["pretrained_cfg"]["crop_pct"]
    assert math.floor(side / share) == round(side / crop)
    if crop == 1:
        assert share == 1


# the names of transformers, there and back


@pytest.mark.parametrize("kind", ["deit_micro", "vit_micro"])
def test_names_go_there_and_back_to_the_bit(kind):
    weights = create_network(StudentConfig(name=kind, depth=2), 7).state_dict()
    back = from_transformers(to_transformers(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(value, back[name]) for name, value in weights.items())


def test_names_of_another_network_are_refused():
    with raises(CheckpointError, "transformers"):
        from_transformers({"bert.embeddings": torch.zeros(1)})
    weights = to_transformers(create_network(StudentConfig(name="vit_micro"), 7).state_dict())
    with raises(CheckpointError, "vit.pooler.dense.weight"):
        from_transformers({**weights, "vit.pooler.dense.weight": torch.zeros(1)})
    key = "vit.encoder.layer.3.attention.attention.key.weight"
    with raises(CheckpointError, "layer 3", "key"):
        from_transformers({name: value for name, value in weights.items() if name != key})


@pytest.mark.parametrize("form", ["timm", "transformers"])
@pytest.mark.parametrize("name", ["distilled", "plain"])
def test_an_export_is_a_start_again(name, form, runs, exports):
    found = load_weights_from(str(exports[name, form]))
    student, facts = load_student(runs / name / "best")
    renamed = {"name": found.student.name, "embed_dim": 48, "depth": 2, "weight_init": "timm"}
    assert found.student == replace(facts.student, **renamed)
    assert found.class_names == facts.class_names
    assert found.mean == pytest.approx(facts.mean)
    again = create_network(facts.student, 10)
    fitted = adapt_weights(found, again, facts.class_names, digits().init)
    assert fitted.notes == ()
    load_weights(again, fitted.weights, origin="here")
    for key, value in student.network.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_what_transformers_saves_is_a_start_too(runs, exports, tmp_path):
    import transformers

    network = transformers.AutoModelForImageClassification.from_pretrained(
        exports["distilled", "transformers"]
    )
    network.save_pretrained(tmp_path)
    found = load_weights_from(str(tmp_path))
    assert found.student.num_heads == 4
    student, _ = load_student(runs / "distilled" / "best")
    for key, value in student.network.state_dict().items():
        assert torch.equal(value, found.weights[key])


# verification and refusal


def sabotage(form, change):
    """The format with files that are changed after they are written."""

    original = FORMATS[form]

    def write(folder, student, facts):
        original.write(folder, student, facts)
        change(folder)

    return original._replace(write=write)


def other_epsilon(folder):
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "layer_norm_eps": 1e-2}))


def shifted_head(folder):
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"] = weights["head.bias"] + 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("form", "change"), [("transformers", other_epsilon), ("timm", shifted_head)]
)
def test_an_export_that_answers_otherwise_is_not_kept(form, change, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, form, sabotage(form, change))
    with raises(CheckpointError, form, "logits", FORMATS[form].tolerance):
        export(runs / "distilled", tmp_path / "out", name=form)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [float("nan"), 1e-3])
def test_verifying_finds_a_difference_in_any_batch(wrong):
    inputs = torch.arange(80.0).reshape(80, 1)
    expected = {"logits": torch.stack([inputs[:, 0] / 80, -inputs[:, 0] / 80], dim=1)}

    def exact(images):
        return {"logits": torch.cat([images / 80, -images / 80], dim=1)}

    found = verify("here", exact, inputs, expected, tolerance=1e-5)
    assert (found.images, found.difference, found.allowed) == (80, 0.0, 1e-5)
    for row in (0, 3, 40, 79):

        def broken(images, row=row):
            logits = exact(images)["logits"]
            logits[(images == row)[:, 0], 0] += wrong
            return {"logits": logits}

        with raises(CheckpointError, "here", "logits", 1e-5):
            verify("here", broken, inputs, expected, tolerance=1e-5)


def test_another_answer_within_the_tolerance_is_a_difference():
    expected = {"logits": torch.tensor([[0.5, 0.500001]])}

    def answer(images):
        return {"logits": torch.tensor([[0.500001, 0.5]])}

    with raises(CheckpointError, "here", "logits") as refused:
        verify("here", answer, torch.zeros(1, 1), expected, tolerance=1e-5)
    assert "1e-05" not in str(refused.value)  # as where a logit differs by more


@pytest.mark.parametrize("check", [timm_config, transformers_config])
@pytest.mark.parametrize(
    "student",
    [
        StudentConfig(name="small_convnet"),
        StudentConfig(name="rednet_micro"),
        StudentConfig(name="deit_micro", num_distillation_tokens=2),
        StudentConfig(name="regnety_002_small_stem"),
    ],
    ids=lambda student: student.name,
)
def test_what_a_format_cannot_hold_is_refused_with_the_reason(check, student):
    facts = ModelInfo(student, tuple("abc"), (0.5,) * 3, (0.5,) * 3, 1.0)
    network = build_student(facts).network
    arguments = (facts, network) if check is timm_config else (facts,)
    field = f"student.name = {student.name!r}"
    if student.num_distillation_tokens > 1:
        field = f"student.num_distillation_tokens = {student.num_distillation_tokens}"
    with raises(ConfigError, field, "--format", "onnx", "pt2"):
        check(*arguments)


def test_a_timm_network_is_exported_under_its_name(tmp_path):
    student = StudentConfig(name="timm:vit_tiny_patch16_224", image_size=32)
    facts = ModelInfo(student, tuple("abc"), (0.5,) * 3, (0.5,) * 3, 0.9)
    built = build_student(facts).eval()
    save_file(built.network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(timm_config(facts, built.network)))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs(images), built.network(images))


# the command and the card


def test_refusals_come_before_the_work_and_leave_nothing(runs, tmp_path, capsys, monkeypatch):
    def evaluated(*nothing, **neither):
        pytest.fail("the run was evaluated, which comes first")

    monkeypatch.setattr("deit.deploy.export.evaluate", evaluated)

    def refused(code, names, *arguments):
        before = sorted(runs.rglob("*"))
        assert run_command("export", [str(word) for word in arguments], "deit export") == code
        said = capsys.readouterr()
        assert all(name in said.err for name in names), said.err
        assert said.out == ""
        assert sorted(runs.rglob("*")) == before

    run, there = runs / "distilled", tmp_path / "there"
    refused(2, ["--format onx", "onnx?"], run, "--format", "onx")
    refused(2, ["--images 0"], run, "--format", "onnx", "--images", "0")
    able = ["student.name = 'small_convnet'", "--format", "onnx", "pt2"]
    refused(2, able, runs / "convnet", "--format", "timm", "--out", tmp_path / "x")
    refused(4, [f"{runs / 'none'}"], runs / "none", "--format", "timm")
    there.mkdir()
    refused(5, [f"--out {there}", "--force"], run, "--format", "pt2", "--out", there)
    refused(5, [f"--out {run}", "best"], run, "--format", "pt2", "--out", run, "--force")
    (there / "thesis.txt").write_text("years of work")
    mine = ("--out", there, "--force")
    refused(5, [f"--out {there}", "thesis.txt"], run, "--format", "pt2", *mine)


def test_an_export_is_replaced_by_force(runs, tmp_path):
    folder = export(runs / "cropped", tmp_path / "out", name="pt2", images=64)
    export(runs / "cropped", folder, name="timm", force=True)
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }


def test_a_missing_package_is_named(runs, tmp_path, monkeypatch):
    import deit.deploy.export

    monkeypatch.setattr(deit.deploy.export, "find_spec", lambda name: None)
    packages = ("onnx, ", "onnxscript", "onnxruntime")
    with raises(SystemFault, "--format onnx", *packages, "pip install 'deit[export]'"):
        export(runs / "distilled", tmp_path / "out", name="onnx")


SNIPPETS = """
import contextlib, io, json, os, sys
said = {}
for name, snippet, place in json.load(sys.stdin):
    os.chdir(place)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(snippet, name, "exec"), {"__name__": "__main__"})
    said[name] = out.getvalue()
assert not any(name.partition(".")[0] == "deit" for name in sys.modules)
print(json.dumps(said))
"""


def snippets_of(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def said(runs, exports, tmp_path_factory):
    """What the snippets of the cards print, by format and place in the card: in a process that
    knows nothing of us, one for all, since each would import the same libraries."""
    picture = load_splits(load_config(runs / "distilled" / "config.json").data).test.pixels[0]
    asked = []
    for form in FORMATS:
        place = tmp_path_factory.mktemp(form) / "export"
        shutil.copytree(exports["distilled", form], place)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(place / "picture.png")
        asked += [(f"{form} {n}", one, str(place)) for n, one in enumerate(snippets_of(place))]
    hidden = ("PYTHONPATH", "PYTHONSTARTUP")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={**environment, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_tells_and_its_snippets_run(form, runs, exports, said):
    folder = exports["distilled", form]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ")
    assert "| fused | " in card
    assert "`train_deit.py distilled`" in card
    for loader in FORMATS[form].load:
        assert f"| {loader} | " in card
    _, heads = whole_test_set(runs / "distilled")
    answer = str(heads["fused"][0].argmax().item())
    snippets = snippets_of(folder)
    assert snippets
    for number in range(len(snippets)):
        printed = said[f"{form} {number}"].strip()
        assert printed == answer or f"'label': '{answer}'" in printed.split("}")[0]


@pytest.mark.fault("E14")
def test_a_card_names_nobodys_folders_and_shows_class_names_as_they_are(tmp_path):
    home = "/home/ann"
    config = digits().replace(
        data={"source": "folder", "root": f"{home}/data/pets"},
        teacher={"source": (f"{home}/runs/convnet", "checkpoints/other")},
        init={"weights": f"{home}/weights.pth"},
    )
    names = ("a|b", "<script>", "snow_leopard_", "two\nlines")
    facts = ModelInfo(config.student, names, (0.5,) * 3, (0.5,) * 3, 1.0)
    command = f"train_deit.py digits --data.root={home}/data/pets --out '~/runs/pets'"
    about = {
        "command": command,
        "deit": "0",
        "commit": "c",
        "packages": {"torch": "2", "timm": "1"},
        "device_name": "CPU",
        "processes": 1,
        "threads": 1,
        "precision": "no",
    }
    (tmp_path / "environment.json").write_text(json.dumps(about))
    measured = {"top1": 0.5, "top5": 1.0, "calibration_error": 0.1}
    heads = dict.fromkeys(("class", "distillation", "fused"), measured)
    found = {"heads": heads, "teacher": None, "num_samples": 4, "split": "test"}
    card = tmp_path / "README.md"
    told = {"config": config, "facts": facts, "found": found, "verified": [], "licence": None}
    write_card(card, run=tmp_path, name="onnx", **told)
    text = card.read_text()
    assert home not in text
    assert "~" not in text
    assert all(f" {name}" in text for name in ("`pets`", "convnet", "checkpoints/other"))
    assert " weights.pth" in text
    assert "`train_deit.py digits --data.root=pets --out pets`" in text
    assert r"a\|b, \<script\>, snow\_leopard\_, two lines" in text
