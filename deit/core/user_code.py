"""Files of the user's own: Python that is run, a recipe or a teacher; lists of names; addresses
given in the place of a path."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from deit.core.errors import DataError
from deit.core.file_reading import read_lines


def import_file(path: Path) -> ModuleType:
    """The module of a Python file, which may import its neighbours. Raises whatever it raises."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # behind everything else: it may not shadow a package
    name = f"deit_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def read_names(field: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """The names, with `@FILE` replaced by the lines of that file. field: for the message.

    Raises DataError where a file cannot be read.
    """
    names: list[str] = []
    for word in words:
        if not word.startswith("@"):
            names.append(word)
            continue
        try:
            lines = read_lines(Path(word[1:]).expanduser())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{field} {word}: not readable ({reason})") from None
        # The first word of a line, so that `wnid<TAB>words` lists work as they are.
        names += [line.split("\t")[0].strip() for line in lines if line]
    return tuple(names)


HUB_PREFIXES = ("hf-hub:", "hf_hub:")
"""What timm calls a repository on the Hugging Face hub by."""
_ADDRESS = re.compile(r"(?i)(?:([a-z][a-z0-9+.-]+):/|(hf[-_]hub|local-dir):)")
_WEB = ("http", "https", "ftp", "ftps")


def address_hint(value: str) -> str | None:
    """What to do instead where a value is the address of something and no path; else None."""
    found = _ADDRESS.match(value)
    if found is None:
        return None
    scheme, kind = (found[1] or "").lower(), (found[2] or "").lower()
    rest = value[found.end() :].lstrip("/")
    if kind == "local-dir":
        return f"is timm's way to name a folder; give the folder itself: {rest}"
    hub = rest.removeprefix("huggingface.co/").removeprefix("hf.co/")
    if kind or scheme == "hf" or (scheme in _WEB and hub != rest and hub.count("/") == 1):
        hub = hub.partition("@")[0]
        return (
            "is an address on the Hugging Face hub, and no file here; download it "
            f"(hf download {hub} --local-dir DIR) and give that folder"
        )
    if scheme == "file":
        return f"is an address; give the path itself: {value[found.end() - 1 :].replace('//', '')}"
    how = f" (curl -LO {value})" if scheme in _WEB else ""
    return f"is an address, and no file or folder here; download it{how} and give its path"
