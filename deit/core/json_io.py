"""Reads JSON into the dataclass that wrote it: no key twice, no NaN; writes it with a digest."""

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

T = TypeVar("Kind")


def parse_strict_json(text: str | bytes) -> Any:
    """JSON, and not what Python's reader takes for it: no key twice, neither NaN nor Infinity.

    Raises ValueError, also where it is nested too deep.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{max(names, key=names.count)!r} stands there twice")
        return found

    def number(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=number)
    except RecursionError:
        raise ValueError("nested too deep") from None


@functools.cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    """What checks the types of such a dataclass; slow to make."""
    return TypeAdapter(kind)


@contextmanager
def values_of(path: Path) -> Iterator[None]:
    """Use values of a JSON file that were not checked. Raises CheckpointError naming the file where
    that fails: a field is missing or of another type, a name unknown, a number out of range."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not as it was written ({type(error).__name__}: {first_line(error)}; "
            "--debug shows where)"
        ) from error


def load_json_as(path: Path, kind: type[T]) -> T:
    """The file as an instance of a dataclass: every field of its type, none missing or unknown.

    Raises CheckpointError naming the file and the field, NotReadableError among them;
    SystemFault where it cannot be read now.
    """
    try:
        return _adapter(kind).validate_json(read_bytes(path), strict=True)
    except PermissionError as error:
        raise NotReadableError(f"{path}: {error.strerror}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first_of(error)}") from None


def as_typed(path: Path, value: Any, kind: type[T]) -> T:
    """The same of a value that was read from a file already. Raises CheckpointError."""
    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first_of(error)}") from None


def _first_of(error: ValidationError) -> str:
    first = error.errors()[0]
    return "".join(f"{part}: " for part in first["loc"]) + first["msg"]


def write_sealed(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write a value with a digest of it, so that `read_sealed` takes nothing else; the value as it
    will be read. Raises SystemFault."""
    value = json.loads(json.dumps(value))  # tuples are lists then, and all keys strings
    write_json(path, asdict(_Sealed(digest_of_value(value), value)))
    return value


def read_sealed(path: Path, kind: type[T]) -> T | None:
    """What `write_sealed` wrote, as an instance of a dataclass or type; None where the file is not
    there, damaged, edited or of another release: whoever asks makes it again. Raises
    NotReadableError and SystemFault."""
    if not path.is_file():
        return None
    try:
        found = load_json_as(path, _Sealed)
        if digest_of_value(found.value) == found.sha256:
            return as_typed(path, found.value, kind)
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
    """SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


_NAMED = 8


def check_same_request(out: Path, file: str, asked: dict[str, Any], *, what: str) -> None:
    """Refuse a folder in which something else was begun, or that holds anything else.

    file: in the folder, what was asked there when it was begun. asked: the same now, by name, ready
    for JSON; what only one of them has counts as well. what: it is called. Raises SystemFault,
    and ConfigError that names all that differs.
    """
    if out.exists() and not out.is_dir():
        raise SystemFault(f"--out {out}: is a file, not a folder")
    before = out / file
    if before.is_file():
        there, now = load_json_as(before, dict[str, Any]), json.loads(json.dumps(asked))
        keys = [*now, *(key for key in there if key not in now)]
        wrong = [
            f"{key} is {_shown(there, key)}, not {_shown(now, key)}"
            for key in keys
            if there.get(key) != now.get(key)
        ]
        if wrong:
            more = f" and {len(wrong) - _NAMED} more" * (len(wrong) > _NAMED)
            raise ConfigError(
                f"--out {out}: holds a {what} whose {', '.join(wrong[:_NAMED])}{more}; give what "
                "it was begun with, or another --out"
            )
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ConfigError(
            f"--out {out}: holds something, but no {what} (no {file}); give another --out"
        )


def _shown(values: dict[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "the default"
