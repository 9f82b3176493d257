"""What processes do together."""

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
    """What both of two processes come to, a number or an error."""
    reduced = []

    def reduce(value, reduction):
        reduced.append(value.clone())
        return sum(reduced)

    def one(main):
        accelerator = SimpleNamespace(is_main_process=main, device="cpu", reduce=reduce)
        try:
            return in_main_process(accelerator, work if main else pytest.fail, "a place")
        except DeitError as error:
            return error

    return one(True), one(False)


@pytest.mark.parametrize("number", [0, 1, 2**40])
def test_all_get_what_the_main_process_finds(number):
    assert pair(lambda: number) == (number, number)


@pytest.mark.parametrize(
    "error",
    [
        *(ConfigError("a"), DataError("a"), CheckpointError("a"), NotReadableError("a")),
        *(SystemFault("a"), OSError(5, "Input/output error", "a")),
    ],
    ids=repr,
)
def test_all_raise_what_ends_the_main_process(error):
    def fail():
        raise error

    main, other = pair(fail)
    assert main is error or str(main) == "a: Input/output error"
    assert main.exit_code == other.exit_code == getattr(error, "exit_code", 5)
    assert re.fullmatch(r"a place\b.*\b0\b.*", str(other))  # which the main process explains


def test_a_bug_is_none_of_these():
    with pytest.raises(ZeroDivisionError):
        pair(lambda: 1 // 0)


def test_one_process_alone():
    from accelerate import Accelerator

    assert in_main_process(Accelerator(cpu=True), lambda: 3, "a place") == 3
