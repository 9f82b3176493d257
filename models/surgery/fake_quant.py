"""Rounding in training: a ViT that computes as its int8 file will, with gradients that go through.

The arithmetic is that of `deit quantize --method static`: weights int8 and symmetric with a scale
for each output channel, the inputs of these layers uint8 with one scale and zero point a tensor,
biases of heads and of the patches int32 by both scales. Products within attention, normalisations,
softmax, GELU and the other biases stay float. What is rounded is multiplied back, so that a sum of
products is the integer one but for the last bits of a float.

Roundings pass the gradient on as if they were not there, to what lies inside the range, and 0 to
what was cut off (Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic
Neurons"; Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3). Weights are never cut off.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

RATE = 0.01
"""Share of an update's range in the moving average of ranges: a horizon of 100 updates."""
_INPUT = 255
_WEIGHT = 127
_BIAS = 2**31 - 1
_TINY = torch.finfo(torch.float32).tiny


class FakeQuantLinear(nn.Linear):
    """A linear layer of rounded weights that hears its input rounded.

    range: float32 [2], the lowest and the highest value of an input, 0 between them; a buffer that
    is saved. Equal: nothing was heard yet; then each input has a range of its own. seen: what the
    update under way has heard so far, likewise, but the lowest negated. product: who multiplies.
    """

    range: Tensor
    observed: Tensor
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """input: float [..., in_features]."""
        values, scale = _quantize_input(self, input)
        weight, scales = fake_quant_weight(self.weight)
        # Of a matrix ONNX adds it to the products, of more dimensions to what they came to.
        bias = fake_quant_bias(self.bias, scale * scales) if input.ndim == 2 else self.bias
        return self.product(values, weight, bias)


class FakeQuantConv2d(nn.Conv2d):
    """A convolution of rounded weights that hears its input rounded, likewise."""

    range: Tensor
    observed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """input: float [batch, in_channels, height, width]."""
        values, scale = _quantize_input(self, input)
        weight, scales = fake_quant_weight(self.weight)
        return self._conv_forward(values, weight, fake_quant_bias(self.bias, scale * scales))


Rounded = FakeQuantLinear | FakeQuantConv2d
_KINDS = {nn.Linear: FakeQuantLinear, nn.Conv2d: FakeQuantConv2d}


def fake_quant_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, ...] as int8 from -127 to 127, the largest of each output channel at an end,
    multiplied back; and the scales [out]. A channel of zeros stays zeros."""
    weight = weight.float()  # under autocast too: in bfloat16 most steps would be lost
    scale = weight.detach().abs().flatten(1).amax(dim=1) / _WEIGHT
    scale = torch.where(scale < _TINY, 1.0, scale)
    return _by_channel(weight, scale, _WEIGHT), scale


def fake_quant_bias(bias: Tensor | None, scale: Tensor) -> Tensor | None:
    """A bias [out] as int32 with these scales [out], multiplied back; None stays None."""
    return None if bias is None else _by_channel(bias.float(), scale, _BIAS)


def _by_channel(values: Tensor, scale: Tensor, largest: int) -> Tensor:
    """Values [out, ...] as whole multiples of scales [out], at most so many."""
    zero = torch.zeros_like(scale)  # of integers torch asks the device whether they are inside
    return torch.fake_quantize_per_channel_affine(values, scale, zero, 0, -largest, largest)


def scale_of(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The scale (float32) and zero point (int32, 0 to 255) of inputs from low to high, which hold 0
    between them, as ONNX Runtime computes them."""
    scale = (high.double() - low.double()) / _INPUT
    flat = scale < _TINY
    scale = torch.where(flat, 1.0, scale)
    return scale.float(), torch.where(flat, 0.0, (-low / scale).round()).int()


def _quantize_input(layer: Rounded, values: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's input, rounded, and its scale; in training what it spans is noted."""
    values = values.float()
    with torch.no_grad():
        low, high = values.aminmax()
        spans = torch.stack([-low, high]).clamp(min=0)
        if layer.training:
            # The larger one, so that it may be computed again, in any number of parts or uses.
            layer.observed.copy_(torch.maximum(layer.observed, spans))
        unknown = layer.range[0] == layer.range[1]
        low = torch.where(unknown, -spans[0], layer.range[0])
        high = torch.where(unknown, spans[1], layer.range[1])
        scale, zero = scale_of(low, high)
        # An integer is always finite: what is not must not become one unnoticed.
        scale = scale + 0 * spans.sum()
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, _INPUT), scale


def enable_fake_quant(network: nn.Module) -> None:
    """Let all linear layers and convolutions of a network round, in place; names and weights stay
    as they are. Ranges begin as unknown: the first update sets them."""
    for layer in network.modules():
        kind = _KINDS.get(type(layer))
        if kind is None:
            continue
        layer.__class__ = kind
        device = layer.weight.device
        layer.register_buffer("range", torch.zeros(2, device=device))
        layer.register_buffer(
            "observed", torch.full((2,), -torch.inf, device=device), persistent=False
        )
        if kind is FakeQuantLinear:
            layer.product = linear


def disable_fake_quant(network: nn.Module) -> None:
    """Let all layers of a network compute in float again, in place."""
    for layer in fake_quant_layers(network).values():
        del layer.range, layer.observed
        vars(layer).pop("product", None)
        layer.__class__ = next(kind for kind, ours in _KINDS.items() if type(layer) is ours)


def fake_quant_layers(network: nn.Module) -> dict[str, Rounded]:
    """The layers of a network that round, by name."""
    return {name: one for name, one in network.named_modules() if isinstance(one, Rounded)}


def ranges_in(weights: dict[str, Tensor]) -> set[str]:
    """The names of the ranges among a network's weights."""
    return {name for name in weights if name.endswith(".range")}


class ActivationRanges:
    """The ranges of a network's layers while it is trained, moved once an update."""

    def __init__(self, network: nn.Module) -> None:
        """network: with layers that round, or without any."""
        layers = fake_quant_layers(network).values()
        self._ranges, self._seen = (
            [getattr(one, key) for one in layers] for key in ("range", "observed")
        )
        self._forget()

    @torch.no_grad()
    def update(self) -> None:
        """Move all ranges towards what was heard since the last time, in all processes together.

        That is the range of the whole batch, however it was divided among processes and parts; the
        first one is taken as it is.
        """
        if not self._ranges:
            return
        seen = torch.stack(self._seen)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        now = torch.stack([-seen[:, 0], seen[:, 1]], dim=1)
        before = torch.stack(self._ranges)
        unknown = before[:, :1] == before[:, 1:]
        after = torch.where(unknown, now, before.lerp(now, RATE))
        torch._foreach_copy_(self._ranges, list(after.unbind()))
        self._forget()

    def _forget(self) -> None:
        for one in self._seen:
            one.fill_(-torch.inf)
