"""Lottery tickets: which runs, under which masks, going back to where; what is told of them."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deit.config.recipes.handwriting import digits
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
from deit.experiments.runner import FailedRun
from deit.experiments.shared_targets import teacher_query_key
from deit.experiments.sweep_execute import SweepFailures
from deit.experiments.sweep_plan import SweepPlan
from deit.models.saved import build_student, load_student, save_weights
from deit.models.surgery.pruning_masks import MASKS, is_masked, num_remaining, read_masks
from tests.helpers.commands import runs_over
from tests.helpers.errors import raises
from tests.helpers.processes import Completed
from tests.helpers.sweeps import LOTTERY, planned_lottery, result

pytest.importorskip("sklearn")
TRAINED = ("model", "average", "optimizer", "masks")


def test_a_level_goes_back_to_the_dense_runs_weights_and_update(tmp_path):
    plan, found = planned_lottery(tmp_path, levels=2, rate=0.5, rewind=1.5)
    assert (plan.rewind, plan.densities) == (6, (0.5, 0.25))
    names = ["level-0", "level-1", "random-1", "re-initialised-1"]
    names += ["level-2", "random-2", "re-initialised-2", "one-shot-2"]
    assert [one.spec.out.name for one in found] == names
    assert found[0].spec.config.run.keep_steps == (6,)
    assert found[0].spec.config.init == digits().init
    for one in found[1:]:
        start, seed = one.spec.config.init, one.spec.config.run.seed
        kind = "level" if one.kind in ("ticket", REINITIALIZED) else one.kind
        assert start.pruning_masks == str(
            tmp_path / "seed-3" / "masks" / f"{kind}-{one.level}.safetensors"
        )
        if one.kind == REINITIALIZED:
            assert (start.weights, start.start_step) == (None, 0)
            assert seed != 3
            assert one.spec.config.views.seed == 3
        else:
            assert start.weights == str(tmp_path / "seed-3" / "level-0" / "checkpoint-00000006")
            assert (start.start_step, seed, one.spec.config.views.seed) == (6, 3, None)


def test_by_itself_it_goes_back_to_where_warm_up_ends(tmp_path):
    plan, _ = planned_lottery(tmp_path)
    assert plan.rewind == 2 * 4
    assert plan.densities == pytest.approx((0.8, 0.64, 0.512, 0.4096, 0.32768, 0.262144, 0.2097152))


def test_the_initial_weights_come_from_the_seed(tmp_path):
    _, found = planned_lottery(tmp_path, levels=1, rewind=0)
    assert found[0].spec.config.run.keep_steps == ()
    start = found[1].spec.config.init
    assert (start.weights, start.start_step) == (None, 0)
    assert found[1].spec.config.run == found[0].spec.config.run


def test_controls_only_where_they_are_asked_for(tmp_path):
    _, found = planned_lottery(
        tmp_path, levels=3, controls=(RANDOM, ONE_SHOT), control_levels=(1, 3)
    )
    told = [(one.kind, one.level) for one in found]
    assert told == [
        *(("dense", 0), ("ticket", 1), (RANDOM, 1), ("ticket", 2)),
        *(("ticket", 3), (RANDOM, 3), (ONE_SHOT, 3)),
    ]


def test_fine_tuned_tickets_start_where_their_dense_run_does(tmp_path):
    start = {"weights": "weights.pth", "head": "new", "pos_embed_resize": "timm"}
    config = digits().replace(init=start)
    _, found = planned_lottery(tmp_path, config, levels=1, rewind=0)
    starts = {one.kind: one.spec.config.init for one in found}
    assert starts["dense"] == config.init
    assert (starts["ticket"].weights, starts["ticket"].head) == ("weights.pth", "new")
    assert (
        starts[REINITIALIZED].weights,
        starts[REINITIALIZED].head,
        starts[REINITIALIZED].pos_embed_resize,
    ) == (None, "keep", "deit")
    _, found = planned_lottery(tmp_path, config, levels=1, rewind=1)
    assert found[1].spec.config.init.head == "keep"  # the dense run has heads by then


def test_all_runs_of_a_seed_ask_their_teacher_the_same(tmp_path):
    config = digits().replace(views={"mean": (0.1,) * 3, "std": (0.3,) * 3})
    _, found = planned_lottery(tmp_path, config, levels=2)
    assert len({json.dumps(teacher_query_key(one.spec.config)) for one in found}) == 1


def runs_listed(done: Completed) -> tuple[int, ...]:
    """How many runs a command begins with, of how many epochs, and how many are finished."""
    (line,) = [line for line in done.out.splitlines() if re.match(r"runs\b", line)]
    return tuple(map(int, re.findall(r"\d+", line)))


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run_folder.latest_checkpoint(run) / f"{name}.safetensors")


def test_every_run_is_told_with_its_sparsity(searched):
    place, done = searched
    found = result(place / "out")
    names = ["dense", "ticket, 50.0 %", "ticket, 75.0 %"]
    names += ["random, 75.0 %", "re-initialised, 75.0 %", "one-shot, 75.0 %"]
    assert list(found["rows"]) == ["teacher", *names]
    assert all(found["rows"][name]["seeds"] == [0, 1] for name in names)
    text = (place / "out" / "results.csv").read_text()
    lines = list(csv.DictReader(text.splitlines()))
    assert len(lines) == 2 * len(names)
    told = {(line["point"], line["run"], line["sparsity %"]) for line in lines}
    assert told == {("dense", "dense", "0.0")} | {
        (name, *name.removesuffix(" %").split(", ")) for name in names[1:]
    }
    assert runs_listed(done) == (12, 3, 0)
    assert runs_over(done.out)[-1] == (13, 13)  # the teacher is one
    assert (place / "out" / "tickets.png").stat().st_size > 10_000
    page = (place / "out" / "results.md").read_text()
    assert "| ticket, 75.0 % | 768 | 3,072 | 75.0 |" in page
    assert matching_line(found) in page


def test_masks_are_nested_exact_and_of_the_end_before(searched):
    place, _ = searched
    for seed in (0, 1):
        folder = place / "out" / f"seed-{seed}"
        masks = {path.stem: read_masks(path) for path in (folder / "masks").iterdir()}
        kept = {name: num_remaining(one) for name, one in masks.items()}
        assert kept == {"level-1": 1536, "level-2": 768, "random-2": 768, "one-shot-2": 768}
        # By hand: the largest of all, and the largest of what level 1 kept.
        ends = final_weights(folder / "level-0")
        ranked = torch.cat([one.abs().flatten() for one in ends.values()])
        least = {number: ranked.topk(number).values[-1] for number in (1536, 768)}
        for name, one in ends.items():
            assert torch.equal(masks["level-1"][name], one.abs() >= least[1536])
            assert torch.equal(masks["one-shot-2"][name], one.abs() >= least[768])
            assert not (masks["level-2"][name] & ~masks["level-1"][name]).any()
            mine, theirs = masks["random-2"][name], masks["level-2"][name]
            assert mine.sum() == theirs.sum()
            assert not torch.equal(mine, theirs)
        ends = final_weights(folder / "level-1")
        kept_before = torch.cat([ends[name][masks["level-1"][name]].abs() for name in ends])
        least_kept = kept_before.topk(768).values[-1]
        for name, one in ends.items():
            asked = masks["level-1"][name] & (one.abs() >= least_kept)
            assert torch.equal(masks["level-2"][name], asked)


def test_every_file_of_every_run_holds_its_masks(searched):
    place, _ = searched
    runs = [path.parent for path in place.glob("out/seed-*/*/result.json")]
    assert len(runs) == 12
    for run in runs:
        if run.name == "level-0":
            continue
        name = run.name.replace("re-initialised", "level")
        masks = read_masks(run.parent / "masks" / f"{name}.safetensors")
        assert all(torch.equal(masks[name], one) for name, one in weights(run, "masks").items())
        for file in ("model", "average"):
            assert is_masked(masks, weights(run, file))
        assert is_masked(masks, load_file(run / "best" / "model.safetensors"))


def test_a_re_initialised_control_has_other_weights_from_the_first_update(searched, tmp_path):
    """Every surviving weight: held against the dense run's initial ones, by their seeds."""
    place, _ = searched
    folder = place / "out" / "seed-0"
    _, facts = load_student(folder / "level-0" / "best")
    drawn = {}
    for run in ("level-0", "re-initialised-2"):
        torch.manual_seed(load_config(folder / run / "config.json").run.seed)
        drawn[run] = dict(build_student(facts).network.named_parameters())
    for name, mask in read_masks(folder / "masks" / "level-2.safetensors").items():
        same = drawn["level-0"][name] == drawn["re-initialised-2"][name]
        assert not same[mask].any()


def test_the_runs_of_a_seed_share_one_store(searched):
    place, _ = searched
    assert len(list((place / "out" / "targets").iterdir())) == 2
    for seed in (0, 1):
        runs = place.glob(f"out/seed-{seed}/*/config.json")
        taught = {json.loads(path.read_text())["teacher"]["target_stores"][0] for path in runs}
        assert len(taught) == 1


def test_the_same_command_trains_nothing_again(searched, command_server):
    place, _ = searched
    before = {path: path.stat().st_mtime_ns for path in place.glob("out/**/model.safetensors")}
    told = result(place / "out")["rows"]
    done = command_server.run(*LOTTERY, "--seeds", "0,1", "--out", "out", cwd=place)
    assert done.code == 0, done.err
    assert runs_listed(done) == (12, 3, 12)
    assert {path: path.stat().st_mtime_ns for path in place.glob("out/**/model.safetensors")} == (
        before
    )
    assert "out/seed-" not in done.err  # as those that are not asked for are named
    after = result(place / "out")["rows"]
    assert {name: row["top1"] for name, row in after.items()} == {
        name: row["top1"] for name, row in told.items()
    }


def test_runs_that_are_there_and_not_asked_for_are_named(searched, command_server):
    place, _ = searched
    done = command_server.run(*LOTTERY, "--seeds", "1", "--out", "out", "--dry-run", cwd=place)
    assert done.code == 0, done.err
    assert re.search(r"\b6\b.*\bout/seed-0/level-0\b", done.err)


@pytest.mark.slow
def test_interrupted_in_a_level_it_goes_on_to_the_same_bits(searched, command_server, tmp_path):
    """Killed in the second level of the second seed, which then goes on from its checkpoint."""
    place, _ = searched
    shutil.copytree(place / "out", tmp_path / "out")
    level = tmp_path / "out" / "seed-1" / "level-2"
    files = [f"{name}.safetensors" for name in TRAINED]
    kept = {file: (run_folder.latest_checkpoint(level) / file).read_bytes() for file in files}
    chain = run_log.read(level / run_log.HASH_CHAIN)
    for run in ("level-2", "random-2"):
        shutil.rmtree(level.with_name(run))
        level.with_name(f"{run}.evaluation.json").unlink(missing_ok=True)
    (level.parent / "masks" / "level-2.safetensors").unlink()
    arguments = (*LOTTERY, "--seeds", "0,1", "--out", "out", "--retries", "0")
    done = command_server.run(*arguments, cwd=tmp_path, DEIT_FAULT="update:5:kill")
    assert done.code == 1
    assert [name in done.err for name in ("level-2.log", "random-2.log")] == [True] * 2
    assert done.err.count(".log") == 2
    assert (
        run_log.read(level / run_log.HASH_CHAIN)
        == chain[: len(run_log.read(level / run_log.HASH_CHAIN))]
    )
    assert run_folder.read_result(level) is None
    told = result(tmp_path / "out")["rows"]["ticket, 75.0 %"]
    assert (told["seeds"], list(told["failed"])) == ([0], ["1"])
    done = command_server.run(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    assert run_log.read(level / run_log.HASH_CHAIN) == chain
    assert {
        file: (run_folder.latest_checkpoint(level) / file).read_bytes() for file in files
    } == kept


@pytest.mark.slow
def test_more_levels_and_seeds_go_on_from_what_there_is(searched, command_server, tmp_path):
    place, _ = searched
    shutil.copytree(place / "out", tmp_path / "out")
    more = [*LOTTERY, "--seeds", "0,1", "--controls", "none", "--out", "out"]
    more[more.index("--rounds") + 1] = "3"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/result.json")}
    done = command_server.run(*more, cwd=tmp_path)
    assert done.code == 0, done.err
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/result.json")}
    assert {path.parent.name for path in after.keys() - before.keys()} == {"level-3"}
    assert before.items() <= after.items()
    masks = [read_masks(tmp_path / f"out/seed-0/masks/level-{at}.safetensors") for at in (2, 3)]
    assert [num_remaining(one) for one in masks] == [768, 384]


def test_a_level_that_fails_bars_those_behind_it_of_its_seed(monkeypatch, tmp_path):
    asked = []

    def train_all(work, **_):
        asked.extend(run.name for run in work.runs)
        failed = [
            FailedRun(run, 1, "a reason", tmp_path / "log")
            for run in work.runs
            if run.name == "ticket of level 1, seed 0"
        ]
        return SweepFailures(failed, {})

    monkeypatch.setattr(lottery, "train_all", train_all)
    monkeypatch.setattr(lottery, "write_masks", lambda ticket, plan: None)
    config = digits().replace(optim={"epochs": 10, "warmup_epochs": 2})
    plan = plan_lottery(LotteryOptions(levels=3, controls=(RANDOM,)), config, steps_per_epoch=4)
    found = [one for seed in (0, 1) for one in lottery_runs(plan, config, seed, tmp_path)]
    runs = [one.spec for one in found]
    work = SweepPlan(BaseRuns(arguments_of(config), config, tmp_path), [], [], [], runs)
    mishaps = lottery._train(plan, work, found, parallel=1, retries=0)
    missing = {run.name for run in runs} - set(asked)
    assert missing == {
        f"{kind} of level {level}, seed 0" for kind in ("ticket", RANDOM) for level in (2, 3)
    }
    barred = {out.name: reason for out, reason in mishaps.blocked.items()}
    assert set(barred) == {"level-2", "random-2", "level-3", "random-3"}
    assert str(tmp_path / "seed-0" / "level-1") in barred["level-2"]
    assert [one.reason for one in mishaps.failed] == ["a reason"]


def arguments_of(config):
    return Experiment("digits", config, Path("out"))


def test_weights_that_say_other_masks_than_a_run_was_trained_under(
    searched, command_server, tmp_path
):
    place, _ = searched
    shutil.copytree(place / "out", tmp_path / "out")
    folder = run_folder.latest_checkpoint(tmp_path / "out/seed-0/level-1")
    save_weights(folder / MASKS, {n: one.flip(0) for n, one in read_masks(folder / MASKS).items()})
    names = {path.name for path in folder.iterdir()} - {manifest.MANIFEST}
    manifest.write_manifest(
        folder, manifest.digests(folder, names), step=run_folder.checkpoint_step(folder)
    )
    for _ in range(2):  # it stays refused
        done = command_server.run(*LOTTERY, "--out", "out", cwd=tmp_path)
        assert done.code == 4
        assert re.search(rf"\bout/seed-0/level-1: .*\b{MASKS}\b", done.err)
        # Its level 2 followed from it, and is not told.
        told = result(tmp_path / "out")["rows"]
        assert told["dense"]["seeds"] == [0]
        for name in ("ticket, 50.0 %", "ticket, 75.0 %", "random, 75.0 %"):
            assert list(told[name]["failed"]) == ["0"]


def test_a_run_whose_end_is_damaged_is_not_pruned_further(searched, tmp_path):
    place, _ = searched
    run = tmp_path / "level-1"
    shutil.copytree(place / "out/seed-0/level-1", run)
    assert final_weights(run)
    (run_folder.latest_checkpoint(run) / "model.safetensors").write_bytes(b"cut off")
    with raises(CheckpointError, run):
        final_weights(run)
