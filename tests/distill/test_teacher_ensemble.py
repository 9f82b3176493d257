"""Outputs of the teacher ensemble, and errors for nonfinite outputs."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from deit.core.errors import NumericsError
from deit.core.types import Batch
from deit.distill.teacher_ensemble import OnlineTeacher, TeacherEnsemble
from deit.models.teachers import LoadedNetwork, Teacher
from tests.helpers.errors import raises


class Mean(nn.Module):
    """Return the mean of each channel divided by their sum: NaN for a black image."""

    def forward(self, images):
        mean = images.mean(dim=(2, 3))
        return mean / mean.sum(dim=1, keepdim=True)


def online_teacher():
    network = Teacher(LoadedNetwork(Mean(), "mean", None, (0.0,) * 3, (1.0,) * 3, None))
    return OnlineTeacher(network, Accelerator(cpu=True))


def stored_teacher(labels):
    return lambda batch: (labels[batch.target_rows], None)


def make_ensemble(*teachers, mode="probabilities", needs_logits=False):
    weights = (1 / len(teachers),) * len(teachers)
    settings = {"mode": mode, "temperature": 1.0, "needs_logits": needs_logits}
    return TeacherEnsemble(list(teachers), weights=weights, name="image {}".format, **settings)


def batch(images, sample_ids=None):
    sample_ids = torch.arange(len(images)) + 40 if sample_ids is None else sample_ids
    return Batch(images, images, torch.zeros(0), sample_ids, 0, torch.arange(len(images)))


IMAGES = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("needs_logits", [False, True])
def test_ensemble_of_one_network_has_one_output(needs_logits):
    outputs = make_ensemble(online_teacher(), needs_logits=needs_logits)(batch(IMAGES))
    assert outputs.labels.tolist() == IMAGES.mean(dim=(2, 3)).argmax(dim=1)[:, None].tolist()
    assert (outputs.logits is not None) is needs_logits


def test_ensemble_of_tokens_combines_networks_and_stored_labels():
    teachers = online_teacher(), stored_teacher(torch.tensor([2, 1, 0, 2]))
    outputs = make_ensemble(*teachers, mode="tokens")(batch(IMAGES))
    assert outputs.labels.shape == (4, 2)
    assert outputs.labels[:, 1].tolist() == [2, 1, 0, 2]


@pytest.mark.fault("D4")
@pytest.mark.parametrize("needs_logits", [False, True])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_nonfinite_teacher_outputs_raise_with_the_image_names(value, needs_logits):
    images = IMAGES.clone()
    images[[1, 3]] = value
    with raises(NumericsError, "image 41", "image 43") as stopped:
        make_ensemble(online_teacher(), needs_logits=needs_logits)(batch(images))
    assert str(stopped.value).count("image 4") == 2


def test_rare_checks_report_earlier_nonfinite_outputs(monkeypatch):
    ensemble = make_ensemble(online_teacher())
    monkeypatch.setattr(ensemble, "check", lambda: None)  # as on a GPU between two checks
    images = IMAGES.clone()
    images[2] = 0.0
    ensemble(batch(images))
    for _ in range(3):
        ensemble(batch(IMAGES))
    monkeypatch.undo()
    with raises(NumericsError, "image 42"):
        ensemble.check()
    ensemble.check()  # raised only once
