"""Where a comparison writes."""

import json

import pytest

from tests.helpers.commands import assert_refused, run_in, tree


@pytest.mark.parametrize("file", ["config.json", "ant/1.png", "comparison.json"])
def test_a_folder_that_holds_something_else_is_left_as_it_is(file, tmp_path):
    place = tmp_path / "out" / file
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"recipe": "mnist"}))
    before = tree(tmp_path)
    done = run_in(tmp_path, "deit", "compare", "digits", "--out", "out")
    assert_refused(done, 2, "--out out", "comparison")
    assert tree(tmp_path) == before
