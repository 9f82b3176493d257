"""Reads a JSON file of ours into the dataclass that wrote it."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from deit.errors import CheckpointError

Kind = TypeVar("Kind")


def read_typed(path: Path, kind: type[Kind]) -> Kind:
    """The file as an instance of a dataclass: every field of its type, none missing or unknown.

    Raises CheckpointError naming the file and the field.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise CheckpointError(f"{path}: {where}{first['msg']}") from None
