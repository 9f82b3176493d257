"""The root scripts on digits: what they write, print and leave alone."""

import json
import re
from pathlib import Path

import pytest

import deit
from deit.core import run_folder
from tests.helpers.commands import QUICK, SMALL, TEN, assert_refused, run_in, tree
from tests.helpers.odd_input.cases import FuzzCase
from tests.helpers.odd_input.run import run_case

TRAIN, EVALUATE = "train_deit.py", "evaluate_deit.py"
CHECKPOINT_FILES = ("model.safetensors", "model.json", "state.json", "manifest.json")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of two epochs and a student of one, trained by the root script."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = run_in(
        folder,
        *(TRAIN, "digits-teacher", "--out=teacher", "--optim.epochs=2", "--optim.batch_size=64"),
        *("--optim.warmup_epochs=0", "--data.train_fraction=0.3"),
    )
    assert teacher.returncode == 0, teacher.stdout + teacher.stderr
    student = run_in(
        folder, TRAIN, "digits", *QUICK, *SMALL, "--out=student", "--teacher.source=teacher"
    )
    assert student.returncode == 0, student.stdout + student.stderr
    assert student.stderr == ""
    return folder


@pytest.mark.parametrize(("name", "epochs"), [("teacher", 2), ("student", 1)])
def test_run_folder_holds_json_and_safetensors_only(runs, name, epochs):
    files = {name for name, content in tree(runs / name).items() if content is not None}
    records = {"config.json", "environment.json", "result.json", "summary.json"}
    records |= {"metrics.jsonl", "state_hashes.jsonl"}
    checkpoints = [folder.name for _, folder in run_folder.list_checkpoints(runs / name)]
    assert len(checkpoints) == min(epochs, 2)
    saved = {f"{folder}/{file}" for folder in ("best", *checkpoints) for file in CHECKPOINT_FILES}
    saved |= {f"{folder}/optimizer.safetensors" for folder in checkpoints}
    assert files == records | saved | {".lock"}
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    environment = json.loads((runs / name / "environment.json").read_text())
    assert environment["command"].startswith(f"{TRAIN} ")
    assert environment["deit"] == deit.__version__


def test_evaluation_reports_every_head(runs, tmp_path):
    before = tree(runs)
    done = run_in(runs, EVALUATE, "student", f"--json={tmp_path / 'results.json'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(runs) == before
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_samples"] == 359
    for head in ("class", "distillation", "fused"):
        assert 0 <= results["heads"][head]["top1"] <= results["heads"][head]["top5"] <= 1
        hits = sum(row["num_samples"] * row[head] for row in results["per_class"].values())
        assert hits / 359 == pytest.approx(results["heads"][head]["top1"])
    assert sum(row["num_samples"] for row in results["per_class"].values()) == 359
    assert tuple(results["per_class"]) == TEN
    assert results["throughput_img_s"] > 0
    assert results["teacher"]["top1"] > 0.2
    assert re.search(r"\bstudent\b.* 359 ", done.stdout)


@pytest.mark.fault("A21")
def test_resuming_with_another_configuration_is_refused(runs):
    before = tree(runs)
    done = run_in(
        runs,
        *(TRAIN, "digits", *QUICK, *SMALL, "--out=student", "--teacher.source=teacher"),
        *("--optim.lr=0.5", "--resume"),
    )
    assert_refused(done, 2, "--resume", "optim.lr: ", "0.001", "0.5", "another folder")
    assert tree(runs) == before


def test_dry_run_writes_nothing(run, tmp_path):
    done = run(TRAIN, "digits-teacher", *QUICK, "--dry-run", "--out=run")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"\bloss \d", done.stdout)  # of the one step
    assert tree(tmp_path) == {}


def run_with_streams(arguments, streams, command_server, folder):
    """Run `deit` with each of the standard streams replaced; return its outcome."""
    folder.chmod(0o777)
    things = folder / "things"
    things.mkdir()
    for name in ("classes.txt", "empty.txt", "notes.txt"):
        (things / name).touch()
    return run_case(
        FuzzCase(0, arguments, (), streams, "utf-8", 80), command_server, things, folder / "try"
    )


@pytest.mark.parametrize("arguments", [(), ("nope",), ("train",)])
def test_error_has_its_exit_code_if_standard_error_is_full(arguments, command_server, tmp_path):
    outcome = run_with_streams(arguments, ("null", "file", "full"), command_server, tmp_path)
    assert (outcome.code, outcome.problem) == (2, "")


@pytest.mark.parametrize("arguments", [("--version",), ("recipes",), ("train", "--help")])
@pytest.mark.parametrize(("stream", "code"), [("broken", 141), ("full", 5), ("closed", 0)])
def test_unwritable_standard_output_has_an_exit_code_and_no_traceback(
    stream, code, arguments, command_server, tmp_path
):
    outcome = run_with_streams(arguments, ("null", stream, "file"), command_server, tmp_path)
    assert (outcome.code, outcome.problem) == (code, "")
    assert ("No space left on device" in outcome.output) == (code == 5)
