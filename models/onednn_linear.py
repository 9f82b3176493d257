"""Linear layers by oneDNN, for processors on which PyTorch's own matrix products are slow."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import linear

from deit.config.schema import RunConfig
from deit.core.accelerator import any_process
from deit.core.errors import SystemFault
from deit.core.hardware import cpu_vendor
from deit.models.surgery.fake_quant import FakeQuantLinear

_SLOW_WITH_MKL = ("AuthenticAMD", "HygonGenuine")  # Hygon's are AMD's design


def available() -> bool:
    """Whether this build of PyTorch has what these layers are made of."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def resolve_linear_backend(run: RunConfig, accelerator: Accelerator) -> str:
    """Return torch or onednn: the configured backend; for auto, by the main process's processor.

    Auto is onednn in float32 on AMD processors. MKL, which PyTorch's own products come from, does
    not use their wide registers: a training step of DeiT-Ti takes 1.6 times as long (docs/log.md).
    Raises SystemFault where oneDNN is configured and not there.
    """
    if run.linear_backend == "onednn" and not available():
        raise SystemFault("run.linear_backend = 'onednn': this PyTorch has no oneDNN; use torch")
    if run.linear_backend != "auto":
        return run.linear_backend
    fp32_on_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
    if not fp32_on_cpu or run.compile != "none":
        return "torch"
    # One choice for all processes: those of a cluster may be of different makers.
    main = accelerator.is_main_process and available() and cpu_vendor() in _SLOW_WITH_MKL
    return "onednn" if any_process(accelerator, main) else "torch"


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
