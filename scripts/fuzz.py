"""Try every command with odd input: arguments, files, folders, streams, encodings, terminals."""

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deit.core.console import info, progress
from tests.helpers.command_server import CommandServer
from tests.helpers.odd_input.cases import make_case
from tests.helpers.odd_input.inputs import make_inputs
from tests.helpers.odd_input.run import run_case

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run fuzz cases. Returns 1 if one of them has a problem, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tries", type=int, default=2000, metavar="N", help="number of cases (default: 2000)"
    )
    parser.add_argument(
        "--first", type=int, default=0, metavar="SEED", help="seed of the first case (default: 0)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="SEED", help="run this case only, and print its output"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="with --seed: copy the folder of the case to DIR"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the result to FILE; the cases in FILE.rows are not run again",
    )
    options = parser.parse_args()
    is_single = options.seed is not None
    seeds = [options.seed] if is_single else range(options.first, options.first + options.tries)
    rows = None if options.out is None else options.out.with_name(f"{options.out.name}.rows")
    done = _read(rows)
    started = time.monotonic()
    with TemporaryDirectory(prefix="deit-fuzz-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "forks").mkdir()
        (folder / "inputs").mkdir()
        command_server = CommandServer(folder / "forks")
        make_inputs(command_server, folder / "inputs")
        left = [seed for seed in seeds if seed not in done]
        for seed in progress(left, total=len(seeds), title="cases", done=len(seeds) - len(left)):
            case, case_folder = make_case(seed), folder / str(seed)
            outcome = run_case(case, command_server, folder / "inputs", case_folder)
            done[seed] = {"seed": seed, **outcome._asdict()}
            if outcome.problem or is_single:
                _show(case, done[seed])
            if options.keep is not None and is_single:
                shutil.copytree(case_folder, options.keep, symlinks=True)
            subprocess.run(["rm", "-rf", case_folder], check=True)  # rmtree fails on deep folders
            if rows is not None:
                with rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**done[seed], "output": ""}) + "\n")
        command_server.close()
    outcomes = [done[seed] for seed in seeds]
    result = _result(outcomes, time.monotonic() - started)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    info(json.dumps(result["codes"]))
    problems = len(result["wrong"])
    info(f"{len(outcomes)} cases, {problems} with a problem, {result['seconds']:.0f} s")
    return 1 if result["wrong"] else 0


def _read(rows: Path | None) -> dict[int, dict[str, Any]]:
    if rows is None or not rows.is_file():
        return {}
    lines = rows.read_text(encoding="utf-8").splitlines()
    return {row["seed"]: row for row in map(json.loads, lines)}


def _show(case: Any, row: dict[str, Any]) -> None:
    info(
        f"seed {case.seed}: {row['problem'] or 'as documented'} "
        f"(code {row['code']}, {row['seconds']} s)"
    )
    info(f"  {case.command}")
    info(f"  streams {', '.join(case.streams)}; {case.encoding}; {case.columns} columns")
    for line in row["damage"]:
        info(f"  {_printable(line)}")
    for line in row["output"].splitlines()[-30:]:
        info(f"  | {_printable(line)}")
    info(f"  again: python scripts/fuzz.py --seed {case.seed}")


def _printable(line: str) -> str:
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in line
    )


def _result(outcomes: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    codes: dict[str, int] = {}
    for row in outcomes:
        codes[str(row["code"])] = codes.get(str(row["code"]), 0) + 1
    return {
        "command": shlex.join(["python", "scripts/fuzz.py", *sys.argv[1:]]),
        "seeds": [outcomes[0]["seed"], outcomes[-1]["seed"]] if outcomes else [],
        "tries": len(outcomes),
        "wrong": {row["seed"]: row["problem"] for row in outcomes if row["problem"]},
        "codes": dict(sorted(codes.items())),
        "longest_s": max((row["seconds"] for row in outcomes), default=0),
        "seconds": round(seconds, 1),
        "versions": {
            name: version(name) for name in ("torch", "timm", "numpy", "pillow", "pydantic")
        },
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


if __name__ == "__main__":
    sys.exit(main())
