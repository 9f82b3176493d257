"""Linear layers by oneDNN, for processors on which PyTorch's own matrix products are slow."""

import time

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import linear

from deit.config.schema import RunConfig
from deit.core.errors import SystemFault
from deit.models.surgery.fake_quant import FakeQuantLinear

_FASTER = 1.3  # from this ratio on: far from what a busy moment makes of equal ones
_TRIES = 7


def available() -> bool:
    """Whether this build of PyTorch has what these layers are made of."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_faster(width: int = 96) -> bool:
    """Whether a layer of this width is clearly faster so, here and now: some 20 ms of measuring.

    MKL, which PyTorch's own products come from, does not use the wide registers of processors that
    are not Intel's: there oneDNN's take less than half the time. Elsewhere both take the same.
    """
    if not available():
        return False
    inputs, weight, bias = torch.randn(4096, width), torch.randn(3 * width, width), torch.zeros(1)
    bias = bias.expand(3 * width).contiguous()
    best = dict.fromkeys((linear, product), float("inf"))
    for _ in range(_TRIES):
        for way in best:
            started = time.perf_counter()
            way(inputs, weight, bias)
            # The shortest: what else the machine does only ever makes it longer.
            best[way] = min(best[way], time.perf_counter() - started)
    return best[linear] > _FASTER * best[product]


def resolve_linear_backend(run: RunConfig, accelerator: Accelerator) -> str:
    """torch or onednn: the configured one, or what measures faster in the main process.

    Raises SystemFault where oneDNN is asked for and not there.
    """
    if run.linear_backend == "onednn" and not available():
        raise SystemFault("run.linear_backend = 'onednn': this PyTorch has no oneDNN; use torch")
    if run.linear_backend != "auto":
        return run.linear_backend
    fp32_on_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
    if not fp32_on_cpu or run.compile != "none":
        return "torch"
    measured = accelerator.is_main_process and is_faster()
    faster = accelerator.reduce(torch.tensor(float(measured)), reduction="sum").item() > 0
    return "onednn" if faster else "torch"


def use_onednn(network: nn.Module) -> None:
    """Let a network's linear layers be computed by oneDNN on the CPU, in float32, where this
    PyTorch has it: a run of another machine can be evaluated where it has not.

    Names, weights and what is saved stay as they are; the last bits of the results do not.
    """
    if not available():
        return
    for layer in network.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = OneDNNLinear
        elif isinstance(layer, FakeQuantLinear):
            layer.product = onednn_linear


class OneDNNLinear(nn.Linear):
    """A linear layer whose products, forward and backward, are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        """input: float [..., in_features]."""
        return onednn_linear(input, self.weight, self.bias)


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input [..., in] times the transpose of weight [out, in], plus bias [out]. What is not float32
    on the CPU goes PyTorch's way."""
    plain = input.dtype == weight.dtype == torch.float32 and input.device.type == "cpu"
    if not plain or torch.is_autocast_enabled("cpu") or not input.numel():
        return linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = _rows(inputs)
        ctx.save_for_backward(rows, weight)
        ctx.shape = inputs.shape
        found = product(rows, weight, bias)
        # Of a matrix no view: torch warns where a divided network returns one.
        return found if inputs.ndim == 2 else found.view(*inputs.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        gradient = _rows(gradient)
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_inputs = product(gradient, weight.t(), None).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            # oneDNN is faster where the longer side of the product is its last.
            if weight.shape[0] > weight.shape[1]:
                of_weight = product(rows.t(), gradient.t(), None).t().contiguous()
            else:
                of_weight = product(gradient.t(), rows.t(), None)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=0)
        return of_inputs, of_weight, of_bias


def _rows(values: Tensor) -> Tensor:
    """[number, features], one behind the other: for expanded gradients, of a mean for instance,
    oneDNN has nothing but a slow reference."""
    return values.reshape(-1, values.shape[-1]).contiguous()


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows [number, in] times the transpose of weight [out, in], plus bias [out]."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
