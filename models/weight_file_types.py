"""Recognize safetensors files, and files without weights: web pages, archives, ONNX and others."""

import tarfile
import zipfile
from pathlib import Path

from deit.core.errors import CheckpointError, single_line

_CONVERT = "convert it to PyTorch and save its state_dict"
_MAX_HEADER_BYTES = 2**27  # safetensors reads headers up to 100 MB


def is_safetensors(head: bytes) -> bool:
    """Return whether a file begins with the length of a JSON header, and with that header."""
    header_bytes = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and 0 < header_bytes < _MAX_HEADER_BYTES


def check_file_type(path: Path, head: bytes) -> None:
    """Raise CheckpointError for a file of another type, such as a web page or an ONNX file.

    head: its first bytes.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()  # without a byte order mark and spaces
    problem = None
    if not head:
        problem = "it is empty: copy or download it again"
    elif text.startswith(b"version https://git-lfs"):
        problem = "a Git LFS pointer to the weights: run `git lfs pull` in its repository"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<script")):
        problem = "a web page (HTML) instead of the weights: download the file itself"
    elif head.startswith(b"\x89HDF\r\n\x1a\n"):
        problem = f"an HDF5 file, as Keras writes it: {_CONVERT}"
    elif path.suffix == ".onnx":
        problem = f"an ONNX file: {_CONVERT}, or use a function (FILE.py:FUNCTION) that runs it"
    elif head.startswith(b"\x93NUMPY"):
        problem = f"a NumPy array: {_CONVERT}"
    elif head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        problem = "a compressed archive: unpack it and use the weight file in it"
    elif head[257:262] == b"ustar":
        problem = f"a tar archive{_first_in_tar(path)}: unpack it and use the weight file in it"
    elif head.startswith(b"PK\x03\x04"):
        problem = _zip_problem(path)
    elif text.startswith((b"{", b"[")) and not is_safetensors(head) and text.isascii():
        problem = "a JSON or text file: use the file with the weights"
    if problem is not None:
        raise CheckpointError(f"{path}: not a readable weight file ({problem})")


def _zip_problem(path: Path) -> str | None:
    """Return what a zip archive is, with the remedy; None for one of torch.save."""
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
    examples = ", ".join(map(single_line, names[:3]))
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
    return "" if first is None else f" of {single_line(first.name)} ..."
