"""Runs of each kind and their exports, shared by the tests."""

from pathlib import Path

import pytest

from deit.config.recipes.handwriting import digits, digits_teacher
from deit.deploy.export import export
from deit.training.train import train
from tests.helpers.exports import STUDENTS
from tests.helpers.trained import shared_folder, trained

OPTIM = {"epochs": 2, "batch_size": 32, "warmup_epochs": 1, "lr": 3e-3}
DATA = {"train_fraction": 0.3}


@pytest.fixture(scope="package")
def runs(tmp_path_factory):
    """Return a folder with students of each kind, trained until predictions vary, and a ConvNet."""
    return shared_folder(tmp_path_factory, "runs-to-export", _train)


def _train(folder: Path) -> None:
    trained(digits_teacher().replace(optim={"epochs": 3}), folder / "convnet")
    two = {"source": (str(folder / "convnet"),) * 2, "combine": "tokens"}
    for name, sections in STUDENTS.items():
        config = digits().replace(optim=OPTIM, data=DATA, **{"teacher": two, **sections})
        train(config, folder / name, command=f"train_deit.py {name}")


class _Exports(dict):
    """The folders of exports by run and format; each is written when it is first used."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def __missing__(self, key: tuple[str, str]) -> Path:
        name, form = key
        self[key] = export(self.runs / name, None, format=form, images=64)
        return self[key]


@pytest.fixture(scope="package")
def exports(runs):
    return _Exports(runs)
