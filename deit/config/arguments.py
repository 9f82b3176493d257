"""Check the types of the arguments of public functions, by their annotations."""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, ParamSpec, TypeVar

from deit.core.errors import NO_VALUE, ConfigProblem, config_error

Parameters, Result = ParamSpec("Parameters"), TypeVar("Result")
_PLAIN = (str, int, float, bool, types.NoneType, PathLike)
"""Types of values that are shown in messages."""
_NAMES = {PathLike: "Path", bool: "True or False", types.NoneType: "None", int: "integer"}
"""What annotations are named in messages, if not by their own name."""


def checks_types(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make a function raise ConfigError for arguments that are not of the annotated types.

    It names all of them. int and float take all integers and real numbers, also those of numpy, and
    Sequence all lists, tuples and arrays, of which the items are not checked.

    >>> @checks_types
    ... def sides(images: Sequence[str], size: int | None = None) -> None: ...
    >>> sides([], 8)
    >>> from deit.core.errors import ConfigError
    >>> try:
    ...     sides("a.png", 8.5)
    ... except ConfigError as error:
    ...     print(error)
    images = 'a.png': should be a list of str; got str
      size = 8.5: should be integer or None; got float
    """
    signature = inspect.signature(function)
    hints = functools.cache(lambda: typing.get_type_hints(function))  # at the first call

    @functools.wraps(function)
    def wrapper(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        try:
            given = signature.bind(*args, **options).arguments
        except TypeError:  # Python's own error names the argument
            return function(*args, **options)
        problems = [
            _problem(name, value, hints()[name])
            for name, value in given.items()
            if name in hints() and signature.parameters[name].kind not in _VARIADIC
            if not _fits(value, hints()[name])
        ]
        if problems:
            raise config_error(problems)
        return function(*args, **options)

    return wrapper


def check_fields(options: Any) -> None:
    """Raise ConfigError for fields of a dataclass that are not of the annotated types."""
    hints = typing.get_type_hints(type(options))
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    problems = [
        _problem(name, value, hints[name])
        for name, value in values.items()
        if not _fits(value, hints[name])
    ]
    if problems:
        raise config_error(problems)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _problem(name: str, value: Any, hint: Any) -> ConfigProblem:
    printed = value if isinstance(value, _PLAIN) else NO_VALUE
    return ConfigProblem(name, printed, f"should be {_name(hint)}; got {type(value).__name__}")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotated type."""
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is tuple and parts and Ellipsis not in parts:
        is_sequence = isinstance(value, tuple | list) and len(value) == len(parts)
        return is_sequence and all(map(_fits, value, parts))
    if origin in (Sequence, tuple):
        is_other = isinstance(value, str | bytes | dict | set)
        return not is_other and hasattr(value, "__len__") and hasattr(value, "__getitem__")
    if origin is Callable:
        return callable(value)
    if origin in (int, float):
        return isinstance(value, Integral if origin is int else Real)
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def _name(hint: Any) -> str:
    """Return what a message names an annotated type."""
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        *first, last = dict.fromkeys(map(_name, parts))
        return f"{', '.join(first)} or {last}" if first else last
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple and parts and Ellipsis not in parts:
        return f"({', '.join(map(_name, parts))})"
    if origin in (Sequence, tuple, Iterable):
        plural = {"function": "functions"}
        item = _name(parts[0]) if parts else ""
        return f"a list of {plural.get(item, item)}" if item else "a list"
    if origin is Callable:
        return "function"
    return _NAMES.get(origin, getattr(origin, "__name__", str(origin)))
