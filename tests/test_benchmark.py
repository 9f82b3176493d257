"""The benchmark script, and the script that measures the cost of a sweep."""

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


def test_benchmark_data_writes_rows_and_environment(tmp_path):
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
    result = json.loads((tmp_path / "x.json").read_text())
    assert [row["name"] for row in result["rows"]] == [
        "32 px in memory: crop, flip, RandAugment",
        "32 px in memory: crop, flip, RandAugment, erasing",
    ]
    for row in result["rows"]:
        ratio = row["ours_images_per_s"] / row["peer_images_per_s"]
        assert row["peer"] == "timm create_loader"
        assert row["ratio"] == pytest.approx(ratio)
        assert row["ratio_min"] == row["ratio"] == row["ratio_max"]
        assert row["name"] in done.stdout
    assert result["command"].endswith("--json x.json --plot x.png")
    assert result["environment"]["device_name"]


@pytest.mark.slow
def test_benchmark_targets_names_its_baselines(tmp_path):
    peers = {"deit_micro": "no teacher at all", "writing": "the teacher's forward pass"}
    for row, peer in peers.items():
        done = benchmark(tmp_path, "--rows", row, "--json", f"{row}.json", what="targets")
        assert done.returncode == 0, done.stderr
        (result,) = json.loads((tmp_path / f"{row}.json").read_text())["rows"]
        assert result["peer"] == peer
        assert result["ratio"] == pytest.approx(
            result["ours_images_per_s"] / result["peer_images_per_s"]
        )


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--json", "existing.json"), ("--json existing.json", "--force")),
        (("--json", "."), ("--json .",)),
        (("--plot", "plot.xyz"), ("--plot plot.xyz", ".png")),
        (("--threads", "-1"), ("--threads", "-1")),
    ],
)
def test_benchmark_invalid_option_is_refused_before_measuring(arguments, names, tmp_path):
    (tmp_path / "existing.json").write_text("mine")
    done = benchmark(tmp_path, *arguments)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]  # after the usage text, which names every option
    for name in names:
        assert name in last
    assert "Traceback" not in done.stderr
    assert (tmp_path / "existing.json").read_text() == "mine"


def test_benchmark_unknown_row_is_refused(tmp_path):
    done = benchmark(tmp_path, "--rows", "65 px")
    assert done.returncode == 2
    assert "--rows '65 px'" in done.stderr


def test_first_losses_of_deit_and_timm_are_equal(tmp_path, monkeypatch):
    """Both sides have the same weights, batch, teacher and loss."""
    pytest.importorskip("timm", "1.0.31", reason="timm's distillation has another loss")
    monkeypatch.setattr(timm_trainer, "num_images", lambda side: 640)
    config = timm_trainer.configuration(tmp_path, student="deit_micro", batch=64, device="cpu")
    our_loss, timm_loss = timm_trainer.first_losses(config)
    assert our_loss == pytest.approx(timm_loss, abs=1e-5)


@pytest.mark.slow
def test_benchmark_train_compares_with_timm_at_equal_loss(tmp_path):
    row = "end to end, ResNet-18 online, compared with timm, best"
    done = benchmark(tmp_path, "--rows", row, "--json", "train.json", what="train")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "train.json").read_text())
    (row,) = result["rows"]
    assert row["peer"] == "timm, best settings"
    assert row["ratio"] == pytest.approx(row["ours_images_per_s"] / row["peer_images_per_s"])
    our_loss, timm_loss = row["losses_of_first_step"]
    assert our_loss == pytest.approx(timm_loss, abs=1e-3)
    assert 0 < row["share_of_peak"] < 1
    assert row["gflop_of_an_image"] == pytest.approx(0.294, abs=0.01)
    for name in ("first_step_s", "memory_mb"):
        assert row[f"ours_{name}"] > 0
        assert row[f"peer_{name}"] > 0
    assert row["peer_workers"] in (0, 1, 2)
    assert result["threads"] == num_cores()


def test_sweep_cost_is_the_median_ratio_of_the_turns(tmp_path, monkeypatch, capsys):
    """One side trains each run of the grid separately, the other a sweep; they take turns."""
    calls = []

    def fake_command(*arguments, folder):
        calls.append(arguments)
        if arguments[0] == "sweep":
            grid = json.loads((folder / arguments[1]).read_text())["grid"]
            assert grid == sweep_cost.GRID
        return {"train": 2.0, "sweep": 6.0 + len(calls)}[arguments[0]]

    monkeypatch.setattr(sweep_cost, "deit", fake_command)
    monkeypatch.setattr("sys.argv", ["sweep_cost.py", "--json", str(tmp_path / "cost.json")])
    sweep_cost.main()
    names = [arguments[0] for arguments in calls]
    turn = ["train"] * 12
    assert names == ["train", "sweep", *turn, *turn, "sweep", "sweep", *turn]
    assert len({arguments[1:] for arguments in calls[2:14]}) == 12
    result = json.loads((tmp_path / "cost.json").read_text())
    sweeps = [6 + position for position, name in enumerate(names, start=1) if name == "sweep"]
    assert result["pairs_s"] == [[sweep, 24] for sweep in sweeps]
    assert result["ratio"] == statistics.median(sweeps) / 24
    assert "n = 3" in capsys.readouterr().out
