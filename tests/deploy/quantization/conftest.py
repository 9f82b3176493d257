"""Runs and networks to quantize, trained and exported once."""

from unittest import mock

import pytest
import torch

from deit.config.recipes.handwriting import digits, digits_teacher
from deit.deploy import quantize, quantize_input
from deit.deploy.quantize_options import QuantizeOptions
from deit.training.train import train
from tests.helpers.exports import (
    QUANTIZABLE,
    SMALL_DEIT,
    WITHOUT_TEACHER,
    prepared_network,
    write_once,
)
from tests.helpers.trained import trained

DATA = {"train_fraction": 0.5}
OPTIM = {"epochs": 5, "batch_size": 32, "warmup_epochs": 1, "lr": 3e-3}
PLAIN = {**SMALL_DEIT, "name": "vit_micro", "depth": 1}
RUNS = {"distilled": {"student": SMALL_DEIT}, "plain": {"student": PLAIN}}


@pytest.fixture(scope="package", autouse=True)
def _export_once():
    with mock.patch.object(quantize_input, "write_onnx_with_metadata", write_once):
        yield


@pytest.fixture(scope="package")
def runs(tmp_path_factory):
    """Return a folder with finished runs: a distilled student, a plain one, a ConvNet."""
    folder = tmp_path_factory.mktemp("runs")
    trained(digits_teacher().replace(optim={"epochs": 3}), folder / "convnet")
    for name, sections in RUNS.items():
        train(
            digits().replace(data=DATA, optim=OPTIM, **WITHOUT_TEACHER, **sections), folder / name
        )
    return folder


@pytest.fixture(scope="package")
def folders(runs):
    """Quantize every run by every method that supports it, as (run, method) -> folder."""
    return {
        (name, method): quantize.quantize(
            runs / name,
            None,
            QuantizeOptions(method=method, max_drop=5),
            command=f"deit quantize {name} --method {method}",
        )
        for name, method in QUANTIZABLE
    }


@pytest.fixture(scope="package")
def micro(tmp_path_factory):
    """Return a prepared ONNX file of a random small DeiT, its layers, the network, and images."""
    folder = tmp_path_factory.mktemp("micro")
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return *prepared_network(folder, "deit_micro", patch_size=2, **SMALL_DEIT), images
