"""deit.Run: student, logits, predictions, evaluation, exports and figures of a run folder."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deit
from deit.datasets.decoding import center_square, open_image
from deit.datasets.splits import load_split
from deit.datasets.views import evaluation_views
from deit.evaluation.predict import predict
from tests.helpers.errors import raises
from tests.helpers.images import write_class_folders
from tests.helpers.small_runs import two_epochs
from tests.helpers.trained import trained

CONFIG = two_epochs(run={"eval_every_epochs": 1}, student={"name": "deit_micro"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return deit.load_run(trained(CONFIG, tmp_path_factory.mktemp("api") / "digits"))


@pytest.fixture(scope="module")
def digits():
    """The test images of digits, uint8 [359, 3, 8, 8]."""
    return load_split(CONFIG.data, "test")[1]


def test_run_has_its_configuration_results_and_classes(run):
    assert run.config.student.name == "deit_micro"
    assert run.class_names == tuple("0123456789")
    assert [row["epoch"] for row in run.metrics] == [1, 2]
    assert run.result["best"]["top1"] == max(row["validation"]["fused_top1"] for row in run.metrics)
    assert not run.student.training
    assert "validation top-1" in repr(run)


def test_logits_are_those_of_the_evaluation(run, digits):
    result = run.evaluate("test", teacher="none", verbose=False)
    heads = run.logits(digits.pixels)
    for head in ("class", "distillation", "fused"):
        top1 = (heads[head].argmax(dim=1) == digits.labels).double().mean().item()
        assert top1 == pytest.approx(result.metrics["heads"][head]["top1"])
    batched = run.logits(digits.pixels, batch_size=7)
    assert torch.allclose(batched["fused"], heads["fused"], atol=1e-5)
    assert torch.allclose(heads["fused"], (heads["class"] + heads["distillation"]) / 2, atol=1e-5)


def test_images_are_decoded_batch_by_batch(run, digits):
    """Not all at once: a generator of files may not fit into memory."""
    read, read_before_batch = 0, []

    def images():
        nonlocal read
        for pixels in digits.pixels[:20]:
            read += 1
            yield pixels

    hook = run.student.register_forward_hook(lambda *_: read_before_batch.append(read))
    predictions = run.predict(images(), batch_size=8)
    hook.remove()
    assert read_before_batch == [8, 16, 20]
    expected = run.predict(digits.pixels[:20])
    assert [item.class_name for item in predictions] == [item.class_name for item in expected]
    assert run.predict([]) == []
    assert run.logits([])["fused"].shape == (0, 10)


def top1_by_head(student, batches):
    right, count = {}, 0
    with torch.no_grad():
        for images, labels in batches:
            count += len(labels)
            for head, logits in deit.logits_by_head(student(images)).items():
                right[head] = right.get(head, 0) + int((logits.argmax(dim=1) == labels).sum())
    return {head: correct / count for head, correct in right.items()}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_batches_of_a_split_measure_what_an_evaluation_measures(run, split):
    heads = run.evaluate(split, teacher="none", verbose=False).metrics["heads"]
    expected = {head: values["top1"] for head, values in heads.items()}
    loader = deit.TrainLoader.from_config(run.config)
    for source in (run.config, run, loader):
        batches = deit.evaluation_batches(source, split, batch_size=50)
        assert top1_by_head(run.student, batches) == pytest.approx(expected)


def test_batches_of_files_are_resized_once_and_cropped(tmp_path):
    write_class_folders(tmp_path / "pictures", images_per_class=20)
    data = {"source": "folder", "root": str(tmp_path / "pictures"), "image_size": 32}
    config = deit.recipe(
        "digits",
        augmentation="none",
        data={**data, "storage": "files", "num_workers": 0},
        views={"eval_crop_pct": 0.5},
    )
    batches = list(deit.evaluation_batches(config, batch_size=3))
    _, split = load_split(config.data, "validation")
    for index, image in enumerate(torch.cat([images for images, _ in batches])):
        square = center_square(open_image(split.read(index), split.name(index)), 16)
        assert torch.equal(image, evaluation_views(square[None], size=8, crop_pct=0.5)[0])
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)


@pytest.mark.parametrize(
    ("arguments", "options", "names"),
    [
        (("digits", "tset"), {}, ["split", "did you mean test"]),
        (("digits",), {"batch_size": 0}, ["batch_size"]),
        (("digits",), {"batch_size": 1.5}, ["batch_size"]),
        (("digits",), {"device": "gpu"}, ["use 'cuda'"]),
        ((3,), {}, ["int"]),
    ],
)
def test_batches_of_other_splits_raise(arguments, options, names):
    with raises(deit.errors.ConfigError, *names):
        deit.evaluation_batches(*arguments, **options)


def test_every_form_of_an_image_gives_the_same_prediction(run, digits, tmp_path):
    pixels = digits.pixels[0]
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.save(tmp_path / "digit.png")
    (expected,) = run.predict(pixels)
    forms = [
        pixels[None],
        pixels.float() / 255,
        image,
        image.convert("RGBA"),
        tmp_path / "digit.png",
        str(tmp_path / "digit.png"),
    ]
    for form in forms:
        (prediction,) = run.predict(form)
        assert prediction.class_name == expected.class_name
        assert prediction.probability == pytest.approx(expected.probability, abs=1e-5)
    mixed = run.predict(iter([*forms[1:]]), top_k=3, head="class")
    assert [prediction.file for prediction in mixed[-2:]] == [str(tmp_path / "digit.png")] * 2
    assert all(len(prediction.top) == 3 for prediction in mixed)


def test_predictions_equal_those_of_the_command(run, tmp_path):
    write_class_folders(tmp_path / "pictures", images_per_class=2, size=(31, 17))
    files = sorted((tmp_path / "pictures").rglob("*.png")) or sorted(
        path for path in (tmp_path / "pictures").rglob("*") if path.is_file()
    )
    by_command = {image["file"]: image for image in predict(run, files)["images"]}
    for prediction in run.predict(files):
        (first, *_) = by_command[prediction.file]["heads"]["fused"]
        assert prediction.class_name == first["class"]
        assert prediction.probability == pytest.approx(first["probability"], abs=1e-5)


def test_folders_are_read_and_unreadable_files_skipped(run, tmp_path, capsys):
    folder = tmp_path / "pictures"
    write_class_folders(folder, images_per_class=1)
    readable = run.predict(folder, top_k=1)
    assert len(readable) == len({prediction.file for prediction in readable}) > 1
    (folder / "page.png").write_text("<html>")
    (tmp_path / "empty").mkdir()
    images = [folder, tmp_path / "gone.png", tmp_path / "empty"]
    with raises(deit.errors.DataError, folder / "page.png"):
        run.predict(folder)
    with raises(deit.errors.DataError, images[-1], "no images"):
        run.predict(images[-1])
    capsys.readouterr()
    assert run.predict(images, top_k=1, batch_size=1, skip_unreadable=True) == readable
    warning = capsys.readouterr().err
    assert all(f"{name}: " in warning for name in (folder / "page.png", *images[1:]))
    assert run.predict(images[1:], skip_unreadable=True) == []


def test_folder_of_a_saved_student_predicts(run, digits, tmp_path):
    info = deit.load_student(run.path / "best")[1]
    saved = deit.save_student(
        run.student, tmp_path / "saved", run.class_names, evaluation_crop=info.evaluation_crop
    )
    assert deit.Run(saved).predict(digits.pixels[:3]) == run.predict(digits.pixels[:3])


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 8, 9, dtype=torch.uint8),
        torch.zeros(2, 1, 8, 8),
        torch.zeros(1, 3, 9, 9),
        torch.full((1, 3, 8, 8), -1.0),
        torch.zeros(1, 3, 8, 8, dtype=torch.int64),
        np.zeros((8, 8, 3)),
        3,
    ],
    ids=["not square", "gray", "other size", "normalized", "integers", "numpy", "number"],
)
def test_images_of_other_forms_raise(run, images):
    with raises(deit.errors.ConfigError, "images"):
        run.predict(images)


def test_files_that_are_no_images_raise(run, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with raises(deit.errors.DataError, "text.png"):
        run.predict([tmp_path / "text.png"])
    with raises(deit.errors.DataError, "missing.png"):
        run.predict(tmp_path / "missing.png")
    assert run.predict([]) == []
    with raises(deit.errors.ConfigError, "top_k"):
        run.predict([], top_k=0)


def test_run_is_a_path_for_other_functions(run, digits):
    result = deit.evaluate(run, teacher="none")
    assert result.metrics["num_samples"] == 359
    teacher = deit.load_teacher(run, run.class_names)
    images = digits.pixels[:4].float() / 255
    assert torch.allclose(teacher(images), run.logits(images)["fused"], atol=1e-5)
    assert deit.recipe(run).student == run.config.student


@pytest.fixture(scope="module")
def last_of_two(tmp_path_factory):
    """A run and its checkpoint `last`, whose weights differ from those of `best`."""
    folder = tmp_path_factory.mktemp("last")
    other = trained(CONFIG.replace(run={"seed": 1}), folder / "other")
    run = trained(CONFIG, folder / "run")
    shutil.rmtree(run / "best")
    shutil.copytree(other / "best", run / "best")
    return deit.load_run(run, "last")


def test_functions_use_the_checkpoint_of_a_run(last_of_two, digits, tmp_path):
    (*_, folder) = sorted(last_of_two.path.glob("checkpoint-*"))
    result = deit.evaluate(last_of_two, teacher="none", verbose=False)
    assert result.metrics["checkpoint"] == folder.name
    images = digits.pixels[:4].float() / 255
    teacher = deit.load_teacher(last_of_two, last_of_two.class_names)
    logits = last_of_two.logits(images)["fused"]
    assert torch.allclose(teacher(images), logits, atol=1e-5)
    best = deit.load_run(last_of_two.path).logits(images)["fused"]
    assert not torch.allclose(logits, best, atol=1e-3)
    tuned = last_of_two.finetune(tmp_path / "tuned", epochs=1, verbose=False)
    assert tuned.config.init.weights == str(folder)
    assert deit.recipe(last_of_two) == deit.recipe(last_of_two.path)
    with raises(deit.errors.CheckpointError, folder):
        deit.report(last_of_two, tmp_path / "report")
    page = last_of_two.report(tmp_path / "report", verbose=False)
    assert page.is_file()


def test_run_stays_where_it_was_when_the_working_directory_changes(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.path.parent)
    moved = deit.Run(run.path.name)
    assert moved.path == Path(run.path.name)
    assert repr(moved).startswith(f"Run({run.path.name!r}, 2 epochs")
    monkeypatch.chdir(tmp_path)
    assert moved.path == run.path
    assert moved.result == run.result
    assert deit.load_student(moved.path / "best")[1].class_names == moved.class_names


@pytest.mark.parametrize(
    "call",
    [
        lambda run, out: deit.load_student(run.path / "best"),
        lambda run, out: deit.load_teacher(run, run.class_names),
        lambda run, out: deit.load_run(run).predict(torch.zeros(3, 8, 8)),
        lambda run, out: deit.evaluate(run, resolution=16, cost=True, verbose=False),
        lambda run, out: deit.dry_run(run.config, verbose=False),
        lambda run, out: run.export("timm", out, verbose=False),
    ],
    ids=["load_student", "load_teacher", "predict", "evaluate", "dry_run", "export"],
)
def test_functions_draw_no_random_numbers_of_the_caller(run, tmp_path, call):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    call(run, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)


def test_repr_of_a_folder_without_a_run_says_so(tmp_path):
    assert "no run is in this folder" in repr(deit.Run(tmp_path / "nope"))


def test_paths_with_a_tilde_are_in_the_home_directory(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.path.parent))
    name = f"~/{run.path.name}"
    assert deit.load_run(name).path == run.path
    assert deit.recipe(name) == deit.recipe(run)
    assert deit.load_student(f"{name}/best")[1].class_names == run.class_names
    with raises(deit.errors.ConfigError, run.path):
        deit.train(CONFIG, name)


def test_silent_calls_print_nothing(run, capfd):
    deit.evaluate(run, verbose=False)
    deit.view_sheet(run.config, verbose=False)
    deit.dry_run(run.config, verbose=False)
    assert capfd.readouterr() == ("", "")
    deit.dry_run(run.config)
    assert "dry run" in capfd.readouterr().out


def test_run_exports_and_writes_a_report(run, tmp_path, capfd):
    folder = run.export("timm", tmp_path / "timm", verbose=False)
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 10
    page = run.report(tmp_path / "report", verbose=False)
    assert page.read_text().startswith("<!doctype html>")
    assert capfd.readouterr() == ("", "")
    with raises(deit.errors.ConfigError, "format"):
        run.export("tim", tmp_path / "other")
    with raises(deit.errors.ConfigError, "paths", "at least one"):
        deit.report([], tmp_path / "none")


def test_notebook_shows_heads_and_curves(run, tmp_path):
    page = run._repr_html_()
    best = run.result["best"]
    names = {"class": "class head", "distillation": "distillation head", "fused": "fused"}
    for head, name in names.items():
        assert f"<td>{name}</td><td>{100 * best[f'{head}_top1']:.1f}</td>" in page
    assert re.search(r'<img [^>]*src="data:image/png;base64,[\w+/]{1000,}', page)
    assert "<script" not in page


def test_figures_are_matplotlib_figures(run, digits):
    figure = run.plot_curves()
    _, accuracy = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in accuracy.get_lines()}
    expected = [100 * row["validation"]["fused_top1"] for row in run.metrics]
    assert list(lines["fused"]) == pytest.approx(expected)
    attention = run.plot_attention(digits.pixels[:3])
    assert len(attention.axes) == 3 * 3  # the image, and it under the map of each token
    for drawn in (figure, attention):
        assert drawn._repr_png_().startswith(b"\x89PNG")
    (attention,) = run.plot_attention(digits.pixels[:3], max_images=1).axes[:1]
    assert "image 0" in attention.get_title(loc="left")
    with raises(deit.errors.ConfigError, "images"):
        run.plot_attention([])


def test_unfinished_run_says_so(run, tmp_path):
    folder = tmp_path / "unfinished"
    folder.mkdir()
    for name in ("config.json", "environment.json", "metrics.jsonl"):
        (folder / name).write_bytes((run.path / name).read_bytes())
    unfinished = deit.load_run(folder)
    assert "not finished" in repr(unfinished)
    assert "not finished" in unfinished._repr_html_()
    with raises(deit.errors.CheckpointError, folder):
        unfinished.student  # noqa: B018
    (folder / "metrics.jsonl").write_text("")
    with raises(deit.errors.CheckpointError, folder):
        unfinished.plot_curves()


def test_folders_that_are_no_runs_raise(tmp_path, run):
    with raises(deit.errors.CheckpointError, tmp_path):
        deit.load_run(tmp_path)
    with raises(deit.errors.ConfigError, "checkpoint", "bets", "best"):
        deit.load_run(run, "bets")
    with raises(deit.errors.ConfigError, "split", "tset", "test"):
        run.evaluate("tset")
