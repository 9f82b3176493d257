"""The optimizer, the learning rate as a function of the step, and the weight average."""

import copy
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from deit.config.schema import OptimConfig
from deit.core.errors import CheckpointError, raise_transient
from deit.core.file_reading import check_readable
from deit.core.sharding import local_tensor, shard_like

# Tokens go by timm names; the mixing of heads (models/surgery/weight_sharing.py) rests at identity.
_UNDECAYED = ("cls_token", "dist_token", "pos_embed", "before", "after")


def parameter_groups(
    model: nn.Module, weight_decay: float, scales: dict[str, float] | None = None
) -> list[dict]:
    """Groups by decay (none on biases, norms, tokens and position embedding) and by the factor of
    the learning rate, `lr_scale`; parameters that take no gradient are in none.

    scales: a factor for each parameter by its name; None: 1 for all. One-dimensional parameters
    are biases and norms; the tokens go by timm's names.
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
    """The factor of the learning rate of each parameter, layer_decay ** (layers above its own)
    (Clark et al. 2020, "ELECTRA"). depths: its layer, 0 the nearest to the image."""
    top = max(depths.values())
    return {name: layer_decay ** (top - depth) for name, depth in depths.items()}


def build_optimizer(
    model: nn.Module, optim: OptimConfig, scales: dict[str, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or SGD with momentum; its learning rate is written by the
    loop.

    scales: as in `parameter_groups`.
    torch's AdamW takes lr_t * weight_decay off a weight, big_vision schedule_t * weight_decay with
    schedule_t = lr_t / peak (Beyer et al. 2022): the same with weight_decay / peak.
    """
    independent = optim.independent_weight_decay
    decay = optim.weight_decay / optim.peak_lr if independent else optim.weight_decay
    groups = parameter_groups(model, decay, scales)
    betas = (optim.beta1, optim.beta2)
    # Fused: one pass over the weights, which it leaves alone where the loop says so (found_inf).
    if optim.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, fused=True)
        # Zeros, from which the first update makes the gradient: a first update that is left alone
        # would leave torch's own buffers as it found the memory.
        for group in groups if optim.momentum else ():
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def lr_at(step: int, *, optim: OptimConfig, steps_per_epoch: int) -> float:
    """The learning rate of update `step` (0 is the first).

    Linear from warmup_lr to the peak, which the first update after the warm-up takes, then a half
    cosine that reaches min_lr with the last update; with decay_at it falls to a tenth at each of
    these shares of all updates.
    """
    peak = optim.peak_lr
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return optim.warmup_lr + (peak - optim.warmup_lr) * step / warmup
    last = optim.epochs * steps_per_epoch - 1
    if optim.lr_milestones:
        fallen = sum(step >= round(share * (last + 1)) for share in optim.lr_milestones)
        return peak * 0.1**fallen
    progress = (step - warmup) / max(last - warmup, 1)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return optim.min_lr + (peak - optim.min_lr) * cosine


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write the learning rate into every group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def ema_decay(updates: Tensor, *, horizon: float) -> Tensor:
    """Decay of the weight average at its update number `updates` (0 is the first), a scalar.

    horizon: updates after which a weight's share has fallen by e. The decay grows as
    (1 + updates) / (10 + updates) until it gets there, so that a short run is not held back by
    its initial weights.
    """
    return ((1 + updates) / (10 + updates)).clamp(max=math.exp(-1 / horizon))


class EMA:
    """An exponential moving average of a model's weights and buffers, itself a model."""

    def __init__(
        self, model: nn.Module, *, horizon: float, device: torch.device | None = None
    ) -> None:
        """horizon: in updates. device: where the model will be; None: where it is."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.horizon_steps = horizon
        device = next(model.parameters()).device if device is None else device
        self.updates = torch.zeros((), dtype=torch.float64, device=device)
        self._of: nn.Module | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, *, applied: Tensor) -> None:
        """Move towards the model, unless its update was not applied (a bool scalar; the model must
        then be as it was before it); integer buffers are copied. Nothing here waits for the
        device."""
        if self._of is not model:  # a walk through all modules, at every update, takes its time
            both = (map(local_tensor, one.state_dict().values()) for one in (self.model, model))
            pairs = list(zip(*both))
            moving = [pair for pair in pairs if pair[0].is_floating_point()]
            self._ours, self._theirs = ([pair[side] for pair in moving] for side in (0, 1))
            self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]
            self._of = model
        weight = (1 - ema_decay(self.updates, horizon=self.horizon_steps)) * applied
        ways = torch._foreach_sub(self._theirs, self._ours)
        torch._foreach_mul_(ways, weight.float())
        torch._foreach_add_(self._ours, ways)
        for mine, other in self._counts:
            mine.copy_(other)
        self.updates += applied


def _kinds(optimizer: torch.optim.Optimizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What it keeps of a parameter: tensors of its shape, and numbers."""
    one = getattr(optimizer, "optimizer", optimizer)  # that in Accelerate's
    if isinstance(one, torch.optim.SGD):
        return ("momentum_buffer",) if one.defaults["momentum"] else (), ()
    assert isinstance(one, torch.optim.AdamW), one
    return ("exp_avg", "exp_avg_sq"), ("step",)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Its state by kind and parameter name, `exp_avg/blocks.0.norm1.weight` for instance."""
    tensors: dict[str, Tensor] = {}
    shaped, numbers = _kinds(optimizer)
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for kind in (*numbers, *shaped):
            if kind in state:
                tensors[f"{kind}/{name}"] = state[kind].detach()
    return tensors


def save_optimizer(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write what `optimizer_tensors` gave."""
    path.write_bytes(save({name: one.cpu().contiguous() for name, one in tensors.items()}))


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Put an optimizer's state back. Raises CheckpointError if names or shapes differ."""
    tensors = read_tensors(path)
    shaped, numbers = _kinds(optimizer)
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite, so training cannot go on from it")
    if not tensors:
        return  # saved before the first update that was not skipped
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found = {kind: tensors.pop(f"{kind}/{name}", None) for kind in (*numbers, *shaped)}
        if any(value is None for value in found.values()):
            raise CheckpointError(f"{path}: no optimizer state for {name}")
        for kind in shaped:
            if found[kind].shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: {name} is {tuple(found[kind].shape)} in the file, "
                    f"{tuple(parameter.shape)} in the network"
                )
        brought = {kind: value.to(parameter.device) for kind, value in found.items()}
        moments = {kind: shard_like(brought[kind], parameter) for kind in shaped}
        optimizer.state[parameter] = {**brought, **moments}
    if tensors:
        raise CheckpointError(f"{path}: state of an unknown parameter: {next(iter(tensors))}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises CheckpointError."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise_transient(error, path)
        check_readable(path)
        raise CheckpointError(f"{path}: not readable ({error})") from None
