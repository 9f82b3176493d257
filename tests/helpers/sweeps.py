"""Sweeps, searches and lotteries of small runs, and their results."""

import json
from dataclasses import asdict

from deit.config.recipes.handwriting import digits
from deit.core import run_folder, run_log
from deit.experiments.lottery_options import LotteryOptions
from deit.experiments.lottery_plan import lottery_runs, plan_lottery
from deit.experiments.parallel_runs import RunSpec
from deit.experiments.search import Search
from deit.experiments.sweep_spec import SearchRange, SearchSpace, read_sweep
from deit.viz.tables import HEADS
from tests.helpers.small_runs import WITH_AVERAGE

LR = {"optim.lr": SearchRange(1e-4, 1e-1, log=True)}


def open_search(
    out, *, trials=8, fields=LR, prune=True, epochs=8, search_hash="this", retries=0, run_of=None
):
    """Open a search. run_of: the run of a point; default: a run in a folder of the point's name."""
    base = digits().replace(optim={"epochs": epochs, "warmup_epochs": 1})
    space = SearchSpace(fields, trials, prune)

    def run_by_name(point):
        return RunSpec(point.name, point.config, out / point.name.replace(" ", "-"))

    run_of = run_of or run_by_name
    options = {"name": "s", "seed": 0, "search_hash": search_hash, "retries": retries}
    return Search(space, base, out, **options, run_of=run_of)


def add_epoch(run, epoch, top1):
    """Write the metrics of a run after an epoch."""
    run.out.mkdir(exist_ok=True)
    row = {"epoch": epoch, "step": epoch, "train": {"lr": 0.1}, "seconds": 1.0}
    run_log.append(run.out / run_log.METRICS, {**row, "validation": {"class_top1": top1}})


def finish(run, top1):
    """Write the result of a finished run."""
    run.out.mkdir(exist_ok=True)
    best = {"epoch": 8, "top1": top1, "class_top1": top1}
    result = run_folder.Result(8, 8, 8, 1.0, 0, None, best, "", "", [], [])
    (run.out / run_folder.RESULT).write_text(json.dumps(asdict(result)))


SMALL = {
    "student": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "optim": {"epochs": 2, "warmup_epochs": 1, "batch_size": 64},
    "run.eval_every_epochs": 2,
    "data.train_fraction": 0.2,
}


def write(path, **values):
    """Write a sweep file with the small student."""
    path.write_text(json.dumps({"recipe": "digits", "set": SMALL, **values}))
    return path


def read(folder, text, name="s.yaml"):
    """Return the sweep of a text in YAML, or of values, written to a file of this name."""
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return read_sweep(path)


def result(out):
    """Return the results of a sweep or lottery."""
    return json.loads((out / "results.json").read_text())


LOTTERY = (
    *("lottery", "digits", *WITH_AVERAGE, "--rounds", "2", "--prune-rate", "0.5"),
    *("--rewind-epoch", "0.5", "--control-rounds", "2"),
)
"""The command line of a lottery of two levels, without seeds and output folder."""


def planned_lottery(tmp_path, config=None, **options):
    """Return the plan of a lottery and its runs with seed 3."""
    config = config or digits().replace(optim={"epochs": 10, "warmup_epochs": 2})
    plan = plan_lottery(LotteryOptions(**options), config, steps_per_epoch=4)
    return plan, lottery_runs(plan, config, 3, tmp_path)


def row(values, fused, *, validation=(0.5,), failed=None, teacher=False):
    """Return a row of results.json with the fused top-1 of each seed."""
    heads = [dict(zip(HEADS, (top1 - 0.1, top1, top1))) for top1 in fused]
    return {
        "values": values,
        "top1": heads,
        "agreement": [0.5] * len(fused),
        "seconds": [10.0] * len(fused),
        "images_per_s": [1000.0] * len(fused),
        "curves": [[(1, top1)] for top1 in fused],
        "validation": list(validation)[: len(fused)],
        "epochs": 1,
        "teacher": teacher,
        "seeds": list(range(len(fused))),
        "folders": ["x"] * len(fused),
        "failed": failed or {},
    }
