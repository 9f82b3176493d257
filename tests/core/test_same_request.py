"""check_same_request: a folder that was started with other options raises."""

import json
import re

import pytest

from deit.core.errors import ConfigError, SystemFault
from deit.core.json_io import check_same_request
from tests.helpers.errors import raises

REQUEST = {"grid": 3, "rays": 5, "seed": 0}


def check(folder, **other):
    check_same_request(folder, "of.json", {**REQUEST, **other}, what="landscape")


@pytest.fixture
def started(tmp_path):
    (tmp_path / "of.json").write_text(json.dumps(REQUEST))
    return tmp_path


def test_same_options_or_an_empty_folder_pass(started, tmp_path):
    check(started)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".hidden").touch()
    check(tmp_path / "new")
    check(tmp_path / "not there")


def test_all_differences_are_reported_in_one_line(started):
    with raises(ConfigError, f"out = {started}", "landscape") as refused:
        check(started, rays=7, grid=15)
    message = str(refused.value)
    assert re.search(r"\bgrid\b\D+\b3\b\D+\b15\b.*\brays\b\D+\b5\b\D+\b7\b", message)
    assert "seed" not in message
    with raises(ConfigError, f"out = {started}") as refused:
        check(started, span=2)
    assert re.search(r"\bspan\b\D+\bdefault\b\D+\b2\b", str(refused.value))
    with raises(ConfigError, f"out = {started}") as refused:
        check_same_request(started, "of.json", {"grid": 3, "rays": 5}, what="landscape")
    assert re.search(r"\bseed\b\D+\b0\b\D+\bdefault\b", str(refused.value))


def test_many_differences_are_shortened_to_a_count(started):
    with raises(ConfigError, *(f"field {index}" for index in range(8))) as refused:
        check(started, **{f"field {index}": index for index in range(11)})
    message = str(refused.value)
    assert not any(f"field {index}" in message for index in range(8, 11))
    assert re.search(r"\bfield 7\b.*\b7\b.*\b3\b", message)


def test_folder_with_other_content_raises(started, tmp_path):
    with raises(ConfigError, f"out = {started}", "search.json"):
        check_same_request(started, "search.json", {}, what="search")
    (tmp_path / "file").touch()
    with raises(SystemFault, f"out = {tmp_path / 'file'}"):
        check(tmp_path / "file")
