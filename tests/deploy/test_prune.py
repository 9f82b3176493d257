"""Tests of `deit prune`: selection, recovery, controls, results and resuming."""

import dataclasses
import json
import re
import shutil

import pytest
from safetensors.torch import load_file

from deit.config.finetune_schedules import short
from deit.config.recipes.handwriting import digits_teacher
from deit.config.sparsity import SCOPES
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.errors import ConfigError
from deit.deploy.prune_options import CRITERIA, PruneOptions, check_options
from deit.models.saved_student import load_student
from deit.models.surgery.structured_pruning import magnitudes, select_top
from deit.training.progress_log import schedule_of
from tests.helpers.commands import runs_over
from tests.helpers.errors import raises
from tests.helpers.small_runs import QUICK_PRUNING, THREE_EPOCHS
from tests.helpers.trained import trained

pytest.importorskip("sklearn")
RUNS = ("recovered", "short-control", "long-control")
SHORT_OPTIM = {"epochs": 2, "warmup_epochs": 0.5}
COMMAND = ("prune", "run", *QUICK_PRUNING, "--ratio", "0.5")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, command_server):
    """Return a folder with a small distilled student (run) and its teacher."""
    workspace = tmp_path_factory.mktemp("prune")
    trained(digits_teacher().replace(optim={"epochs": 3}), workspace / "teacher")
    options = ("--teacher.source", "teacher", "--teacher.allow_near_chance", *THREE_EPOCHS)
    done = command_server.run("train", "digits", *options, "--out", "run", cwd=workspace)
    assert done.code == 0, done.err
    return workspace


@pytest.fixture(scope="module")
def pruned(workspace, command_server):
    done = command_server.run(
        *COMMAND, "--controls", "long,short", "--parallel", "2", "--out", "out", cwd=workspace
    )
    assert done.code == 0, done.err
    return workspace / "out", done


def read_results(out):
    return json.loads((out / "results.json").read_text())


def printed_selection(done):
    """Return the printed numbers of heads (of 3) and hidden units (of 96) that each block keeps."""
    lines = [line for line in done.out.splitlines() if line.startswith("│")]
    rows = [list(map(int, re.findall(r"\d+", line))) for line in lines]
    return [(row[1], row[3]) for row in rows if row[2::2] == [3, 96]]


def test_prune_half_keeps_weights_of_selected_units(workspace, pruned):
    out, done = pruned
    units = read_results(out)["kept_units"]
    assert [sum(map(len, units[part])) for part in ("heads", "hidden")] == [3, 96]
    _, model_info = load_student(out / "pruned" / "best")
    for part, shape in (
        ("heads", model_info.student.heads_per_block),
        ("hidden", model_info.student.mlp_hidden_per_block),
    ):
        assert tuple(map(len, units[part])) == shape
    before = load_file(workspace / "run" / "best" / "model.safetensors")
    after = load_file(out / "pruned" / "best" / "model.safetensors")
    for block, (heads, hidden) in enumerate(zip(*units.values())):
        name = f"blocks.{block}"
        columns = [8 * head + channel for head in heads for channel in range(8)]
        proj = before[f"{name}.attn.proj.weight"][:, columns]
        assert after[f"{name}.attn.proj.weight"].equal(proj)
        rows = [24 * part + column for part in range(3) for column in columns]
        assert after[f"{name}.attn.qkv.weight"].equal(before[f"{name}.attn.qkv.weight"][rows])
        assert after[f"{name}.attn.qkv.bias"].equal(before[f"{name}.attn.qkv.bias"][rows])
        assert after[f"{name}.mlp.fc1.bias"].equal(before[f"{name}.mlp.fc1.bias"][list(hidden)])
    assert after["head.weight"].equal(before["head.weight"])
    assert printed_selection(done) == [tuple(map(len, block)) for block in zip(*units.values())]


def test_prune_recovery_starts_from_pruned_and_controls_from_random_weights(
    workspace, pruned, monkeypatch
):
    monkeypatch.chdir(workspace)  # the paths in its configurations are relative to it
    out, _ = pruned
    shape = load_student(out / "pruned" / "best")[1].student
    run_config = load_config(workspace / "run" / "config.json")
    sources = {"recovered": "out/pruned", "short-control": None, "long-control": None}
    for name, source in sources.items():
        config = load_config(out / name / "config.json")
        assert config.init.weights == source
        assert config.student == shape
        assert config.teacher.source == ("teacher",)
        epochs = 3 + 2 if name == "long-control" else 2  # the run's and the recovery's
        assert config.optim.epochs == epochs
        assert run_folder.read_result(out / name)["epochs"] == epochs
        schedule = run_config
        if name != "long-control":
            schedule = short(run_config).replace(optim=SHORT_OPTIM)
        assert dataclasses.replace(schedule.optim, epochs=epochs) == config.optim
    report = json.loads((out / "recovered" / "init.json").read_text())
    assert report["source"] == "out/pruned"
    means = [load_config(out / name / "config.json").views.mean for name in sources]
    assert means == [load_student(workspace / "run" / "best")[1].mean] * 3


def test_prune_schedules_are_printed_before_training(workspace, pruned):
    """The printed schedules are those of the trained runs."""
    out, done = pruned
    lines = done.out.splitlines()[:3]
    schedules = {name: schedule_of(load_config(out / name / "config.json").optim) for name in RUNS}
    assert [schedule in line for schedule, line in zip(schedules.values(), lines)] == [True] * 3
    assert "teacher" in lines[0].replace(schedules["recovered"], "")
    assert [name in line for name, line in zip(RUNS[1:], lines[1:])] == [True] * 2
    numbers = {name: re.findall(r"\d[\d.]*", text) for name, text in schedules.items()}
    assert (numbers["recovered"][0], numbers["recovered"][-1]) == ("2", "0.5")
    assert numbers["long-control"][0] == "5"


def test_prune_loss_none_prints_no_teacher(workspace, command_server):
    done = command_server.run("prune", "run", "--loss", "none", "--dry-run", cwd=workspace)
    assert done.code == 0, done.err
    assert done.out.startswith("recovery ")
    assert "teacher" not in done.out.splitlines()[0]


def test_prune_help_shows_defaults_of_short_schedule(workspace, command_server):
    """And lists the schedules that train the whole student."""
    output = command_server.run("prune", "run", "--help", cwd=workspace).out.replace("│", " ")
    output = " ".join(output.split())
    epochs = short(load_config(workspace / "run" / "config.json")).optim.epochs
    assert re.search(rf"--optim\.epochs INT [^(]*\(default: {epochs}\)", output)
    assert re.search(r"--schedule NAME [^(]*\bdeit, deit3, short, int8\b", output)


def test_prune_results_list_every_step_with_cost(pruned):
    out, done = pruned
    rows = read_results(out)["rows"]
    assert list(rows) == ["run", "pruned", "recovered", "short-control", "long-control"]
    unpruned, *others = (rows[name] for name in rows)
    for row in others:
        assert row["parameters"] < 0.62 * unpruned["parameters"]
        assert row["gmacs"] < 0.62 * unpruned["gmacs"]
        assert row["bytes"] < 0.65 * unpruned["bytes"]
        assert set(row["top1"]) == {"class", "distillation", "fused"}
    text = (out / "results.md").read_text()
    assert "| recovered |" in text
    assert "deit prune run" in text
    assert "long-control" in done.out.splitlines()[-2]


@pytest.mark.slow
def test_prune_pruned_and_recovered_can_be_evaluated_and_exported(pruned, command_server, tmp_path):
    out, _ = pruned
    done = command_server.run(
        "evaluate", out / "pruned", "--json", tmp_path / "e.json", cwd=out.parent
    )
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "e.json").read_text())
    expected = read_results(out)["rows"]["pruned"]["top1"]["fused"]
    assert metrics["heads"]["fused"]["top1"] == expected
    options = ("--format", "onnx", "--images", "32", "--out", tmp_path / "onnx")
    done = command_server.run("export", out / "recovered", *options, cwd=out.parent)
    assert done.code == 0, done.err
    done = command_server.run("export", out / "recovered", "--format", "timm", cwd=out.parent)
    assert done.code == 2
    for name in ("--format", "onnx", "pt2"):
        assert name in done.err


def test_prune_same_command_reuses_runs_and_other_request_raises(pruned, command_server):
    out, _ = pruned
    before = {path: path.stat().st_mtime_ns for path in out.glob("**/*.safetensors")}
    rows = read_results(out)["rows"]
    arguments = (*COMMAND, "--out", "out")
    done = command_server.run(*arguments, cwd=out.parent)
    assert done.code == 0, done.err
    assert read_results(out)["rows"] == rows  # with the controls
    assert {path: path.stat().st_mtime_ns for path in out.glob("**/*.safetensors")} == before
    done = command_server.run(*arguments, "--scope", "layerwise", cwd=out.parent)
    assert done.code == 2
    assert re.search(r"--out out\b.*\bscope\b.*\bglobal\b.*\blayerwise\b", done.err)
    done = command_server.run(*arguments, "--optim.epochs", "3", cwd=out.parent)
    assert done.code == 2
    assert re.search(r"--out out\b.*\boptim\.epochs\b.*\b2\b.*\b3\b", done.err)


@pytest.mark.slow
def test_prune_killed_in_recovery_resumes(workspace, command_server, tmp_path):
    """The selection is not made again, and the training resumes."""
    arguments = (*COMMAND, "--run.save_every_steps", "1", "--out", tmp_path / "out")
    done = command_server.run(
        *arguments, cwd=workspace, DEIT_FAULT="step:3:kill"
    )  # and in its retry
    assert done.code == 1
    ends = [line for line in done.out.splitlines() if runs_over(line)]
    assert [line.split(":")[0] for line in ends] == ["recovered"] * 2
    selection = (tmp_path / "out" / "pruned" / "kept_units.json").read_bytes()
    assert run_folder.list_checkpoints(tmp_path / "out" / "recovered")
    done = command_server.run(*arguments, cwd=workspace)
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "pruned" / "kept_units.json").read_bytes() == selection
    assert printed_selection(done) == []
    assert list(read_results(tmp_path / "out")["rows"]) == ["run", "pruned", "recovered"]


@pytest.mark.slow
def test_prune_killed_before_selection_is_written_selects_again(
    workspace, command_server, tmp_path
):
    arguments = (*COMMAND, "--out", tmp_path / "out")
    done = command_server.run(*arguments, cwd=workspace, DEIT_FAULT="renamed:1:kill")
    assert done.code != 0
    assert not (tmp_path / "out" / "pruned" / "config.json").exists()
    done = command_server.run(*arguments, cwd=workspace)
    assert done.code == 0, done.err
    assert len(printed_selection(done)) == 2


@pytest.mark.slow
def test_prune_other_working_directory_restarts_recovery_without_checkpoint(
    workspace, command_server, tmp_path
):
    """The path of the pruned student in config.json is relative to the first directory."""
    command = (*COMMAND[:1], "{run}", *COMMAND[2:], "--optim.epochs", "1", "--out", "{out}")
    command = (*command, "--teacher.source", str(workspace / "teacher"))
    relative = [argument.format(run="run", out="o") for argument in command]
    shutil.copytree(workspace / "run", tmp_path / "run")
    done = command_server.run(*relative, cwd=tmp_path)
    assert done.code == 0, done.err
    recovered = tmp_path / "o" / "recovered"
    for path in recovered.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    paths = {"run": tmp_path / "run", "out": tmp_path / "o"}
    absolute = [argument.format(**paths) for argument in command]
    done = command_server.run(*absolute, cwd=workspace)
    assert done.code == 0, done.err
    assert run_folder.read_result(recovered)["epochs"] == 1


def test_prune_long_control_of_initialized_run_raises(pruned, command_server):
    out, _ = pruned
    arguments = ("prune", out / "recovered", *QUICK_PRUNING, "--heads", "0.1", "--out", "again")
    done = command_server.run(*arguments, "--controls", "long", cwd=out.parent)
    assert done.code == 2
    for name in ("--controls long", "init.weights out/pruned"):
        assert name in done.err
    assert not (out.parent / "again").exists()


def test_prune_run_with_trainable_part_raises(workspace, command_server, tmp_path):
    shutil.copytree(workspace / "run", tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["optim"]["trainable"], config["init"]["weights"] = "attention", str(workspace / "run")
    file.write_text(json.dumps(config))
    done = command_server.run(
        "prune", tmp_path / "run", *QUICK_PRUNING, "--out", tmp_path / "o", cwd=workspace
    )
    assert done.code == 2
    for name in ("attention", "optim.trainable"):
        assert name in done.err
    assert "--schedule" not in done.err  # the message is not that of a schedule that trains a part


def test_prune_unfinished_run_raises(workspace, command_server, tmp_path):
    shutil.copytree(workspace / "run", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    done = command_server.run(
        "prune", tmp_path / "run", *QUICK_PRUNING, "--out", tmp_path / "o", cwd=workspace
    )
    assert done.code == 4
    for name in (str(tmp_path / "run"), "--resume"):
        assert name in done.err


def test_quantize_pruned_run_raises_and_names_recovered_run(pruned, command_server):
    pytest.importorskip("onnxruntime")
    out, _ = pruned
    done = command_server.run("quantize", out / "pruned", cwd=out.parent)
    assert done.code != 0
    for name in (f"{out / 'pruned'}: ", str(out / "recovered")):
        assert name in done.err


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_prune_dry_run_selects_by_criterion_and_scope(
    workspace, command_server, tmp_path, scope, criterion
):
    options = ("--scope", scope, "--criterion", criterion, "--out", tmp_path / "out")
    done = command_server.run(*COMMAND, *options, "--dry-run", cwd=workspace)
    assert done.code == 0, done.err
    assert not (tmp_path / "out").exists()
    units = [units for _, units in printed_selection(done)]
    assert (len(units), sum(units)) == (2, 96)
    if scope == "layerwise":
        assert units == [48, 48]
    elif criterion == "magnitude":
        student, _ = load_student(workspace / "run" / "best")
        expected = select_top(magnitudes(student.network).hidden, 96, scope="global")
        assert units == list(map(len, expected))


def test_prune_macs_layerwise_is_not_exceeded(workspace, command_server, tmp_path):
    options = ("--macs", "0.6", "--scope", "layerwise", "--dry-run", "--out", tmp_path / "out")
    done = command_server.run("prune", "run", *QUICK_PRUNING, *options, cwd=workspace)
    assert done.code == 0, done.err
    share = re.search(r"\b192\b[^\d\n]*([\d.]+) %", done.out)  # after the hidden units
    assert 0 < float(share[1]) <= 60


@pytest.mark.slow
def test_prune_run_with_frozen_weights_is_pruned(workspace, command_server, tmp_path):
    arguments = ("finetune", "--from", "run", "--optim.trainable", "heads", "--optim.epochs", "1")
    arguments = (*arguments, "--optim.warmup_epochs", "0", "--run.eval_every_epochs", "1", "--out")
    done = command_server.run(*arguments, tmp_path / "probe", cwd=workspace)
    assert done.code == 0, done.err
    arguments = ("prune", tmp_path / "probe", *QUICK_PRUNING, "--out", tmp_path / "out")
    # The schedule trains the whole student.
    done = command_server.run(*arguments, "--schedule", "int8", "--dry-run", cwd=workspace)
    assert done.code == 0, done.err


def test_prune_macs_global_keeps_expected_number_of_heads(workspace, command_server, tmp_path):
    options = ("--macs", "0.6", "--dry-run", "--out", tmp_path / "out")
    done = command_server.run("prune", "run", *QUICK_PRUNING, *options, cwd=workspace)
    assert done.code == 0, done.err
    assert sum(heads for heads, _ in printed_selection(done)) in (3, 4)


def removed_shares(**options):
    pruning = PruneOptions(**options)
    check_options(pruning)
    recorded = pruning.recorded()
    return recorded["heads"], recorded["hidden"], recorded["macs"]


def test_prune_options_shares_by_hand():
    assert removed_shares() == (0.5, 0.5, None)
    assert removed_shares(ratio=0.3) == (0.3, 0.3, None)
    assert removed_shares(heads=0.3) == (0.3, 0.0, None)
    assert removed_shares(heads=0.3, hidden=0) == (0.3, 0, None)
    assert removed_shares(macs=0.3) == (0.0, 0.0, 0.3)


@pytest.mark.parametrize(
    "invalid",
    [
        *({"ratio": 1.0}, {"ratio": 0.0}, {"ratio": -0.1}, {"ratio": float("nan")}),
        *({"heads": 1.0}, {"hidden": -1.0}, {"macs": 0.0}, {"macs": 1.5}),
        *({"ratio": 0.5, "macs": 0.5}, {"ratio": 0.5, "heads": 0.5}, {"macs": 0.1, "hidden": 0.1}),
        *({"scope": "2:4"}, {"criterion": "tailor"}, {"images": 0}),
    ],
)
def test_prune_options_invalid_values_raise(invalid):
    with raises(ConfigError, *invalid):
        check_options(PruneOptions(**invalid))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("prune",), ("deit prune RUN",)),
        (("prune", "run", "--criterion", "tailor"), ("--criterion tailor", *CRITERIA)),
        (("prune", "run", "--schedule", "long"), ("--schedule long", "deit3", "short", "int8")),
        (("prune", "run", "--heads", "0.9"), ("--heads 0.9",)),
        (("prune", "run", "--macs", "0.01"), ("--macs 0.01",)),
        (("prune", "run", "--controls", "lnog"), ("--controls lnog", "short", "long")),
        (
            ("prune", "run", "--schedule", "linear-probe"),
            ("--schedule linear-probe", "heads", "optim.trainable"),
        ),
        (
            ("prune", "run", "--student.shared_block_size", "2"),
            ("student.shared_block_size = 2", "(1)"),
        ),
        (("prune", "run", "--resume"), ("deit prune", "--resume")),
        (("prune", "run", "--force"), ("deit prune", "--force", "--out")),
        (("prune", "teacher"), ("teacher", "student.name = 'small_convnet'", "deit_*", "vit_*")),
        (("prune", "run", "--init.weights", "teacher"), ("init.*",)),
        (("prune", "run", "--out", "run"), ("--out run", "prune.json")),
    ],
)
def test_prune_invalid_arguments_fail_before_work(workspace, command_server, arguments, names):
    out = () if "--out" in arguments else ("--out", "new")
    done = command_server.run(*arguments, *out, cwd=workspace)
    assert done.code == 2, done.err
    for name in names:
        assert name in done.err
    assert not (workspace / "new" / "pruned").exists()
