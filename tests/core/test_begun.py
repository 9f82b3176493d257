"""A folder in which something was begun: what goes on there, and what a refusal names."""

import json
import re

import pytest

from deit.core.errors import ConfigError, SystemFault
from deit.core.json_io import check_same_request
from tests.helpers.errors import raises

ASKED = {"grid": 3, "rays": 5, "seed": 0}


def check(folder, **other):
    check_same_request(folder, "of.json", {**ASKED, **other}, what="landscape")


@pytest.fixture
def begun(tmp_path):
    (tmp_path / "of.json").write_text(json.dumps(ASKED))
    return tmp_path


def test_the_same_goes_on_and_an_empty_folder_is_begun(begun, tmp_path):
    check(begun)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".hidden").touch()
    check(tmp_path / "new")
    check(tmp_path / "not there")


def test_everything_that_differs_is_named_in_one_line(begun):
    with raises(ConfigError, f"--out {begun}", "landscape") as refused:
        check(begun, rays=7, grid=15)
    said = str(refused.value)
    assert re.search(r"\bgrid\b\D+\b3\b\D+\b15\b.*\brays\b\D+\b5\b\D+\b7\b", said)
    assert "seed" not in said
    with raises(ConfigError, f"--out {begun}") as refused:
        check(begun, span=2)
    assert re.search(r"\bspan\b\D+\bdefault\b\D+\b2\b", str(refused.value))
    with raises(ConfigError, f"--out {begun}") as refused:
        check_same_request(begun, "of.json", {"grid": 3, "rays": 5}, what="landscape")
    assert re.search(r"\bseed\b\D+\b0\b\D+\bdefault\b", str(refused.value))


def test_of_many_differences_the_first_are_named_and_the_others_counted(begun):
    with raises(ConfigError, *(f"field {number}" for number in range(8))) as refused:
        check(begun, **{f"field {number}": number for number in range(11)})
    said = str(refused.value)
    assert not any(f"field {number}" in said for number in range(8, 11))
    assert re.search(r"\bfield 7\b.*\b7\b.*\b3\b", said)


def test_what_holds_something_else_is_refused(begun, tmp_path):
    with raises(ConfigError, f"--out {begun}", "search.json"):
        check_same_request(begun, "search.json", {}, what="search")
    (tmp_path / "file").touch()
    with raises(SystemFault, f"--out {tmp_path / 'file'}"):
        check(tmp_path / "file")
