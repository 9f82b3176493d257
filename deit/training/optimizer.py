"""The optimizer and its state, and the EMA of the weights."""

import copy
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from deit.config.sections.optim import OptimConfig
from deit.core.errors import CheckpointError, raise_if_transient
from deit.core.file_reading import check_readable
from deit.core.sharding import local_tensor, shard_like

# timm's names of tokens; the head mixing matrices of models/surgery/weight_sharing.py, which start
# at the identity.
_UNDECAYED = ("cls_token", "dist_token", "pos_embed", "before", "after")


def parameter_groups(
    model: nn.Module, weight_decay: float, scales: dict[str, float] | None = None
) -> list[dict]:
    """Return parameter groups by weight decay and by `lr_scale`, the factor of the learning rate.

    Biases and norms (one-dimensional parameters), tokens and position embeddings have no decay.
    Frozen parameters are in no group. scales: a factor for each parameter name; default: 1 for all.

    Example:
        >>> groups = parameter_groups(nn.Linear(3, 2), weight_decay=0.05)
        >>> [(group["weight_decay"], group["params"][0].shape) for group in groups]
        [(0.05, torch.Size([2, 3])), (0.0, torch.Size([2]))]
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        token = name.rpartition(".")[2] in _UNDECAYED
        decay = 0.0 if token or parameter.ndim <= 1 else weight_decay
        scale = 1.0 if scales is None else scales[name]
        groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in groups.items()
    ]


def layer_lr_scales(depths: dict[str, int], layer_decay: float) -> dict[str, float]:
    """Return the learning rate factor of each parameter: layer_decay ** (number of layers above).

    depths: the layer of each parameter, 0 next to the image. Source: Clark et al. 2020, "ELECTRA".

    Example:
        >>> layer_lr_scales({"patch_embed": 0, "block": 1, "head": 2}, 0.5)
        {'patch_embed': 0.25, 'block': 0.5, 'head': 1.0}
    """
    top = max(depths.values())
    return {name: layer_decay ** (top - depth) for name, depth in depths.items()}


def build_optimizer(
    model: nn.Module, optim: OptimConfig, scales: dict[str, float] | None = None
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019) or SGD with momentum; the loop sets the learning
    rate.

    scales: as in `parameter_groups`. optim.independent_weight_decay: torch's AdamW subtracts lr_t *
    weight_decay * weight, big_vision (lr_t / peak) * weight_decay * weight (Beyer et al. 2022); so
    weight_decay is divided by the peak.
    """
    independent = optim.independent_weight_decay
    decay = optim.weight_decay / optim.peak_lr if independent else optim.weight_decay
    groups = parameter_groups(model, decay, scales)
    betas = (optim.beta1, optim.beta2)
    # Fused: one pass over the weights, skipped if the loop sets found_inf.
    if optim.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, fused=True)
        # Zeros give the same first step. torch would allocate the buffers in the first step, and
        # leave them uninitialized if that step is skipped.
        for group in groups if optim.momentum else ():
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def ema_decay(updates: Tensor, *, horizon: float) -> Tensor:
    """Return the decay of the EMA at an update, counted from 0; a scalar.

    horizon: number of updates after which the share of a weight has dropped by a factor of e. The
    decay rises as (1 + updates) / (10 + updates) up to exp(-1 / horizon), so that the initial
    weights do not dominate a short run.

    Example:
        >>> round(ema_decay(torch.tensor(0), horizon=100.0).item(), 4)  # 1 / 10
        0.1
        >>> round(ema_decay(torch.tensor(10**6), horizon=100.0).item(), 4)  # exp(-1 / 100)
        0.99
    """
    return ((1 + updates) / (10 + updates)).clamp(max=math.exp(-1 / horizon))


class EMA:
    """An exponential moving average of a model's weights and buffers; `model` has the averages.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average, _ = EMA(model, horizon=100.0), nn.init.zeros_(model.weight)
        >>> before = average.model.weight.item()
        >>> average.update(model, applied=torch.tensor(True))
        >>> round(average.model.weight.item() / before, 4)  # the decay of the first update
        0.1
    """

    def __init__(
        self, model: nn.Module, *, horizon: float, device: torch.device | None = None
    ) -> None:
        """horizon: in updates. device: of the model in training; default: its device now."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.horizon_steps = horizon
        device = next(model.parameters()).device if device is None else device
        self.updates = torch.zeros((), dtype=torch.float64, device=device)
        self._source: nn.Module | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, *, applied: Tensor) -> None:
        """Average the model in; integer buffers are copied. Nothing waits for the device.

        applied: bool scalar. If False, the model must be unchanged, and the EMA stays as it is.
        """
        if self._source is not model:  # walking through all modules at every update takes time
            both = (map(local_tensor, net.state_dict().values()) for net in (self.model, model))
            pairs = list(zip(*both))
            floats = [pair for pair in pairs if pair[0].is_floating_point()]
            self._averages, self._weights = ([pair[side] for pair in floats] for side in (0, 1))
            self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]
            self._source = model
        weight = (1 - ema_decay(self.updates, horizon=self.horizon_steps)) * applied
        differences = torch._foreach_sub(self._weights, self._averages)
        torch._foreach_mul_(differences, weight.float())
        torch._foreach_add_(self._averages, differences)
        for average, current in self._counters:
            average.copy_(current)
        self.updates += applied


def _state_keys(optimizer: torch.optim.Optimizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys of a parameter's state: of tensors with its shape, and of scalars."""
    inner = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's
    if isinstance(inner, torch.optim.SGD):
        return ("momentum_buffer",) if inner.defaults["momentum"] else (), ()
    assert isinstance(inner, torch.optim.AdamW), inner
    return ("exp_avg", "exp_avg_sq"), ("step",)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the state by key and parameter name, such as `exp_avg/blocks.0.norm1.weight`.

    Tensors have the shape of their parameter; `step/...` of AdamW are scalars.
    """
    tensors: dict[str, Tensor] = {}
    shaped, scalars = _state_keys(optimizer)
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for kind in (*scalars, *shaped):
            if kind in state:
                tensors[f"{kind}/{name}"] = state[kind].detach()
    return tensors


def save_optimizer(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors of `optimizer_tensors`."""
    path.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Restore an optimizer's state. Raises CheckpointError if names or shapes differ."""
    tensors = read_tensors(path)
    shaped, scalars = _state_keys(optimizer)
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} is not finite, so training cannot resume from it"
            )
    if not tensors:
        return  # saved before the first applied step
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = {kind: tensors.pop(f"{kind}/{name}", None) for kind in (*scalars, *shaped)}
        if any(value is None for value in state.values()):
            raise CheckpointError(f"{path}: no optimizer state for {name}")
        for kind in shaped:
            if state[kind].shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: {name} is {tuple(state[kind].shape)} in the file, "
                    f"{tuple(parameter.shape)} in the network"
                )
        state = {kind: value.to(parameter.device) for kind, value in state.items()}
        moments = {kind: shard_like(state[kind], parameter) for kind in shaped}
        optimizer.state[parameter] = {**state, **moments}
    if tensors:
        raise CheckpointError(f"{path}: state of an unknown parameter: {next(iter(tensors))}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises CheckpointError."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise_if_transient(error, path)
        check_readable(path)
        raise CheckpointError(f"{path}: not readable ({error})") from None
