"""What an error must be: its class, and what it names. Its sentences may change."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deit.core.errors import DeitError


@contextmanager
def raises(kind: type[DeitError], *names: object) -> Iterator[pytest.ExceptionInfo[DeitError]]:
    """Demand an error of this class that names all of `names`: fields (`loss.kind`), options
    (`--out`), files, values."""
    with pytest.raises(kind) as raised:
        yield raised
    missing = [str(name) for name in names if str(name) not in str(raised.value)]
    assert not missing, f"{missing} not named in: {raised.value}"
