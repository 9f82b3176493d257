"""The page of the Python interface: every public name, from the table in deit/__init__.py."""

import ast
import inspect
import re
from importlib import import_module
from itertools import pairwise

import deit
from scripts.documentation.markdown import code, escaped, text_table

_INTRODUCTION = """\
`import deit` offers these names. It takes a fraction of a second; torch and the other libraries are
imported when a name is used for the first time. Errors are raised as subclasses of
`deit.errors.DeitError` ([Exit codes](exit-codes.md) lists them).

Loaders, teachers, students and the student of a `Run` are on the CPU unless `device` is given, also
on a machine with a GPU. It is a `torch.device` or its name: `cpu`, `cuda`, `cuda:1`, or `auto` for
a GPU if there is one. Functions that train or evaluate take the device of the configuration
(`run.device`, `auto` by default).
"""
_SECTIONS = {
    "Configurations": ("deit.config",),
    "Runs": (
        *("deit.api", "deit.evaluation", "deit.analysis", "deit.deploy"),
        *("deit.core.machine", "deit.experiments", "deit.training"),
    ),
    "Parts for your own loop": ("deit.distill", "deit.datasets", "deit.models", "deit.core"),
}
"""The packages of each section."""


def api_page() -> str:
    """Return the page as Markdown, with directives of mkdocstrings."""
    parts, remaining = [f"# Python interface\n\n{_INTRODUCTION}"], dict(deit._MODULES)
    for title, packages in _SECTIONS.items():
        modules = {name: remaining[name] for name in remaining if name.startswith(packages)}
        remaining = {name: names for name, names in remaining.items() if name not in modules}
        members = [(module, name) for module, names in modules.items() for name in names]
        rows = [(code(f"deit.{name}"), escaped(_summary(name))) for _, name in members]
        parts.append(f"## {title}\n\n{text_table(('name', 'purpose'), rows)}\n")
        parts += [_directive(module, name) for module, name in members]
    assert not remaining, f"no section for {', '.join(remaining)}"
    return "\n".join(parts)


def _summary(name: str) -> str:
    """Return the first sentence of a docstring."""
    text = " ".join(docstring(name).split("\n\n")[0].split())
    return re.split(r"(?<=[.;]) ", text)[0].replace(";", ".")


def docstring(name: str) -> str:
    """Return the documentation of a public name; of an alias the string below its assignment."""
    value = getattr(deit, name)
    if inspect.isfunction(value) or isinstance(value, type):
        return inspect.getdoc(value) or ""
    body = ast.parse(inspect.getsource(import_module(deit._MODULE_OF[name]))).body
    (text,) = (
        ast.literal_eval(below.value)
        for statement, below in pairwise(body)
        if isinstance(statement, ast.Assign)
        and [ast.unparse(target) for target in statement.targets] == [name]
        and isinstance(below, ast.Expr)
    )
    return text


def _directive(module: str, name: str) -> str:
    """Return the directive of a name; the fields of a section are on the page of settings."""
    if not module.startswith("deit.config.sections."):
        return f"::: {module}.{name}\n"
    section = module.rpartition(".")[2]
    fields = f"Its fields are the [settings of `{section}`](settings.md#{section}).\n"
    return f"::: {module}.{name}\n    options:\n      members: false\n\n{fields}"
