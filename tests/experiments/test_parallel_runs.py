"""Parallel runs: bit-identical results, independent failures, and signals that reach all runs."""

import io
import json
import re
import signal
from types import SimpleNamespace

import psutil
import pytest

from deit.cli import run_command
from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits_teacher
from deit.core import run_folder, run_log
from deit.core.errors import ConfigError, SystemFault
from deit.core.filesystem import lock_dir
from deit.experiments import parallel_runs as runner
from deit.experiments.parallel_runs import (
    RunProgress,
    RunSpec,
    check_num_parallel,
    combined_error,
    run_parallel,
)
from tests.helpers.commands import runs_over
from tests.helpers.errors import raises
from tests.helpers.processes import wait_until
from tests.helpers.small_runs import two_epochs
from tests.helpers.trained import trained

pytest.importorskip("sklearn")
SMALL = (
    *("--student.depth", "1", "--student.embed_dim", "16", "--student.num_heads", "2"),
    *("--optim.epochs", "2", "--optim.warmup_epochs", "1", "--run.eval_every_epochs", "2"),
    *("--data.train_fraction", "0.2"),
)


def chain(out):
    return (out / run_log.HASH_CHAIN).read_bytes()


def run_of(out, name, *, seed=0):
    """Return the folder of a sweep's run; None if it was not started."""
    folders = (path for path in out.glob(f"runs/{name}-seed-{seed}-*") if path.is_dir())
    return next(folders, None)


def log_of(run):
    """Return the log file of a run."""
    return run.with_name(f"{run.name}.log")


def has_checkpoint(out, name):
    """Return whether a sweep's run has a checkpoint."""
    run = run_of(out, name)
    return run is not None and bool(run_folder.list_checkpoints(run))


def endless_comparison(folder):
    """Return a command that trains two students in parallel for hours in `folder`/out, with a
    trained teacher."""
    trained(digits_teacher().replace(optim={"epochs": 3}), folder / "teacher")
    return (
        *("compare", "digits", *SMALL, "--teacher.source", folder / "teacher"),
        *("--optim.epochs", "3000", "--run.eval_every_epochs", "3000"),
        *("--parallel", "2", "--out", folder / "out"),
    )


@pytest.mark.slow
def test_parallel_runs_are_bit_identical_to_sequential_runs(command_server, tmp_path):
    arguments = ("compare", "digits", *SMALL, "--seeds", "0,1")
    outs = [tmp_path / "sequential", tmp_path / "parallel"]
    for out, num_parallel in zip(outs, ("1", "2")):
        done = command_server.run(*arguments, "--parallel", num_parallel, "--out", out)
        assert done.code == 0, done.err
    # A teacher and four students.
    assert runs_over(done.out) == [(num_done, 5) for num_done in range(1, 6)]
    lines = [line for line in done.out.splitlines() if runs_over(line)]
    assert lines[-1].endswith("ETA 0 s")
    assert "distilled, seed 1: epoch 2/2" in done.out
    for seed in (0, 1):
        for name in ("distilled", "undistilled"):
            sequential, parallel = (run_of(out, name, seed=seed) for out in outs)
            assert chain(sequential) == chain(parallel)
            epochs = run_folder.read_result(parallel)["epochs"]
            assert f"epoch {epochs}/{epochs}" in log_of(parallel).read_text()
    sequential, parallel = (json.loads((out / "results.json").read_text()) for out in outs)
    for name, row in sequential["rows"].items():
        for key in ("top1", "agreement", "curves", "epochs", "teacher"):
            assert row[key] == parallel["rows"][name][key]


def test_run_parallel_failures_stop_no_other_run_and_are_reported_by_name(
    fork_runs, tmp_path, capsys
):
    code = tmp_path / "mine.py"
    code.write_text(
        "import torch\n"
        "def teacher():\n"
        "    linear = torch.nn.Linear(192, 10)\n"
        "    torch.nn.init.zeros_(linear.weight)  # one class for all images: always near chance\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), linear)\n"
    )
    teacher = {"source": (f"{code}:teacher",), "allow_near_chance": True}
    configs = {
        "lost": two_epochs(data={"source": "folder", "root": str(tmp_path / "nowhere")}),
        "wrong": two_epochs(optim={"epochs": 1, "warmup_epochs": 2.0}, student={"patch_size": 7}),
        "coarse": two_epochs(),
        # A configuration file must not name code; the caller of run_parallel may.
        "taught": two_epochs(teacher=teacher, loss=LOSS_PRESETS["deit-hard"]),
    }
    runs = [RunSpec(name, config, tmp_path / name) for name, config in configs.items()]
    failed = run_parallel(runs, num_parallel=2, progress=RunProgress(len(runs)))
    output = capsys.readouterr()
    error = combined_error(failed)
    assert error.exit_code in (2, 3)  # that of the first failed run
    lines = str(error).splitlines()
    reports = {line.split(":")[0]: line for line in lines if re.match(r"  \S", line)}
    lost = f"  lost ({tmp_path / 'lost.log'})"
    assert set(reports) == {lost, f"  wrong ({tmp_path / 'wrong.log'})"}
    assert "nowhere" in reports[lost]
    assert any("student.patch_size" in line for line in lines)
    assert any("optim.warmup_epochs" in line for line in lines)
    ends = [line for line in output.out.splitlines() if runs_over(line)]
    codes = {line.split(":")[0]: re.findall(r"\d+", line.split(";")[0]) for line in ends}
    assert codes == {"lost": ["3"], "wrong": ["2"], "coarse": [], "taught": []}
    assert runs_over(output.out) == [(num_done, 4) for num_done in range(1, 5)]
    assert "taught: epoch 2/2" in output.out
    assert re.search(rf"^deit: warning: taught: .*{re.escape(str(code))}", output.err, re.MULTILINE)
    for name in configs:
        trained = run_folder.read_result(tmp_path / name) is not None
        assert trained == (name in ("coarse", "taught"))


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signal_stops_parallel_runs_after_a_checkpoint_and_they_resume(
    command_server, tmp_path, signum
):
    arguments = endless_comparison(tmp_path)
    running = command_server.start(*arguments)
    names = ("distilled", "undistilled")
    wait_until(lambda: all(has_checkpoint(tmp_path / "out", name) for name in names))
    running.signal(signum)
    done = running.wait()
    assert done.code == 128 + signum
    stopped_by = signal.Signals(signum).name
    assert stopped_by in done.err
    logs = [log_of(run_of(tmp_path / "out", name)).read_text() for name in names]
    assert all(signal.Signals(signal.SIGTERM).name in log for log in logs)
    undistilled = run_of(tmp_path / "out", "undistilled")
    before = chain(undistilled)
    running = command_server.start(*arguments, "--arms", "undistilled")
    wait_until(lambda: len(chain(undistilled)) > len(before))
    running.signal(signum)
    assert running.wait().code == 128 + signum
    assert chain(undistilled).startswith(before)


@pytest.mark.fault("A14")
def test_parallel_runs_stop_if_their_command_is_killed(command_server, tmp_path):
    arguments = endless_comparison(tmp_path)
    running = command_server.start(*arguments, as_program=True)
    names = ("distilled", "undistilled")
    wait_until(lambda: all(has_checkpoint(tmp_path / "out", name) for name in names))
    running.signal(signal.SIGKILL)
    running.wait()
    # Runs lock their folders until they have ended.
    for name in names:
        out = run_of(tmp_path / "out", name)
        num_checkpoints = len(run_folder.list_checkpoints(out))
        assert num_checkpoints
        wait_until(lambda out=out: not is_locked(out))


@pytest.mark.slow
def test_run_parallel_ignores_a_folder_named_deit(tmp_path, monkeypatch):
    """A folder named deit in the working directory is not imported."""
    (tmp_path / "deit").mkdir()
    (tmp_path / "deit" / "__init__.py").write_text("raise SystemExit(77)\n")
    monkeypatch.chdir(tmp_path)
    runs = [RunSpec("run", two_epochs(), tmp_path / "run")]
    assert run_parallel(runs, num_parallel=1, progress=RunProgress(1)) == []
    assert run_folder.read_result(tmp_path / "run") is not None


def is_locked(out):
    try:
        with lock_dir(out, name="out"):
            return False
    except SystemFault:
        return True


def test_check_num_parallel_invalid_number_is_refused(monkeypatch):
    check_num_parallel(1, name="parallel")
    with raises(ConfigError, "parallel = 0"):
        check_num_parallel(0, name="parallel")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_num_parallel(1, name="parallel")
    with raises(ConfigError, "parallel = 2", "torchrun"):
        check_num_parallel(2, name="parallel")


@pytest.mark.parametrize(
    ("cores", "omp_threads", "num_parallel", "threads"),
    [(8, None, 2, 4), (8, None, 3, 2), (2, None, 4, 1), (8, "1", 2, 1), (8, "16", 2, 4)],
)
def test_local_pool_divides_the_cores(
    monkeypatch, tmp_path, cores, omp_threads, num_parallel, threads
):
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp_threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_threads)
    assert runner._LocalPool(num_parallel, tmp_path).threads == threads


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 1, ["-"] * 3), (None, 2, ["0", "1", "0"]), ("3,5", 2, ["3", "5", "3"])],
)
def test_local_pool_uses_the_gpu_with_the_fewest_runs(
    monkeypatch, tmp_path, visible, count, expected
):
    gpus = []

    def popen(arguments, *, env, **options):
        gpus.append(env.get("CUDA_VISIBLE_DEVICES", "-"))
        return SimpleNamespace(stdout=io.StringIO())

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    pool = runner._LocalPool(3, tmp_path)
    for seed in range(3):
        pool.start(RunSpec(f"run {seed}", two_epochs(), tmp_path / str(seed)))
    assert gpus == expected
    del pool.children[1]  # as if it had ended
    pool.start(RunSpec("another", two_epochs(), tmp_path / "another"))
    assert gpus[3] == expected[1]


@pytest.mark.slow
def test_compare_leaves_no_process_behind(tmp_path):
    arguments = [*SMALL, "--arms", "undistilled", "--teacher.source", tmp_path / "teacher"]
    trained(digits_teacher().replace(optim={"epochs": 3}), tmp_path / "teacher")
    before = psutil.Process().children()
    arguments += ["--parallel", "2", "--out", tmp_path / "out"]
    assert run_command("compare", ["digits", *map(str, arguments)], "deit compare") == 0
    undistilled = run_of(tmp_path / "out", "undistilled")
    assert run_folder.read_result(undistilled) is not None
    assert "epoch 2/2" in log_of(undistilled).read_text()
    assert set(psutil.Process().children()) <= set(before)


class StoppingObserver:
    """Stops the run named `stopped` after its first epoch."""

    def __init__(self):
        self.queried, self.ends = [], {}

    def should_stop(self, run):
        self.queried.append(run.name)
        return run.name == "stopped"

    def on_end(self, run, code, reason):
        self.ends[run.name] = code


def test_run_stopped_by_the_observer_is_saved_and_not_a_failure(fork_runs, tmp_path):
    observer = StoppingObserver()
    long = two_epochs(optim={"epochs": 200}, run={"eval_every_epochs": 1})
    requested = []

    def runs():
        for name, config in {"stopped": long, "good": two_epochs()}.items():
            requested.append(name)
            yield RunSpec(name, config, tmp_path / name)

    assert (
        runner.run_parallel(runs(), num_parallel=1, progress=RunProgress(2), observer=observer)
        == []
    )
    assert requested == ["stopped", "good"]
    assert observer.ends == {"stopped": 143, "good": 0}
    assert observer.queried.count("stopped") == 1  # once is enough
    assert run_folder.read_result(tmp_path / "stopped") is None
    assert run_folder.list_checkpoints(tmp_path / "stopped")
