"""Searches over a learning rate, and the runs they wait for."""

import json
from dataclasses import asdict

from deit import checkpoint, journal
from deit.at_once import RunSpec
from deit.recipes import digits
from deit.search import Search
from deit.sweep_file import SearchRange, SearchSpace

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
    journal.append(run.out / journal.METRICS, {**row, "validation": {"class_top1": top1}})


def finish(run, top1):
    run.out.mkdir(exist_ok=True)
    best = {"epoch": 8, "top1": top1, "class_top1": top1}
    result = checkpoint.Result(8, 8, 8, 1.0, 0, None, best, "", "", [], [])
    (run.out / checkpoint.RESULT).write_text(json.dumps(asdict(result)))
