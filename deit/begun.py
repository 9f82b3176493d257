"""What was begun in a folder, so that the same command goes on there and no other."""

import json
from pathlib import Path
from typing import Any

from deit.errors import ConfigError, SystemFault
from deit.typed_json import load_json_as

_NAMED = 8


def check_same_request(out: Path, file: str, asked: dict[str, Any], *, what: str) -> None:
    """Refuse a folder in which something else was begun, or that holds anything else.

    file: in the folder, what was asked there when it was begun. asked: the same now, by name, ready
    for JSON; what only one of them has counts as well. what: it is called. Raises EnvironmentFault,
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
