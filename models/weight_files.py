"""Weight files of any origin, read without running code from them, loaded without silent gaps."""

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
"""What trainers call the weights within their files, an average before the raw weights."""
_NOT_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loop|rng|loss|criterion", re.IGNORECASE)
_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
"""What wrappers of PyTorch put before names, wherever they stand."""
_MEMBERS = (
    *("model.", "_model.", "net.", "network.", "backbone.", "encoder."),
    *("student.", "teacher.", "ema_model.", "ema."),
)
"""What a Lightning module or a trainer calls its network: left out where all names begin so."""
_PLAIN_ROOTS = {
    *("argparse", "types", "pathlib", "datetime", "enum", "numpy", "collections", "omegaconf"),
    *("yacs", "easydict", "ml_collections", "addict", "lightning_fabric", "lightning_utilities"),
}
_PLAIN_CLASSES = {"AttributeDict", "AttrDict", "HParams"}
"""Where values come from that say nothing of the weights: modules, and classes by name."""


class _StandIn(dict):
    """What a file holds beside its weights (arguments, paths, NumPy's numbers): known to be there
    and nothing more. The class that the file names is neither imported nor called."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Take no state."""

    def __hash__(self) -> int:
        return id(self)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name: safetensors, or a .pth / .pt / .bin / .ckpt of tensors.

    Unwraps the usual containers (an EMA before the raw weights) and the prefixes that wrappers
    leave. Plain values beside the weights are passed over. Raises CheckpointError that says what
    the file is where it holds no weights; a file that wants to run code is refused.
    """
    try:
        head = _head_of(path)
        _refuse_other_kinds(path, head)
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
    return _bare(path, _named_tensors(path, content))


def _load(path: Path) -> Any:
    """What a file of torch.save holds. Raises CheckpointError where that needs code to run."""
    stand_ins: dict[str, type] = {}
    while True:
        known = [(kind, name) for name, kind in stand_ins.items()]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of old pickles; ours is the message
                with torch.serialization.safe_globals(known):
                    return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
        except (OSError, EOFError):
            raise
        except Exception as error:  # torch raises RuntimeError, KeyError, UnpicklingError and more
            raise_transient(error, path)
            # torch names the global or class it refused; every other reason is a damaged file.
            said = str(error)
            name = _refused_name(said)
            if name is not None and name not in stand_ins and _is_plain(name):
                stand_ins[name] = type("_StandIn", (_StandIn,), {})
                continue
            if name is not None or "GLOBAL" in said or "Unsupported class" in said:
                raise CheckpointError(_needs_code(path, name)) from None
            raise CheckpointError(
                f"{path}: not a readable weight file (cut off or damaged?)"
            ) from None


def _refused_name(said: str) -> str | None:
    """The global that torch.load would not import, by its whole name."""
    found = re.search(r"GLOBAL ([\w.]+)", said)
    return None if found is None else found[1]


def _is_plain(name: str) -> bool:
    """Whether a global stands for a plain value: what is put in its place changes no weight."""
    root = name.partition(".")[0]
    return root in _PLAIN_ROOTS or name.rpartition(".")[2] in _PLAIN_CLASSES


def _needs_code(path: Path, name: str | None) -> str:
    root = (name or "").partition(".")[0]
    if root in ("torch", "torchvision", "timm", "transformers", "__main__", "models", "model"):
        what = f"holds a whole network ({name}) and more than tensors"
    else:
        what = "holds more than tensors" + (f" ({name})" if name else "")
    return (
        f"{path}: {what} and would have to run code to load; where you trust it, save its "
        "state_dict alone (torch.save(network.state_dict(), FILE); safetensors is best) and give "
        "that file"
    )


def _head_of(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read(1024)


def _is_safetensors(head: bytes) -> bool:
    size = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and 0 < size < 2**27


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    """Name what is certainly no weights. Raises CheckpointError."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    said = None
    if not head:
        said = "it is empty: copy or download it again"
    elif text.startswith(b"version https://git-lfs"):
        said = "a Git LFS pointer to the weights: run `git lfs pull` in its repository"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<script")):
        said = "a web page (HTML), saved in the place of the weights: download the file itself"
    elif head.startswith(b"\x89HDF\r\n\x1a\n"):
        said = f"an HDF5 file, as Keras writes it: {_CONVERT}"
    elif path.suffix == ".onnx":
        said = f"an ONNX file: {_CONVERT}, or give a function (FILE.py:FUNCTION) that runs it"
    elif head.startswith(b"\x93NUMPY"):
        said = f"an array of NumPy: {_CONVERT}"
    elif head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        said = "a compressed archive: unpack it and give the weight file in it"
    elif head[257:262] == b"ustar":
        said = f"a tar archive{_held_in_tar(path)}: unpack it and give the weight file in it"
    elif head.startswith(b"PK\x03\x04"):
        said = _of_zip(path)
    elif text.startswith((b"{", b"[")) and not _is_safetensors(head) and text.isascii():
        said = "a JSON or text file: give the file with the weights"
    if said is not None:
        raise CheckpointError(f"{path}: not a readable weight file ({said})")


_CONVERT = "convert it to PyTorch and save its state_dict"


def _of_zip(path: Path) -> str | None:
    """What a zip archive is, where it is not one of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return None  # cut off: torch.load says so
    inner = {name.partition("/")[2] for name in names}
    if "data.pkl" in inner:
        if "constants.pkl" not in inner:
            return None
        return (
            "a TorchScript program, which would run its code: "
            "save torch.jit.load(FILE).state_dict() and give that file"
        )
    if names and all(name.endswith(".npy") for name in names):
        return f"NumPy's .npz with {len(names)} arrays: {_CONVERT}"
    if any(name.endswith(".weights.h5") for name in names):
        return f"a Keras file: {_CONVERT}"
    shown = ", ".join(map(in_line, names[:3])) + (
        f" and {len(names) - 3} more" if names[3:] else ""
    )
    return f"a zip archive of {shown or 'nothing'}: unpack it and give the weight file in it"


def _held_in_tar(path: Path) -> str:
    try:
        with tarfile.open(path) as archive:
            first = archive.next()
    except (tarfile.TarError, OSError):
        return ""
    return "" if first is None else f" of {in_line(first.name)} ..."


def _named_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors by name in the container that most likely holds the weights. Raises
    CheckpointError naming what is there instead."""
    found = _within(content)
    if not found:
        raise CheckpointError(f"{path}: holds no named tensors; {_described(content)}")
    for name, value in found.items():
        if (trouble := _trouble(value)) is not None:
            raise CheckpointError(f"{path}: {in_line(name)} {trouble}")
    return found


_KINDS = {
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
_MOST_DIMENSIONS = 64
"""Types and dimensions with which PyTorch computes; files may hold others."""


def _trouble(value: Tensor) -> str | None:
    """Why nothing can be computed with a tensor of a file; None where it can."""
    if value.layout != torch.strided or value.is_meta or value.is_nested or value.is_quantized:
        return "is no plain tensor with its numbers in the file"
    if value.dtype not in _KINDS:
        return f"is of {value.dtype}, with which a CPU does not compute: save it as float32"
    if value.ndim > _MOST_DIMENSIONS:
        return f"has {value.ndim} dimensions"
    return None


def _within(content: Any, depth: int = 0) -> dict[str, Tensor]:
    """The named tensors of a value: those of the container in it with a usual name, else its own,
    else those of its only container that has any."""
    if not isinstance(content, Mapping) or depth > 4:
        return {}
    for name in _CONTAINERS:
        if inner := _within(content.get(name), depth + 1):
            return inner
    own = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    others = [
        inner
        for name, value in content.items()
        if isinstance(name, str)
        and not _NOT_WEIGHTS.search(name)
        and (inner := _within(value, depth + 1))
    ]
    # Beside a container, a tensor of its own is a number that was noted, such as the best top-1.
    if len(others) == 1 and all(value.ndim == 0 for value in own.values()):
        return others[0]
    return own


def _described(content: Any) -> str:
    """What a file holds in the place of weights."""
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        of = f" of {tuple(content.shape)}" if isinstance(content, Tensor) else ""
        if isinstance(content, list | tuple):
            of = f" of {len(content)} values"
        return f"it is one {kind}{of}: save network.state_dict()"
    if not content:
        return "it is an empty dict"
    tensors = sum(1 for _ in _tensors_in(content))
    keys = ", ".join(map(repr, list(content)[:8]))
    more = f" and {len(content) - 8} more" if len(content) > 8 else ""
    return (
        f"its keys are {keys}{more}, with {tensors} tensors in all: save network.state_dict() and "
        "give that file"
    )


def _tensors_in(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    values = content.values() if isinstance(content, Mapping) else content
    if isinstance(content, Mapping | list | tuple):
        for value in values:
            yield from _tensors_in(value)


def _bare(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes of wrappers. Raises CheckpointError where two become one."""
    bare = {_unwrapped(name): value for name, value in weights.items()}
    if len(bare) < len(weights):
        twice = next(name for name in weights if name not in bare)
        raise CheckpointError(
            f"{path}: holds {_unwrapped(twice)} twice, also as {twice}; which of them counts is "
            "not said"
        )
    while (member := next((one for one in _MEMBERS if _all_begin(bare, one)), None)) is not None:
        bare = {_unwrapped(name.removeprefix(member)): value for name, value in bare.items()}
    return bare


def _all_begin(names: Collection[str], prefix: str) -> bool:
    """Whether all names begin with a prefix, and are more than one layer's."""
    rest = {name.removeprefix(prefix) for name in names}
    return all(name.startswith(prefix) for name in names) and any("." in name for name in rest)


def _unwrapped(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def as_named(weights: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The weights under the names of a network, where they are these behind one prefix that all of
    them have; else as they are."""
    first = next(iter(weights), "")
    for place in [at + 1 for at, letter in enumerate(first) if letter == "."]:
        prefix = first[:place]
        if not all(name.startswith(prefix) for name in weights):
            break
        bare = {name.removeprefix(prefix): value for name, value in weights.items()}
        if bare.keys() == set(names):
            return bare
    return weights


def digest_of(weights: dict[str, Tensor]) -> str:
    """SHA-256 of tensors by name, type and shape."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(network: nn.Module, weights: dict[str, Tensor], *, origin: str) -> None:
    """Copy weights into the network: every name and shape must agree, but for a prefix that all
    names have.

    Raises CheckpointError listing the first ten differences, before anything is copied.
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
        shown = "".join(f"\n  {line}" for line in differences[:10])
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        hint = _on_gray(weights, expected) or _on_names(weights, expected)
        raise CheckpointError(f"{origin}: made for another network:{shown}{more}{hint}")
    network.load_state_dict(
        {name: shard_like(value, expected[name]) for name, value in weights.items()}
    )


def _on_gray(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """What to do with weights for images of one channel, where that is what differs."""
    for name, value in weights.items():
        own = expected.get(name)
        if own is None or value.ndim != 4 or own.ndim != 4 or value.shape == own.shape:
            continue
        if value.shape[1] == 1 and own.shape[1] == 3 and value.shape[2:] == own.shape[2:]:
            return (
                f"\n  {name} takes gray images (1 channel), here all images have 3: save it as "
                f"weight.repeat(1, 3, 1, 1) / 3, which answers a gray image as before"
            )
    return ""


def _on_names(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """By which first words the names differ, where none of the network's is in the file."""
    if not weights or any(name in weights for name in expected):
        return ""

    def begin(names: Collection[str]) -> str:
        counted = Counter(name.partition(".")[0] for name in names).most_common(4)
        return ", ".join(f"{name}. ({number})" for name, number in counted)

    return (
        f"\n  the {len(weights)} names in the file begin with {begin(weights)}; those of the "
        f"network with {begin(expected)}"
    )
