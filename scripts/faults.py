"""Run the fault matrix (docs/faults.json): every row's tests, and the table of what passed."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MATRIX = ROOT / "docs" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"
PARTS = {
    "A": "Crash and resume",
    "B": "What is in a checkpoint",
    "C": "Data",
    "D": "Teacher, targets, numbers",
    "E": "Machine, processes, input",
}


_WORSE = ("pass", "skipped", "FAIL")


def rows() -> list[dict[str, Any]]:
    """The matrix: `id`, `fault`, `behaviour`, `tests` that prove it, and `open`, what is not."""
    return json.loads(MATRIX.read_text(encoding="utf-8"))


def outcomes(tests: list[str], *, slow: bool) -> tuple[dict[str, str], float]:
    """What became of each test, with all its parameters: the worst of `pass`, `skipped` and `FAIL`;
    how long all of them took [s].

    A test that was not asked for, being slow, is not among them.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--numprocesses",
            "2",
            "--dist",
            "loadfile",
        ]
        command += ["-m", "not gpu" if slow else "not gpu and not slow", f"--junitxml={report}"]
        started = time.monotonic()
        code = subprocess.run([*command, *tests], cwd=ROOT, check=False).returncode
        took = time.monotonic() - started
        if code not in (0, 1) or not report.is_file():
            sys.exit(f"pytest could not run all of them (exit code {code}); see what it said above")
        found: dict[str, str] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.get("classname", "").replace(".", "/")
            name = f"{file}.py::{case.get('name', '').partition('[')[0]}"
            failed = case.find("failure") is not None or case.find("error") is not None
            said = "FAIL" if failed else "pass" if case.find("skipped") is None else "skipped"
            found[name] = max(said, found.get(name, said), key=_WORSE.index)
        return found, took


def verdict(row: dict[str, Any], found: dict[str, str]) -> str:
    """`pass`, `FAIL`, `open`, `skipped` where a proof was, or `not run` where a slow test alone
    would prove it."""
    told = [found[test] for test in row["tests"] if test in found]
    if not told:
        return "open" if "open" in row else "not run"
    worst = max(told, key=_WORSE.index)
    return worst if worst == "FAIL" or "open" not in row else "open"


def page(matrix: list[dict[str, Any]]) -> str:
    """The matrix for a reader."""
    proven = sum("open" not in row for row in matrix)
    lines = [
        "# The fault matrix",
        "",
        "<!-- made by scripts/faults.py from faults.json -->",
        "",
        f"{len(matrix)} faults, what is done about each, and the tests that prove it: {proven} are "
        f"proven whole, {len(matrix) - proven} are open in part, with the reason. `python "
        "scripts/faults.py` runs them all and prints the table of what passed; `--slow` adds the "
        "hundred kills and every update of two processes. How to place faults yourself: "
        "[Stopping and going on](run-folder.md#stopping-and-going-on).",
    ]
    for letter, title in PARTS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| | fault | what is done | proven by |",
            "|---|---|---|---|",
        ]
        for row in matrix:
            if row["id"].startswith(letter):
                names = ", ".join(f"`{test.partition('::')[2]}`" for test in row["tests"])
                opened = f" **Open:** {row['open']}." if "open" in row else ""
                cells = (row["id"], row["fault"], row["behaviour"] + opened, names)
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the pass table; 1 if a row fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", action="store_true", help="also the proofs of some minutes")
    parser.add_argument("--page", action="store_true", help="only write docs/faults.md anew")
    options = parser.parse_args()
    matrix = rows()
    PAGE.write_text(page(matrix), encoding="utf-8")
    if options.page:
        return 0
    tests = sorted({test for row in matrix for test in row["tests"]})
    found, took = outcomes(tests, slow=options.slow)
    counts: dict[str, int] = {}
    for row in matrix:
        said = verdict(row, found)
        counts[said] = counts.get(said, 0) + 1
        print(
            f"{row['id']:4} {said:8} {row['fault']}"
            + (f": {row['open']}" if said == "open" else "")
        )
    summary = ", ".join(f"{number} {said}" for said, number in sorted(counts.items()))
    print(f"\n{len(matrix)} rows: {summary}; {len(found)} tests in {took / 60:.1f} min")
    return (
        1 if counts.get("FAIL") or (options.slow and {"not run", "skipped"} & counts.keys()) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
