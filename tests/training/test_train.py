"""Whole runs in one process: run folder, resuming, checks before the first step."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes import RECIPES, recipe_of_path
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.validation import validate
from deit.core import fault_injection, run_folder, run_log
from deit.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericsError,
    SystemFault,
)
from deit.core.filesystem import clean_leftovers, replace_dir
from deit.evaluation.evaluate import evaluate
from deit.models.saved_student import load_student
from deit.training import save
from deit.training.resume import read_state
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.trained import trained

pytest.importorskip("sklearn")
FEW = {"train_fraction": 0.2}
ALL = {"train_fraction": 1.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    return trained(digits_teacher().replace(optim={"epochs": 3}), folder)


def small(teacher, **optim):
    """Return the configuration of a small digits student."""
    return digits().replace(
        data=FEW,
        student={"depth": 1, "embed_dim": 16, "num_heads": 2, "drop_path": 0.1},
        views={"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
        teacher={"source": str(teacher)},
        optim={"epochs": 4, "batch_size": 64, "warmup_epochs": 1, "ema_epochs": 1, **optim},
        run={"eval_every_epochs": 1},
    )


def tensors(folder):
    """Return every tensor of a checkpoint by file and name."""
    return {
        f"{file.name}/{name}": value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def test_run_folder_holds_only_json_and_safetensors(teacher, tmp_path, monkeypatch):
    out = tmp_path / "run"
    # Every epoch ties, and a tie goes to the later one: best is the last epoch.
    monkeypatch.setattr(save, "selection_metric", lambda validation: 0.5)
    train(small(teacher), out, command="train_deit.py digits")
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    common_files = {"model.json", "model.safetensors", "state.json", "manifest.json"}
    checkpoint_names = [folder.name for _, folder in run_folder.list_checkpoints(out)]
    assert len(checkpoint_names) == 2
    assert files == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "state_hashes.jsonl",
        "result.json",
        "summary.json",
        ".lock",
        *(
            f"{subfolder}/{name}"
            for subfolder in ("best", *checkpoint_names)
            for name in common_files
        ),
        *(f"{subfolder}/average.safetensors" for subfolder in checkpoint_names),
        *(f"{subfolder}/optimizer.safetensors" for subfolder in checkpoint_names),
    }
    rows = run_log.read(out / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "label_loss", "distillation_loss", "agreement", "lr"} <= rows[-1][
        "train"
    ].keys()
    assert {"class_top1", "distillation_top1", "fused_top1", "average_fused_top1"} <= rows[-1][
        "validation"
    ].keys()
    environment = json.loads((out / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["command"] == "train_deit.py digits"
    # With a weight average, best has the average of its epoch (here the last); last has both.
    assert read_state(out / "best").epoch == 4
    best, last = tensors(out / "best"), tensors(run_folder.latest_checkpoint(out))
    name = "head.weight"
    assert torch.equal(best[f"model.safetensors/{name}"], last[f"average.safetensors/{name}"])
    assert not torch.equal(best[f"model.safetensors/{name}"], last[f"model.safetensors/{name}"])
    assert not any("teacher" in name for name in last)


@pytest.mark.fault("A21")
def test_resume_with_other_settings_or_data_is_refused(teacher, tmp_path):
    out = tmp_path / "run"
    config = small(teacher, epochs=2)
    train(config, out)
    with raises(ConfigError, "optim.lr"):
        train(config.replace(optim={"lr": 0.5}), out, resume=True)
    result = json.loads((out / "result.json").read_text())
    (out / "result.json").write_text(json.dumps({**result, "fingerprint": "other"}))
    with raises(DataError, out, "data.source"):
        train(config, out, resume=True)
    (out / "result.json").write_text("{}")
    with raises(CheckpointError, "result.json"):
        train(config, out, resume=True)
    (out / "result.json").write_text("[")
    with raises(CheckpointError, "result.json"):
        train(config, out, resume=True)


@pytest.mark.fault("A25")
def test_resume_of_a_folder_without_a_run_changes_nothing(teacher, tmp_path):
    for name in (".new-x", ".old-y", "y", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    with raises(ConfigError, f"out = {tmp_path}", "config.json"):
        train(small(teacher), tmp_path, resume=True)
    (tmp_path / "config.json").write_text("{")
    with raises(ConfigError, tmp_path / "config.json"):
        train(small(teacher), tmp_path, resume=True)
    assert len(list(tmp_path.rglob("mine"))) == 4


@pytest.mark.fault("A24", "D15")
def test_truncated_line_of_metrics_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run_log.append(path, {"epoch": 1, "loss": float("nan")})
    with path.open("a") as file:
        file.write('{"epoch": 2, "lo')
    assert run_log.read(path) == [{"epoch": 1, "loss": None}]


def test_environment_does_not_override_gradient_accumulation(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "64")
    train(small(teacher, epochs=2), tmp_path / "run")
    assert run_log.read(tmp_path / "run" / "metrics.jsonl")[-1]["train"]["lr"] > 0


def test_images_too_small_for_the_network_are_refused(tmp_path):
    config = digits_teacher().replace(student={"name": "timm:dla46_c"})
    with raises(ConfigError, "student.image_size", "timm:dla46_c"):
        train(config, tmp_path / "run")


def test_out_with_other_files_is_refused_unchanged(teacher, tmp_path):
    (tmp_path / "precious.txt").write_text("do not lose")
    with raises(ConfigError, f"out = {tmp_path}", "config.json"):
        train(small(teacher), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_dry_run_writes_nothing(teacher, tmp_path):
    train(small(teacher), tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run").exists()


def test_large_patches_warn_about_too_few_tokens(teacher, tmp_path, capsys):
    config = small(teacher).replace(student={"patch_size": 4})
    train(config, tmp_path / "run", dry_run=True)
    assert "student.patch_size" in capsys.readouterr().err
    train(small(teacher), tmp_path / "run", dry_run=True)
    assert "student.patch_size" not in capsys.readouterr().err


def test_batch_arithmetic_is_logged_before_the_first_step(teacher, tmp_path, capsys):
    config = small(teacher).replace(
        data=ALL, optim={"grad_accum_steps": 2, "lr_base_batch_size": 512}
    )
    fault_injection.install_faults("loss:1:nan")  # stops in the first step, before it is logged
    try:
        with pytest.raises(NumericsError):
            train(config, tmp_path / "run", dry_run=True)
    finally:
        fault_injection.install_faults(None)
    output = capsys.readouterr().out
    assert re.search(r"\b64 = 1\b\D+\b2\b\D+\b32\b", output)
    # Steps, views, distinct images and all images of an epoch.
    assert re.search(r"\b20\b\D+\b1280\b\D+\b1280\b\D+\b1295\b", output)
    assert "0.000125 = 0.001 x 64 / 512" in output
    assert re.search(rf"{re.escape(str(teacher))}\b.*\b10\.5 %", output)


def test_repeated_augmentation_logs_the_images_of_an_epoch(teacher, tmp_path, capsys):
    config = small(teacher).replace(data=ALL, views={"aug_repeats": 3})
    train(config, tmp_path / "run", dry_run=True)
    output = capsys.readouterr().out
    assert re.search(r"\b20\b\D+\b1280\b\D+\b440\b\D+\b1295\b", output)
    assert re.search(r"\b3 views\b", output)


def test_teacher_near_chance_is_refused_unless_allowed(tmp_path):
    train(
        digits_teacher().replace(
            data=FEW,
            optim={"epochs": 1, "lr": 1e-9, "min_lr": 0, "warmup_lr": 0, "warmup_epochs": 0},
        ),
        tmp_path / "weak",
    )
    config = small(tmp_path / "weak", epochs=2)
    with raises(DataError, tmp_path / "weak", "teacher.allow_near_chance"):
        train(config, tmp_path / "run")
    result = train(config.replace(teacher={"allow_near_chance": True}), tmp_path / "other")
    assert result["epochs"] == 2


@pytest.mark.fault("B19")
def test_interrupted_save_leaves_a_complete_checkpoint(tmp_path):
    target = tmp_path / "best"
    replace_dir(target, lambda folder: (folder / "a").write_text("old"))

    def write_half(folder):
        (folder / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with raises(SystemFault, target, "No space left on device"):
        replace_dir(target, write_half)
    assert (target / "a").read_text() == "old"
    # After a kill between the two renames, the old folder is restored when the run is opened.
    target.rename(tmp_path / ".deit-old-best")
    clean_leftovers(tmp_path)
    assert (target / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"]


def test_evaluation_counts_each_test_image_once(teacher):
    metrics = evaluate(teacher).metrics
    assert metrics["num_samples"] == 359
    assert sum(row["num_samples"] for row in metrics["per_class"].values()) == 359
    assert sum(map(sum, metrics["confusion"])) == 359
    correct = sum(metrics["confusion"][i][i] for i in range(10))
    assert metrics["heads"]["class"]["top1"] == pytest.approx(correct / 359)
    assert metrics["heads"]["fused"] == metrics["heads"]["class"]
    assert metrics["heads"]["distillation"] is None
    json.dumps(metrics, allow_nan=False)


def test_evaluation_matches_the_accuracy_of_the_saved_student(teacher, tmp_path):
    from deit.core.types import logits_by_head
    from deit.datasets.splits import load_splits

    out = tmp_path / "run"
    config = small(teacher, epochs=2)
    train(config, out)
    metrics = evaluate(out).metrics
    student, _ = load_student(out / "best")
    test = load_splits(config.data).test
    with torch.no_grad():
        heads = logits_by_head(student.eval()(test.pixels.float() / 255))
    for name, logits in heads.items():
        expected = (logits.argmax(dim=1) == test.labels).double().mean().item()
        assert metrics["heads"][name]["top1"] == pytest.approx(expected)
    predictions = {name: logits.argmax(dim=1) for name, logits in heads.items()}
    agreement = (predictions["class"] == predictions["distillation"]).double().mean().item()
    assert metrics["agreement"]["class"]["distillation"] == pytest.approx(agreement)
    assert metrics["teacher"]["top1"] == pytest.approx(
        evaluate(teacher).metrics["heads"]["class"]["top1"]
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid(name):
    config = RECIPES[name]()
    if name.startswith("transfer"):
        with raises(ConfigError, "init.weights"):
            validate(config)
        config = config.replace(init={"weights": "weights.pth"})
    assert validate(config)
    assert RECIPES[name].__doc__
    for source in config.teacher.source:
        if source.startswith("checkpoints/"):
            teacher = RECIPES[recipe_of_path(source)]()
            assert teacher.loss == LOSS_PRESETS["none"]
            assert teacher.data.source == config.data.source
    if recipe_of_path(config.init.weights) is not None:
        base = RECIPES[recipe_of_path(config.init.weights)]()
        assert base.student.name == config.student.name
        assert base.data.source == config.data.source


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if not name.startswith(("imagenet", "transfer"))]
)
def test_every_recipe_takes_a_step(name, tmp_path):
    """On a few synthetic images of the recipe's size, with an untrained teacher."""
    from tests.helpers.images import write_class_folders

    config = RECIPES[name]()
    size = (config.data.image_size, config.data.image_size)
    write_class_folders(tmp_path / "data", images_per_class=12, size=size)
    stub = tmp_path / "stub.py"
    stub.write_text(
        "import torch\n"
        "def teacher():\n"
        "    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
    )
    sources = (f"{stub}:teacher",) * len(config.teacher.source)
    changes = {"teacher": {"source": sources, "allow_near_chance": True}}
    root, unseen = str(tmp_path / "data"), ("bee",) if config.data.unseen_classes else ()
    config = config.replace(
        data={"source": "folder", "root": root, "unseen_classes": unseen, "train_fraction": 1.0},
        optim={"batch_size": 4, "lr": 1e-3, "lr_base_batch_size": None},
        # Random weights, because the run with the initial weights does not exist.
        init={"weights": None, "head": "keep"},
        **(changes if config.loss.kind != "none" else {}),
    )
    train(config, tmp_path / "run", dry_run=True)


def test_best_of_tied_epochs_is_the_latest(teacher, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.9, 0.7])
    monkeypatch.setattr(save, "selection_metric", lambda validation: next(accuracies))
    result = train(small(teacher, ema_epochs=0), tmp_path / "run")
    assert result["best"]["epoch"] == 3
    assert read_state(tmp_path / "run" / "best").epoch == 3
    steps_per_epoch = result["step"] // 4
    assert [
        step // steps_per_epoch for step, _ in run_folder.list_checkpoints(tmp_path / "run")
    ] == [4, 3]


def test_ensemble_accuracy_is_logged_per_teacher_and_combined(teacher, tmp_path, capsys):
    second_teacher = tmp_path / "other"
    train(
        digits_teacher().replace(optim={"epochs": 1, "warmup_epochs": 0}, run={"seed": 1}),
        second_teacher,
    )
    config = small(teacher, epochs=2, ema_epochs=0).replace(
        teacher={"source": (str(teacher), str(second_teacher)), "weights": (0.6, 0.4)},
    )
    capsys.readouterr()
    train(config, tmp_path / "run")
    output = capsys.readouterr().out
    assert re.search(r"^\D*\b143\b\D*$", output, re.MULTILINE)
    rows = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    first, second, ensemble, pair = ([cell.strip() for cell in row] for row in rows)
    assert first[0].startswith("1: ")
    assert first[0].endswith(str(teacher))
    assert second[0].startswith("2: ")
    assert second[0].endswith(str(second_teacher))
    assert [len(row) for row in (first, second, ensemble, pair)] == [2, 2, 2, 3]
    assert all(
        0 <= float(cell) <= 100 for row in (first, second, ensemble, pair) for cell in row[1:]
    )
    metrics = evaluate(tmp_path / "run").metrics
    assert len(metrics["teachers"]) == 2
    single_metrics = [
        evaluate(tmp_path / "run", teacher=str(folder)).metrics["teacher"]
        for folder in (teacher, second_teacher)
    ]
    assert list(metrics["teachers"].values()) == single_metrics
    ensemble_metrics = evaluate(tmp_path / "run", teacher=f"{teacher},{second_teacher}").metrics[
        "teacher"
    ]
    assert ensemble_metrics["top1"] >= min(metrics["top1"] for metrics in single_metrics)


WITHOUT_TOKEN = {
    "small_convnet": {"image_size": 8},
    "timm:mixer_s16_224": {"image_size": 16},
    "vit_micro": {"image_size": 8, "patch_size": 2, "depth": 2, "weight_init": "scaled"},
}


@pytest.mark.parametrize("name", WITHOUT_TOKEN)
def test_usi_trains_backbones_without_a_distillation_token(name, teacher, tmp_path):
    config = digits_teacher().replace(
        data={"image_size": 8},
        student={"name": name, **WITHOUT_TOKEN[name]},
        views={"mixup_alpha": 0.8},
        teacher={"source": (str(teacher),)},
        loss=LOSS_PRESETS["usi"],
        optim={"epochs": 4, "warmup_epochs": 1, "lr": 1e-3},
    )
    if name == "small_convnet":  # it needs fewer images
        few = {"train_fraction": 0.3}
        config = config.replace(data=few, optim={"batch_size": 32, "lr": 2e-3})
    if "mixer" in name:
        train(config, tmp_path / "run", dry_run=True)
        return
    train(config, tmp_path / "run")
    assert evaluate(tmp_path / "run").metrics["heads"]["class"]["top1"] > 0.4
