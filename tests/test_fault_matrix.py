"""The fault matrix: every row is there, every test it names exists, and its page is up to date."""

import ast
from pathlib import Path

import pytest

from scripts.faults import MATRIX, PAGE, PARTS, page, rows, verdict

ROOT = Path(__file__).parents[1]
NUMBERS = {"A": 27, "B": 25, "C": 30, "D": 17, "E": 19}


def test_all_rows_are_there_and_most_are_proven():
    expected = [f"{part}{n}" for part, count in NUMBERS.items() for n in range(1, count + 1)]
    assert [row["id"] for row in rows()] == expected
    assert PARTS.keys() == NUMBERS.keys()
    assert sum("open" not in row for row in rows()) >= 90
    for row in rows():
        assert row["fault"]
        assert row["behaviour"]
        assert row["tests"] or "open" in row, row["id"]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["id"])
def test_the_tests_of_a_row_exist(row):
    for test in row["tests"]:
        file, _, name = test.partition("::")
        functions = ast.parse((ROOT / file).read_text()).body
        assert name in {one.name for one in functions if isinstance(one, ast.FunctionDef)}, test


def test_the_page_is_made_from_the_matrix():
    assert PAGE.read_text() == page(rows()), "python scripts/faults.py --page"
    assert MATRIX.is_file()


@pytest.mark.parametrize(
    ("row", "found", "said"),
    [
        ({"tests": ["a", "b"]}, {"a": "pass", "b": "pass"}, "pass"),
        ({"tests": ["a", "b"]}, {"a": "pass", "b": "FAIL"}, "FAIL"),
        ({"tests": ["a"], "open": "why"}, {"a": "pass"}, "open"),
        ({"tests": ["a"], "open": "why"}, {"a": "FAIL"}, "FAIL"),
        ({"tests": ["a"]}, {}, "not run"),
        ({"tests": ["a", "b"]}, {"a": "pass", "b": "skipped"}, "skipped"),
        ({"tests": ["a", "b"]}, {"a": "pass"}, "pass"),
        ({"tests": ["a"], "open": "why"}, {"a": "skipped"}, "open"),
        ({"tests": ["a"], "open": "why"}, {}, "open"),
    ],
)
def test_a_row_is_as_good_as_its_tests(row, found, said):
    assert verdict(row, found) == said
