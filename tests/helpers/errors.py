"""Check the class of an error and what its message names, not its sentences."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deit.core.errors import DeitError


@contextmanager
def raises(kind: type[DeitError], *names: object) -> Iterator[pytest.ExceptionInfo[DeitError]]:
    """Assert that an error of this class is raised, and that its message contains all `names`.

    names: fields (`loss.kind`), options (`--out`), files, values.
    """
    with pytest.raises(kind) as raised:
        yield raised
    missing = [str(name) for name in names if str(name) not in str(raised.value)]
    assert not missing, f"{missing} not named in: {raised.value}"
