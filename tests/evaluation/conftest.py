"""Runs that tests of evaluation look at: trained once for each file."""

import pytest

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.training.train import train
from tests.helpers.trained import trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, its student, and the same by labels alone."""
    folder = tmp_path_factory.mktemp("runs")
    trained(digits_teacher().replace(optim={"epochs": 3}), folder / "teacher")
    config = digits().replace(
        data={"train_fraction": 0.2},
        student={"depth": 2, "embed_dim": 32, "num_heads": 2},
        teacher={"source": (str(folder / "teacher"),)},
        optim={"epochs": 4, "batch_size": 64, "warmup_epochs": 1, "lr": 3e-3},
    )
    train(config, folder / "student")
    train(config.replace(loss=LOSS_PRESETS["none"]), folder / "labels")
    return folder
