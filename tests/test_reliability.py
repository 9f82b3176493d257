"""docs/reliability.md: every row has tests that prove it, and every marker names a row."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| ([A-E]\d+) \| (.+?) \| (.+) \|$", re.MULTILINE)


def marked() -> set[str]:
    """The rows that `@pytest.mark.fault` names, over all tests."""
    found = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                found |= {ast.literal_eval(argument) for argument in node.args}
    return found


def test_every_fault_has_tests_and_every_marker_its_fault():
    rows = ROW.findall((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    ids = [name for name, _, _ in rows]
    assert len(ids) == len(set(ids)) >= 118
    without = {name for name, _, text in rows if "**Open:**" in text}
    assert len(without) <= 5
    assert set(ids) - without <= marked() <= set(ids)
