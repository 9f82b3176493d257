"""Exports are loaded by other tools without our code, with equal outputs."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from deit.config.choices import EXPORT_PACKAGES
from deit.config.recipes.handwriting import digits
from deit.config.student_section import StudentConfig
from deit.config.validation import load_config
from deit.core.errors import CheckpointError
from deit.datasets.decoding import decode_square
from deit.datasets.splits import load_splits
from deit.datasets.views import evaluation_views
from deit.deploy.formats import FORMATS
from deit.models.adapt_weights import adapt_weights
from deit.models.load_weights import load_weights_from
from deit.models.networks import create_network
from deit.models.saved import ModelInfo, build_student, load_student
from deit.models.timm_format import timm_config
from deit.models.transformers_format import from_transformers, to_transformers
from deit.models.weight_files import load_weights
from tests.helpers.errors import raises
from tests.helpers.exports import STUDENTS, views_of_test_set

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

NAMES = tuple("abc")


def test_formats_are_those_of_the_command_line():
    assert tuple(FORMATS) == tuple(EXPORT_PACKAGES)


def test_what_can_be_exported_is(exports):
    everything = {(name, form) for name in (*STUDENTS, "convnet") for form in FORMATS}
    refused = {(n, f) for n in ("two tokens", "convnet") for f in ("timm", "transformers")}
    assert set(exports) == everything - refused


@pytest.mark.parametrize("name", ["distilled", "plain", "cropped"])
def test_timm_and_transformers_load_one_folder_with_equal_answers(name, runs, exports):
    from transformers import AutoModelForImageClassification

    images, heads = views_of_test_set(runs / name)
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

    images, heads = views_of_test_set(runs / name)
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

    images, heads = views_of_test_set(runs / name)
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

    copy = tmp_path / "copy.onnx"
    shutil.copy(exports["cropped", "onnx"] / "model.onnx", copy)
    session = onnxruntime.InferenceSession(copy)
    about = session.get_modelmeta().custom_metadata_map
    facts = load_student(runs / "cropped" / "best")[1]
    assert json.loads(about["mean"]) == list(facts.mean)
    assert json.loads(about["class_names"]) == list(facts.class_names)
    assert (about["image_size"], about["resize_shortest_edge"]) == ("8", "10")
    assert list(session.get_inputs()[0].shape) == ["batch", 3, 8, 8]
    content = copy.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content  # nobody's own paths
    assert b"pkg.torch" not in content


@pytest.mark.parametrize("name", [*STUDENTS, "convnet"])
def test_torch_export_answers_the_same(name, runs, exports):
    images, heads = views_of_test_set(runs / name)
    network = torch.export.load(exports[name, "pt2"] / "model.pt2").module()
    for number in (1, 5, 64):
        logits = network(images[:number])[0]
        expected = heads.get("fused", heads["class"])[:number]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_pipeline_of_transformers_answers_on_pictures(runs, exports, tmp_path):
    from transformers import pipeline

    config = load_config(runs / "distilled" / "config.json")
    pixels = load_splits(config.data).test.pixels[:5]
    _, heads = views_of_test_set(runs / "distilled")
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
