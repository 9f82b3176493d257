"""Files of the user's own: Python that is run, a recipe or a teacher; lists of names."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from deit.errors import DataError


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
            lines = Path(word[1:]).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise DataError(f"{field} {word}: not readable ({error.strerror})") from None
        except UnicodeDecodeError:
            raise DataError(f"{field} {word}: no text in UTF-8, with one name a line") from None
        # The first word of a line, so that `wnid<TAB>words` lists work as they are.
        names += [line.split("\t")[0].strip() for line in lines if line.strip()]
    return tuple(names)
