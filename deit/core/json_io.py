"""Strict JSON (no duplicate keys, no NaN), loaded as typed dataclasses, also with a digest."""

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from deit.core.errors import CheckpointError, ConfigError, NotReadableError, SystemFault, first_line
from deit.core.file_reading import read_bytes
from deit.core.filesystem import write_json

T = TypeVar("T")


def parse_strict_json(text: str | bytes) -> Any:
    """Parse JSON, without Python's extensions: no duplicate keys, no NaN, no Infinity.

    Raises ValueError, also if the nesting is too deep.
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"duplicate key {max(names, key=names.count)!r}")
        return values

    def reject_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=reject_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None


@functools.cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    """Return the type checker of a dataclass; cached because it is slow to build."""
    return TypeAdapter(kind)


@contextmanager
def translate_value_errors(path: Path) -> Iterator[None]:
    """Raise CheckpointError, with the name of a JSON file, if using its unchecked values fails.

    Such errors: a field is missing or of another type, a name is unknown, a number out of range.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: invalid content ({type(error).__name__}: {first_line(error)}; "
            "--debug shows where)"
        ) from error


def load_json_as(path: Path, kind: type[T]) -> T:
    """Load a JSON file as an instance of a dataclass, with all fields present and of their types.

    Raises CheckpointError naming the file and the field; NotReadableError if the permissions
    forbid reading it; SystemFault for a transient error.
    """
    try:
        return _adapter(kind).validate_json(read_bytes(path), strict=True)
    except PermissionError as error:
        raise NotReadableError(f"{path}: {error.strerror}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first_problem(error)}") from None


def as_typed(path: Path, value: Any, kind: type[T]) -> T:
    """Convert a value from the file `path` as `load_json_as` does. Raises CheckpointError."""
    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return "".join(f"{part}: " for part in first["loc"]) + first["msg"]


def write_sealed(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write a value with its digest, for `read_sealed`. Return the value as it will be read.

    Raises SystemFault.
    """
    value = json.loads(json.dumps(value))  # turns tuples into lists and keys into strings
    write_json(path, asdict(_Sealed(digest_of_value(value), value)))
    return value


def read_sealed(path: Path, kind: type[T]) -> T | None:
    """Read a value written by `write_sealed`, as an instance of a dataclass or type.

    Return None if the file is missing, damaged, edited or of another release: it is a cache, which
    the caller computes again. Raises NotReadableError and SystemFault.
    """
    if not path.is_file():
        return None
    try:
        sealed = load_json_as(path, _Sealed)
        if digest_of_value(sealed.value) == sealed.sha256:
            return as_typed(path, sealed.value, kind)
    except NotReadableError:
        raise
    except CheckpointError:
        pass
    return None


@dataclass
class _Sealed:
    sha256: str
    value: dict[str, Any]


def digest_of_value(value: dict[str, Any]) -> str:
    """Return the SHA-256 of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


_MAX_LISTED = 8


def check_same_request(out: Path, file: str, request: dict[str, Any], *, what: str) -> None:
    """Check that a folder is empty, or was started with the same options.

    file: the JSON file in the folder with the options it was started with.
    request: the options now, by name, ready for JSON. An option that only one side has differs.
    what: the kind of result in the folder, for messages.
    Raises SystemFault if `out` is a file, and ConfigError naming all options that differ.
    """
    if out.exists() and not out.is_dir():
        raise SystemFault(f"out = {out}: is a file, not a folder")
    path = out / file
    if path.is_file():
        before, now = load_json_as(path, dict[str, Any]), json.loads(json.dumps(request))
        keys = [*now, *(key for key in before if key not in now)]
        differences = [
            f"{key} is {_value_text(before, key)}, not {_value_text(now, key)}"
            for key in keys
            if before.get(key) != now.get(key)
        ]
        if differences:
            more = f" and {len(differences) - _MAX_LISTED} more"
            more *= len(differences) > _MAX_LISTED
            raise ConfigError(
                f"out = {out}: holds a {what} whose {', '.join(differences[:_MAX_LISTED])}{more}; "
                "use the options that it was started with, or another folder"
            )
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ConfigError(f"out = {out}: is not empty and not a {what} (no {file}); give another")


def _value_text(values: dict[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "the default"
