"""Weight files of any origin, read without running code from them, loaded without silent gaps."""

import argparse
import hashlib
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deit.errors import CheckpointError
from deit.sharding import divided_like

_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name: safetensors, or a .pth / .pt / .bin of tensors.

    Unwraps the usual containers (an EMA before the raw weights) and the prefixes that wrappers
    leave. Raises CheckpointError; a file that wants to run code is refused.
    """
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of old pickles; ours is the message
                # What DeiT's and timm's scripts save beside the weights: plain arguments.
                with torch.serialization.safe_globals([argparse.Namespace]):
                    content = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such weight file") from None
    except (SafetensorError, OSError, EOFError) as error:
        reason = str(error) or "it is empty"
        raise CheckpointError(f"{path}: not a readable weight file ({reason})") from None
    except Exception as error:  # torch raises RuntimeError, KeyError, UnpicklingError and more
        # torch names the global or class it refused; every other reason is a damaged file.
        if "GLOBAL" in str(error) or "Unsupported class" in str(error):
            raise CheckpointError(
                f"{path}: holds more than tensors and would have to run code to load; "
                "save its state_dict alone (safetensors is best) and give that file"
            ) from None
        raise CheckpointError(f"{path}: not a readable weight file (cut off or damaged?)") from None
    for name in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no named tensors")
    weights = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not weights:
        raise CheckpointError(f"{path}: holds no named tensors")
    bare = {_unprefixed(name): value for name, value in weights.items()}
    if len(bare) < len(weights):
        twice = next(name for name in weights if name not in bare)
        raise CheckpointError(
            f"{path}: holds {_unprefixed(twice)} twice, also as {twice}; which of them counts is "
            "not said"
        )
    return bare


def _unprefixed(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def digest_of(weights: dict[str, Tensor]) -> str:
    """SHA-256 of tensors by name, type and shape."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(network: nn.Module, weights: dict[str, Tensor], *, origin: str) -> None:
    """Copy weights into the network: every name and shape must agree.

    Raises CheckpointError listing the first ten differences, before anything is copied.
    """
    expected = network.state_dict()
    differences = [f"missing: {name}" for name in expected if name not in weights]
    differences += [f"unexpected: {name}" for name in weights if name not in expected]
    differences += [
        f"{name}: {tuple(value.shape)} in the file, {tuple(expected[name].shape)} in the network"
        for name, value in weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if differences:
        shown = "".join(f"\n  {line}" for line in differences[:10])
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise CheckpointError(f"{origin}: made for another network:{shown}{more}")
    network.load_state_dict(
        {name: divided_like(value, expected[name]) for name, value in weights.items()}
    )
