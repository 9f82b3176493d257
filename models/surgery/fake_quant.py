"""Fake quantization: a ViT that computes as its int8 export will, for quantization-aware training.

The arithmetic is that of `deit quantize --method static`. Weights are int8, symmetric, with one
scale per output channel. The inputs of these layers are uint8, with one scale and zero point per
tensor. Biases of the heads and of the patch embedding are int32, with the product of both scales.
Products within attention, norms, softmax, GELU and the other biases stay in float. Quantized values
are dequantized before use, so results equal those in integers up to float rounding.

Rounding uses the straight-through estimator: the gradient is passed on within the range, and is 0
for clipped values (Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic
Neurons"; Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3). Weights are never clipped.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

MOMENTUM = 0.01
"""Weight of a step's range in the moving average of ranges; its horizon is 100 steps."""
_INPUT_MAX = 255
_WEIGHT_MAX = 127
_BIAS_MAX = 2**31 - 1
_TINY = torch.finfo(torch.float32).tiny


class FakeQuantLinear(nn.Linear):
    """A linear layer with fake-quantized weights and input.

    range: float32 [2], the lowest and highest input value, with 0 between them; a saved buffer. If
    both are equal, no input was observed yet, and each input uses its own range.
    observed: float32 [2], the negated lowest and the highest input value of the current step.
    product: computes input times transposed weight plus bias; torch's linear or that of oneDNN.
    """

    range: Tensor
    observed: Tensor
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out_features] for input, float [..., in_features]."""
        values, scale = _quantize_input(self, input)
        weight, scales = fake_quant_weight(self.weight)
        # For a matrix, ONNX adds the bias to the integer products, otherwise to the float result.
        bias = fake_quant_bias(self.bias, scale * scales) if input.ndim == 2 else self.bias
        return self.product(values, weight, bias)


class FakeQuantConv2d(nn.Conv2d):
    """A convolution with fake-quantized weights, bias and input; buffers as FakeQuantLinear."""

    range: Tensor
    observed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of input, float [batch, in_channels, height, width]."""
        values, scale = _quantize_input(self, input)
        weight, scales = fake_quant_weight(self.weight)
        return self._conv_forward(values, weight, fake_quant_bias(self.bias, scale * scales))


FakeQuantLayer = FakeQuantLinear | FakeQuantConv2d
_KINDS = {nn.Linear: FakeQuantLinear, nn.Conv2d: FakeQuantConv2d}


def fake_quant_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight [out, ...] to int8 (-127 to 127) per output channel, and dequantize it.

    Return the float32 weight and the scales, float32 [out]. The largest absolute value of a channel
    is mapped to 127; a channel of zeros has scale 1.

    >>> weight, scale = fake_quant_weight(torch.tensor([[1.27, 0.004], [0.0, 0.0]]))
    >>> [[round(value, 4) for value in row] for row in weight.tolist()]
    [[1.27, 0.0], [0.0, 0.0]]
    >>> [round(value, 4) for value in scale.tolist()]
    [0.01, 1.0]
    """
    weight = weight.float()  # under autocast too: bfloat16 has too few digits for 255 levels
    scale = weight.detach().abs().flatten(1).amax(dim=1) / _WEIGHT_MAX
    scale = torch.where(scale < _TINY, 1.0, scale)
    return _fake_quantize(weight, scale, _WEIGHT_MAX), scale


def fake_quant_bias(bias: Tensor | None, scale: Tensor) -> Tensor | None:
    """Quantize a bias [out] to int32 with scales [out], and dequantize it; None stays None."""
    return None if bias is None else _fake_quantize(bias.float(), scale, _BIAS_MAX)


def _fake_quantize(values: Tensor, scale: Tensor, largest: int) -> Tensor:
    """Round values [out, ...] to multiples of scales [out], from -largest to largest."""
    zero = torch.zeros_like(scale)  # float: torch would wait for the device to check integers
    return torch.fake_quantize_per_channel_affine(values, scale, zero, 0, -largest, largest)


def activation_scale(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale (float32) and zero point (int32, 0 to 255) of inputs from low to high.

    low <= 0 <= high. Computed as by ONNX Runtime.
    """
    scale = (high.double() - low.double()) / _INPUT_MAX
    flat = scale < _TINY
    scale = torch.where(flat, 1.0, scale)
    return scale.float(), torch.where(flat, 0.0, (-low / scale).round()).int()


def _quantize_input(layer: FakeQuantLayer, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's fake-quantized input and its scale; in training, record its range."""
    values = values.float()
    with torch.no_grad():
        low, high = values.aminmax()
        spans = torch.stack([-low, high]).clamp(min=0)
        if layer.training:
            # A maximum, so that recomputed, split or repeated inputs do not change the result.
            layer.observed.copy_(torch.maximum(layer.observed, spans))
        unknown = layer.range[0] == layer.range[1]
        low = torch.where(unknown, -spans[0], layer.range[0])
        high = torch.where(unknown, spans[1], layer.range[1])
        scale, zero = activation_scale(low, high)
        # Quantization would turn non-finite inputs into finite values: make the scale NaN instead.
        scale = scale + 0 * spans.sum()
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, _INPUT_MAX), scale


def enable_fake_quant(network: nn.Module) -> None:
    """Fake-quantize all linear layers and convolutions of a network, in place.

    Names and weights do not change. Activation ranges are unknown until the first step sets them.

    >>> network = nn.Sequential(nn.Linear(4, 2))
    >>> enable_fake_quant(network)
    >>> list(fake_quant_layers(network)), network[0].range.tolist()
    (['0'], [0.0, 0.0])
    """
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
        layer.__class__ = next(kind for kind, quant in _KINDS.items() if type(layer) is quant)


def fake_quant_layers(network: nn.Module) -> dict[str, FakeQuantLayer]:
    """Return the fake-quantized layers of a network by name."""
    modules = network.named_modules()
    return {name: module for name, module in modules if isinstance(module, FakeQuantLayer)}


def range_names(weights: dict[str, Tensor]) -> set[str]:
    """Return the names of the activation ranges among a network's weights."""
    return {name for name in weights if name.endswith(".range")}


class ActivationRanges:
    """Moving averages of the activation ranges of a network's layers, updated once per step."""

    def __init__(self, network: nn.Module) -> None:
        """Bind to a network and reset its observed ranges; it may have no quantized layers."""
        layers = fake_quant_layers(network).values()
        self._ranges = [layer.range for layer in layers]
        self._observed = [layer.observed for layer in layers]
        self._reset()

    @torch.no_grad()
    def update(self) -> None:
        """Move all ranges toward those observed since the last call; the first are taken unchanged.

        The observed range is that of the whole batch, over all processes and micro-batches.
        """
        if not self._ranges:
            return
        observed = torch.stack(self._observed)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(observed, op=torch.distributed.ReduceOp.MAX)
        current = torch.stack([-observed[:, 0], observed[:, 1]], dim=1)
        before = torch.stack(self._ranges)
        unknown = before[:, :1] == before[:, 1:]
        after = torch.where(unknown, current, before.lerp(current, MOMENTUM))
        torch._foreach_copy_(self._ranges, list(after.unbind()))
        self._reset()

    def _reset(self) -> None:
        for observed in self._observed:
            observed.fill_(-torch.inf)
