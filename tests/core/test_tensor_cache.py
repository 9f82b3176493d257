"""Constant tensors are made once, and never kept from a trace without values."""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import deit

NAMES = ("a", "b", "c")
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
IMAGES = torch.rand(2, 3, 8, 8)
POLICIES = ["randaugment", "three_augment", "autoaugment", "none"]


class MeanColor(nn.Module):
    def forward(self, images):
        return 40 * (images.mean(dim=(2, 3)) - 0.5)


def reordered_teacher():
    return deit.load_teacher(MeanColor(), ("c", "a", "b"), classes=NAMES, **PLAIN)


def without_values(teacher):
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher(IMAGES)


def exported(teacher):
    program = torch.export.export(teacher, (IMAGES,), strict=False)
    assert torch.equal(program.module()(IMAGES), MeanColor()(IMAGES)[:, [2, 0, 1]])


@pytest.mark.parametrize("trace", [without_values, exported])
def test_teacher_is_itself_after_a_trace(trace):
    teacher = reordered_teacher()
    trace(teacher)
    expected = MeanColor()(IMAGES)[:, [2, 0, 1]]
    for current in (teacher, reordered_teacher()):
        assert torch.equal(current(IMAGES), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_views_are_the_same_after_a_trace(policy):
    views = deit.ViewsConfig(
        crop="random_resized", auto_augment=policy, color_jitter=0.3, erasing_prob=1.0
    )
    pixels = torch.randint(0, 256, (4, 3, 13, 13), dtype=torch.uint8)

    def make():
        return deit.make_views(pixels, views, seed=0, epoch=0, sample_ids=range(4), size=7)

    # Some operations need values.
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(RuntimeError):
        make()
    assert torch.equal(make(), make())
    assert type(make()) is torch.Tensor


def test_compiled_teachers_and_ensembles_do_not_warn():
    torch._dynamo.reset()
    teacher = reordered_teacher()
    ensemble = deit.TeacherEnsemble([teacher, teacher], weights=(3, 1))
    rows = torch.arange(2)
    batch = deit.Batch(IMAGES, IMAGES, torch.zeros(2, 3), rows, 0, rows)
    expected = teacher(IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(teacher, backend="eager", fullgraph=True)
        assert torch.equal(compiled(IMAGES), expected)
        output = torch.compile(ensemble.__call__, backend="eager")(batch)
    assert torch.allclose(output.logits[:, 0].softmax(dim=1), expected.softmax(dim=1), atol=1e-6)
    torch._dynamo.reset()


def test_teacher_moves_with_its_classes():
    teacher = reordered_teacher()
    assert teacher.to("meta")(IMAGES.to("meta")).shape == (2, 3)
    assert all(not name.startswith("class") for name in teacher.state_dict())
