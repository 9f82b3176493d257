"""Linear layers computed by oneDNN, for processors on which PyTorch's own are slow."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import linear

from deit.config.sections.run import RunConfig
from deit.core.accelerator import any_process
from deit.core.errors import SystemFault
from deit.core.hardware import cpu_vendor
from deit.models.surgery.fake_quant import FakeQuantLinear

_AMD = ("AuthenticAMD", "HygonGenuine")  # Hygon builds AMD's designs


def available() -> bool:
    """Return whether this build of PyTorch includes oneDNN's linear operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def resolve_linear_backend(run: RunConfig, accelerator: Accelerator) -> str:
    """Return torch or onednn: the configured backend, or for auto the one that is usually faster.

    Auto is onednn for float32 on AMD processors with AVX-512 and without torch.compile. MKL,
    PyTorch's default, does not use AVX-512 on AMD: a training step of DeiT-Ti takes 1.6 times as
    long. With AVX2 alone, MKL was the faster one (docs/log.md). The processor of the main process
    decides for all processes. Raises SystemFault if onednn is configured but this PyTorch lacks it.
    """
    if run.linear_backend == "onednn" and not available():
        raise SystemFault("run.linear_backend = 'onednn': this PyTorch has no oneDNN; use torch")
    if run.linear_backend != "auto":
        return run.linear_backend
    fp32_on_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
    if not fp32_on_cpu or run.compile != "none":
        return "torch"
    # One choice for all processes: the machines of a cluster may have different processors.
    main = accelerator.is_main_process and available() and _mkl_is_slow()
    return "onednn" if any_process(accelerator, main) else "torch"


def _mkl_is_slow() -> bool:
    return cpu_vendor() in _AMD and torch.backends.cpu.get_cpu_capability() == "AVX512"


def use_onednn(network: nn.Module) -> None:
    """Compute a network's linear layers with oneDNN on the CPU in float32, in place.

    Nothing is changed if this PyTorch lacks oneDNN, so that runs of other machines can be
    evaluated. Names and weights stay the same; results differ by float rounding.
    """
    if not available():
        return
    for layer in network.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = OneDNNLinear
        elif isinstance(layer, FakeQuantLinear):
            layer.product = onednn_linear


class OneDNNLinear(nn.Linear):
    """A linear layer whose forward and backward products are computed by oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out_features] for input, float [..., in_features]."""
        return onednn_linear(input, self.weight, self.bias)


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return input [..., in] times the transpose of weight [out, in], plus bias [out].

    Anything but float32 on the CPU is computed by PyTorch's own operator.
    """
    supported = input.dtype == weight.dtype == torch.float32 and input.device.type == "cpu"
    if not supported or torch.is_autocast_enabled("cpu") or not input.numel():
        return linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = _rows(inputs)
        ctx.save_for_backward(rows, weight)
        ctx.shape = inputs.shape
        output = product(rows, weight, bias)
        # No view of a matrix: torch warns if a sharded network returns one.
        return output if inputs.ndim == 2 else output.view(*inputs.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        gradient = _rows(gradient)
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_inputs = product(gradient, weight.t(), None).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            # oneDNN is faster if the last dimension of the product is the longer one.
            if weight.shape[0] > weight.shape[1]:
                grad_weight = product(rows.t(), gradient.t(), None).t().contiguous()
            else:
                grad_weight = product(gradient.t(), rows.t(), None)
        if ctx.needs_input_grad[2]:
            grad_bias = gradient.sum(dim=0)
        return grad_inputs, grad_weight, grad_bias


def _rows(values: Tensor) -> Tensor:
    """Return contiguous [rows, features].

    oneDNN has only a slow reference kernel for expanded gradients, such as those of a mean.
    """
    return values.reshape(-1, values.shape[-1]).contiguous()


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows [n, in] times the transpose of weight [out, in], plus bias [out]."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
