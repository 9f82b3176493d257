"""An optimizer's state as tensors by parameter name, in a file other libraries read."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from deit.errors import CheckpointError, raise_transient
from deit.inputs import check_readable
from deit.sharding import shard_like


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
