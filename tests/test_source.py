"""Faults that the source itself shows: braces that nothing fills in, files in an encoding of the
locale."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    str(path.relative_to(ROOT)): path
    for pattern in ("*.py", "deit/**/*.py", "models/**/*.py", "datasets/*.py", "scripts/**/*.py")
    for path in ROOT.glob(pattern)
}

# Not after a dollar sign, which is a variable of a shell, nor a name in LaTeX.
_BRACES = re.compile(
    r"(?<!\$)(?<!\\begin)(?<!\\end)\{[A-Za-z_]\w*(?:\.\w+|\([^{}]*\)|\[[^{}]*\])*(?:![rsa])?(?::[^{}]*)?\}"
)
_TAKES_TEMPLATE = {"TextColumn", "set_major_formatter", "set_minor_formatter", "colorbar"}
"""Functions of rich and matplotlib that fill braces in themselves."""


def unfilled(source: str) -> list[str]:
    """List plain strings with braces around an expression that no `.format` fills in."""
    tree = ast.parse(source)
    templates = set(map(id, _templates(tree)))
    return [*_joined_with_f_strings(source, tree)] + [
        f"line {node.lineno}: {match[0]}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if id(node) not in templates and (match := _BRACES.search(node.value))
    ]


def _joined_with_f_strings(source: str, tree: ast.AST) -> Iterator[str]:
    """Yield plain strings that are joined with f-strings; the syntax tree merges them."""
    spans = [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
    ]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.STRING or "f" in re.split("['\"]", token.string)[0].lower():
            continue
        inside = any(start <= token.start and token.end <= end for start, end in spans)
        if inside and (match := _BRACES.search(token.string)):
            yield f"line {token.start[0]}: {match[0]}"


def _templates(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield nodes with valid braces: f-strings, docstrings, and values that reach `.format`."""
    assigned: dict[str, list[ast.AST]] = {}
    used: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    assigned.setdefault(target.id, []).append(node.value)
        if isinstance(node, ast.JoinedStr):
            yield from ast.walk(node)
        if isinstance(node, ast.Expr):
            yield node.value
        if isinstance(node, ast.Attribute) and node.attr == "format":
            yield from ast.walk(node.value)
            used += [leaf.id for leaf in ast.walk(node.value) if isinstance(leaf, ast.Name)]
        if isinstance(node, ast.Call) and _called(node) in _TAKES_TEMPLATE:
            yield from ast.walk(node)
    known: set[str] = set()
    while used:
        name = used.pop()
        if name in known:
            continue
        known.add(name)
        for value in assigned.get(name, ()):
            yield from ast.walk(value)
            used += [leaf.id for leaf in ast.walk(value) if isinstance(leaf, ast.Name)]


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def test_no_plain_string_has_unfilled_braces():
    problems = {name: unfilled(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
    assert {name: lines for name, lines in problems.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        'x = f"{a}; " "see {_kept(parts)}"',
        'x = f"{a}; " + "see {_kept(parts)}"',
        'info("no file {path}")',
        'info("{options.out!r} exists", "{rate:.2f}"[0], "{rows[0]}")',
    ],
)
def test_unfilled_planted_braces_are_reported(source):
    assert unfilled(source)


def test_unfilled_templates_are_not_reported():
    source = '"""Of {name}."""\n_A = "{x}"\n_B = _A + "{y}"\n'
    source += 'info(_B.format(x=1, y=2), f"{x}", "{z}".format(z=1), "a{2,3}", "{}", "${w[i]}")\n'
    assert unfilled(source) == []


def local_encodings(source: str) -> list[str]:
    """List the lines that read or write text in the encoding of the locale."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        method = isinstance(node.func, ast.Attribute)
        modes = [value.value for value in node.args if isinstance(value, ast.Constant)]
        opens = any(isinstance(mode, str) and mode in ("w", "a", "a+", "x", "r") for mode in modes)
        if _called(node) in ("read_text", "write_text"):
            opens = method
        elif _called(node) != "open":
            continue
        if opens and "encoding" not in keywords:
            problems.append(f"line {node.lineno}: {_called(node)}")
    return problems


def test_text_files_are_opened_as_utf_8():
    problems = {
        name: local_encodings(path.read_text(encoding="utf-8")) for name, path in FILES.items()
    }
    assert {name: lines for name, lines in problems.items() if lines} == {}


def test_local_encodings_planted_lines_are_reported():
    source = "path.read_text()\npath.write_text(x, errors='replace')\nopen(path, 'w')\n"
    source += "path.open('a')\nread_text(path)\npath.open('wb')\nopen(path, encoding='utf-8')\n"
    lines = local_encodings(source)
    assert [line.split(":")[0] for line in lines] == ["line 1", "line 2", "line 3", "line 4"]
