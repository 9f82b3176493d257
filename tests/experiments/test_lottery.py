"""Lottery experiments: the planned runs, their masks, rewinding, resumption and results."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deit.config.recipes.handwriting import digits
from deit.config.schema import Config
from deit.config.validation import load_config
from deit.core import manifest, run_folder, run_log
from deit.core.errors import CheckpointError
from deit.experiments import lottery
from deit.experiments.base_runs import BaseRuns, Experiment
from deit.experiments.lottery_masks import final_weights
from deit.experiments.lottery_options import (
    ONE_SHOT,
    RANDOM,
    REINITIALIZED,
    LotteryOptions,
)
from deit.experiments.lottery_plan import lottery_runs, plan_lottery
from deit.experiments.lottery_tables import matching_line
from deit.experiments.parallel_runs import FailedRun
from deit.experiments.shared_targets import teacher_query_key
from deit.experiments.sweep_execute import SweepFailures
from deit.experiments.sweep_plan import SweepPlan
from deit.models.saved_student import load_student, save_weights, student_from_info
from deit.models.surgery.pruning_masks import MASKS, is_masked, num_remaining, read_masks
from tests.helpers.commands import runs_over
from tests.helpers.errors import raises
from tests.helpers.processes import Completed
from tests.helpers.sweeps import LOTTERY, planned_lottery, result

pytest.importorskip("sklearn")
TRAINED = ("model", "average", "optimizer", "masks")


def test_lottery_runs_rewind_to_the_weights_and_step_of_the_dense_run(tmp_path):
    plan, runs = planned_lottery(tmp_path, rounds=2, prune_rate=0.5, rewind_epoch=1.5)
    assert (plan.rewind_step, plan.densities) == (6, (0.5, 0.25))
    names = ["level-0", "level-1", "random-1", "reinitialized-1"]
    names += ["level-2", "random-2", "reinitialized-2", "one-shot-2"]
    assert [run.spec.out.name for run in runs] == names
    assert runs[0].spec.config.run.keep_steps == (6,)
    assert runs[0].spec.config.init == digits().init
    for run in runs[1:]:
        init, seed = run.spec.config.init, run.spec.config.run.seed
        kind = "level" if run.kind in ("ticket", REINITIALIZED) else run.kind
        assert init.pruning_masks == str(
            tmp_path / "seed-3" / "masks" / f"{kind}-{run.level}.safetensors"
        )
        if run.kind == REINITIALIZED:
            assert (init.weights, init.start_step) == (None, 0)
            assert seed != 3
            assert run.spec.config.views.seed == 3
        else:
            assert init.weights == str(tmp_path / "seed-3" / "level-0" / "checkpoint-00000006")
            assert (init.start_step, seed, run.spec.config.views.seed) == (6, 3, None)


def test_plan_lottery_default_rewinds_to_the_end_of_warm_up(tmp_path):
    plan, _ = planned_lottery(tmp_path)
    assert plan.rewind_step == 2 * 4
    assert plan.densities == pytest.approx((0.8, 0.64, 0.512, 0.4096, 0.32768, 0.262144, 0.2097152))


def test_lottery_runs_rewind_to_step_0_uses_the_seed(tmp_path):
    _, runs = planned_lottery(tmp_path, rounds=1, rewind_epoch=0)
    assert runs[0].spec.config.run.keep_steps == ()
    init = runs[1].spec.config.init
    assert (init.weights, init.start_step) == (None, 0)
    assert runs[1].spec.config.run == runs[0].spec.config.run


def test_lottery_runs_have_controls_at_the_requested_levels_only(tmp_path):
    _, runs = planned_lottery(
        tmp_path, rounds=3, controls=(RANDOM, ONE_SHOT), control_rounds=(1, 3)
    )
    kinds = [(run.kind, run.level) for run in runs]
    assert kinds == [
        *(("dense", 0), ("ticket", 1), (RANDOM, 1), ("ticket", 2)),
        *(("ticket", 3), (RANDOM, 3), (ONE_SHOT, 3)),
    ]


def test_lottery_runs_of_fine_tuning_start_from_the_same_weights(tmp_path):
    init = {"weights": "weights.pth", "head": "new", "pos_embed_resize": "timm"}
    config = digits().replace(init=init)
    _, runs = planned_lottery(tmp_path, config, rounds=1, rewind_epoch=0)
    inits = {run.kind: run.spec.config.init for run in runs}
    assert inits["dense"] == config.init
    assert (inits["ticket"].weights, inits["ticket"].head) == ("weights.pth", "new")
    assert (
        inits[REINITIALIZED].weights,
        inits[REINITIALIZED].head,
        inits[REINITIALIZED].pos_embed_resize,
    ) == (None, "keep", "deit")
    _, runs = planned_lottery(tmp_path, config, rounds=1, rewind_epoch=1)
    assert runs[1].spec.config.init.head == "keep"  # the dense run's heads are trained


def test_lottery_runs_of_a_seed_share_the_teacher_query_key(tmp_path):
    config = digits().replace(views={"mean": (0.1,) * 3, "std": (0.3,) * 3})
    _, runs = planned_lottery(tmp_path, config, rounds=2)
    assert len({json.dumps(teacher_query_key(run.spec.config)) for run in runs}) == 1


def runs_listed(done: Completed) -> tuple[int, ...]:
    """Return the number of runs that a command lists, their epochs, and how many are finished."""
    (line,) = [line for line in done.out.splitlines() if re.match(r"runs\b", line)]
    return tuple(map(int, re.findall(r"\d+", line)))


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run_folder.latest_checkpoint(run) / f"{name}.safetensors")


def test_lottery_results_name_every_run_with_its_sparsity(finished_lottery):
    workdir, done = finished_lottery
    results = result(workdir / "out")
    names = ["dense", "ticket, 50.0 %", "ticket, 75.0 %"]
    names += ["random, 75.0 %", "reinitialized, 75.0 %", "one-shot, 75.0 %"]
    assert list(results["rows"]) == ["teacher", *names]
    assert all(results["rows"][name]["seeds"] == [0, 1] for name in names)
    text = (workdir / "out" / "results.csv").read_text()
    lines = list(csv.DictReader(text.splitlines()))
    assert len(lines) == 2 * len(names)
    points = {(line["point"], line["run"], line["sparsity %"]) for line in lines}
    assert points == {("dense", "dense", "0.0")} | {
        (name, *name.removesuffix(" %").split(", ")) for name in names[1:]
    }
    assert runs_listed(done) == (12, 3, 0)
    assert runs_over(done.out)[-1] == (13, 13)  # with the teacher
    assert (workdir / "out" / "tickets.png").stat().st_size > 10_000
    page = (workdir / "out" / "results.md").read_text()
    assert "| ticket, 75.0 % | 768 | 3,072 | 75.0 |" in page
    assert matching_line(results) in page


def test_masks_keep_the_largest_final_weights_of_the_level_before(finished_lottery):
    workdir, _ = finished_lottery
    for seed in (0, 1):
        folder = workdir / "out" / f"seed-{seed}"
        masks = {path.stem: read_masks(path) for path in (folder / "masks").iterdir()}
        counts = {name: num_remaining(mask) for name, mask in masks.items()}
        assert counts == {"level-1": 1536, "level-2": 768, "random-2": 768, "one-shot-2": 768}
        # The largest of all weights, and the largest of those that level 1 kept.
        final = final_weights(folder / "level-0")
        ranked = torch.cat([weight.abs().flatten() for weight in final.values()])
        thresholds = {count: ranked.topk(count).values[-1] for count in (1536, 768)}
        for name, weight in final.items():
            assert torch.equal(masks["level-1"][name], weight.abs() >= thresholds[1536])
            assert torch.equal(masks["one-shot-2"][name], weight.abs() >= thresholds[768])
            assert not (masks["level-2"][name] & ~masks["level-1"][name]).any()
            drawn, ticket = masks["random-2"][name], masks["level-2"][name]
            assert drawn.sum() == ticket.sum()
            assert not torch.equal(drawn, ticket)
        final = final_weights(folder / "level-1")
        left = torch.cat([final[name][masks["level-1"][name]].abs() for name in final])
        threshold = left.topk(768).values[-1]
        for name, weight in final.items():
            expected = masks["level-1"][name] & (weight.abs() >= threshold)
            assert torch.equal(masks["level-2"][name], expected)


def test_masks_hold_in_every_file_of_every_run(finished_lottery):
    workdir, _ = finished_lottery
    runs = [path.parent for path in workdir.glob("out/seed-*/*/result.json")]
    assert len(runs) == 12
    for run in runs:
        if run.name == "level-0":
            continue
        name = run.name.replace("reinitialized", "level")
        masks = read_masks(run.parent / "masks" / f"{name}.safetensors")
        assert all(torch.equal(masks[name], mask) for name, mask in weights(run, "masks").items())
        for file in ("model", "average"):
            assert is_masked(masks, weights(run, file))
        assert is_masked(masks, load_file(run / "best" / "model.safetensors"))


def test_reinitialized_control_starts_from_other_weights(finished_lottery, tmp_path):
    """Every kept weight differs from the initial weight of the dense run."""
    workdir, _ = finished_lottery
    folder = workdir / "out" / "seed-0"
    _, facts = load_student(folder / "level-0" / "best")
    initial = {}
    for run in ("level-0", "reinitialized-2"):
        torch.manual_seed(load_config(folder / run / "config.json").run.seed)
        initial[run] = dict(student_from_info(facts).network.named_parameters())
    for name, mask in read_masks(folder / "masks" / "level-2.safetensors").items():
        same = initial["level-0"][name] == initial["reinitialized-2"][name]
        assert not same[mask].any()


def test_lottery_runs_of_a_seed_share_one_target_store(finished_lottery):
    workdir, _ = finished_lottery
    assert len(list((workdir / "out" / "targets").iterdir())) == 2
    for seed in (0, 1):
        runs = workdir.glob(f"out/seed-{seed}/*/config.json")
        stores = {json.loads(path.read_text())["teacher"]["target_stores"][0] for path in runs}
        assert len(stores) == 1


def test_lottery_same_command_trains_nothing_again(finished_lottery, command_server):
    workdir, _ = finished_lottery
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("out/**/model.safetensors")}
    before_rows = result(workdir / "out")["rows"]
    done = command_server.run(*LOTTERY, "--seeds", "0,1", "--out", "out", cwd=workdir)
    assert done.code == 0, done.err
    assert runs_listed(done) == (12, 3, 12)
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("out/**/model.safetensors")} == (
        before
    )
    assert "out/seed-" not in done.err  # no warning of ignored runs
    after = result(workdir / "out")["rows"]
    assert {name: row["top1"] for name, row in after.items()} == {
        name: row["top1"] for name, row in before_rows.items()
    }


def test_lottery_warns_of_existing_runs_that_are_not_requested(finished_lottery, command_server):
    workdir, _ = finished_lottery
    done = command_server.run(*LOTTERY, "--seeds", "1", "--out", "out", "--dry-run", cwd=workdir)
    assert done.code == 0, done.err
    assert re.search(r"\b6\b.*\bout/seed-0/level-0\b", done.err)


@pytest.mark.slow
def test_lottery_killed_in_a_level_resumes_to_the_same_bits(
    finished_lottery, command_server, tmp_path
):
    """It is killed in level 2 of the second seed, which then resumes from its checkpoint."""
    workdir, _ = finished_lottery
    shutil.copytree(workdir / "out", tmp_path / "out")
    level = tmp_path / "out" / "seed-1" / "level-2"
    files = [f"{name}.safetensors" for name in TRAINED]
    contents = {file: (run_folder.latest_checkpoint(level) / file).read_bytes() for file in files}
    chain = run_log.read(level / run_log.HASH_CHAIN)
    for run in ("level-2", "random-2"):
        shutil.rmtree(level.with_name(run))
        level.with_name(f"{run}.evaluation.json").unlink(missing_ok=True)
    (level.parent / "masks" / "level-2.safetensors").unlink()
    arguments = (*LOTTERY, "--seeds", "0,1", "--out", "out", "--retries", "0")
    done = command_server.run(*arguments, cwd=tmp_path, DEIT_FAULT="step:5:kill")
    assert done.code == 1
    assert [name in done.err for name in ("level-2.log", "random-2.log")] == [True] * 2
    assert done.err.count(".log") == 2
    assert (
        run_log.read(level / run_log.HASH_CHAIN)
        == chain[: len(run_log.read(level / run_log.HASH_CHAIN))]
    )
    assert run_folder.read_result(level) is None
    row = result(tmp_path / "out")["rows"]["ticket, 75.0 %"]
    assert (row["seeds"], list(row["failed"])) == ([0], ["1"])
    done = command_server.run(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    assert run_log.read(level / run_log.HASH_CHAIN) == chain
    assert {
        file: (run_folder.latest_checkpoint(level) / file).read_bytes() for file in files
    } == contents


@pytest.mark.slow
def test_lottery_more_levels_reuse_existing_runs(finished_lottery, command_server, tmp_path):
    workdir, _ = finished_lottery
    shutil.copytree(workdir / "out", tmp_path / "out")
    more = [*LOTTERY, "--seeds", "0,1", "--controls", "none", "--out", "out"]
    more[more.index("--rounds") + 1] = "3"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/result.json")}
    done = command_server.run(*more, cwd=tmp_path)
    assert done.code == 0, done.err
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/result.json")}
    assert {path.parent.name for path in after.keys() - before.keys()} == {"level-3"}
    assert before.items() <= after.items()
    masks = [
        read_masks(tmp_path / f"out/seed-0/masks/level-{level}.safetensors") for level in (2, 3)
    ]
    assert [num_remaining(mask) for mask in masks] == [768, 384]


def test_failed_level_blocks_later_levels_of_its_seed(monkeypatch, tmp_path):
    started = []

    def train_all(sweep_plan, **_):
        started.extend(run.name for run in sweep_plan.runs)
        failed = [
            FailedRun(run, 1, "a reason", tmp_path / "log")
            for run in sweep_plan.runs
            if run.name == "ticket of level 1, seed 0"
        ]
        return SweepFailures(failed, {})

    monkeypatch.setattr(lottery, "train_all", train_all)
    monkeypatch.setattr(lottery, "write_masks", lambda run, plan: None)
    config = digits().replace(optim={"epochs": 10, "warmup_epochs": 2})
    plan = plan_lottery(LotteryOptions(rounds=3, controls=(RANDOM,)), config, steps_per_epoch=4)
    runs = [run for seed in (0, 1) for run in lottery_runs(plan, config, seed, tmp_path)]
    specs = [run.spec for run in runs]
    sweep_plan = SweepPlan(BaseRuns(experiment_of(config), config, tmp_path), [], [], [], specs)
    failures = lottery._train(plan, sweep_plan, runs, parallel=1, retries=0)
    skipped = {run.name for run in specs} - set(started)
    assert skipped == {
        f"{kind} of level {level}, seed 0" for kind in ("ticket", RANDOM) for level in (2, 3)
    }
    blocked = {out.name: reason for out, reason in failures.blocked.items()}
    assert set(blocked) == {"level-2", "random-2", "level-3", "random-3"}
    assert str(tmp_path / "seed-0" / "level-1") in blocked["level-2"]
    assert [run.reason for run in failures.failed] == ["a reason"]


def experiment_of(config: Config) -> Experiment:
    return Experiment("digits", config, Path("out"))


def test_lottery_run_with_other_masks_is_refused(finished_lottery, command_server, tmp_path):
    workdir, _ = finished_lottery
    shutil.copytree(workdir / "out", tmp_path / "out")
    folder = run_folder.latest_checkpoint(tmp_path / "out/seed-0/level-1")
    save_weights(
        folder / MASKS, {n: mask.flip(0) for n, mask in read_masks(folder / MASKS).items()}
    )
    names = {path.name for path in folder.iterdir()} - {manifest.MANIFEST}
    manifest.write_manifest(
        folder, manifest.digests(folder, names), step=run_folder.checkpoint_step(folder)
    )
    for _ in range(2):  # the first refusal changes nothing
        done = command_server.run(*LOTTERY, "--out", "out", cwd=tmp_path)
        assert done.code == 4
        assert re.search(rf"\bout/seed-0/level-1: .*\b{MASKS}\b", done.err)
        # Level 2 depends on it, so it is not reported either.
        rows = result(tmp_path / "out")["rows"]
        assert rows["dense"]["seeds"] == [0]
        for name in ("ticket, 50.0 %", "ticket, 75.0 %", "random, 75.0 %"):
            assert list(rows[name]["failed"]) == ["0"]


def test_final_weights_of_damaged_checkpoint_raise(finished_lottery, tmp_path):
    workdir, _ = finished_lottery
    run = tmp_path / "level-1"
    shutil.copytree(workdir / "out/seed-0/level-1", run)
    assert final_weights(run)
    (run_folder.latest_checkpoint(run) / "model.safetensors").write_bytes(b"cut off")
    with raises(CheckpointError, run):
        final_weights(run)
