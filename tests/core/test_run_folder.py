"""Run folders that were changed from outside: links, garbage, another run, a moved folder."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from deit.core import filesystem, manifest, run_folder, run_log
from deit.core.errors import CheckpointError, SystemFault
from tests.helpers import small_runs
from tests.helpers.command_server import CommandServer
from tests.helpers.commands import assert_refused, run_in
from tests.helpers.errors import raises
from tests.helpers.process_setup import Gate
from tests.helpers.processes import Completed
from tests.helpers.small_runs import STEPS, assert_same_run

pytest.importorskip("sklearn")
# As many steps with fewer images.
FEW = ("--data.train_fraction", "0.2", "--optim.batch_size", "48")
SMALL = (*small_runs.SMALL, *FEW)


def run(command_server: CommandServer, out: Path, fault: str = "", *more: object) -> Completed:
    return small_runs.run(command_server, out, fault, *FEW, *more)


@pytest.fixture(scope="module")
def uninterrupted_run(command_server, tmp_path_factory) -> Path:
    """Return a run that was not interrupted."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(command_server, out).code == 0
    return out


@pytest.fixture(scope="module")
def stopped(command_server, tmp_path_factory) -> Path:
    """Return a run that was killed in its second epoch."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert (
        run(command_server, out, "step:7:kill", "--run.save_every_steps", "2").code
        == -signal.SIGKILL
    )
    return out


@pytest.fixture
def out(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def resume_run(command_server: CommandServer, out: Path) -> Completed:
    return run(command_server, out, "", "--run.save_every_steps", "2")


@pytest.mark.fault("B15")
@pytest.mark.parametrize(
    "name", [".lock", "metrics.jsonl", "state_hashes.jsonl", "nonfinite_steps.jsonl", "config.json"]
)
def test_link_instead_of_a_run_file_raises(name, out, command_server, tmp_path):
    """Following it, a resumed run would truncate the target or write to it."""
    victim = tmp_path / "victim"
    victim.write_bytes((out / name).read_bytes() if name == "config.json" else b"precious\n" * 900)
    before = victim.read_bytes()
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(victim)
    done = resume_run(command_server, out)
    assert done.code == 4
    assert str(out / name) in done.err
    assert str(victim) in done.err
    assert victim.read_bytes() == before


@pytest.mark.fault("B15")
@pytest.mark.parametrize("name", ["best", "newest"])
def test_link_instead_of_a_run_folder_raises(name, out, command_server, tmp_path):
    folder = run_folder.latest_checkpoint(out) if name == "newest" else out / name
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    done = resume_run(command_server, out)
    assert done.code == 4
    assert str(folder) in done.err
    assert str(tmp_path / "elsewhere") in done.err


@pytest.mark.fault("B23")
def test_links_with_other_names_are_ignored(out, command_server, tmp_path):
    (out / "latest").symlink_to(tmp_path)
    assert resume_run(command_server, out).code == 0
    assert (out / "latest").is_symlink()


@pytest.mark.fault("B18")
def test_best_of_an_abandoned_branch_is_not_used(command_server, tmp_path):
    """The latest checkpoint is damaged and an earlier one is resumed; `best` is of a later step."""
    out, more = tmp_path / "run", ("--optim.epochs", "3", "--run.num_checkpoints", "3")
    assert run(command_server, out, "finish:1:kill", *more).code == -signal.SIGKILL
    late = manifest.verify_dir(out / "best").step
    assert late > 2 * STEPS  # otherwise the test shows nothing
    state = out / "best" / "state.json"
    abandoned = json.loads(state.read_text())["best"]
    (run_folder.latest_checkpoint(out) / "model.safetensors").write_bytes(b"")
    done = run(command_server, out, "loss:0:nan", *more, "--run.max_nonfinite_steps", "100")
    assert done.code == 0, done.err
    best = re.escape(str(out / "best"))
    assert re.search(rf"{best}\W.*\b{abandoned['epoch']}\b", done.err)
    best = json.loads((out / "result.json").read_text())["best"]
    assert json.loads(state.read_text())["best"] == best != abandoned


def test_kill_after_writing_the_best_gives_no_warning(command_server, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    run(command_server, out, "metrics:1:kill")
    done = run(command_server, out)
    assert (done.code, done.err) == (0, "")
    assert_same_run(out, uninterrupted_run)


@pytest.mark.fault("B21", "E7")
@pytest.mark.parametrize("change", ["moved", "replaced"])
def test_replaced_run_folder_is_not_written_to(change, command_server, tmp_path):
    """It was moved, or removed and used by another run: the new content must not change."""
    out = tmp_path / "run"
    gate, arguments = Gate(tmp_path / "gate"), ("train", *SMALL, "--out", out)
    first = command_server.start(*arguments, DEIT_FAULT="step:7:slow", **gate.environment)
    gate.wait()
    if change == "moved":
        out.rename(tmp_path / "elsewhere")
        out.mkdir()
    else:
        shutil.rmtree(out)
        assert command_server.run("train", *SMALL, "--run.seed", "5", "--out", out).code == 0
    content = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    gate.open()
    done = first.wait()
    assert done.code == 5, done.err
    assert f"--out {out}" in done.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == content


def test_finished_run_with_other_settings_raises(uninterrupted_run, command_server):
    done = run(command_server, uninterrupted_run, "", "--optim.epochs", "9")
    assert done.code == 2
    remedy = f"deit finetune --from {uninterrupted_run}"
    assert "--out" in done.err
    assert remedy in done.err
    assert re.search(r"optim\.epochs\b.*\b2\b.*\b9\b", done.err)
    printed = command_server.run(
        "finetune", *remedy.split()[2:], "--optim.epochs", "9", "--print-config"
    )
    assert (printed.code, json.loads(printed.out)["optim"]["epochs"]) == (0, 9)


@pytest.mark.fault("B19")
def test_full_disk_leaves_no_probe_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filesystem.os, "fsync", full)
    with raises(SystemFault, f"out = {tmp_path}", "No space left on device"):
        filesystem.check_writable(tmp_path, name="out")
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("A1")
@pytest.mark.parametrize("resume", [True, False])
def test_unfinished_first_file_is_not_a_run(resume, command_server, tmp_path):
    """The process was killed between writing config.json and renaming it."""
    out = tmp_path / "run"
    out.mkdir()
    left = out / f".config.json.{'0' * 32}"
    left.write_text("{")
    arguments = ("train", *SMALL, "--out", out, *(["--resume"] if resume else []))
    done = command_server.run(*arguments, DEIT_FAULT="step:1:term")
    assert done.code == 143, done.err
    assert not left.exists()


@pytest.mark.fault("B1")
def test_unreadable_checkpoint_is_skipped(out, monkeypatch, capsys):
    newest = run_folder.latest_checkpoint(out)
    digest = manifest.hashlib.file_digest

    def broken(file, kind):
        if file.name == str(newest / "model.safetensors"):
            raise OSError(5, "Input/output error")
        return digest(file, kind)

    monkeypatch.setattr(manifest.hashlib, "file_digest", broken)
    checkpoint = run_folder.latest_checkpoint(out)
    assert checkpoint is not None
    assert checkpoint != newest
    errors = capsys.readouterr().err
    assert str(newest / "model.safetensors") in errors
    assert "Input/output error" in errors


def test_checkpoint_replaced_during_reading_is_read_again(out, monkeypatch):
    """Replaced by the run that is still training: this is not damage."""
    best, read = out / "best", manifest.load_json_as
    shutil.copytree(best, out / "later")
    reads = []

    def replaced(path, kind):
        reads.append(path)
        if len(reads) == 1:
            shutil.rmtree(best)
            (out / "later").rename(best)
            raise CheckpointError("half of one, half of the other")
        return read(path, kind)

    monkeypatch.setattr(manifest, "load_json_as", replaced)
    manifest.verify_dir(best)
    assert len(reads) == 2


@pytest.mark.fault("A24")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("environment.json", b""),
        ("environment.json", b'{"packages": []}'),
        ("nonfinite_steps.jsonl", b"5\n"),
        ("nonfinite_steps.jsonl", b'{"a": 1}\n'),
        ("nonfinite_steps.jsonl", b"\xff\xfe\x00"),
        ("metrics.jsonl", b"\xff\xfe\x00"),
    ],
)
def test_damaged_logs_do_not_stop_a_run(name, content, out, command_server):
    (out / name).write_bytes(content)
    done = resume_run(command_server, out)
    assert done.code == 0, done.err
    assert str(out / name) in done.err


@pytest.mark.fault("B23")
def test_folder_with_another_name_is_ignored(out, command_server):
    (out / ".deit-old-").mkdir()
    assert resume_run(command_server, out).code == 0


@pytest.mark.fault("A24")
def test_rows_after_a_truncated_line_are_complete(out, command_server):
    rows = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(rows[: len(rows) - 20])
    assert resume_run(command_server, out).code == 0
    assert [row["epoch"] for row in run_log.read(out / "metrics.jsonl")] == [2]


@pytest.mark.fault("A24")
def test_truncate_keeps_complete_rows_of_an_edited_log(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    length = [run_log.append(log, {"step": step}) for step in range(4)][2]
    written = log.read_bytes().splitlines(keepends=True)
    longer, broken = b'{"step": 0, "note": "mine"}\n', b"{step: 1}\n"
    for lines, left in [
        (written, [0, 1, 2]),
        ([longer, *written[1:]], [0]),
        ([written[0], broken, *written[2:]], [0, 2]),
        ([written[0], broken], [0]),
        ([], []),
    ]:
        log.write_bytes(b"".join(lines))
        run_log.truncate(log, length)
        assert (str(log) in capsys.readouterr().err) == (left != [0, 1, 2])
        run_log.append(log, {"step": 9})
        assert [row["step"] for row in run_log.read(log)] == [*left, 9]


@pytest.mark.fault("A24")
def test_broken_line_of_the_metrics_raises(uninterrupted_run, tmp_path):
    log = tmp_path / "metrics.jsonl"
    first, second = (uninterrupted_run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:2]
    for content in (first + second, first + second[:-9]):  # a kill leaves half a row
        log.write_bytes(content)
        assert [row["epoch"] for row in run_log.read_metrics(tmp_path)][:1] == [1]
    for content in (b"{epoch: 1}\n" + second, first + b"{}}\n", first + second[:-9] + b"\n"):
        log.write_bytes(content)
        with raises(CheckpointError, log, "line"):
            run_log.read_metrics(tmp_path)


@pytest.mark.fault("A9")
def test_damaged_best_of_a_finished_run_is_reported(command_server, uninterrupted_run, tmp_path):
    out = shutil.copytree(uninterrupted_run, tmp_path / "run")
    (out / "best" / "model.safetensors").write_bytes(b"")
    done = run(command_server, out)
    assert done.code == 0
    assert re.search(r"best/model\.safetensors\b.*\b0 bytes\b", done.err)
    assert "--checkpoint last" in done.err
    assert command_server.run("evaluate", out, "--checkpoint", "last").code == 0


@pytest.mark.fault("A9")
@pytest.mark.parametrize(
    ("name", "value"), [("epochs", None), ("fingerprint", 3), ("targets", "a")]
)
def test_invalid_result_raises(name, value, command_server, uninterrupted_run, tmp_path):
    out = shutil.copytree(uninterrupted_run, tmp_path / "run")
    result = json.loads((out / "result.json").read_text())
    (out / "result.json").write_text(json.dumps({**result, name: value}))
    done = run(command_server, out)
    assert done.code == 4
    assert re.search(rf"result\.json\W+{name}\b", done.err)


@pytest.mark.fault("B19")
def test_full_disk_while_logging_raises_system_fault(command_server, tmp_path):
    done = run(command_server, tmp_path / "run", "metrics:1:full")
    assert done.code == 5
    assert str(tmp_path / "run" / "metrics.jsonl") in done.err
    assert "No space left on device" in done.err


@pytest.fixture(scope="module")
def teachers(command_server, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (0, 1):
        arguments = (*FEW, "--optim.epochs", "3", "--run.seed", seed, "--out", folder / str(seed))
        assert command_server.run("train", "digits-teacher", *arguments).code == 0
    return folder


@pytest.mark.fault("A21")
def test_moved_teacher_is_the_same_teacher(teachers, command_server, tmp_path):
    """Compared by its weights. Another teacher raises, also in a finished run."""
    moved, out = shutil.copytree(teachers / "0", tmp_path / "moved"), tmp_path / "run"
    taught = ("--loss", "deit-hard", "--teacher.allow_near_chance", "--teacher.source")
    assert run(command_server, out, "step:7:term", *taught, teachers / "0").code == 143
    other = run(command_server, out, "", *taught, teachers / "1")
    assert other.code == 3
    assert "teacher.source" in other.err
    assert run(command_server, out, "", *taught, moved).code == 0
    assert run(command_server, out, "", *taught, teachers / "0").code == 0
    assert run(command_server, out, "", *taught, teachers / "1").code == 3


LEARNER = ("digits-transformer-teacher", "--student.depth", "1")


@pytest.mark.fault("E3")
@pytest.mark.parametrize(
    ("arguments", "block", "named"),
    [
        (("digits-teacher",), 63, {"--optim.grad_accum_steps 3"}),
        (("digits-teacher",), 1, {"student"}),
        (LEARNER, 2, {"--run.activation_checkpointing", "student"}),
        ((*LEARNER, "--run.activation_checkpointing"), 2, {"student"}),
    ],
    ids=["less fits", "nothing to recompute", "activation_checkpointing", "recomputes already"],
)
def test_out_of_memory_advice(arguments, block, named, command_server, tmp_path):
    arguments = (*arguments, *FEW, "--optim.epochs", "3", "--optim.batch_size", block)
    done = command_server.run(
        "train", *arguments, "--out", tmp_path / "run", DEIT_FAULT="step:3:memory"
    )
    assert done.code == 5
    assert re.search(rf"\b{block} images\b", done.err)
    assert "--resume" in done.err
    assert str(tmp_path / "run") in done.err
    options = {"--optim.grad_accum_steps 3", "--run.activation_checkpointing", "student"}
    assert {remedy for remedy in options if remedy in done.err} == named
    if block == 63:
        assert re.search(r"\b21\b", done.err)  # images that fit
    else:
        assert "--optim.grad_accum_steps" not in done.err
        assert "teacher" not in done.err  # the run has none that could be smaller


@pytest.mark.parametrize(
    ("name", "value"),
    [("command", ["train", 3]), ("packages", {"torch": "2"}), ("threads", None), ("commit", 4)],
)
def test_environment_with_wrong_types_raises(name, value, uninterrupted_run, tmp_path):
    """Not TypeError or KeyError, which reports and model cards once showed."""
    recorded = json.loads((uninterrupted_run / run_folder.ENVIRONMENT).read_text())
    assert run_folder.read_environment(uninterrupted_run).device_name == recorded["device_name"]
    (tmp_path / run_folder.ENVIRONMENT).write_text(json.dumps({**recorded, name: value}))
    with raises(CheckpointError, "environment.json", name):
        run_folder.read_environment(tmp_path)


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_resuming_a_folder_without_a_run_raises(more, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(b"")
    done = run_in(tmp_path, "train_deit.py", "digits-teacher", "--out", "pictures", *more)
    assert_refused(done, 2, "--out pictures", "config.json")
    assert "--resume" not in done.stderr


def test_missing_teacher_and_images_are_reported_together(tmp_path):
    done = run_in(tmp_path, "train_deit.py", "folder", "--data.root", "nothere", "--out", "out")
    assert_refused(done, 3, "data.root nothere", "teacher.source checkpoints/folder-teacher")
    assert "train_deit.py folder-teacher" in done.stderr
    assert str(tmp_path) in done.stderr
    assert not (tmp_path / "out").exists()
