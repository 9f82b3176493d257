"""Limits of loss surfaces: masks, sizes, layers without second derivative, precision."""

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
def test_surface_with_invalid_masks_names_them(masks, names):
    with raises(ConfigError, *names):
        surface(student(), masks=masks)


def test_surface_with_invalid_batches_dtypes_or_masks_is_refused():
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
    single_layer = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(single_layer.weight)
    with pytest.raises(ConfigError) as raised:
        surface(single_layer, masks={"weight": torch.zeros(1, 2).bool()})
    assert raised.value.problems[0].field == "masks"


@pytest.mark.skipif(not onednn_linear.available(), reason="no oneDNN in this PyTorch")
def test_onednn_layers_have_a_gradient_but_no_hvp():
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
    """A decorator without a reference to the function that it wraps."""
    return lambda *arguments: function(*arguments)


def decorated(function):
    """A decorator that keeps a reference, as torch.amp.custom_bwd does."""
    return functools.wraps(function)(opaque(function))


class SlopeOfCube(torch.autograd.Function):
    """3 x ** 2 times a gradient, with manual derivatives."""

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
"""Gradients of x ** 3, as a user might write them in a custom layer."""


@pytest.mark.parametrize("kind", CUBES)
@pytest.mark.parametrize("power", [1, 2])
def test_hvp_of_custom_function_is_correct_or_refused(kind, power):
    """autograd.grad alone would silently drop the term of a function without second derivative.

    With power 1 the incoming gradient is constant, and torch does not even warn.
    """

    class Cube(torch.autograd.Function):
        backward = staticmethod(CUBES[kind])

        @staticmethod
        def forward(ctx, values):
            ctx.save_for_backward(values)
            return values**3

    def custom_loss(network, batch):
        cubes = Cube.apply(network(batch[0]).class_logits)
        # For torch, the gradient of cubes**1 would depend on cubes.
        return loss(network, batch) + (cubes if power == 1 else cubes**power).mean()

    def builtin_loss(network, batch):
        return loss(network, batch) + (network(batch[0]).class_logits ** (3 * power)).mean()

    land, plain = surface(student(), loss=custom_loss), surface(student(), loss=builtin_loss)
    direction = vectors(1, land.point)[0]
    torch.testing.assert_close(land.gradient(land.point), plain.gradient(plain.point))
    if "once" not in kind:
        product, expected = land.hvp(direction), plain.hvp(direction)
        torch.testing.assert_close(product, expected)
    elif not (kind == "once, hidden" and power == 1):  # nothing identifies this one
        with raises(ConfigError, "oneDNN"):
            land.hvp(direction)


def test_hvp_of_linear_loss_is_zero():
    def flat(network, batch):
        return sum((2 * parameter).sum() for parameter in network.parameters())

    land = surface(student(), loss=flat)
    assert torch.equal(land.gradient(land.point), torch.full_like(land.point, 2))
    assert land.hvp(land.point).count_nonzero() == 0


def test_surface_ignores_global_precision_settings():
    settings = []

    def recording_loss(network, batch):
        settings.append(
            (
                torch.get_float32_matmul_precision(),
                torch.backends.cudnn.conv.fp32_precision,
                network(batch[0]).class_logits.dtype,
            )
        )
        return loss(network, batch)

    land = surface(student(dtype=torch.float32), loss=recording_loss)
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
    assert set(settings) == {("highest", "ieee", torch.float32)}
