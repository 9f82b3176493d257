"""`deit profile`: the parts of a step, its output files, and options that it refuses."""

import json

import pytest

from deit.training.profile import PARTS

pytest.importorskip("sklearn")
SMALL = (
    *("--student.depth", "2", "--student.embed_dim", "24", "--student.num_heads", "2"),
    *("--optim.batch_size", "128", "--optim.ema_epochs", "1"),
)


@pytest.fixture(scope="module")
def teacher(command_server, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "teacher"
    done = command_server.run("train", "digits-teacher", "--optim.epochs", "3", "--out", out)
    assert done.code == 0, done.err
    return out


def test_profile_reports_every_part_of_a_step(teacher, command_server, tmp_path):
    arguments = ("profile", "digits", *SMALL, "--teacher.source", teacher, "--steps", "5")
    arguments += ("--trace", "trace.json", "--json", "numbers.json")
    done = command_server.run(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert tuple(numbers["parts"]) == PARTS
    assert all(seconds > 0 for seconds in numbers["parts"].values())
    assert 0 < sum(numbers["parts"].values()) / numbers["profiled_s"] <= 1
    assert numbers["step_s"] > 0
    operations = numbers["operations"]
    assert "aten::_fused_adamw_" in operations or len(operations) == 15
    assert not set(PARTS) & operations.keys()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"views", "teacher", "student"} <= {event.get("name") for event in events}
    for part in PARTS:
        assert part in done.out
    assert "images/s" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json", "trace.json"]


def test_profile_without_teacher_and_average_omits_them(command_server, tmp_path):
    arguments = ("profile", "digits", "--loss", "none", "--teacher.source", "none", *SMALL[:6])
    done = command_server.run(*arguments, "--steps", "2", "--json", "n.json", cwd=tmp_path)
    assert done.code == 0, done.err
    parts = json.loads((tmp_path / "n.json").read_text())["parts"]
    assert set(parts) == set(PARTS) - {"teacher", "average"}


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("--steps", "0"), 2, ["--steps 0: "]),
        (("--trace", "there.json"), 5, ["--trace there.json: ", "--force"]),
        (("--resume",), 2, ["deit profile: ", "--resume"]),
    ],
)
def test_profile_with_invalid_options_is_refused_before_work(
    arguments, code, named, command_server, tmp_path
):
    (tmp_path / "there.json").write_text("mine")
    without_teacher = ("--loss", "none", "--teacher.source", "none")
    done = command_server.run("profile", "digits", *without_teacher, *arguments, cwd=tmp_path)
    assert done.code == code
    assert [text for text in named if text not in done.err] == []
    assert (tmp_path / "there.json").read_text() == "mine"


def test_profile_prints_no_warnings(command_server):
    """Nor a warning that there is no GPU."""
    without_teacher = ("--teacher.source", "none", "--loss", "none", "--student.depth", "1")
    done = command_server.run("profile", "digits", *without_teacher, "--steps", "2")
    assert (done.code, done.err) == (0, "")
