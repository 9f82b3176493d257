"""What a loss surface refuses: masks, sizes, layers without second derivatives, other precision."""

import functools

import pytest
import torch
from torch import nn

from deit.analysis.loss_surface import LossSurface
from deit.core.errors import ConfigError
from deit.models import onednn_linear
from tests.helpers.errors import raises
from tests.helpers.loss_surfaces import (
    loss,
    student,
    surface,
    vectors,
)

HEAD = "network.head.weight"


@pytest.mark.parametrize(
    ("masks", "names"),
    [
        ({"network.head.wieght": torch.ones(3, 12).bool()}, ("network.head.wieght", HEAD)),
        ({HEAD: torch.ones(3, 12)}, (HEAD, torch.float32, torch.bool)),
        ({HEAD: torch.ones(12, 3).bool()}, (HEAD, "[12, 3]", "[3, 12]")),
        ({HEAD: torch.zeros(3, 12).bool()}, (HEAD, 36)),
    ],
)
def test_wrong_masks_are_refused(masks, names):
    with raises(ConfigError, *names):
        surface(student(), masks=masks)


def test_impossible_surfaces_are_refused():
    network = student()
    for batches, sizes in (([], []), ([1], [1, 2]), ([1], [0])):
        with raises(ConfigError, "sizes", sizes):
            LossSurface(network, batches, loss, sizes=sizes)
    with raises(ConfigError, torch.bfloat16):
        surface(student().bfloat16())
    mixed = student()
    mixed.network.head.float()
    with raises(ConfigError, torch.float32, torch.float64):
        surface(mixed)
    lone = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(lone.weight)
    with pytest.raises(ConfigError) as raised:
        surface(lone, masks={"weight": torch.zeros(1, 2).bool()})
    assert raised.value.problems[0].field == "masks"


@pytest.mark.skipif(not onednn_linear.available(), reason="no oneDNN in this PyTorch")
def test_layers_of_one_derivative_are_refused_a_second_and_given_a_first():
    network = student(dtype=torch.float32)
    plain = surface(network)
    onednn_linear.use_onednn(network)
    land = surface(network)
    torch.testing.assert_close(
        land.gradient(land.point), plain.gradient(plain.point), atol=1e-5, rtol=1e-4
    )
    with raises(ConfigError, "oneDNN") as caught:
        land.hvp(land.point)
    assert "\n" not in str(caught.value)


def slope_of_cube(ctx, gradient):
    return 3 * ctx.saved_tensors[0] ** 2 * gradient


def opaque(function):
    """A decorator that hides what it decorates."""
    return lambda *arguments: function(*arguments)


def decorated(function):
    """As torch.amp.custom_bwd does it."""
    return functools.wraps(function)(opaque(function))


class SlopeOfCube(torch.autograd.Function):
    """3 x ** 2 times a gradient, with its derivatives by hand."""

    @staticmethod
    def forward(ctx, values, gradient):
        ctx.save_for_backward(values, gradient)
        return 3 * values**2 * gradient

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, second):
        values, gradient = ctx.saved_tensors
        return 6 * values * gradient * second, 3 * values**2 * second


once = torch.autograd.function.once_differentiable
CUBES = {
    "once": once(slope_of_cube),
    "once, under another decorator": decorated(once(slope_of_cube)),
    "once, hidden": opaque(once(slope_of_cube)),
    "twice": slope_of_cube,
    "twice, by hand": lambda ctx, gradient: SlopeOfCube.apply(ctx.saved_tensors[0], gradient),
}
"""Gradients of x ** 3, as one would write them in a layer of one's own."""


@pytest.mark.parametrize("kind", CUBES)
@pytest.mark.parametrize("power", [1, 2])
def test_functions_of_ones_own_are_right_or_refused(kind, power):
    """autograd.grad alone would leave the term of a function of one derivative out, and answer;
    with the power 1 the gradient that comes in is constant, and torch has not even a warning."""

    class Cube(torch.autograd.Function):
        backward = staticmethod(CUBES[kind])

        @staticmethod
        def forward(ctx, values):
            ctx.save_for_backward(values)
            return values**3

    def ours(network, batch):
        cubes = Cube.apply(network(batch[0]).class_logits)
        # cubes**1 would have a gradient that depends on them, for torch.
        return loss(network, batch) + (cubes if power == 1 else cubes**power).mean()

    def theirs(network, batch):
        return loss(network, batch) + (network(batch[0]).class_logits ** (3 * power)).mean()

    land, plain = surface(student(), loss=ours), surface(student(), loss=theirs)
    direction = vectors(1, land.point)[0]
    torch.testing.assert_close(land.gradient(land.point), plain.gradient(plain.point))
    if "once" not in kind:
        found, expected = land.hvp(direction), plain.hvp(direction)
        torch.testing.assert_close(found, expected)
    elif not (kind == "once, hidden" and power == 1):  # nothing is left to see this one by
        with raises(ConfigError, "oneDNN"):
            land.hvp(direction)


def test_a_loss_without_curvature_has_none():
    def flat(network, batch):
        return sum((2 * parameter).sum() for parameter in network.parameters())

    land = surface(student(), loss=flat)
    assert torch.equal(land.gradient(land.point), torch.full_like(land.point, 2))
    assert land.hvp(land.point).count_nonzero() == 0


def test_precision_is_that_of_the_weights_whatever_is_allowed_elsewhere():
    seen = []

    def spied(network, batch):
        seen.append(
            (
                torch.get_float32_matmul_precision(),
                torch.backends.cudnn.conv.fp32_precision,
                network(batch[0]).class_logits.dtype,
            )
        )
        return loss(network, batch)

    land = surface(student(dtype=torch.float32), loss=spied)
    expected = land.value(land.point), land.gradient(land.point), land.hvp(land.point)
    torch.set_float32_matmul_precision("medium")
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert land.value(land.point) == expected[0]
            assert torch.equal(land.gradient(land.point), expected[1])
            assert torch.equal(land.hvp(land.point), expected[2])
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.conv.fp32_precision == before
        assert torch.backends.cudnn.allow_tf32  # can still be read
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("highest", "ieee", torch.float32)}
