"""`deit evaluate --predictions`: path, label and prediction of every image of a split."""

import csv
from pathlib import Path

import pytest

from deit.cli import run_command
from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits
from deit.evaluation.predict import predict
from deit.training.train import train
from tests.helpers.images import folder_data, write_class_folders


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student of 36 images in class folders without splits."""
    folder = tmp_path_factory.mktemp("folder-run")
    write_class_folders(folder / "pictures", images_per_class=12, splits=(".",))
    config = digits().replace(
        data=folder_data(folder / "pictures", test_fraction=0.4),
        student={"depth": 1, "embed_dim": 32, "num_heads": 2},
        teacher={"source": ()},
        loss=LOSS_PRESETS["none"],
        optim={"epochs": 1, "warmup_epochs": 0, "batch_size": 8},
    )
    train(config, folder / "run")
    return folder / "run"


@pytest.mark.parametrize("split", ["test", "validation"])
def test_predictions_name_each_image_as_deit_predict_reads_it(split, run, tmp_path, capsys):
    out = tmp_path / "found.csv"
    arguments = [str(run), "--split", split, "--predictions", str(out)]
    assert run_command("evaluate", arguments, "deit evaluate") == 0
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    text = capsys.readouterr().out
    assert f"wrote {out}: {len(rows)} images" in text
    assert len(rows) >= 3
    paths = [row["image"] for row in rows]
    assert len(set(paths)) == len(paths)
    assert all(Path(row["image"]).parent.name == row["label"] for row in rows)
    predicted = predict(run, paths, top_k=1)["images"]
    for row, image in zip(rows, predicted, strict=True):
        assert row["image"] == image["file"]
        (top,) = image["heads"]["fused"]
        assert row["prediction"] == top["class"]
        assert float(row["probability"]) == pytest.approx(top["probability"], abs=1e-3)
    correct = sum(row["label"] == row["prediction"] for row in rows)
    assert f"{correct} of {len(rows)}" in text
    assert run_command("evaluate", arguments, "deit evaluate") == 5  # the file exists
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("others", [["RUN"], ["--crop", "0.8,1"], ["--plot", "p.png"]])
def test_predictions_of_a_comparison_are_refused(others, run, tmp_path, capsys):
    arguments = [str(run), *(other.replace("RUN", str(run)) for other in others)]
    arguments += ["--predictions", str(tmp_path / "found.csv")]
    assert run_command("evaluate", arguments, "deit evaluate") == 2
    assert "--predictions " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
