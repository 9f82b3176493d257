"""Several runs at once: the bits of each alone, failures that stop no other, signals that reach
all."""

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
from deit.core.errors import ConfigError, DeitError, SystemFault
from deit.core.filesystem import lock_dir
from deit.experiments import runner
from deit.experiments.runner import RunProgress, RunSpec, check_num_parallel, run_parallel_or_raise
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
    """The folder of a run of a sweep; None where it is not begun."""
    found = (path for path in out.glob(f"runs/{name}-seed-{seed}-*") if path.is_dir())
    return next(found, None)


def log_of(run):
    """What a run printed."""
    return run.with_name(f"{run.name}.log")


def begun(out, name):
    """Whether a run of a sweep has a checkpoint."""
    run = run_of(out, name)
    return run is not None and bool(run_folder.list_checkpoints(run))


def endless_comparison(place):
    """A command that trains two students in parallel for hours, into `place`/out; their teacher is
    trained already."""
    trained(digits_teacher().replace(optim={"epochs": 3}), place / "teacher")
    return (
        *("compare", "digits", *SMALL, "--teacher.source", place / "teacher"),
        *("--optim.epochs", "3000", "--run.eval_every_epochs", "3000"),
        *("--parallel", "2", "--out", place / "out"),
    )


@pytest.mark.slow
def test_a_comparison_at_once_is_that_of_one_after_the_other_to_the_bit(command_server, tmp_path):
    arguments = ("compare", "digits", *SMALL, "--seeds", "0,1")
    outs = [tmp_path / "after", tmp_path / "once"]
    for out, number in zip(outs, ("1", "2")):
        done = command_server.run(*arguments, "--parallel", number, "--out", out)
        assert done.code == 0, done.err
    # A teacher and four students.
    assert runs_over(done.out) == [(number, 5) for number in range(1, 6)]
    lines = [line for line in done.out.splitlines() if runs_over(line)]
    assert lines[-1].endswith("ETA 0 s")
    assert "distilled, seed 1: epoch 2/2" in done.out
    for seed in (0, 1):
        for name in ("distilled", "undistilled"):
            one, other = (run_of(out, name, seed=seed) for out in outs)
            assert chain(one) == chain(other)
            epochs = run_folder.read_result(other)["epochs"]
            assert f"epoch {epochs}/{epochs}" in log_of(other).read_text()
    one, other = (json.loads((out / "results.json").read_text()) for out in outs)
    for name, row in one["rows"].items():
        for key in ("top1", "agreement", "curves", "epochs", "teacher"):
            assert row[key] == other["rows"][name][key]


def test_those_that_fail_stop_no_other_and_what_each_says_is_told_with_its_name(tmp_path, capsys):
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
        # Its file alone may not name code; who planned the run did.
        "taught": two_epochs(teacher=teacher, loss=LOSS_PRESETS["deit-hard"]),
    }
    runs = [RunSpec(name, one, tmp_path / name) for name, one in configs.items()]
    with pytest.raises(DeitError) as failure:
        run_parallel_or_raise(runs, num_parallel=2, progress=RunProgress(len(runs)))
    said = capsys.readouterr()
    assert failure.value.exit_code in (2, 3)  # of the one that failed first
    lines = str(failure.value).splitlines()
    told = {line.split(":")[0]: line for line in lines if re.match(r"  \S", line)}
    lost = f"  lost ({tmp_path / 'lost.log'})"
    assert set(told) == {lost, f"  wrong ({tmp_path / 'wrong.log'})"}
    assert "nowhere" in told[lost]
    assert any("student.patch_size" in line for line in lines)
    assert any("optim.warmup_epochs" in line for line in lines)
    ends = [line for line in said.out.splitlines() if runs_over(line)]
    codes = {line.split(":")[0]: re.findall(r"\d+", line.split(";")[0]) for line in ends}
    assert codes == {"lost": ["3"], "wrong": ["2"], "coarse": [], "taught": []}
    assert runs_over(said.out) == [(number, 4) for number in range(1, 5)]
    assert "taught: epoch 2/2" in said.out
    assert re.search(rf"^deit: warning: taught: .*{re.escape(str(code))}", said.err, re.MULTILINE)
    for name in configs:
        trained = run_folder.read_result(tmp_path / name) is not None
        assert trained == (name in ("coarse", "taught"))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_stops_all_of_them_after_a_checkpoint_and_the_same_command_goes_on(
    command_server, tmp_path, number
):
    arguments = endless_comparison(tmp_path)
    running = command_server.start(*arguments)
    names = ("distilled", "undistilled")
    wait_until(lambda: all(begun(tmp_path / "out", name) for name in names))
    running.signal(number)
    done = running.wait()
    assert done.code == 128 + number
    stopped_by = signal.Signals(number).name
    assert stopped_by in done.err
    logs = [log_of(run_of(tmp_path / "out", name)).read_text() for name in names]
    assert all(signal.Signals(signal.SIGTERM).name in log for log in logs)
    undistilled = run_of(tmp_path / "out", "undistilled")
    before = chain(undistilled)
    running = command_server.start(*arguments, "--arms", "undistilled")
    wait_until(lambda: len(chain(undistilled)) > len(before))
    running.signal(number)
    assert running.wait().code == 128 + number
    assert chain(undistilled).startswith(before)


@pytest.mark.fault("A14")
def test_without_the_command_that_started_them_they_stop_as_well(command_server, tmp_path):
    arguments = endless_comparison(tmp_path)
    running = command_server.start(*arguments, as_program=True)
    names = ("distilled", "undistilled")
    wait_until(lambda: all(begun(tmp_path / "out", name) for name in names))
    running.signal(signal.SIGKILL)
    running.wait()
    # They hold their folders until they have ended.
    for name in names:
        out = run_of(tmp_path / "out", name)
        number = len(run_folder.list_checkpoints(out))
        assert number
        wait_until(lambda out=out: not _held(out))


def test_a_run_is_our_command_from_any_folder(tmp_path, monkeypatch):
    """A folder of our name in the working directory is not taken for us."""
    (tmp_path / "deit").mkdir()
    (tmp_path / "deit" / "__init__.py").write_text("raise SystemExit(77)\n")
    monkeypatch.chdir(tmp_path)
    runs = [RunSpec("run", two_epochs(), tmp_path / "run")]
    run_parallel_or_raise(runs, num_parallel=1, progress=RunProgress(1))
    assert run_folder.read_result(tmp_path / "run") is not None


def _held(out):
    try:
        with lock_dir(out, option="--out"):
            return False
    except SystemFault:
        return True


def test_a_number_that_cannot_be_is_refused(monkeypatch):
    check_num_parallel(1, option="--parallel")
    with raises(ConfigError, "--parallel 0"):
        check_num_parallel(0, option="--parallel")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_num_parallel(1, option="--parallel")
    with raises(ConfigError, "--parallel 2", "torchrun"):
        check_num_parallel(2, option="--parallel")


@pytest.mark.parametrize(
    ("cores", "asked", "number", "threads"),
    [(8, None, 2, 4), (8, None, 3, 2), (2, None, 4, 1), (8, "1", 2, 1), (8, "16", 2, 4)],
)
def test_each_gets_its_share_of_the_cores(monkeypatch, tmp_path, cores, asked, number, threads):
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert runner._LocalPool(number, tmp_path).threads == threads


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 1, ["-"] * 3), (None, 2, ["0", "1", "0"]), ("3,5", 2, ["3", "5", "3"])],
)
def test_each_run_gets_the_gpu_that_has_the_fewest(monkeypatch, tmp_path, visible, count, expected):
    given = []

    def popen(arguments, *, env, **how):
        given.append(env.get("CUDA_VISIBLE_DEVICES", "-"))
        return SimpleNamespace(stdout=io.StringIO())

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    here = runner._LocalPool(3, tmp_path)
    for seed in range(3):
        here.start(RunSpec(f"run {seed}", two_epochs(), tmp_path / str(seed)))
    assert given == expected
    del here.children[1]  # it ends first
    here.start(RunSpec("another", two_epochs(), tmp_path / "another"))
    assert given[3] == expected[1]


def test_a_program_keeps_no_process_after_its_runs(tmp_path):
    arguments = [*SMALL, "--arms", "undistilled", "--teacher.source", tmp_path / "teacher"]
    trained(digits_teacher().replace(optim={"epochs": 3}), tmp_path / "teacher")
    before = psutil.Process().children()
    arguments += ["--parallel", "2", "--out", tmp_path / "out"]
    assert run_command("compare", ["digits", *map(str, arguments)], "deit compare") == 0
    undistilled = run_of(tmp_path / "out", "undistilled")
    assert run_folder.read_result(undistilled) is not None
    assert "epoch 2/2" in log_of(undistilled).read_text()
    assert set(psutil.Process().children()) <= set(before)


class Impatient:
    """Gives up the first run at its first epoch."""

    def __init__(self):
        self.asked, self.ends = [], {}

    def should_stop(self, run):
        self.asked.append(run.name)
        return run.name == "hopeless"

    def on_end(self, run, code, reason):
        self.ends[run.name] = code


def test_a_run_that_is_given_up_stops_saved_and_is_no_failure(fork_runs, tmp_path):
    watch = Impatient()
    long = two_epochs(optim={"epochs": 200}, run={"eval_every_epochs": 1})
    asked = []

    def runs():
        for name, one in {"hopeless": long, "good": two_epochs()}.items():
            asked.append(name)
            yield RunSpec(name, one, tmp_path / name)

    assert (
        runner.run_parallel(runs(), num_parallel=1, progress=RunProgress(2), observer=watch) == []
    )
    assert asked == ["hopeless", "good"]
    assert watch.ends == {"hopeless": 143, "good": 0}
    assert watch.asked.count("hopeless") == 1  # not asked again
    assert run_folder.read_result(tmp_path / "hopeless") is None
    assert run_folder.list_checkpoints(tmp_path / "hopeless")
