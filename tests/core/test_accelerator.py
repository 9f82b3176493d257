"""Functions that several processes call together."""

import re
from types import SimpleNamespace

import pytest

from deit.core.accelerator import in_main_process
from deit.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeitError,
    NotReadableError,
    SystemFault,
)


def pair(work):
    """Return the results or errors of two processes."""
    reduced = []

    def reduce(value, reduction):
        reduced.append(value.clone())
        return sum(reduced)

    def run(main):
        accelerator = SimpleNamespace(is_main_process=main, device="cpu", reduce=reduce)
        try:
            return in_main_process(accelerator, work if main else pytest.fail, "a place")
        except DeitError as error:
            return error

    return run(True), run(False)


@pytest.mark.parametrize("result", [0, 1, 2**40])
def test_in_main_process_returns_its_result_in_all(result):
    assert pair(lambda: result) == (result, result)


@pytest.mark.parametrize(
    "error",
    [
        *(ConfigError("a"), DataError("a"), CheckpointError("a"), NotReadableError("a")),
        *(SystemFault("a"), OSError(5, "Input/output error", "a")),
    ],
    ids=repr,
)
def test_in_main_process_raises_in_all(error):
    def fail():
        raise error

    main, other = pair(fail)
    assert main is error or str(main) == "a: Input/output error"
    assert main.exit_code == other.exit_code == getattr(error, "exit_code", 5)
    assert re.fullmatch(r"a place\b.*\b0\b.*", str(other))  # process 0 prints the error


def test_in_main_process_does_not_translate_bugs():
    with pytest.raises(ZeroDivisionError):
        pair(lambda: 1 // 0)


def test_in_main_process_with_one_process():
    from accelerate import Accelerator

    assert in_main_process(Accelerator(cpu=True), lambda: 3, "a place") == 3
