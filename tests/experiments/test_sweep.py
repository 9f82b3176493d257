"""A sweep trains what its file says, once; shares what can be shared; and tells what came of it."""

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
    """When each run of a sweep was last written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}


def lines_of(out):
    return list(csv.DictReader((out / "results.csv").read_text().splitlines(keepends=True)))


@pytest.fixture(scope="module")
def swept(tmp_path_factory, command_server):
    """A folder with a sweep of two temperatures and two seeds."""
    place = tmp_path_factory.mktemp("sweep")
    write(place / "heat.json", grid={"loss.temperature": [1, 3]}, seeds=[0, 1])
    done = command_server.run("sweep", "heat.json", "--out", "out", "--parallel", "2", cwd=place)
    assert done.code == 0, done.err
    return place, done


def test_sweep_trains_and_reports_every_point_and_seed(swept):
    place, done = swept
    found = result(place / "out")
    assert list(found["rows"]) == ["teacher", "temperature 1", "temperature 3"]
    assert found["fields"] == ["loss.temperature"]
    assert found["rows"]["teacher"]["teacher"]
    assert not found["rows"]["teacher"]["values"]
    row = found["rows"]["temperature 3"]
    assert (row["seeds"], row["failed"], row["values"]) == ([0, 1], {}, {"loss.temperature": "3"})
    lines = lines_of(place / "out")
    assert len(lines) == 4
    for line in lines:
        there = result_of(line["folder"], place)
        assert float(line["validation_top1"]) == there["best"]["top1"]
        assert float(line["seconds"]) == pytest.approx(there["seconds"], abs=1e-3)
        own = found["rows"][line["point"]]
        at = own["seeds"].index(int(line["seed"]))
        assert float(line["fused_top1"]) == own["top1"][at]["fused"]
    first = next((place / "out" / "runs").glob("*/environment.json"))
    assert found["environment"]["packages"] == json.loads(first.read_text())["packages"]
    text = (place / "out" / "results.md").read_text()
    assert "| 3 |" in text
    assert found["command"] in text
    assert (place / "out" / "loss.temperature.png").read_bytes()[:4] == b"\x89PNG"
    assert runs_over(done.out)[-1] == (5, 5)  # the teacher is one
    for place, name in enumerate(found["best"], start=1):
        assert f"{place}. {name}" in done.out


def result_of(folder, place):
    return run_folder.read_result(place / folder)


def test_report_names_the_file_of_invalid_results(swept, tmp_path, monkeypatch):
    """They make a page where it needs nothing of what was changed; else the file is named."""
    axes = MagicMock()
    axes.get_legend_handles_labels.return_value = ([], [])
    monkeypatch.setattr(charts, "chart", lambda draw, *_, **__: (draw(axes) and "") or "")
    good = result(swept[0] / "out")
    errors = {}
    for number, (what, content) in enumerate([("nothing", good), *edits(good, depth=3)]):
        sweep = tmp_path / str(number)
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


def test_sweep_runs_of_a_seed_share_a_target_store(swept):
    place, _ = swept
    stores = {}
    for path in (place / "out" / "runs").glob("*/config.json"):
        config = json.loads(path.read_text())
        (store,) = config["teacher"]["target_stores"]
        stores.setdefault(config["run"]["seed"], set()).add(store)
    assert [len(found) for found in stores.values()] == [1, 1]
    assert stores[0] != stores[1]
    assert len(list((place / "out" / "targets").iterdir())) == 2


def test_sweep_run_is_bit_identical_to_a_single_run(swept, command_server):
    place, _ = swept
    inside = next((place / "out" / "runs").glob("temperature-3-seed-1-*/config.json"))
    done = command_server.run("train", inside, "--out", place / "alone", cwd=place)
    assert done.code == 0, done.err
    ours = (inside.parent / run_log.HASH_CHAIN).read_bytes()
    assert (place / "alone" / run_log.HASH_CHAIN).read_bytes() == ours


def test_sweep_finished_runs_are_kept_under_new_names(swept, command_server, tmp_path):
    place = shutil.copytree(swept[0], tmp_path / "place")
    before = states(place / "out")
    done = command_server.run("sweep", "heat.json", "--out", "out", cwd=place)
    assert done.code == 0, done.err
    assert re.search(r"^4[^\d\n]+4\b", done.out, re.MULTILINE)  # are finished
    assert states(place / "out") == before
    # Other names, the same configurations; and one more value.
    changed = {"loss.distillation_weight": [0.5, 0.7], "loss.temperature": [3]}
    file = (place / "heat.json").read_text()
    write(place / "heat.json", grid=changed, seeds=[1])
    listed = command_server.run("sweep", "heat.json", "--out", "out", "--dry-run", cwd=place)
    assert re.search(r"^2[^\d\n]+1\b", listed.out, re.MULTILINE)  # is finished
    assert states(place / "out") == before
    done = command_server.run("sweep", "heat.json", "--out", "out", cwd=place)
    (place / "heat.json").write_text(file)
    assert done.code == 0, done.err
    assert re.search(r"^1[^\d\n]+2\b", done.out, re.MULTILINE)  # are finished
    now = states(place / "out")
    assert before.items() < now.items()
    assert len(now) == 5
    assert list(result(place / "out")["rows"])[1:] == [
        *("distillation weight 0.5, temperature 3", "distillation weight 0.7, temperature 3")
    ]


def test_sweep_teacher_of_another_split_is_refused(swept, command_server):
    place, _ = swept
    arguments = ("--data.split_seed", "5")
    done = command_server.run("sweep", "heat.json", "--out", "out", *arguments, cwd=place)
    assert done.code == 2, done.err
    assert re.search(r"out/teacher\b.*\bdata\.split_seed\b.*\bNone\b.*\b5\b", done.err)


def test_sweep_finished_run_of_other_images_or_teacher_is_refused(swept, command_server, tmp_path):
    place, _ = swept
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    heat = ("sweep", "heat.json", "--out", "out")
    assert command_server.run(*heat, cwd=tmp_path).code == 0
    first = result(tmp_path / "out")["rows"]["temperature 1"]
    (run,) = (tmp_path / "out" / "runs").glob("temperature-3-seed-1-????????????/result.json")
    before = json.loads(run.read_text())
    run.write_text(json.dumps({**before, "fingerprint": "0" * 64}))
    done = command_server.run(*heat, cwd=tmp_path)
    assert done.code == 3, done.err
    assert run.parent.name in done.err
    assert "digits" in done.err  # where its images are
    assert "out/teacher" not in done.err
    run.write_text(json.dumps({**before, "teachers": ["0" * 64]}))
    done = command_server.run(*heat, cwd=tmp_path)
    assert done.code == 3, done.err
    assert run.parent.name in done.err
    assert "out/teacher" in done.err
    run.write_text(json.dumps(before))
    # A teacher that is gone is not trained for nothing, and its row is: what it said is kept.
    shutil.rmtree(tmp_path / "out" / "teacher")
    done = command_server.run(*heat, cwd=tmp_path)
    assert done.code == 0, done.err
    assert not (tmp_path / "out" / "teacher").exists()
    assert list(result(tmp_path / "out")["rows"]) == ["temperature 1", "temperature 3"]
    again = result(tmp_path / "out")["rows"]["temperature 1"]
    assert (again["top1"], again["agreement"]) == (first["top1"], first["agreement"])


def test_sweep_evaluates_with_a_teacher_from_code(command_server, tmp_path):
    """Whoever names it to a sweep has said that it may run; a report of the same runs does not."""
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
    assert "mine.py:teacher" not in done.err  # as a warning names one that is left out


def test_sweep_reports_a_failed_evaluation(swept, command_server, tmp_path):
    place, _ = swept
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    (run,) = (tmp_path / "out" / "runs").glob("temperature-3-seed-1-????????????")
    run.with_name(f"{run.name}.evaluation.json").unlink()
    (run / "best" / "model.safetensors").write_bytes(b"cut")
    done = command_server.run("sweep", "heat.json", "--out", "out", cwd=tmp_path)
    assert done.code == 4
    row = result(tmp_path / "out")["rows"]["temperature 3"]
    assert row["seeds"] == [0]
    assert run_folder.read_result(run) is not None
    for told in (row["failed"]["1"], done.err):
        assert f"{run.name}/best/model.safetensors" in told


def test_sweep_moved_folder_resumes_with_its_stores(swept, command_server, tmp_path):
    """Half a run, whose configuration names the store where it was."""
    place, _ = swept
    shutil.copytree(place, tmp_path / "there", dirs_exist_ok=True)
    out = tmp_path / "there" / "out"
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
        f"/gone/{one}" for one in config["teacher"]["target_stores"]
    ]
    (run / "config.json").write_text(json.dumps(config))
    done = command_server.run("sweep", "heat.json", "--out", "out", cwd=tmp_path / "there")
    assert done.code == 0, done.err
    assert (run / run_log.HASH_CHAIN).read_bytes() == chain
    (store,) = json.loads((run / "config.json").read_text())["teacher"]["target_stores"]
    assert (tmp_path / "there" / store).is_dir()


def test_sweep_store_content_without_the_needed_records_is_refused(command_server, tmp_path):
    grid = {"loss.temperature": [1, 3]}
    student = {**SMALL["student"], "name": "vit_micro"}
    soft = {**SMALL, "student": student, "loss": "class-soft"}
    file = write(tmp_path / "s.json", grid=grid, content="hard", set=soft)
    done = command_server.run("sweep", file, "--out", tmp_path / "out")
    assert done.code == 2, done.err
    for name in ("loss.kind 'soft'", "--content full"):
        assert name in done.err
    assert not (tmp_path / "out").exists()


def test_sweep_folder_with_other_content_is_refused(swept, command_server, tmp_path):
    place, _ = swept
    write(tmp_path / "other.json", grid={"loss.temperature": [1, 3]})
    done = command_server.run("sweep", tmp_path / "other.json", "--out", place / "out")
    assert done.code == 2, done.err
    assert f"--out {place / 'out'}" in done.err
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
    (tmp_path / "images").mkdir()  # and nothing in it
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
    # Once: the images are not there the second time either.
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
