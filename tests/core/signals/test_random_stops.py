"""Training stopped at random times: exit code, leftovers, and bit-identical resumption."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from deit.core import run_log
from tests.helpers.command_server import CommandServer
from tests.helpers.leftovers import assert_no_leftovers
from tests.helpers.processes import ROOT, Completed
from tests.helpers.small_runs import ON_IMAGES, image_run_arguments

pytest.importorskip("sklearn")

NUM_STOPS = 100  # of each seed


def of_kind(kind: int, image_folder: Path, out: Path) -> tuple[str, ...]:
    """Return arguments: 0 to 2 train on images with `kind` workers, 3 on digits."""
    more = ("--optim.epochs", "30", "--run.save_every_steps", "2")
    if kind < 3:
        return (*image_run_arguments(image_folder, out, kind), *more)
    given = (
        "train",
        "digits",
        *ON_IMAGES[:-2],
        "--student.image_size",
        "8",
        "--data.image_size",
        "8",
    )
    few = (
        "--student.patch_size",
        "2",
        "--data.train_fraction",
        "0.1",
        "--run.linear_backend",
        "torch",
    )
    return (*given, *few, *more, "--out", str(out), "--resume")


@pytest.mark.fault("A15")
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_stops_at_200_random_times(seed, command_server: CommandServer, image_folder, tmp_path):
    """Real processes, stopped at any time from their start: each exits with the code of its signal,
    leaves no process, and resumes bit-identically. stops.jsonl in the test's folder (--basetemp)
    has a row for each."""
    rng = random.Random(seed)
    uninterrupted = [tmp_path / f"uninterrupted-{kind}" for kind in range(4)]
    for kind, out in enumerate(uninterrupted):
        assert command_server.run(*of_kind(kind, image_folder, out)).code == 0
    rows, failures, count = [], [], 0
    while sum(row["code"] != 0 for row in rows) < NUM_STOPS:  # 0: finished before
        count += 1
        out, kind = tmp_path / f"run-{count}", count % 4
        signum = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        given = of_kind(kind, image_folder, out)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (tmp_path / "output").open("w+") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "deit", *given],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            after, to_group = rng.uniform(0.02, 8), rng.random() < 0.5
            time.sleep(after)
            sent_at = time.monotonic()
            if to_group:
                os.killpg(process.pid, signum)
            else:
                process.send_signal(signum)
            code = process.wait(timeout=300)
            took = time.monotonic() - sent_at
            output.seek(0)
            text = output.read()
        assert_no_leftovers(process.pid)
        # Before the first line of deit, the signal kills Python, or Python prints a traceback.
        right = code in (128 + signum, -signum, 0) and ("Traceback" not in text or not out.exists())
        has_folder = out.exists()
        same = code == 0 or same_as(uninterrupted[kind], out, command_server.run(*given))
        row = {"kind": kind, "signal": signum.name, "to_group": to_group, "after_s": after}
        row |= {"code": code, "ended_s": took, "has_folder": has_folder, "same_bits": same}
        rows.append(row)
        with (tmp_path / "stops.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if not (right and same):
            failures.append(f"stop {count}: {row}: {text}")
    took = sorted(row["ended_s"] for row in rows if row["code"])
    codes = Counter(row["code"] for row in rows)
    print(
        f"{len(took)} stops: codes {dict(codes)}; half within {took[len(took) // 2]:.2f} s, ",
        end="",
    )
    print(f"95 % within {took[int(0.95 * len(took))]:.2f} s, all within {took[-1]:.2f} s")
    assert not failures, "\n\n".join(failures)


def same_as(uninterrupted: Path, out: Path, resumed: Completed) -> bool:
    """Return whether a resumed run is bit-identical to one that was not stopped."""
    files = (run_log.HASH_CHAIN, "best/model.safetensors")
    return resumed.code == 0 and all(
        (out / name).read_bytes() == (uninterrupted / name).read_bytes() for name in files
    )
