"""`import deit`: fast, without torch, with documented names that type checkers see."""

import ast
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import deit
from deit.core import errors as core_errors
from scripts.documentation.api import docstring

SOURCE = Path(deit.__file__).read_text(encoding="utf-8")


def test_import_loads_no_library(tmp_path):
    code = (
        "import sys; before = set(sys.modules); import deit; dir(deit); deit.__version__; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(deit.__file__).parents[1],
    )  # fmt: skip
    assert not {*result.stdout.split()} & {"torch", "timm", "numpy", "pydantic", "rich", "PIL"}


def test_errors_are_a_module():
    code = (
        "import sys, deit.errors; from deit.errors import ConfigError; "
        "assert deit.errors.ConfigError is ConfigError and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(deit.__file__).parents[1])
    defined = {
        name
        for name, value in vars(core_errors).items()
        if inspect.isclass(value) and value.__module__ == "deit.core.errors"
    }
    assert {*deit.errors.__all__} == defined
    assert all(vars(deit.errors)[name] is vars(core_errors)[name] for name in defined)


@pytest.mark.parametrize("name", deit.__all__)
def test_public_name_exists_and_is_documented(name):
    value = getattr(deit, name)
    assert name in dir(deit)
    if name not in ("__version__", "errors"):
        assert len(docstring(name)) > 20
        assert getattr(deit, name) is value


INTERNAL = {"EvalSettings", "LoadedNetwork", "SearchSpace", "TeacherInput", "UnmixedViews"}
"""Types of parameters and results that the package itself needs only."""


def functions_of(value):
    """Yield a public function, or the constructor and the public methods of a class."""
    if inspect.isfunction(value):
        yield value
    if isinstance(value, type):
        for name, member in inspect.getmembers(value):
            function = member.fget if isinstance(member, property) else member
            is_public = not name.startswith("_") or name in ("__init__", "__call__")
            if is_public and (inspect.isfunction(function) or inspect.ismethod(function)):
                yield function


def types_in(hint):
    if isinstance(hint, type):
        yield hint
    for part in typing.get_args(hint):
        yield from types_in(part)


@pytest.mark.parametrize("name", [name for name in deit.__all__ if not name.startswith("_")])
def test_types_of_parameters_and_results_are_public(name):
    public = {getattr(deit, other) for other in deit.__all__ if other[0].isupper()}
    types = {
        part
        for function in functions_of(getattr(deit, name))
        for hint in typing.get_type_hints(function).values()
        for part in types_in(hint)
        if part.__module__.startswith("deit.")
    }
    assert {part.__name__ for part in types - public} <= INTERNAL


def test_type_checkers_see_the_same_names():
    (block,) = [
        node
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert all(alias.name == alias.asname for node in block.body for alias in node.names)
    listed = {name: module for module, names in deit._MODULES.items() for name in names}
    assert seen == {**listed, "errors": "deit"}
    assert (Path(deit.__file__).parent / "py.typed").is_file()


def test_unknown_name_raises_attribute_error():
    assert not hasattr(deit, "trian")
    with pytest.raises(AttributeError, match="trian"):
        deit.trian  # noqa: B018


@pytest.mark.parametrize("name", [name for name in deit.__all__ if not name.startswith("_")])
def test_signatures_are_annotated(name):
    value = getattr(deit, name)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        empty = inspect.Parameter.empty
        missing = [p.name for p in signature.parameters.values() if p.annotation is empty]
        assert not missing
