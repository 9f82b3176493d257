"""Read weight files from any source without running code from them; load them strictly."""

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deit.core.errors import CheckpointError, NotReadableError, raise_if_transient, single_line
from deit.core.file_reading import check_readable, open_file
from deit.core.sharding import shard_like
from deit.models.weight_file_types import check_file_type, is_safetensors

_STATE_DICT_KEYS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network"),
    *("weights", "params", "teacher", "student", "backbone", "shadow"),
)
"""Keys under which trainers store a state dict; averaged weights come before raw ones."""
_NOT_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loop|rng|loss|criterion", re.IGNORECASE)
_MAX_DEPTH = 4
"""Nested dicts are searched for a state dict down to this depth."""

_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
"""Prefixes of DDP, torch.compile and Lightning Fabric. All at the beginning of a name are removed,
in any order; elsewhere in a name they stay."""
_TRAINER_ATTRIBUTES = (
    *("model.", "_model.", "net.", "network.", "backbone.", "encoder."),
    *("student.", "teacher.", "ema_model.", "ema."),
)
"""Attributes in which Lightning modules and trainers hold the network. One that all names of a
state dict begin with is removed."""

_IGNORED_PACKAGES = {
    *("argparse", "types", "pathlib", "datetime", "enum", "numpy", "collections", "omegaconf"),
    *("yacs", "easydict", "ml_collections", "addict", "lightning_fabric", "lightning_utilities"),
}
"""Packages whose objects do not affect the weights, such as parsed arguments, paths and dates."""
_IGNORED_CLASSES = {"AttributeDict", "AttrDict", "HParams"}
"""Classes of hyperparameters, in any package."""


class _StandIn(dict):
    """Stands in for an ignored object, such as parsed arguments, whose class is not imported."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""

    def __hash__(self) -> int:
        return id(self)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file by name, on the CPU.

    path: a safetensors file, or a .pth, .pt, .bin or .ckpt file of torch.save. The state dict is
    found in a trainer's checkpoint (averaged weights come before raw ones), and the prefixes of
    wrappers are removed from its names. Other values, such as parsed arguments, are ignored. No
    code of the file is run. Raises CheckpointError if the file is missing or damaged, contains no
    weights, contains two of the same name, or could be loaded only by running code;
    NotReadableError if its permissions forbid reading; SystemFault for a transient I/O error.
    """
    path = Path(path)
    try:
        head = _head_of(path)
        check_file_type(path, head)
        if path.suffix == ".safetensors" or is_safetensors(head):
            content: Any = load_file(path)
        else:
            content = _load(path)
    except (SafetensorError, OSError, EOFError, RuntimeError) as error:
        raise_if_transient(error, path)
        check_readable(path)
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{path}: no such weight file") from None
        if isinstance(error, PermissionError):
            raise NotReadableError(f"{path}: {error.strerror}") from None
        reason = str(error) or "it ends too early: copy or download it again"
        raise CheckpointError(f"{path}: not a readable weight file ({reason})") from None
    return _remove_prefixes(path, _named_tensors(path, content))


def _load(path: Path) -> Any:
    """Load a file of torch.save, with a stand-in for each object that does not affect the weights.

    Raises CheckpointError if that would run code.
    """
    ignored: set[str] = set()
    # torch.load names the first class that it rejects: each attempt adds it to `ignored`.
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of old pickles
                with torch.serialization.safe_globals([(_StandIn, name) for name in ignored]):
                    return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
        except (OSError, EOFError):
            raise
        except Exception as error:  # torch raises RuntimeError, KeyError, UnpicklingError and more
            raise_if_transient(error, path)
            # An error that names no class or other global is one of a damaged file.
            message = str(error)
            name = _rejected_name(message)
            if name is not None and name not in ignored and _is_ignored(name):
                ignored.add(name)
                continue
            if name is not None or "GLOBAL" in message or "Unsupported class" in message:
                raise CheckpointError(_needs_code(path, name)) from None
            raise CheckpointError(
                f"{path}: not a readable weight file (truncated or damaged?)"
            ) from None


def _rejected_name(message: str) -> str | None:
    """Return the full name of the global that torch.load refused to import."""
    match = re.search(r"GLOBAL ([\w.]+)", message)
    return None if match is None else match[1]


def _is_ignored(name: str) -> bool:
    """Return whether objects of a class, given by its full name, do not affect the weights."""
    package, class_name = name.partition(".")[0], name.rpartition(".")[2]
    return package in _IGNORED_PACKAGES or class_name in _IGNORED_CLASSES


def _needs_code(path: Path, name: str | None) -> str:
    package = (name or "").partition(".")[0]
    if package in ("torch", "torchvision", "timm", "transformers", "__main__", "models", "model"):
        content = f"contains a whole network ({name}), not only tensors,"
    else:
        content = "contains more than tensors" + (f" ({name})" if name else "")
    return (
        f"{path}: {content} and could be loaded only by running its code; if you trust it, save "
        "its state_dict (torch.save(network.state_dict(), FILE), or better as safetensors) and use "
        "that file"
    )


def _head_of(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read(1024)


def _named_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """Return a file's named tensors. Raises CheckpointError if there are none or one is invalid."""
    weights = _find_weights(content)
    if not weights:
        raise CheckpointError(f"{path}: contains no named tensors; {_describe(content)}")
    for name, value in weights.items():
        if (problem := _tensor_problem(value)) is not None:
            raise CheckpointError(f"{path}: {single_line(name)} {problem}")
    return weights


_DTYPES = {
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
"""Dtypes that the CPU supports; files may contain others."""
_MAX_DIMENSIONS = 64  # the limit of PyTorch's reductions


def _tensor_problem(value: Tensor) -> str | None:
    """Return why a tensor of a file cannot be used; None if it can."""
    if value.layout != torch.strided or value.is_meta or value.is_nested or value.is_quantized:
        return "is not a plain (dense, unquantized) tensor with its values in the file"
    if value.dtype not in _DTYPES:
        return f"has dtype {value.dtype}, which the CPU does not support: save it as float32"
    if value.ndim > _MAX_DIMENSIONS:
        return f"has {value.ndim} dimensions; at most {_MAX_DIMENSIONS} are supported"
    return None


def _find_weights(content: Any, depth: int = 0) -> dict[str, Tensor]:
    """Return the named tensors of a file's content; empty if there are none.

    Searched in this order, at most _MAX_DEPTH levels deep: the values under _STATE_DICT_KEYS; the
    tensors of the mapping itself; its only nested mapping with tensors.
    """
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return {}
    for key in _STATE_DICT_KEYS:
        if state_dict := _find_weights(content.get(key), depth + 1):
            return state_dict
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    nested = [
        state_dict
        for key, value in content.items()
        if isinstance(key, str)
        and not _NOT_WEIGHTS.search(key)
        and (state_dict := _find_weights(value, depth + 1))
    ]
    # Scalar tensors next to a single state dict are metrics, such as the best top-1.
    if len(nested) == 1 and all(value.ndim == 0 for value in tensors.values()):
        return nested[0]
    return tensors


def _describe(content: Any) -> str:
    """Describe the content of a file without weights, with the remedy."""
    if not isinstance(content, Mapping):
        type_name = type(content).__name__
        size = f" of shape {tuple(content.shape)}" if isinstance(content, Tensor) else ""
        if isinstance(content, list | tuple):
            size = f" of {len(content)} values"
        return f"it is a single {type_name}{size}: save network.state_dict()"
    if not content:
        return "it is an empty dict"
    tensors = sum(1 for _ in _tensors_in(content))
    keys = ", ".join(map(repr, list(content)[:8]))
    more = f" and {len(content) - 8} more" if len(content) > 8 else ""
    return (
        f"its keys are {keys}{more}, with {tensors} tensors in total: save network.state_dict() "
        "and use that file"
    )


def _tensors_in(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    values = content.values() if isinstance(content, Mapping) else content
    if isinstance(content, Mapping | list | tuple):
        for value in values:
            yield from _tensors_in(value)


def _remove_prefixes(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove _WRAPPER_PREFIXES and _TRAINER_ATTRIBUTES from the beginning of all names.

    Raises CheckpointError if two names become equal.
    """
    names = [_strip_wrappers(name) for name in weights]
    while prefix := next((a for a in _TRAINER_ATTRIBUTES if _is_common_prefix(a, names)), None):
        names = [_strip_wrappers(name.removeprefix(prefix)) for name in names]
    full_names: dict[str, str] = {}
    for name, full_name in zip(names, weights, strict=True):
        if (first := full_names.setdefault(name, full_name)) != full_name:
            raise CheckpointError(
                f"{path}: contains {single_line(name)} twice, as {single_line(first)} and as "
                f"{single_line(full_name)}; keep one of them"
            )
    return dict(zip(names, weights.values(), strict=True))


def _is_common_prefix(prefix: str, names: list[str]) -> bool:
    """Return whether all names begin with a prefix, and some have a dot after it.

    Without a dot, as in net.weight and net.bias, the prefix is the name of the only layer.
    """
    return all(name.startswith(prefix) for name in names) and any(
        "." in name.removeprefix(prefix) for name in names
    )


def _strip_wrappers(name: str) -> str:
    while name.startswith(_WRAPPER_PREFIXES):
        name = name.partition(".")[2]
    return name


def strip_common_prefix(weights: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Remove a prefix that all names share if they are then exactly the expected ones.

    Otherwise return the weights unchanged. Since the names of the network are known, any prefix
    can be removed, unlike in `read_weights`.
    """
    first = next(iter(weights), "")
    for end in [index + 1 for index, letter in enumerate(first) if letter == "."]:
        prefix = first[:end]
        if not all(name.startswith(prefix) for name in weights):
            break
        stripped = {name.removeprefix(prefix): value for name, value in weights.items()}
        if stripped.keys() == set(expected):
            return stripped
    return weights


def digest_of(weights: dict[str, Tensor]) -> str:
    """Return the SHA-256 of tensors in hexadecimal, with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(network: nn.Module, weights: dict[str, Tensor], *, origin: str) -> None:
    """Copy weights into a network. All names and shapes must match, except for a common prefix.

    origin: names the weights in messages, such as their path. Raises CheckpointError with the
    first ten differences, before anything is copied.
    """
    expected = network.state_dict()
    weights = strip_common_prefix(weights, expected)
    differences = [f"missing: {name}" for name in expected if name not in weights]
    differences += [f"unexpected: {name}" for name in weights if name not in expected]
    differences += [
        f"{name}: {tuple(value.shape)} in the file, {tuple(expected[name].shape)} in the network"
        for name, value in weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if differences:
        lines = "".join(f"\n  {line}" for line in differences[:10])
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        hint = _gray_hint(weights, expected) or _names_hint(weights, expected)
        raise CheckpointError(f"{origin}: does not match the network:{lines}{more}{hint}")
    network.load_state_dict(
        {name: shard_like(value, expected[name]) for name, value in weights.items()}
    )


def _gray_hint(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Return how to convert the weights if they are made for images of one channel."""
    for name, value in weights.items():
        target = expected.get(name)
        if target is None or value.ndim != 4 or target.ndim != 4 or value.shape == target.shape:
            continue
        if value.shape[1] == 1 and target.shape[1] == 3 and value.shape[2:] == target.shape[2:]:
            return (
                f"\n  {name} takes gray images (1 channel), but all images have 3 channels here: "
                "save it as weight.repeat(1, 3, 1, 1) / 3, which gives the same outputs"
            )
    return ""


def _names_hint(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Return how the names begin in the file and in the network, if none of them match."""
    if not weights or any(name in weights for name in expected):
        return ""

    def prefixes(names: Collection[str]) -> str:
        counts = Counter(name.partition(".")[0] for name in names).most_common(4)
        return ", ".join(f"{name}. ({count})" for name, count in counts)

    return (
        f"\n  the {len(weights)} names in the file begin with {prefixes(weights)}; those of the "
        f"network with {prefixes(expected)}"
    )
