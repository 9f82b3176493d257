"""Processes for runs: copies and fresh ones are the same command; what ends whom."""

import os
import signal

import psutil
import pytest

from deit.core import run_folder
from deit.core.parent_process import PARALLEL_RUNS_ENV
from deit.experiments import processes
from deit.experiments.processes import Copies, Fresh
from tests.helpers.command_server import until
from tests.helpers.images import write_pictures
from tests.helpers.leftovers import is_gone

pytest.importorskip("sklearn")
LONG = (
    *(
        "train",
        "digits",
        "--loss",
        "none",
        "--run.linear_backend",
        "torch",
        "--run.save_every_steps",
        "1",
    ),
    *("--data.train_fraction", "0.25"),
    *("--student.depth", "1", "--student.embed_dim", "16", "--student.num_heads", "2"),
    *("--optim.epochs", "3000", "--run.eval_every_epochs", "3000"),
)


@pytest.fixture(scope="module")
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", PARALLEL_RUNS_ENV: "1"}


@pytest.fixture(scope="module")
def copies():
    source = Copies()
    yield source
    source.close()


def server_of(source):
    """The one for the environment that was asked for last."""
    return list(source._servers.values())[-1]


def said_by(source, arguments, environment):
    """What a command says, and its exit code."""
    said, says = os.pipe()
    process = source.start(list(map(str, arguments)), environment, says)
    os.close(says)
    with open(said) as lines:
        text = lines.read()
    return text, process.wait()


def begun(source, arguments, environment):
    """A command under way, and where it says what it does."""
    said, says = os.pipe()
    process = source.start(list(map(str, arguments)), environment, says)
    os.close(says)
    return process, open(said)


@pytest.mark.parametrize("kind", ["copies", "fresh"])
def test_it_is_the_command(kind, copies, environment, tmp_path, monkeypatch):
    """From another directory, where something else is called as we are; without our input."""
    source = copies if kind == "copies" else Fresh()
    (tmp_path / "deit").mkdir()
    (tmp_path / "deit" / "__init__.py").write_text("raise SystemExit(77)\n")
    monkeypatch.chdir(tmp_path)
    text, code = said_by(source, ("recipes",), environment)
    assert (code, "digits-teacher" in text) == (0, True)
    text, code = said_by(source, ("train", "digit"), environment)
    assert code == 2
    assert text.startswith("deit: error: ")
    assert "digits?" in text


def test_copies_are_of_one_process_as_long_as_they_want_one_environment(environment, fork_server):
    source = Copies()
    said_by(source, ("recipes",), environment)
    first = server_of(source)._process.pid
    said_by(source, ("recipes",), environment)
    assert server_of(source)._process.pid == first
    text, code = said_by(source, ("train", "digits"), {**environment, "DEIT_FAULT": "nowhere"})
    assert (code, "nowhere" in text) == (2, True)
    assert server_of(source)._process.pid != first
    until(lambda: is_gone(first))  # nothing needs it any more
    text, code = said_by(source, ("recipes",), environment)
    assert code == 0  # there is another one in its place
    last = server_of(source)._process.pid
    source.close()
    until(lambda: is_gone(last))


def test_what_is_copied_stays_as_long_as_a_copy_is_under_way(environment, fork_server, tmp_path):
    source = Copies()
    process, said = begun(source, (*LONG, "--out", tmp_path / "run"), environment)
    needed = server_of(source)
    assert said_by(source, ("recipes",), {**environment, "OTHER": "1"})[1] == 0
    source.close_idle()
    assert list(source._servers.values()) == [needed]
    until(lambda: run_folder.list_checkpoints(tmp_path / "run"))
    process.terminate()
    with said:
        text = said.read()
    assert process.wait() == 143, text
    source.close_idle()
    assert not source._servers
    until(lambda: is_gone(needed._process.pid))


def test_what_asks_to_stop_does_not_end_the_one_that_is_copied(copies, environment):
    said_by(copies, ("recipes",), environment)
    server = server_of(copies)._process.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(server, number)
    assert said_by(copies, ("recipes",), environment)[1] == 0
    assert server_of(copies)._process.pid == server


@pytest.mark.parametrize("how", ["asked", "killed", "closed"])
def test_a_copy_saves_when_it_is_asked_and_when_its_server_is_gone(
    how, environment, fork_server, tmp_path
):
    source = Copies()
    process, said = begun(source, (*LONG, "--out", tmp_path / "run"), environment)
    until(lambda: run_folder.list_checkpoints(tmp_path / "run"))
    if how == "asked":
        process.terminate()
    elif how == "killed":
        server_of(source)._process.kill()
    else:
        source.close()
    with said:
        text = said.read()
    assert "SIGTERM" in text
    assert process.wait() == (143 if how == "asked" else -signal.SIGTERM)
    assert said_by(source, ("recipes",), environment)[1] == 0  # another server, if need be
    source.close()


def test_an_answer_to_a_question_that_was_interrupted_is_not_taken_for_the_next(
    copies, environment
):
    said_by(copies, ("recipes",), environment)
    server = server_of(copies)
    server._asks.send(b'{"stop": %d, "number": -1}' % server._process.pid)  # it ignores that
    assert said_by(copies, ("recipes",), environment)[1] == 0


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_workers_of_a_copy_end_with_it(end, copies, environment, tmp_path):
    """They are its own, as of any run: what it says ends, and nobody is left."""
    for split in ("train", "val", "test"):
        write_pictures(tmp_path / "images" / split, number=16)
    words = (
        *("train", "folder", "--loss", "none", "--data.root", tmp_path / "images"),
        *("--data.storage", "files", "--data.num_workers", "2", "--data.image_size", "16"),
        *("--student.name", "vit_micro", "--student.depth", "1", "--student.image_size", "16"),
        *("--student.patch_size", "4", "--optim.batch_size", "16", "--run.linear_backend", "torch"),
        *("--optim.epochs", "15" if end == "finished" else "3000"),
        *("--optim.warmup_epochs", "0", "--run.save_every_steps", "1", "--out", tmp_path / "run"),
    )
    process, said = begun(copies, words, environment)
    until(lambda: len(children_of(process.pid)) >= 2)
    workers = children_of(process.pid)
    with said:
        if end == "killed":
            os.kill(process.pid, signal.SIGKILL)
        text = said.read()  # to the end: whoever still had the pipe would keep it open
    assert process.wait() == (0 if end == "finished" else -9), text
    until(lambda: all(map(is_gone, workers)))


def children_of(pid):
    return [one.pid for one in psutil.Process(pid).children()]


def test_what_is_copied_has_one_thread_and_a_copy_as_many_as_it_should(environment, tmp_path):
    """Pools that libraries begin as they are imported would not come along."""
    source = Copies()
    two = {**environment, "OMP_NUM_THREADS": "2"}
    words = ("--optim.epochs", "1", "--optim.warmup_epochs", "0", "--run.eval_every_epochs", "1")
    text, code = said_by(source, (*LONG[:-4], *words, "--out", tmp_path / "run"), two)
    assert (code, " 2 threads" in text) == (0, True), text
    assert psutil.Process(server_of(source)._process.pid).num_threads() == 1
    source.close()


def test_where_no_server_can_be_made_each_is_fresh(environment, monkeypatch):
    def none(*kinds):
        raise OSError("no such sockets")

    monkeypatch.setattr(processes.socket, "socketpair", none)
    assert said_by(Copies(), ("recipes",), environment)[1] == 0


def test_copies_where_they_can_be_and_fresh_ones_elsewhere(monkeypatch):
    made = processes.source.__wrapped__
    assert isinstance(made(gpu=False), Copies)
    assert isinstance(made(gpu=True), Fresh)
    monkeypatch.setattr(processes.sys, "platform", "darwin")
    assert isinstance(made(gpu=False), Fresh)
