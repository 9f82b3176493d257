"""docs/reliability.md: every row has tests, and every marker names a row."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| ([A-E]\d+) \| (.+?) \| (.+) \|$", re.MULTILINE)


def marked() -> set[str]:
    """Return the rows that `@pytest.mark.fault` names, over all tests."""
    rows = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                rows |= {ast.literal_eval(argument) for argument in node.args}
    return rows


def test_every_fault_has_a_test_and_every_marker_names_a_fault():
    rows = ROW.findall((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    ids = [name for name, _, _ in rows]
    assert len(ids) == len(set(ids)) >= 118
    open_rows = {name for name, _, text in rows if "**Open:**" in text}
    assert len(open_rows) <= 5
    assert set(ids) - open_rows <= marked() <= set(ids)
