"""Runs of each kind and their exports, shared by the tests."""

import pytest

from deit.config.recipes.handwriting import digits, digits_teacher
from deit.core.errors import ConfigError
from deit.deploy.export import export
from deit.deploy.export_formats import FORMATS
from deit.training.train import train
from tests.helpers.exports import STUDENTS
from tests.helpers.trained import trained

OPTIM = {"epochs": 2, "batch_size": 32, "warmup_epochs": 1, "lr": 3e-3}
DATA = {"train_fraction": 0.3}


@pytest.fixture(scope="package")
def runs(tmp_path_factory):
    """Return a folder with students of each kind, trained until predictions vary, and a ConvNet."""
    folder = tmp_path_factory.mktemp("runs")
    trained(digits_teacher().replace(optim={"epochs": 3}), folder / "convnet")
    two = {"source": (str(folder / "convnet"),) * 2, "combine": "tokens"}
    for name, sections in STUDENTS.items():
        config = digits().replace(optim=OPTIM, data=DATA, **{"teacher": two, **sections})
        train(config, folder / name, command=f"train_deit.py {name}")
    return folder


@pytest.fixture(scope="package")
def exports(runs):
    """Export every run in every format that supports it, as (run, format) -> folder."""
    folders = {}
    for name in (*STUDENTS, "convnet"):
        for form in FORMATS:
            try:
                folders[name, form] = export(runs / name, None, format=form, images=64)
            except ConfigError:
                continue
    return folders
