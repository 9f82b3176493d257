"""User input that is not a plain value: Python files (recipes, teachers), lists of names, and
addresses given instead of paths."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from deit.core.errors import DataError
from deit.core.file_reading import read_lines


def import_file(path: str | Path) -> ModuleType:
    """Run a Python file and return its module. It may import files of its folder.

    Raises any error that the file raises.
    """
    path = Path(path)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # at the end, so that its files do not shadow packages
    name = f"deit_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


def read_names(field: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names, with `@FILE` replaced by the lines of that file.

    field: the configuration field, for the message.
    Raises DataError if a file cannot be read.
    """
    names: list[str] = []
    for value in values:
        if not value.startswith("@"):
            names.append(value)
            continue
        try:
            lines = read_lines(Path(value[1:]).expanduser())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{field} {value}: not readable ({reason})") from None
        # Only the text before a tab: ImageNet's lists have lines `wnid<TAB>description`.
        names += [line.split("\t")[0].strip() for line in lines if line]
    return tuple(names)


HUB_PREFIXES = ("hf-hub:", "hf_hub:")
"""Prefixes by which timm names a repository on the Hugging Face hub."""
_ADDRESS = re.compile(r"(?i)(?:([a-z][a-z0-9+.-]+):/|(hf[-_]hub|local-dir):)")
_WEB = ("http", "https", "ftp", "ftps")


def address_hint(value: str) -> str | None:
    """Return what to give instead of a value that is an address; None if it is not an address."""
    match = _ADDRESS.match(value)
    if match is None:
        return None
    scheme, kind = (match[1] or "").lower(), (match[2] or "").lower()
    rest = value[match.end() :].lstrip("/")
    if kind == "local-dir":
        return f"is timm's name for a folder; give the folder itself: {rest}"
    hub = rest.removeprefix("huggingface.co/").removeprefix("hf.co/")
    if kind or scheme == "hf" or (scheme in _WEB and hub != rest and hub.count("/") == 1):
        hub = hub.partition("@")[0]
        return (
            "is an address on the Hugging Face hub, not a local file; download it "
            f"(hf download {hub} --local-dir DIR) and give that folder"
        )
    if scheme == "file":
        return f"is an address; give the path itself: {value[match.end() - 1 :].replace('//', '')}"
    command = f" (curl -LO {value})" if scheme in _WEB else ""
    return f"is an address, not a local file or folder; download it{command} and give its path"
