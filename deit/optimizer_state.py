"""AdamW's state as tensors by parameter name, in a file other libraries read."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from deit.errors import CheckpointError
from deit.sharding import divided_like

_ADAM_TENSORS = ("step", "exp_avg", "exp_avg_sq")


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """AdamW's state by kind and parameter name, `exp_avg/blocks.0.norm1.weight` for instance."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for kind in _ADAM_TENSORS:
            if kind in state:
                tensors[f"{kind}/{name}"] = state[kind].detach()
    return tensors


def save_optimizer(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write what `optimizer_tensors` gave."""
    path.write_bytes(save({name: one.cpu().contiguous() for name, one in tensors.items()}))


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Put AdamW's state back. Raises CheckpointError if names or shapes differ."""
    tensors = read_tensors(path)
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite, so training cannot go on from it")
    if not tensors:
        return  # saved before the first update that was not skipped
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found = {kind: tensors.pop(f"{kind}/{name}", None) for kind in _ADAM_TENSORS}
        if any(value is None for value in found.values()):
            raise CheckpointError(f"{path}: no optimizer state for {name}")
        for kind in ("exp_avg", "exp_avg_sq"):
            if found[kind].shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: {name} is {tuple(found[kind].shape)} in the file, "
                    f"{tuple(parameter.shape)} in the network"
                )
        optimizer.state[parameter] = {
            "step": found["step"].to(parameter.device),
            "exp_avg": divided_like(found["exp_avg"].to(parameter.device), parameter),
            "exp_avg_sq": divided_like(found["exp_avg_sq"].to(parameter.device), parameter),
        }
    if tensors:
        raise CheckpointError(f"{path}: state of an unknown parameter: {next(iter(tensors))}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises CheckpointError."""
    try:
        return load_file(path)
    except Exception as error:  # OSError or SafetensorError
        raise CheckpointError(f"{path}: not readable ({error})") from None
