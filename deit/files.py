"""Runs a user's own Python file: a recipe or a teacher."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


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
