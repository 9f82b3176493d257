"""Read weight files from any source without running code from them; load them strictly."""

import hashlib
import re
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deit.core.errors import CheckpointError, NotReadableError, in_line, raise_transient
from deit.core.file_reading import check_readable, open_file
from deit.core.sharding import shard_like

_CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network"),
    *("weights", "params", "teacher", "student", "backbone", "shadow"),
)
"""Keys under which trainers store weights; averaged weights are preferred to raw ones."""
_NOT_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loop|rng|loss|criterion", re.IGNORECASE)
_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
"""Prefixes that PyTorch's wrappers add, removed wherever they occur."""
_MEMBERS = (
    *("model.", "_model.", "net.", "network.", "backbone.", "encoder."),
    *("student.", "teacher.", "ema_model.", "ema."),
)
"""Attributes of Lightning modules and trainers: removed if all names begin with one of them."""
_PLAIN_ROOTS = {
    *("argparse", "types", "pathlib", "datetime", "enum", "numpy", "collections", "omegaconf"),
    *("yacs", "easydict", "ml_collections", "addict", "lightning_fabric", "lightning_utilities"),
}
_PLAIN_CLASSES = {"AttributeDict", "AttrDict", "HParams"}
"""Modules and classes of values that do not affect the weights, such as arguments and paths."""


class _StandIn(dict):
    """Replaces an object of a file, such as arguments, whose class is not imported or called."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""

    def __hash__(self) -> int:
        return id(self)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file by name, on the CPU.

    path: a safetensors file, or a .pth, .pt, .bin or .ckpt file of torch.save. The usual containers
    are unwrapped (averaged weights are preferred to raw ones) and prefixes of wrappers removed.
    Other plain values are ignored. No code of the file is run. Raises CheckpointError if the file
    is missing or damaged, contains no weights, or could be loaded only by running code.
    """
    path = Path(path)
    try:
        head = _head_of(path)
        _check_kind(path, head)
        if path.suffix == ".safetensors" or _is_safetensors(head):
            content: Any = load_file(path)
        else:
            content = _load(path)
    except (SafetensorError, OSError, EOFError, RuntimeError) as error:
        raise_transient(error, path)
        check_readable(path)
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{path}: no such weight file") from None
        if isinstance(error, PermissionError):
            raise NotReadableError(f"{path}: {error.strerror}") from None
        reason = str(error) or "it is empty"
        raise CheckpointError(f"{path}: not a readable weight file ({reason})") from None
    return _remove_prefixes(path, _named_tensors(path, content))


def _load(path: Path) -> Any:
    """Load a file of torch.save. Raises CheckpointError if that would run code."""
    stand_ins: dict[str, type] = {}
    while True:
        allowed = [(kind, name) for name, kind in stand_ins.items()]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of old pickles
                with torch.serialization.safe_globals(allowed):
                    return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
        except (OSError, EOFError):
            raise
        except Exception as error:  # torch raises RuntimeError, KeyError, UnpicklingError and more
            raise_transient(error, path)
            # torch names the global or class it rejects; any other error is a damaged file.
            message = str(error)
            name = _rejected_name(message)
            if name is not None and name not in stand_ins and _is_plain(name):
                stand_ins[name] = type("_StandIn", (_StandIn,), {})
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


def _is_plain(name: str) -> bool:
    """Return whether a global is a plain value, so that a stand-in for it changes no weight."""
    root = name.partition(".")[0]
    return root in _PLAIN_ROOTS or name.rpartition(".")[2] in _PLAIN_CLASSES


def _needs_code(path: Path, name: str | None) -> str:
    root = (name or "").partition(".")[0]
    if root in ("torch", "torchvision", "timm", "transformers", "__main__", "models", "model"):
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


def _is_safetensors(head: bytes) -> bool:
    size = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and 0 < size < 2**27


def _check_kind(path: Path, head: bytes) -> None:
    """Raise CheckpointError for files that are certainly no weights, with their kind."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = None
    if not head:
        kind = "it is empty: copy or download it again"
    elif text.startswith(b"version https://git-lfs"):
        kind = "a Git LFS pointer to the weights: run `git lfs pull` in its repository"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<script")):
        kind = "a web page (HTML) instead of the weights: download the file itself"
    elif head.startswith(b"\x89HDF\r\n\x1a\n"):
        kind = f"an HDF5 file, as Keras writes it: {_CONVERT}"
    elif path.suffix == ".onnx":
        kind = f"an ONNX file: {_CONVERT}, or use a function (FILE.py:FUNCTION) that runs it"
    elif head.startswith(b"\x93NUMPY"):
        kind = f"a NumPy array: {_CONVERT}"
    elif head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        kind = "a compressed archive: unpack it and use the weight file in it"
    elif head[257:262] == b"ustar":
        kind = f"a tar archive{_first_in_tar(path)}: unpack it and use the weight file in it"
    elif head.startswith(b"PK\x03\x04"):
        kind = _zip_kind(path)
    elif text.startswith((b"{", b"[")) and not _is_safetensors(head) and text.isascii():
        kind = "a JSON or text file: use the file with the weights"
    if kind is not None:
        raise CheckpointError(f"{path}: not a readable weight file ({kind})")


_CONVERT = "convert it to PyTorch and save its state_dict"


def _zip_kind(path: Path) -> str | None:
    """Return the kind of a zip archive; None for one of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return None  # truncated: torch.load reports it
    inner = {name.partition("/")[2] for name in names}
    if "data.pkl" in inner:
        if "constants.pkl" not in inner:
            return None
        return (
            "a TorchScript program, which would run its code: "
            "save torch.jit.load(FILE).state_dict() and use that file"
        )
    if names and all(name.endswith(".npy") for name in names):
        return f"a NumPy .npz file with {len(names)} arrays: {_CONVERT}"
    if any(name.endswith(".weights.h5") for name in names):
        return f"a Keras file: {_CONVERT}"
    examples = ", ".join(map(in_line, names[:3]))
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return (
        f"a zip archive of {examples or 'nothing'}{more}: unpack it and use the weight file in it"
    )


def _first_in_tar(path: Path) -> str:
    try:
        with tarfile.open(path) as archive:
            first = archive.next()
    except (tarfile.TarError, OSError):
        return ""
    return "" if first is None else f" of {in_line(first.name)} ..."


def _named_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """Return a file's named tensors. Raises CheckpointError if there are none or one is invalid."""
    weights = _find_weights(content)
    if not weights:
        raise CheckpointError(f"{path}: contains no named tensors; {_describe(content)}")
    for name, value in weights.items():
        if (problem := _problem(value)) is not None:
            raise CheckpointError(f"{path}: {in_line(name)} {problem}")
    return weights


_DTYPES = {
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
_MAX_DIMENSIONS = 64
"""Supported dtypes and number of dimensions; files may contain others."""


def _problem(value: Tensor) -> str | None:
    """Return why a tensor of a file cannot be used; None if it can."""
    if value.layout != torch.strided or value.is_meta or value.is_nested or value.is_quantized:
        return "is not a plain (dense, unquantized) tensor with its values in the file"
    if value.dtype not in _DTYPES:
        return f"has dtype {value.dtype}, which the CPU does not support: save it as float32"
    if value.ndim > _MAX_DIMENSIONS:
        return f"has {value.ndim} dimensions; at most {_MAX_DIMENSIONS} are supported"
    return None


def _find_weights(content: Any, depth: int = 0) -> dict[str, Tensor]:
    """Return the named tensors of a mapping.

    Those of a nested container with a usual name, or its own, or those of its only container.
    """
    if not isinstance(content, Mapping) or depth > 4:
        return {}
    for name in _CONTAINERS:
        if inner := _find_weights(content.get(name), depth + 1):
            return inner
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    containers = [
        inner
        for name, value in content.items()
        if isinstance(name, str)
        and not _NOT_WEIGHTS.search(name)
        and (inner := _find_weights(value, depth + 1))
    ]
    # Scalar tensors next to a single container are records such as the best top-1.
    if len(containers) == 1 and all(value.ndim == 0 for value in tensors.values()):
        return containers[0]
    return tensors


def _describe(content: Any) -> str:
    """Describe the content of a file without weights, with the remedy."""
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        size = f" of shape {tuple(content.shape)}" if isinstance(content, Tensor) else ""
        if isinstance(content, list | tuple):
            size = f" of {len(content)} values"
        return f"it is a single {kind}{size}: save network.state_dict()"
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
    """Remove the prefixes of wrappers. Raises CheckpointError if two names become equal."""
    names = [_unwrapped(name) for name in weights]
    while (member := next((m for m in _MEMBERS if _all_begin(names, m)), None)) is not None:
        names = [_unwrapped(name.removeprefix(member)) for name in names]
    full_names: dict[str, str] = {}
    for name, full_name in zip(names, weights, strict=True):
        if (first := full_names.setdefault(name, full_name)) != full_name:
            raise CheckpointError(
                f"{path}: contains {in_line(name)} twice, as {in_line(first)} and as "
                f"{in_line(full_name)}; keep one of them"
            )
    return dict(zip(names, weights.values(), strict=True))


def _all_begin(names: Collection[str], prefix: str) -> bool:
    """Return whether all names begin with a prefix and belong to more than one layer."""
    rest = {name.removeprefix(prefix) for name in names}
    return all(name.startswith(prefix) for name in names) and any("." in name for name in rest)


def _unwrapped(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def as_named(weights: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Remove a prefix that all weights share, if their names are then exactly `names`."""
    first = next(iter(weights), "")
    for end in [index + 1 for index, letter in enumerate(first) if letter == "."]:
        prefix = first[:end]
        if not all(name.startswith(prefix) for name in weights):
            break
        bare = {name.removeprefix(prefix): value for name, value in weights.items()}
        if bare.keys() == set(names):
            return bare
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

    origin: of the weights, for the message. Raises CheckpointError with the first ten differences,
    before anything is copied.
    """
    expected = network.state_dict()
    weights = as_named(weights, expected)
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
        raise CheckpointError(f"{origin}: made for another network:{lines}{more}{hint}")
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
