"""The benchmark script measures both sides of a row and writes them down."""

import json
import statistics
import subprocess

import pytest

from deit.core.hardware import num_cores
from scripts import sweep_cost
from scripts.benchmarks import timm_trainer
from tests.helpers.command_server import shared_server

pytest.importorskip("sklearn")
SCRIPT = "scripts/benchmark.py"


def benchmark(folder, *arguments, what="data"):
    command = (what, "--rounds", "1", "--seconds", "0.05", *arguments)
    done = shared_server().run(*command, cwd=folder, script=SCRIPT, CUDA_VISIBLE_DEVICES="")
    return subprocess.CompletedProcess(command, done.code, done.out, done.err)


def test_rows_hold_both_sides_and_the_file_says_where_they_were_measured(tmp_path):
    done = benchmark(
        tmp_path,
        "--rows",
        "32 px in memory: crop, flip, Rand",
        "--json",
        "x.json",
        "--plot",
        "x.png",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "x.json").read_text())
    assert [row["name"] for row in found["rows"]] == [
        "32 px in memory: crop, flip, RandAugment",
        "32 px in memory: crop, flip, RandAugment, erasing",
    ]
    for row in found["rows"]:
        ratio = row["ours_images_per_s"] / row["peer_images_per_s"]
        assert row["peer"] == "timm create_loader"
        assert row["ratio"] == pytest.approx(ratio)
        assert row["ratio_min"] == row["ratio"] == row["ratio_max"]
        assert row["name"] in done.stdout
    assert found["command"].endswith("--json x.json --plot x.png")
    assert found["environment"]["device_name"]


@pytest.mark.slow
def test_targets_are_measured_beside_no_teacher_and_beside_its_forward_pass(tmp_path):
    peers = {"deit_micro": "no teacher at all", "writing": "the teacher's forward pass"}
    for row, peer in peers.items():
        done = benchmark(tmp_path, "--rows", row, "--json", f"{row}.json", what="targets")
        assert done.returncode == 0, done.stderr
        (found,) = json.loads((tmp_path / f"{row}.json").read_text())["rows"]
        assert found["peer"] == peer
        assert found["ratio"] == pytest.approx(
            found["ours_images_per_s"] / found["peer_images_per_s"]
        )


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--json", "there.json"), ("--json there.json", "--force")),
        (("--json", "."), ("--json .",)),
        (("--plot", "picture.xyz"), ("--plot picture.xyz", ".png")),
        (("--threads", "-1"), ("--threads", "-1")),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments, names, tmp_path):
    (tmp_path / "there.json").write_text("mine")
    done = benchmark(tmp_path, *arguments)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]  # behind the usage, which names every option
    for name in names:
        assert name in last
    assert "Traceback" not in done.stderr
    assert (tmp_path / "there.json").read_text() == "mine"


def test_no_row_of_that_name_is_refused(tmp_path):
    done = benchmark(tmp_path, "--rows", "65 px")
    assert done.returncode == 2
    assert "--rows '65 px'" in done.stderr


def test_both_sides_of_training_begin_with_the_same_loss(tmp_path, monkeypatch):
    """Ours and timm's: the same weights, batch, teacher and objective."""
    pytest.importorskip("timm", "1.0.31", reason="timm's distillation has another objective")
    monkeypatch.setattr(timm_trainer, "number_of", lambda side: 640)
    config = timm_trainer.configuration(tmp_path, student="deit_micro", batch=64, device="cpu")
    ours, theirs = timm_trainer.first_losses(config)
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_training_is_measured_beside_timms_parts_with_the_same_loss(tmp_path):
    row = "end to end, ResNet-18 online, compared with timm, best"
    done = benchmark(tmp_path, "--rows", row, "--json", "train.json", what="train")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "train.json").read_text())
    (row,) = found["rows"]
    assert row["peer"] == "timm, best settings"
    assert row["ratio"] == pytest.approx(row["ours_images_per_s"] / row["peer_images_per_s"])
    ours, theirs = row["losses_of_first_step"]
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert 0 < row["share_of_peak"] < 1
    assert row["gflop_of_an_image"] == pytest.approx(0.294, abs=0.01)
    for name in ("first_update_s", "memory_mb"):
        assert row[f"ours_{name}"] > 0
        assert row[f"peer_{name}"] > 0
    assert row["peer_workers"] in (0, 1, 2)
    assert found["threads"] == num_cores()


def test_what_a_sweep_saves_is_the_median_of_the_turns(tmp_path, monkeypatch, capsys):
    """Each run of the grid by itself on one side, the grid on the other, sides by turns."""
    asked = []

    def took(*arguments, folder):
        asked.append(arguments)
        if arguments[0] == "sweep":
            grid = json.loads((folder / arguments[1]).read_text())["grid"]
            assert grid == sweep_cost.GRID
        return {"train": 2.0, "sweep": 6.0 + len(asked)}[arguments[0]]

    monkeypatch.setattr(sweep_cost, "deit", took)
    monkeypatch.setattr("sys.argv", ["sweep_cost.py", "--json", str(tmp_path / "cost.json")])
    sweep_cost.main()
    names = [arguments[0] for arguments in asked]
    turn = ["train"] * 12
    assert names == ["train", "sweep", *turn, *turn, "sweep", "sweep", *turn]
    assert len({arguments[1:] for arguments in asked[2:14]}) == 12
    found = json.loads((tmp_path / "cost.json").read_text())
    sweeps = [6 + at for at, name in enumerate(names, start=1) if name == "sweep"]
    assert found["pairs_s"] == [[sweep, 24] for sweep in sweeps]
    assert found["ratio"] == statistics.median(sweeps) / 24
    assert "n = 3" in capsys.readouterr().out
