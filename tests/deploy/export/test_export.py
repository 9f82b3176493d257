"""Exports are loaded by other tools without our code, with equal outputs."""

import itertools
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

from deit.config.command_choices import EXPORT_PACKAGES
from deit.config.recipes.handwriting import digits
from deit.config.sections.student import StudentConfig
from deit.config.validation import load_config
from deit.core.errors import CheckpointError, ConfigError
from deit.datasets.decoding import decode_square
from deit.datasets.splits import load_splits
from deit.datasets.views import evaluation_views
from deit.deploy.export_formats import FORMATS
from deit.models.adapt_weights import adapt_weights
from deit.models.load_weights import load_weights_from
from deit.models.registry import create_network
from deit.models.saved_student import ModelInfo, load_student, student_from_info
from deit.models.timm_format import timm_config
from deit.models.transformers_format import from_transformers, to_transformers
from deit.models.weight_files import load_weights
from tests.helpers.errors import raises
from tests.helpers.exports import STUDENTS, views_of_test_set

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

NAMES = tuple("abc")


def test_formats_equal_those_of_command_line():
    assert tuple(FORMATS) == tuple(EXPORT_PACKAGES)


def test_export_supported_formats_are_written(exports):
    for name, form in itertools.product((*STUDENTS, "convnet"), FORMATS):
        if name in ("two tokens", "convnet") and form in ("timm", "transformers"):
            with raises(ConfigError, form):
                exports[name, form]
        else:
            assert any(exports[name, form].iterdir())


@pytest.mark.parametrize("name", ["distilled", "plain", "cropped"])
def test_export_timm_folder_loads_in_timm_and_transformers(name, runs, exports):
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
def test_export_transformers_classes_have_equal_heads(name, runs, exports):
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
        outputs = network.eval()(pixel_values=images)
    pairs = {"logits": "class"} if plain else {"logits": "fused", "cls_logits": "class"}
    if not plain:
        pairs["distillation_logits"] = "distillation"
    for output, head in pairs.items():
        torch.testing.assert_close(outputs[output], heads[head], atol=1e-5, rtol=0)
        assert torch.equal(outputs[output].argmax(1), heads[head].argmax(1))


@pytest.mark.parametrize("name", [*STUDENTS, "convnet"])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_export_onnx_any_batch_size_has_equal_logits(name, batch, runs, exports):
    import onnxruntime

    images, heads = views_of_test_set(runs / name)
    session = onnxruntime.InferenceSession(exports[name, "onnx"] / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    two_heads = "fused" in heads
    expected = ["logits", "class_logits", "distillation_logits"] if two_heads else ["logits"]
    assert names == expected
    for start in range(0, 128, batch):
        rows = slice(start, start + batch)
        outputs = session.run(None, {"pixel_values": images[rows].numpy()})
        order = ("fused", "class", "distillation") if two_heads else ("class",)
        for logits, head in zip(outputs, order):
            logits = torch.from_numpy(logits)
            torch.testing.assert_close(logits, heads[head][rows], atol=1e-4, rtol=0)
            assert torch.equal(logits.argmax(1), heads[head][rows].argmax(1))


def test_export_onnx_single_file_has_metadata_and_no_paths(runs, exports, tmp_path):
    import onnxruntime

    copied = tmp_path / "copy.onnx"
    shutil.copy(exports["cropped", "onnx"] / "model.onnx", copied)
    session = onnxruntime.InferenceSession(copied)
    metadata = session.get_modelmeta().custom_metadata_map
    model_info = load_student(runs / "cropped" / "best")[1]
    assert json.loads(metadata["mean"]) == list(model_info.mean)
    assert json.loads(metadata["class_names"]) == list(model_info.class_names)
    assert (metadata["image_size"], metadata["resize_shortest_edge"]) == ("8", "10")
    assert list(session.get_inputs()[0].shape) == ["batch", 3, 8, 8]
    content = copied.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content  # no paths of this machine
    assert b"pkg.torch" not in content


@pytest.mark.parametrize("name", [*STUDENTS, "convnet"])
def test_export_pt2_any_batch_size_has_equal_logits(name, runs, exports):
    images, heads = views_of_test_set(runs / name)
    network = torch.export.load(exports[name, "pt2"] / "model.pt2").module()
    for batch in (1, 5, 64):
        logits = network(images[:batch])[0]
        expected = heads.get("fused", heads["class"])[:batch]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_export_pipeline_of_transformers_predicts_images(runs, exports, tmp_path):
    from transformers import pipeline

    config = load_config(runs / "distilled" / "config.json")
    pixels = load_splits(config.data).test.pixels[:5]
    _, heads = views_of_test_set(runs / "distilled")
    expected = heads["fused"][:5].softmax(1)
    for form in ("timm", "transformers"):
        classify = pipeline("image-classification", model=str(exports["distilled", form]), top_k=10)
        for row, image in enumerate(pixels):
            predictions = classify(Image.fromarray(image.permute(1, 2, 0).numpy()))
            scores = {top["label"]: top["score"] for top in predictions}
            for label in range(10):
                assert scores[str(label)] == pytest.approx(expected[row, label].item(), abs=1e-4)


def test_export_timm_and_transformers_preprocessing_agree(exports, tmp_path):
    """The image is not square and is cropped to 80 %. (They round odd margins differently.)"""
    from transformers import AutoImageProcessor

    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (30, 50, 3), dtype=torch.uint8, generator=generator)
    image = Image.fromarray(noise.numpy())
    network = timm.create_model(f"local-dir:{exports['cropped', 'timm']}", pretrained=True)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    processor = AutoImageProcessor.from_pretrained(exports["cropped", "transformers"])
    by_transformers = processor(image, return_tensors="pt")["pixel_values"][0]
    by_timm = prepare(image)
    assert by_timm.shape == by_transformers.shape == (3, 8, 8)
    assert (by_timm - by_transformers).abs().mean() < 0.02
    student, model_info = load_student(exports["cropped", "timm"].parent / "best")
    image.save(tmp_path / "image.png")
    square = decode_square((tmp_path / "image.png").read_bytes(), "image", 10)
    views = evaluation_views(square[None], size=8, crop_pct=model_info.evaluation_crop)
    expected = ((views - student.mean) / student.std)[0]
    assert (by_timm - expected).abs().mean() < 0.03


@pytest.mark.parametrize("side", [8, 16, 32, 48, 64, 224, 384])
@pytest.mark.parametrize("crop", [1.0, 0.95, 0.9, 0.875, 0.8, 64 / 72])
def test_timm_config_crop_pct_gives_rounded_resize(side, crop):
    model_info = ModelInfo(
        StudentConfig(image_size=side, patch_size=4), NAMES, (0.5,) * 3, (0.5,) * 3, crop
    )
    share = timm_config(model_info, student_from_info(model_info).network)["pretrained_cfg"][
        "crop_pct"
    ]
    assert math.floor(side / share) == round(side / crop)
    if crop == 1:
        assert share == 1


# the names of transformers, there and back


@pytest.mark.parametrize("kind", ["deit_micro", "vit_micro"])
def test_to_transformers_round_trip_is_exact(kind):
    weights = create_network(StudentConfig(name=kind, depth=2), 7).state_dict()
    restored = from_transformers(to_transformers(weights))
    assert restored.keys() == weights.keys()
    assert all(torch.equal(value, restored[name]) for name, value in weights.items())


def test_from_transformers_other_network_raises():
    with raises(CheckpointError, "transformers"):
        from_transformers({"bert.embeddings": torch.zeros(1)})
    weights = to_transformers(create_network(StudentConfig(name="vit_micro"), 7).state_dict())
    with raises(CheckpointError, "vit.pooler.dense.weight"):
        from_transformers({**weights, "vit.pooler.dense.weight": torch.zeros(1)})
    key = "vit.encoder.layer.3.attention.attention.key.weight"
    with raises(CheckpointError, "layer 3", "key"):
        from_transformers({name: value for name, value in weights.items() if name != key})


@pytest.mark.parametrize(
    ("name", "duplicate"),
    [
        ("deit.embeddings.cls_token", "embeddings.cls_token"),
        ("deit.layernorm.bias", "layernorm.bias"),
        ("cls_classifier.weight", "classifier.weight"),
        ("cls_classifier.bias", "deit.cls_classifier.bias"),
        ("deit.encoder.layer.1.output.dense.bias", "encoder.layer.1.output.dense.bias"),
        (
            "deit.encoder.layer.1.attention.attention.key.bias",
            "deit.encoder.layer.1.key.bias",
        ),
    ],
)
def test_from_transformers_two_weights_of_one_name_raise(name, duplicate):
    student = StudentConfig(name="deit_micro", depth=2)
    weights = to_transformers(create_network(student, 7).state_dict())
    with raises(CheckpointError, name, duplicate):
        from_transformers({**weights, duplicate: weights[name]})


@pytest.mark.parametrize("form", ["timm", "transformers"])
@pytest.mark.parametrize("name", ["distilled", "plain"])
def test_load_weights_from_export_restores_student(name, form, runs, exports):
    loaded = load_weights_from(str(exports[name, form]))
    student, model_info = load_student(runs / name / "best")
    renamed = {"name": loaded.student.name, "embed_dim": 48, "depth": 2, "weight_init": "timm"}
    assert loaded.student == replace(model_info.student, **renamed)
    assert loaded.class_names == model_info.class_names
    assert loaded.mean == pytest.approx(model_info.mean)
    network = create_network(model_info.student, 10)
    adapted = adapt_weights(loaded, network, model_info.class_names, digits().init)
    assert adapted.notes == ()
    load_weights(network, adapted.weights, origin="here")
    for key, value in student.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[key])


def test_load_weights_from_save_pretrained_restores_student(runs, exports, tmp_path):
    import transformers

    network = transformers.AutoModelForImageClassification.from_pretrained(
        exports["distilled", "transformers"]
    )
    network.save_pretrained(tmp_path)
    loaded = load_weights_from(str(tmp_path))
    assert loaded.student.num_heads == 4
    student, _ = load_student(runs / "distilled" / "best")
    for key, value in student.network.state_dict().items():
        assert torch.equal(value, loaded.weights[key])


def test_timm_config_timm_network_loads_in_timm(tmp_path):
    student = StudentConfig(name="timm:vit_tiny_patch16_224", image_size=32)
    model_info = ModelInfo(student, tuple("abc"), (0.5,) * 3, (0.5,) * 3, 0.9)
    built = student_from_info(model_info).eval()
    save_file(built.network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(timm_config(model_info, built.network)))
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(by_timm(images), built.network(images))
