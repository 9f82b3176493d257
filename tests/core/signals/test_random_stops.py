"""Trainings stopped at random moments: exit code, leftovers, and the same bits after resuming."""

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

MOMENTS = 100  # of each seed


def of_kind(kind: int, image_folder: Path, out: Path) -> tuple[str, ...]:
    """A training on pictures, with so many workers, or on digits, which are imported late."""
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
def test_two_hundred_stops_at_random_moments(
    seed, command_server: CommandServer, image_folder, tmp_path
):
    """Of real processes, from their first moment on: each ends with the code of its signal and
    leaves nothing behind, and what it leaves in its folder is resumed to the same bits. A row for
    each is in stops.jsonl of the test's folder (--basetemp)."""
    moments = random.Random(seed)
    uninterrupted = [tmp_path / f"straight-{kind}" for kind in range(4)]
    for kind, out in enumerate(uninterrupted):
        assert command_server.run(*of_kind(kind, image_folder, out)).code == 0
    rows, wrong, number = [], [], 0
    while sum(row["code"] != 0 for row in rows) < MOMENTS:  # of others the end came first
        number += 1
        out, kind = tmp_path / f"run-{number}", number % 4
        sent = moments.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        given = of_kind(kind, image_folder, out)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (tmp_path / "said").open("w+") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "deit", *given],
                env=environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            after, everybody = moments.uniform(0.02, 8), moments.random() < 0.5
            time.sleep(after)
            moment = time.monotonic()
            if everybody:
                os.killpg(process.pid, sent)
            else:
                process.send_signal(sent)
            code = process.wait(timeout=300)
            took = time.monotonic() - moment
            said.seek(0)
            text = said.read()
        assert_no_leftovers(process.pid)
        # Before our first line runs, Python dies of the signal itself, or says where it was.
        right = code in (128 + sent, -sent, 0) and ("Traceback" not in text or not out.exists())
        begun = out.exists()
        same = code == 0 or same_as(uninterrupted[kind], out, command_server.run(*given))
        row = {"kind": kind, "signal": sent.name, "everybody": everybody, "after_s": after}
        row |= {"code": code, "ended_s": took, "begun": begun, "same_bits": same}
        rows.append(row)
        with (tmp_path / "stops.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if not (right and same):
            wrong.append(f"stop {number}: {row}: {text}")
    took = sorted(row["ended_s"] for row in rows if row["code"])
    codes = Counter(row["code"] for row in rows)
    print(
        f"{len(took)} stops: codes {dict(codes)}; half within {took[len(took) // 2]:.2f} s, ",
        end="",
    )
    print(f"95 % within {took[int(0.95 * len(took))]:.2f} s, all within {took[-1]:.2f} s")
    assert not wrong, "\n\n".join(wrong)


def same_as(uninterrupted: Path, out: Path, resumed: Completed) -> bool:
    """Whether a resumed run is to the bit the one that was not stopped."""
    files = (run_log.HASH_CHAIN, "best/model.safetensors")
    return resumed.code == 0 and all(
        (out / name).read_bytes() == (uninterrupted / name).read_bytes() for name in files
    )
