"""Lottery experiments: tickets that match the dense run, plot, report, and refused options."""

import csv
import json
import re
import shutil
from dataclasses import asdict

import pytest

from deit.cli import run_command
from deit.config.sparsity import SCOPES
from deit.core import run_folder
from deit.core.console import format_duration
from deit.experiments.lottery_options import (
    CONTROLS,
    RANDOM,
)
from deit.experiments.lottery_plan import work_left
from deit.experiments.lottery_tables import matching, sparsest
from deit.experiments.sweep_plots import draw_sweep, ticket_curve
from tests.helpers.processes import Completed
from tests.helpers.small_runs import WITH_AVERAGE
from tests.helpers.sweeps import LOTTERY, planned_lottery, result

pytest.importorskip("sklearn")


def row(kind: str, *shares: float, sparsity: str = "50.0") -> dict:
    values = {"run": kind, "sparsity %": sparsity}
    top1 = [{"class": share, "distillation": None, "fused": None} for share in shares]
    return {
        "values": values,
        "seeds": list(range(len(shares))),
        "top1": top1,
        "failed": {},
        "teacher": False,
    }


def test_matching_compares_the_means_with_the_tolerance():
    rows = {
        "teacher": {**row("", 0.9, 0.9), "values": {}},
        "dense": row("dense", 0.80, 0.90, sparsity="0.0"),  # 85 %
        "just": row("ticket", 0.80, 0.88),  # 84 %
        "below": row("ticket", 0.80, 0.8798),
        "above": row("random", 0.99, 0.99),
        "one seed": row("ticket", 0.99),
        "none": row("ticket"),
    }
    assert matching(rows, 1.0) == ["just", "above"]
    assert matching(rows, 0.0) == ["above"]
    rows["sparser"] = row("ticket", 0.80, 0.90, sparsity="75.0")
    assert sparsest({"rows": rows, "lottery": {"matching": matching(rows, 1.0)}}) == "75.0 %"
    assert sparsest({"rows": rows, "lottery": {"matching": ["above"]}}) == "none"
    assert matching({"ticket": row("ticket", 1.0)}, 1.0) == []


def test_ticket_curve_has_a_line_per_kind_and_the_dense_run(finished_lottery):
    from matplotlib.figure import Figure

    workdir, _ = finished_lottery
    results = result(workdir / "out")
    axes = Figure().subplots()
    ticket_curve(results)(axes)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names[1:] == ["ticket", *CONTROLS]
    assert names[0].startswith("dense, ")
    drawn = {bars.get_label(): bars.lines[0].get_xydata() for bars in axes.containers}
    assert {kind: len(line) for kind, line in drawn.items()} == {"ticket": 2} | dict.fromkeys(
        CONTROLS, 1
    )
    for kind in ("ticket", *CONTROLS):
        for x, y in drawn[kind]:
            sparsity = min((50.0, 75.0), key=lambda level, x=x: abs(level - x))
            top1 = [seed["fused"] for seed in results["rows"][f"{kind}, {sparsity} %"]["top1"]]
            assert abs(sparsity - x) < 1
            assert y == pytest.approx(100 * sum(top1) / 2)


@pytest.mark.parametrize(
    ("kinds", "is_shifted"), [(("ticket",), False), (("ticket", RANDOM), True)]
)
def test_ticket_curve_notes_shifted_points(kinds, is_shifted):
    """The label of the axis has the note only if there are several kinds."""
    figure = pytest.importorskip("matplotlib.figure").Figure

    def drawn(*kinds):
        axes = figure().subplots()
        rows = {kind: row(kind, 0.5) for kind in kinds}
        ticket_curve({"rows": rows, "split": "test", "lottery": {"tolerance": 1}})(axes)
        return axes

    axes = drawn(*kinds)
    xs = [bars.lines[0].get_xydata()[0][0] for bars in axes.containers]
    assert (xs != [50.0] * len(kinds)) == is_shifted
    assert (axes.get_xlabel() != drawn("ticket").get_xlabel()) == is_shifted


def test_draw_sweep_without_finished_dense_run_draws_tickets(finished_lottery, tmp_path):
    workdir, _ = finished_lottery
    results = result(workdir / "out")
    del results["rows"]["dense"]
    assert [path.name for path in draw_sweep(results, tmp_path)] == ["tickets.png", "tickets.pdf"]


def test_report_of_lottery_has_curve_masks_and_layers(finished_lottery, command_server, tmp_path):
    workdir, _ = finished_lottery
    done = command_server.run("report", "out", "--out", tmp_path / "page", cwd=workdir)
    assert done.code == 0, done.err
    page = (tmp_path / "page" / "index.html").read_text()
    for text in ("reinitialized", "attn.qkv.q", f"<b>{sparsest(result(workdir / 'out'))}</b>"):
        assert text in page
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert {"out-tickets.png", "out-masks.csv", "out-layers.csv", "out-results.csv"} <= names
    layers = list(csv.reader((tmp_path / "page" / "out-layers.csv").read_text().splitlines()))
    assert [line[0] for line in layers[1:]] == [
        *(f"blocks.0.attn.qkv.{part}" for part in "qkv"),
        *("blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"),
    ]


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs a command in this process, from a folder, without training."""

    def run(name, *arguments, cwd):
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        code = run_command(name, [str(argument) for argument in arguments], f"deit {name}")
        return Completed(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--scope", "some"), ("scope some", *SCOPES, "2:4")),
        (("--scope", "2:4"), ("--scope 2:4", "rounds", "prune_rate")),
        (("--rounds", "0"), ("--rounds 0", "100")),
        (("--prune-rate", "1"), ("--prune-rate 1",)),
        (("--prune-rate", "nan"), ("--prune-rate nan",)),
        (("--rewind-epoch", "3"), ("--rewind-epoch 3", "optim.epochs")),
        (("--rewind-epoch", "-1"), ("--rewind-epoch -1", "optim.epochs")),
        (("--rewind-epoch", "2.999"), ("--rewind-epoch", "12")),
        (("--controls", "randm"), ("--controls randm", *CONTROLS)),
        (("--control-rounds", "3"), ("--control-rounds 3",)),
        (("--control-rounds", "1,1"), ("--control-rounds 1,1",)),
        (("--tolerance", "-1"), ("--tolerance -1",)),
        (("--retries", "-1"), ("--retries -1",)),
        (("--parallel", "0"), ("--parallel 0",)),
        (("--seeds", "0,0"), ("--seeds 0,0",)),
        (("--run.seed", "4"), ("--run.seed 4", "--seeds")),
        (("--init.pruning_masks", "x"), ("init.pruning_masks",)),
        (("--init.start_step", "3"), ("init.start_step",)),
        (("--resume",), ("deit lottery", "--resume")),
    ],
)
def test_lottery_invalid_option_is_refused_before_training(command, tmp_path, arguments, names):
    done = command(*LOTTERY, *arguments, "--out", "out", cwd=tmp_path)
    assert done.code == 2
    for name in names:
        assert name in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_lottery_of_partly_trained_student_is_refused(command, tmp_path, finished_lottery):
    workdir, _ = finished_lottery
    init = ("--init.weights", workdir / "out/seed-0/level-0", "--optim.trainable", "heads")
    done = command(*LOTTERY, *init, "--out", "out", cwd=tmp_path)
    assert (done.code, "optim.trainable = 'heads'" in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("arguments", "differs"),
    [
        (("--scope", "layerwise"), r"scope\b.*\bglobal\b.*\blayerwise"),
        (("--prune-rate", "0.4"), r"prune_rate\b.*\b0\.5\b.*\b0\.4"),
        (("--rewind-epoch", "1"), r"rewind_epoch\b.*\b0\.5\b.*\b1"),
        (("--optim.lr", "0.5"), r"optim\.lr\b.*\b0\.001\b.*\b0\.5"),
        (("--student.depth", "2"), r"student\.depth\b.*\b1\b.*\b2"),
        (("--loss", "none"), r"loss\.kind\b.*\bsoft\b.*\bnone"),
    ],
)
def test_lottery_folder_of_another_lottery_is_refused(
    finished_lottery, command, arguments, differs
):
    workdir, _ = finished_lottery
    done = command(*LOTTERY, *arguments, "--out", "out", cwd=workdir)
    assert done.code == 2, done.err
    assert re.search(rf"--out out\b.*\b{differs}\b", done.err), done.err


def test_lottery_scope_that_does_not_divide_a_layer_is_refused(command, tmp_path):
    arguments = ("lottery", "digits", *WITH_AVERAGE, "--scope", "3:5", "--out", "out")
    done = command(*arguments, cwd=tmp_path)
    assert done.code == 2
    for name in ("scope", "blocks.0.attn.qkv.weight", "16", "5"):
        assert name in done.err
    assert not (tmp_path / "out").exists()


def test_time_left_counts_steps_and_estimates_seconds(tmp_path):
    _, lottery_runs = planned_lottery(tmp_path, rounds=2, prune_rate=0.5, rewind_epoch=1.5)
    runs = [run.spec for run in lottery_runs]
    # Eight runs of 10 epochs of 4 steps; all but the dense run and two reinitialized ones start
    # at step 6. Without a finished run there is no time.
    assert numbers_in(work_left(runs, 4)) == [8 * 40 - 5 * 6]
    (runs[7].out / "checkpoint-00000020").mkdir(parents=True)
    assert numbers_in(work_left(runs, 4)) == [8 * 40 - 4 * 6 - 20]
    shutil.rmtree(runs[7].out)
    best = {"epoch": 10, "top1": 0.5, "class_top1": 0.5}
    result = asdict(run_folder.Result(10, 0, 0, 60.0, 0, None, best, "", "", [], []))
    for run, samples in ((runs[0], 40 * 32), (runs[1], 34 * 32)):
        run.out.mkdir(parents=True)
        (run.out / run_folder.RESULT).write_text(json.dumps({**result, "samples_seen": samples}))
    step_seconds = 120 / 74
    line = work_left(runs, 4)
    assert numbers_in(line)[0] == 8 * 40 - 5 * 6 - 74
    assert format_duration(216 * step_seconds) in line
    assert "1.62 s" in line  # per step of the finished runs
    assert numbers_in(work_left(runs[:2], 4)) == [0]


def numbers_in(text: str) -> list[float]:
    return [float(match.replace(",", "")) for match in re.findall(r"\d[\d,.]*", text)]


def test_lottery_of_standardized_weights_is_refused(command, tmp_path):
    arguments = ("--student.name", "timm:resnetv2_50x1_bit", "--student.patch_size", "4")
    arguments = ("lottery", "digits-teacher", *arguments, "--out", "out", "--dry-run")
    done = command(*arguments, cwd=tmp_path)
    assert done.code == 2
    assert "student.name = 'timm:resnetv2_50x1_bit'" in done.err
    assert len(done.err.splitlines()) == 1  # without the two problems of the configuration


def test_lottery_sparsities_of_close_levels_stay_distinct(command, tmp_path):
    arguments = (
        "lottery",
        "digits",
        *WITH_AVERAGE,
        "--prune-rate",
        "0.5",
        "--rounds",
        "12",
        "--controls",
        "none",
    )
    done = command(*arguments, "--out", "out", "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    sparsities = [line.split()[3] for line in done.out.splitlines() if " ticket " in line]
    assert len(sparsities) == len(set(sparsities)) == 12


def test_lottery_folder_with_other_content_is_refused(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    done = command(*LOTTERY, "--out", "out", cwd=tmp_path)
    assert done.code == 2
    for name in ("--out out", "sweep.json"):
        assert name in done.err


@pytest.mark.parametrize("scope", [*SCOPES, "2:4"])
def test_lottery_dry_run_lists_runs_of_each_scope(command, tmp_path, scope):
    options = () if scope in SCOPES else ("--scope", "2:4")
    arguments = (
        "lottery",
        "digits",
        *WITH_AVERAGE,
        *(options or ("--scope", scope, "--rounds", "2")),
    )
    done = command(*arguments, "--out", "out", "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    sparsities = "25.0, 50.0 %" if options else "20.0, 36.0 %"
    assert re.search(rf"^levels\b.*\b{sparsities}.*\b{scope}\b", done.out, re.MULTILINE)
    assert "seed-0/level-2" in done.out
    # 8 runs of 12 steps; all but two start at step 4.
    assert re.search(r"^time\b[^\d\n]*\b76\b[^\d\n]*$", done.out, re.MULTILINE)
    assert not (tmp_path / "out").exists()
