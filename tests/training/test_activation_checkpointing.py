"""Activation checkpointing: bit-identical results with less memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.core.errors import ConfigError
from deit.core.run_folder import latest_checkpoint
from deit.training.build import build_run
from deit.training.train import train
from tests.helpers.errors import raises

pytest.importorskip("sklearn")


def config(**sections):
    small = digits().replace(
        student={"depth": 4, "embed_dim": 24, "num_heads": 2, "drop_path": 0.3, "dropout": 0.1},
        teacher={"source": ()},
        loss=LOSS_PRESETS["none"],
        optim={"epochs": 1, "warmup_epochs": 0},
    )
    return small.replace(**sections)


def saved_bytes(config):
    """Return what a forward pass keeps for the backward pass, without the weights [bytes]."""
    student, saved = build_run(config).student.train(), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = student(torch.rand(32, 3, 8, 8))
        assert outputs.class_logits.requires_grad
    return sum(saved.values())


def test_activation_checkpointing_keeps_a_fraction_of_the_memory():
    plain, checkpointed = (
        saved_bytes(config(run={"activation_checkpointing": enabled})) for enabled in (False, True)
    )
    assert checkpointed < 0.15 * plain


@pytest.mark.parametrize("linear", ["torch", "onednn"])
def test_activation_checkpointing_is_bit_identical(tmp_path, linear):
    """With drop path: the second forward pass drops the same paths."""
    weights = []
    for enabled in (False, True):
        out = tmp_path / str(enabled)
        train(config(run={"activation_checkpointing": enabled, "linear_backend": linear}), out)
        weights.append((latest_checkpoint(out) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_activation_checkpointing_without_blocks_is_refused():
    convnet = digits_teacher().replace(run={"activation_checkpointing": True})
    with raises(ConfigError, "run.activation_checkpointing"):
        build_run(convnet)
