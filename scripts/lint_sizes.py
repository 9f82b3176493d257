"""Check that modules, functions and folders stay small: 400 lines, 60 lines, 20 modules."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("deit", "models", "datasets", "scripts", "tests")
MODULE_LINES, FUNCTION_LINES, FOLDER_MODULES = 400, 60, 20


def problems() -> list[str]:
    """Return one line for each module, function or folder that is too large."""
    messages = []
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            messages += _of_file(file)
        for inner in (ROOT / folder, *(ROOT / folder).rglob("*")):
            modules = [] if inner.name == "__pycache__" else list(inner.glob("[!_]*.py"))
            if len(modules) > FOLDER_MODULES:
                messages.append(f"{inner.relative_to(ROOT)}: {len(modules)} modules")
    return messages


def _of_file(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8")
    name, lines = file.relative_to(ROOT), text.count("\n")
    messages = [f"{name}: {lines} lines"] if lines > MODULE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > FUNCTION_LINES:
                messages.append(f"{name}:{node.lineno}: {node.name} has {length} lines")
    return messages


if __name__ == "__main__":
    messages = problems()
    print("\n".join(messages) or "sizes: fine")
    sys.exit(bool(messages))
