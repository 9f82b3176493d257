"""Searches over a learning rate, and the runs they wait for."""

import json
from dataclasses import asdict

from deit.config.recipes.handwriting import digits
from deit.core import run_folder, run_log
from deit.experiments.runner import RunSpec
from deit.experiments.search import Search
from deit.experiments.sweep_spec import SearchRange, SearchSpace

LR = {"optim.lr": SearchRange(1e-4, 1e-1, log=True)}


def opened(out, *, trials=8, fields=LR, prune=True, epochs=8, of="this", retries=0, plan=None):
    """plan: which run a point is; None: one in a folder of the point's name."""
    base = digits().replace(optim={"epochs": epochs, "warmup_epochs": 1})
    space = SearchSpace(fields, trials, prune)

    def by_name(point):
        return RunSpec(point.name, point.config, out / point.name.replace(" ", "-"))

    return Search(space, base, out, name="s", seed=0, of=of, plan=plan or by_name, retries=retries)


def reach(run, epoch, top1):
    """The run as it is after an epoch."""
    run.out.mkdir(exist_ok=True)
    row = {"epoch": epoch, "step": epoch, "train": {"lr": 0.1}, "seconds": 1.0}
    run_log.append(run.out / run_log.METRICS, {**row, "validation": {"class_top1": top1}})


def finish(run, top1):
    run.out.mkdir(exist_ok=True)
    best = {"epoch": 8, "top1": top1, "class_top1": top1}
    result = run_folder.Result(8, 8, 8, 1.0, 0, None, best, "", "", [], [])
    (run.out / run_folder.RESULT).write_text(json.dumps(asdict(result)))
