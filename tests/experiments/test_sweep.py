"""The command `deit sweep`: training, shared target stores, resumption and results."""

import csv
import json
import re
import shutil
from unittest.mock import MagicMock

import pytest

from deit.analysis.report import report
from deit.core import run_folder, run_log
from deit.core.errors import CheckpointError
from deit.viz import charts
from tests.helpers.commands import runs_over
from tests.helpers.json_edits import edits, error_of
from tests.helpers.sweeps import SMALL, result, write

pytest.importorskip("sklearn")


def states(out):
    """Return the time at which each run of a sweep finished, by its folder name."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}


def lines_of(out):
    return list(csv.DictReader((out / "results.csv").read_text().splitlines(keepends=True)))


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory, command_server):
    """Return the folder and command of a sweep of two temperatures and two seeds."""
    workdir = tmp_path_factory.mktemp("sweep")
    write(workdir / "heat.json", grid={"loss.temperature": [1, 3]}, seeds=[0, 1])
    done = command_server.run("sweep", "heat.json", "--out", "out", "--parallel", "2", cwd=workdir)
    assert done.code == 0, done.err
    return workdir, done


def test_sweep_trains_and_reports_every_point_and_seed(finished_sweep):
    workdir, done = finished_sweep
    results = result(workdir / "out")
    assert list(results["rows"]) == ["teacher", "temperature 1", "temperature 3"]
    assert results["fields"] == ["loss.temperature"]
    assert results["rows"]["teacher"]["teacher"]
    assert not results["rows"]["teacher"]["values"]
    row = results["rows"]["temperature 3"]
    assert (row["seeds"], row["failed"], row["values"]) == ([0, 1], {}, {"loss.temperature": "3"})
    lines = lines_of(workdir / "out")
    assert len(lines) == 4
    for line in lines:
        recorded = result_of(line["folder"], workdir)
        assert float(line["validation_top1_percent"]) == pytest.approx(
            100 * recorded["best"]["top1"], abs=1e-4
        )
        assert float(line["seconds"]) == pytest.approx(recorded["seconds"], abs=1e-3)
        row = results["rows"][line["point"]]
        index = row["seeds"].index(int(line["seed"]))
        assert float(line["fused_top1_percent"]) == pytest.approx(
            100 * row["top1"][index]["fused"], abs=1e-4
        )
    first = next((workdir / "out" / "runs").glob("*/environment.json"))
    assert results["environment"]["packages"] == json.loads(first.read_text())["packages"]
    text = (workdir / "out" / "results.md").read_text()
    assert "| 3 |" in text
    assert results["command"] in text
    assert (workdir / "out" / "loss.temperature.png").read_bytes()[:4] == b"\x89PNG"
    assert runs_over(done.out)[-1] == (5, 5)  # with the teacher
    for rank, name in enumerate(results["best"], start=1):
        assert f"{rank}. {name}" in done.out


def result_of(folder, workdir):
    return run_folder.read_result(workdir / folder)


def test_report_names_the_file_of_invalid_results(finished_sweep, tmp_path, monkeypatch):
    """Each edit of results.json either makes a page or raises an error with the file's name."""
    axes = MagicMock()
    axes.get_legend_handles_labels.return_value = ([], [])
    monkeypatch.setattr(charts, "chart", lambda draw, *_, **__: (draw(axes) and "") or "")
    good = result(finished_sweep[0] / "out")
    errors = {}
    for index, (what, content) in enumerate([("nothing", good), *edits(good, depth=3)]):
        sweep = tmp_path / str(index)
        sweep.mkdir()
        (sweep / "sweep.json").write_text("{}")
        (sweep / "results.json").write_text(json.dumps(content))
        errors[what] = error_of(report, [sweep], sweep / "report")
    assert errors["nothing"] is None
    named = {what: error for what, error in errors.items() if error is not None}
    assert 50 < len(named) < len(errors) - 50
    for what, error in named.items():
        assert isinstance(error, CheckpointError), (what, error)
        assert "results.json" in str(error), what


def test_sweep_runs_of_a_seed_share_a_target_store(finished_sweep):
    workdir, _ = finished_sweep
    stores = {}
    for path in (workdir / "out" / "runs").glob("*/config.json"):
        config = json.loads(path.read_text())
        (store,) = config["teacher"]["target_stores"]
        stores.setdefault(config["run"]["seed"], set()).add(store)
    assert [len(paths) for paths in stores.values()] == [1, 1]
    assert stores[0] != stores[1]
    assert len(list((workdir / "out" / "targets").iterdir())) == 2


def test_sweep_run_is_bit_identical_to_a_single_run(finished_sweep, command_server):
    workdir, _ = finished_sweep
    inside = next((workdir / "out" / "runs").glob("temperature-3-seed-1-*/config.json"))
    done = command_server.run("train", inside, "--out", workdir / "alone", cwd=workdir)
    assert done.code == 0, done.err
    chain = (inside.parent / run_log.HASH_CHAIN).read_bytes()
    assert (workdir / "alone" / run_log.HASH_CHAIN).read_bytes() == chain


def test_sweep_finished_runs_are_kept_under_new_names(finished_sweep, command_server, tmp_path):
    workdir = shutil.copytree(finished_sweep[0], tmp_path / "copy")
    before = states(workdir / "out")
    done = command_server.run("sweep", "heat.json", "--out", "out", cwd=workdir)
    assert done.code == 0, done.err
    assert re.search(r"^4[^\d\n]+4\b", done.out, re.MULTILINE)  # are finished
    assert states(workdir / "out") == before
    # The same configurations under other names, and one more.
    changed = {"loss.distillation_weight": [0.5, 0.7], "loss.temperature": [3]}
    file = (workdir / "heat.json").read_text()
    write(workdir / "heat.json", grid=changed, seeds=[1])
    listed = command_server.run("sweep", "heat.json", "--out", "out", "--dry-run", cwd=workdir)
    assert re.search(r"^2[^\d\n]+1\b", listed.out, re.MULTILINE)  # is finished
    assert re.search(r"\bteacher\b.*needed first.*finished", listed.out)
    assert re.search(r"stored targets.*(finished|to write)", listed.out)
    assert re.search(r"\brun\b.*\bto train\b", listed.out)
    assert states(workdir / "out") == before
    done = command_server.run("sweep", "heat.json", "--out", "out", cwd=workdir)
    (workdir / "heat.json").write_text(file)
    assert done.code == 0, done.err
    assert re.search(r"^1[^\d\n]+2\b", done.out, re.MULTILINE)  # are finished
    now = states(workdir / "out")
    assert before.items() < now.items()
    assert len(now) == 5
    assert list(result(workdir / "out")["rows"])[1:] == [
        *("distillation weight 0.5, temperature 3", "distillation weight 0.7, temperature 3")
    ]


def test_sweep_teacher_of_another_split_is_refused(finished_sweep, command_server):
    workdir, _ = finished_sweep
    arguments = ("--data.split_seed", "5")
    done = command_server.run("sweep", "heat.json", "--out", "out", *arguments, cwd=workdir)
    assert done.code == 2, done.err
    assert re.search(r"out/teacher\b.*\bdata\.split_seed\b.*\bNone\b.*\b5\b", done.err)


def test_sweep_finished_run_of_other_images_or_teacher_is_refused(
    finished_sweep, command_server, tmp_path
):
    workdir, _ = finished_sweep
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    heat = ("sweep", "heat.json", "--out", "out")
    assert command_server.run(*heat, cwd=tmp_path).code == 0
    first = result(tmp_path / "out")["rows"]["temperature 1"]
    (run,) = (tmp_path / "out" / "runs").glob("temperature-3-seed-1-????????????/result.json")
    before = json.loads(run.read_text())
    run.write_text(json.dumps({**before, "fingerprint": "0" * 64}))
    done = command_server.run(*heat, cwd=tmp_path)
    assert done.code == 3, done.err
    assert run.parent.name in done.err
    assert "digits" in done.err  # the source of its images
    assert "out/teacher" not in done.err
    run.write_text(json.dumps({**before, "teachers": ["0" * 64]}))
    done = command_server.run(*heat, cwd=tmp_path)
    assert done.code == 3, done.err
    assert run.parent.name in done.err
    assert "out/teacher" in done.err
    run.write_text(json.dumps(before))
    # A missing teacher is not trained again, since no run needs it. Its row is missing, but the
    # cached agreement with it is kept.
    shutil.rmtree(tmp_path / "out" / "teacher")
    done = command_server.run(*heat, cwd=tmp_path)
    assert done.code == 0, done.err
    assert not (tmp_path / "out" / "teacher").exists()
    assert list(result(tmp_path / "out")["rows"]) == ["temperature 1", "temperature 3"]
    again = result(tmp_path / "out")["rows"]["temperature 1"]
    assert (again["top1"], again["agreement"]) == (first["top1"], first["agreement"])


def test_sweep_evaluates_with_a_teacher_from_code(command_server, tmp_path):
    """Naming a teacher on the command line of a sweep allows its code to run."""
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Ink(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        "        return torch.nn.functional.one_hot(images.sum((1, 2, 3)).long() % 10, 10) * 9.0\n"
        "def teacher():\n    return Ink()\n"
    )
    write(tmp_path / "s.json", grid={"loss.temperature": [1]})
    arguments = (
        "--teacher.source",
        "mine.py:teacher",
        "--teacher.allow_near_chance",
        "--out",
        "out",
    )
    done = command_server.run("sweep", "s.json", *arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    (agreement,) = result(tmp_path / "out")["rows"]["temperature 1"]["agreement"]
    assert 0 <= agreement < 1
    assert "mine.py:teacher" not in done.err  # no warning of a skipped teacher


def test_sweep_reports_a_failed_evaluation(finished_sweep, command_server, tmp_path):
    workdir, _ = finished_sweep
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    (run,) = (tmp_path / "out" / "runs").glob("temperature-3-seed-1-????????????")
    run.with_name(f"{run.name}.evaluation.json").unlink()
    (run / "best" / "model.safetensors").write_bytes(b"cut")
    done = command_server.run("sweep", "heat.json", "--out", "out", cwd=tmp_path)
    assert done.code == 4
    row = result(tmp_path / "out")["rows"]["temperature 3"]
    assert row["seeds"] == [0]
    assert run_folder.read_result(run) is not None
    for text in (row["failed"]["1"], done.err):
        assert f"{run.name}/best/model.safetensors" in text


def test_sweep_moved_folder_resumes_with_its_stores(finished_sweep, command_server, tmp_path):
    """The configuration of an unfinished run has the path of the store before the move."""
    workdir, _ = finished_sweep
    shutil.copytree(workdir, tmp_path / "moved", dirs_exist_ok=True)
    out = tmp_path / "moved" / "out"
    (run,) = (out / "runs").glob("temperature-3-seed-1-????????????")
    chain = (run / run_log.HASH_CHAIN).read_bytes()
    for name in ("result.json", "summary.json"):
        (run / name).unlink()
    shutil.rmtree(run / "best")
    shutil.rmtree(
        max((path for _, path in run_folder.list_checkpoints(run)), key=lambda path: path.name)
    )
    config = json.loads((run / "config.json").read_text())
    config["teacher"]["target_stores"] = [
        f"/gone/{target}" for target in config["teacher"]["target_stores"]
    ]
    (run / "config.json").write_text(json.dumps(config))
    done = command_server.run("sweep", "heat.json", "--out", "out", cwd=tmp_path / "moved")
    assert done.code == 0, done.err
    assert (run / run_log.HASH_CHAIN).read_bytes() == chain
    (store,) = json.loads((run / "config.json").read_text())["teacher"]["target_stores"]
    assert (tmp_path / "moved" / store).is_dir()


def test_sweep_store_content_without_the_needed_records_is_refused(command_server, tmp_path):
    grid = {"loss.temperature": [1, 3]}
    student = {**SMALL["student"], "name": "vit_micro"}
    soft = {**SMALL, "student": student, "loss": "class-soft"}
    file = write(tmp_path / "s.json", grid=grid, content="hard", set=soft)
    done = command_server.run("sweep", file, "--out", tmp_path / "out")
    assert done.code == 2, done.err
    for name in ("loss.kind 'soft'", "content full"):
        assert name in done.err
    assert not (tmp_path / "out").exists()


def test_sweep_folder_with_other_content_is_refused(finished_sweep, command_server, tmp_path):
    workdir, _ = finished_sweep
    write(tmp_path / "other.json", grid={"loss.temperature": [1, 3]})
    done = command_server.run("sweep", tmp_path / "other.json", "--out", workdir / "out")
    assert done.code == 2, done.err
    assert f"--out {workdir / 'out'}" in done.err
    assert re.search(r"\bheat\b.*\bother\b", done.err)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    done = command_server.run("sweep", tmp_path / "other.json", "--out", tmp_path / "full")
    assert done.code == 2, done.err
    assert f"--out {tmp_path / 'full'}" in done.err
    assert "sweep.json" in done.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_sweep_failed_run_stops_no_other_and_is_retried_by_the_next_command(
    command_server, tmp_path
):
    runs = {"good": {}, "lost": {"data.source": "folder", "data.root": str(tmp_path / "images")}}
    more = {"loss": "none", "data.train_fraction": 1.0}
    (tmp_path / "images").mkdir()  # without images
    write(tmp_path / "s.json", set={**SMALL, **more}, runs=runs)
    arguments = (
        "sweep",
        tmp_path / "s.json",
        "--out",
        tmp_path / "out",
        "--teacher.source",
        "none",
    )
    done = command_server.run(*arguments)
    assert done.code == 3
    failed = [line for line in done.err.splitlines() if line.startswith("  ")]
    assert [line.split(",")[0] for line in failed] == ["  lost"]
    assert f"{tmp_path / 'images'}: " in failed[0]
    # Missing images are a permanent failure, so the run is not retried.
    ends = [line for line in done.out.splitlines() if line.startswith("lost, ") and "ETA" in line]
    assert len(ends) == 1
    rows = result(tmp_path / "out")["rows"]
    assert rows["good"]["seeds"] == [0]
    assert rows["lost"]["seeds"] == []
    assert f"{tmp_path / 'images'}: " in rows["lost"]["failed"]["0"]
    assert "| lost | failed |" in (tmp_path / "out" / "results.md").read_text()
    before = states(tmp_path / "out")
    done = command_server.run(*arguments)
    assert done.code == 3
    assert states(tmp_path / "out") == before
