"""Sweep files of small runs, and their results."""

import json

SMALL = {
    "student": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "optim": {"epochs": 2, "warmup_epochs": 1, "batch_size": 64},
    "run.eval_every_epochs": 2,
    "data.train_fraction": 0.2,
}


def write(path, **values):
    path.write_text(json.dumps({"recipe": "digits", "set": SMALL, **values}))
    return path


def result(out):
    return json.loads((out / "results.json").read_text())
