"""A folder in which something was begun: what goes on there, and what a refusal names."""

import json

import pytest

from deit.begun import check_begun
from deit.errors import ConfigError, EnvironmentFault

ASKED = {"grid": 3, "rays": 5, "seed": 0}


def check(folder, **other):
    check_begun(folder, "of.json", {**ASKED, **other}, what="landscape")


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
    with pytest.raises(ConfigError) as refused:
        check(begun, rays=7, grid=15)
    assert str(refused.value) == (
        f"--out {begun}: holds a landscape whose grid is 3, not 15, rays is 5, not 7; give what it "
        "was begun with, or another --out"
    )
    with pytest.raises(ConfigError, match="whose span is the default, not 2;"):
        check(begun, span=2)
    with pytest.raises(ConfigError, match="whose seed is 0, not the default;"):
        check_begun(begun, "of.json", {"grid": 3, "rays": 5}, what="landscape")


def test_of_many_differences_the_first_are_named_and_the_others_counted(begun):
    with pytest.raises(ConfigError, match="field 7 is the default, not 7 and 3 more; give"):
        check(begun, **{f"field {number}": number for number in range(11)})


def test_what_holds_something_else_is_refused(begun, tmp_path):
    with pytest.raises(ConfigError, match="holds something, but no search"):
        check_begun(begun, "search.json", {}, what="search")
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="is a file, not a folder"):
        check(tmp_path / "file")
