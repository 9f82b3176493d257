"""Make JSON with one wrong or missing value, as a careless edit may leave it."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from deit.core.errors import DeitError

REPLACEMENTS = (7.5, {}, None)


def edits(content: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield a description and the content with one value replaced or removed.

    Edits the first 30 entries and the last one of each object and list, down to `depth` levels.
    """
    if not isinstance(content, dict | list) or not content or not depth:
        return
    keys = list(content) if isinstance(content, dict) else range(len(content))
    for key in dict.fromkeys([*keys[:30], keys[-1]]):
        for value in REPLACEMENTS:
            if value != content[key]:
                yield f"{key} = {value!r}", _with(content, key, value)
        if isinstance(content, dict):
            yield f"no {key}", {name: value for name, value in content.items() if name != key}
        for description, value in edits(content[key], depth - 1):
            yield f"{key}.{description}", _with(content, key, value)


def _with(content: Any, key: Any, value: Any) -> Any:
    changed = copy.copy(content)
    changed[key] = value
    return changed


def error_of(call: Callable[..., object], *arguments: object) -> DeitError | None:
    """Return the DeitError that a call raises, or None. Raises any other error."""
    try:
        call(*arguments)
    except DeitError as error:
        return error
    return None
