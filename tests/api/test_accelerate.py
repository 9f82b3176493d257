"""Calls of our functions in a loop that has its own Accelerator: each keeps its settings."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import deit
from tests.helpers.small_runs import two_epochs
from tests.helpers.trained import trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return deit.load_run(trained(two_epochs(), tmp_path_factory.mktemp("accelerate") / "run"))


@pytest.fixture(autouse=True)
def no_state():
    """Start and end without an Accelerator, as a process does."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


def write_targets(run, folder):
    teacher = {"source": str(run.path), "allow_near_chance": True}
    config = deit.recipe("digits", teacher=teacher, data={"train_fraction": 0.1})
    deit.write_targets(config, folder / "targets", epochs=1, verbose=False)


CALLS = {
    "dry_run": lambda run, folder: deit.dry_run(run.config, verbose=False),
    "train": lambda run, folder: deit.train(
        run.config.replace(optim={"epochs": 1, "warmup_epochs": 0}), folder / "run", verbose=False
    ),
    "evaluate": lambda run, folder: deit.evaluate(run, verbose=False),
    "view_sheet": lambda run, folder: deit.view_sheet(run.config, verbose=False),
    "write_targets": write_targets,
}


def precision_in_autocast(accelerator):
    layer = torch.nn.Linear(2, 2)
    with accelerator.autocast():
        return layer(torch.zeros(1, 2)).dtype


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_accelerator_of_a_loop_keeps_its_settings(call, run, tmp_path):
    accelerator = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=3)
    call(run, tmp_path)
    assert accelerator.mixed_precision == "bf16"
    assert precision_in_autocast(accelerator) == torch.bfloat16
    assert accelerator.gradient_accumulation_steps == 3
    assert AcceleratorState().mixed_precision == "bf16"  # as an optimizer it prepares reads it


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_accelerator_can_be_made_after_a_call(call, run, tmp_path):
    call(run, tmp_path)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    assert precision_in_autocast(accelerator) == torch.bfloat16
    assert accelerator.gradient_accumulation_steps == 1


def test_settings_are_kept_if_a_call_fails(tmp_path):
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    config = deit.recipe("digits", teacher={"source": str(tmp_path / "missing")})
    with pytest.raises(deit.errors.NotFoundError):
        deit.train(config, tmp_path / "run", verbose=False)
    assert accelerator.mixed_precision == AcceleratorState().mixed_precision == "bf16"
