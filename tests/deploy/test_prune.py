"""deit prune: what is cut, what is taught once more, and what is told of it."""

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
from deit.deploy.prune_options import CRITERIA, PruneOptions, prune_options
from deit.models.saved import load_student
from deit.models.surgery.structured_pruning import magnitudes, select_top
from deit.training.progress_log import schedule_of
from tests.helpers.commands import runs_over
from tests.helpers.errors import raises
from tests.helpers.small_runs import QUICK_PRUNING, THREE_EPOCHS
from tests.helpers.trained import trained

pytest.importorskip("sklearn")
RUNS = ("recovered", "short-control", "long-control")
BRIEF = {"epochs": 2, "warmup_epochs": 0.5}
WORDS = ("prune", "run", *QUICK_PRUNING, "--ratio", "0.5")


@pytest.fixture(scope="module")
def place(tmp_path_factory, command_server):
    """A folder with a small distilled student and its teacher."""
    place = tmp_path_factory.mktemp("prune")
    trained(digits_teacher().replace(optim={"epochs": 3}), place / "teacher")
    arguments = (
        "--teacher.source",
        "teacher",
        "--teacher.allow_near_chance",
        *THREE_EPOCHS,
        "--out",
        "run",
    )
    done = command_server.run("train", "digits", *arguments, cwd=place)
    assert done.code == 0, done.err
    return place


@pytest.fixture(scope="module")
def pruned(place, command_server):
    done = command_server.run(
        *WORDS, "--controls", "long,short", "--parallel", "2", "--out", "out", cwd=place
    )
    assert done.code == 0, done.err
    return place / "out", done


def result(out):
    return json.loads((out / "results.json").read_text())


def stays(done):
    """Heads and hidden units that stay of 3 and 96, block by block, as a table tells them."""
    lines = [line for line in done.out.splitlines() if line.startswith("│")]
    rows = [list(map(int, re.findall(r"\d+", line))) for line in lines]
    return [(row[1], row[3]) for row in rows if row[2::2] == [3, 96]]


def test_half_of_the_heads_and_hidden_units_go(place, pruned):
    out, done = pruned
    found = result(out)
    assert [sum(map(len, found["kept"][part])) for part in ("heads", "hidden")] == [3, 96]
    _, facts = load_student(out / "pruned" / "best")
    for part, shape in (
        ("heads", facts.student.heads_per_block),
        ("hidden", facts.student.mlp_hidden_per_block),
    ):
        assert tuple(map(len, found["kept"][part])) == shape
    before = load_file(place / "run" / "best" / "model.safetensors")
    after = load_file(out / "pruned" / "best" / "model.safetensors")
    for block, (heads, units) in enumerate(zip(*found["kept"].values())):
        name = f"blocks.{block}"
        columns = [8 * head + one for head in heads for one in range(8)]
        proj = before[f"{name}.attn.proj.weight"][:, columns]
        assert after[f"{name}.attn.proj.weight"].equal(proj)
        rows = [24 * part + one for part in range(3) for one in columns]
        assert after[f"{name}.attn.qkv.weight"].equal(before[f"{name}.attn.qkv.weight"][rows])
        assert after[f"{name}.attn.qkv.bias"].equal(before[f"{name}.attn.qkv.bias"][rows])
        assert after[f"{name}.mlp.fc1.bias"].equal(before[f"{name}.mlp.fc1.bias"][list(units)])
    assert after["head.weight"].equal(before["head.weight"])
    assert stays(done) == [tuple(map(len, block)) for block in zip(*found["kept"].values())]


def test_what_is_left_is_taught_and_its_control_begins_at_random(place, pruned, monkeypatch):
    monkeypatch.chdir(place)  # where its relative paths lead somewhere as they are
    out, _ = pruned
    shape = load_student(out / "pruned" / "best")[1].student
    own = load_config(place / "run" / "config.json")
    sources = {"recovered": "out/pruned", "short-control": None, "long-control": None}
    for name, source in sources.items():
        config = load_config(out / name / "config.json")
        assert config.init.weights == source
        assert config.student == shape
        assert config.teacher.source == ("teacher",)
        epochs = 3 + 2 if name == "long-control" else 2  # the run's and the recovery's
        assert config.optim.epochs == epochs
        assert run_folder.read_result(out / name)["epochs"] == epochs
        schedule = own if name == "long-control" else short(own).replace(optim=BRIEF)
        assert dataclasses.replace(schedule.optim, epochs=epochs) == config.optim
    notes = json.loads((out / "recovered" / "init.json").read_text())
    assert notes["source"] == "out/pruned"
    colours = [load_config(out / name / "config.json").views.mean for name in sources]
    assert colours[0] == colours[1] == colours[2] == load_student(place / "run" / "best")[1].mean


def test_schedules_are_told_before_anything_is_trained(place, pruned):
    """And are those of the runs."""
    out, done = pruned
    told = done.out.splitlines()[:3]
    schedules = {name: schedule_of(load_config(out / name / "config.json").optim) for name in RUNS}
    assert [schedule in line for schedule, line in zip(schedules.values(), told)] == [True] * 3
    assert "teacher" in told[0].replace(schedules["recovered"], "")
    assert [name in line for name, line in zip(RUNS[1:], told[1:])] == [True] * 2
    numbers = {name: re.findall(r"\d[\d.]*", one) for name, one in schedules.items()}
    assert (numbers["recovered"][0], numbers["recovered"][-1]) == ("2", "0.5")
    assert numbers["long-control"][0] == "5"


def test_a_recovery_without_teacher_names_none(place, command_server):
    done = command_server.run("prune", "run", "--loss", "none", "--dry-run", cwd=place)
    assert done.code == 0, done.err
    assert done.out.startswith("recovery ")
    assert "teacher" not in done.out.splitlines()[0]


def test_help_shows_the_schedule_that_the_run_would_have(place, command_server):
    """And the schedules by name that train all."""
    told = command_server.run("prune", "run", "--help", cwd=place).out.replace("│", " ")
    told = " ".join(told.split())
    epochs = short(load_config(place / "run" / "config.json")).optim.epochs
    assert re.search(rf"--optim\.epochs INT [^(]*\(default: {epochs}\)", told)
    assert re.search(r"--schedule NAME [^(]*\bdeit, deit3, short, int8\b", told)


def test_every_step_is_told_with_what_it_costs(pruned):
    out, done = pruned
    rows = result(out)["rows"]
    assert list(rows) == ["run", "pruned", "recovered", "short-control", "long-control"]
    whole, *others = (rows[name] for name in rows)
    for row in others:
        assert row["parameters"] < 0.62 * whole["parameters"]
        assert row["gmacs"] < 0.62 * whole["gmacs"]
        assert row["bytes"] < 0.65 * whole["bytes"]
        assert set(row["top1"]) == {"class", "distillation", "fused"}
    text = (out / "results.md").read_text()
    assert "| recovered |" in text
    assert "deit prune run" in text
    assert "long-control" in done.out.splitlines()[-2]


@pytest.mark.slow
def test_what_is_left_is_evaluated_and_exported_like_a_run(pruned, command_server, tmp_path):
    out, _ = pruned
    done = command_server.run(
        "evaluate", out / "pruned", "--json", tmp_path / "e.json", cwd=out.parent
    )
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["heads"]["fused"]["top1"] == result(out)["rows"]["pruned"]["top1"]["fused"]
    arguments = ("--format", "onnx", "--images", "32", "--out", tmp_path / "onnx")
    done = command_server.run("export", out / "recovered", *arguments, cwd=out.parent)
    assert done.code == 0, done.err
    done = command_server.run("export", out / "recovered", "--format", "timm", cwd=out.parent)
    assert done.code == 2
    for name in ("--format", "onnx", "pt2"):
        assert name in done.err


def test_the_same_command_trains_nothing_again_and_another_is_refused(pruned, command_server):
    out, _ = pruned
    before = {path: path.stat().st_mtime_ns for path in out.glob("**/*.safetensors")}
    told = json.loads((out / "results.json").read_text())["rows"]
    arguments = (*WORDS, "--out", "out")
    done = command_server.run(*arguments, cwd=out.parent)
    assert done.code == 0, done.err
    assert json.loads((out / "results.json").read_text())["rows"] == told  # with its controls
    assert {path: path.stat().st_mtime_ns for path in out.glob("**/*.safetensors")} == before
    done = command_server.run(*arguments, "--scope", "layerwise", cwd=out.parent)
    assert done.code == 2
    assert re.search(r"--out out\b.*\bscope\b.*\bglobal\b.*\blayerwise\b", done.err)
    done = command_server.run(*arguments, "--optim.epochs", "3", cwd=out.parent)
    assert done.code == 2
    assert re.search(r"--out out\b.*\boptim\.epochs\b.*\b2\b.*\b3\b", done.err)


@pytest.mark.slow
def test_interrupted_it_goes_on(place, command_server, tmp_path):
    """Killed while what is left is taught: the choice stays, the training goes on."""
    arguments = (*WORDS, "--run.save_every_steps", "1", "--out", tmp_path / "out")
    done = command_server.run(
        *arguments, cwd=place, DEIT_FAULT="update:3:kill"
    )  # the second try as well
    assert done.code == 1
    ends = [line for line in done.out.splitlines() if runs_over(line)]
    assert [line.split(":")[0] for line in ends] == ["recovered"] * 2
    chosen = (tmp_path / "out" / "pruned" / "kept_units.json").read_bytes()
    assert run_folder.list_checkpoints(tmp_path / "out" / "recovered")
    done = command_server.run(*arguments, cwd=place)
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "pruned" / "kept_units.json").read_bytes() == chosen
    assert stays(done) == []
    assert list(result(tmp_path / "out")["rows"]) == ["run", "pruned", "recovered"]


@pytest.mark.slow
def test_killed_before_all_of_it_is_written_it_chooses_again(place, command_server, tmp_path):
    arguments = (*WORDS, "--out", tmp_path / "out")
    done = command_server.run(*arguments, cwd=place, DEIT_FAULT="renamed:1:kill")
    assert done.code != 0
    assert not (tmp_path / "out" / "pruned" / "config.json").exists()
    done = command_server.run(*arguments, cwd=place)
    assert done.code == 0, done.err
    assert len(stays(done)) == 2


@pytest.mark.slow
def test_from_elsewhere_it_goes_on_where_nothing_was_saved_yet(place, command_server, tmp_path):
    """What is left was spelled from the first directory; its training ended before it saved."""
    arguments = (*WORDS[:1], "{run}", *WORDS[2:], "--optim.epochs", "1", "--out", "{out}")
    arguments = (*arguments, "--teacher.source", str(place / "teacher"))
    here = [word.format(run="run", out="o") for word in arguments]
    shutil.copytree(place / "run", tmp_path / "run")
    done = command_server.run(*here, cwd=tmp_path)
    assert done.code == 0, done.err
    recovered = tmp_path / "o" / "recovered"
    for path in recovered.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    there = [word.format(run=tmp_path / "run", out=tmp_path / "o") for word in arguments]
    done = command_server.run(*there, cwd=place)
    assert done.code == 0, done.err
    assert run_folder.read_result(recovered)["epochs"] == 1


def test_of_a_run_that_began_with_weights_nothing_is_trained_as_long(pruned, command_server):
    out, _ = pruned
    arguments = ("prune", out / "recovered", *QUICK_PRUNING, "--heads", "0.1", "--out", "again")
    done = command_server.run(*arguments, "--controls", "long", cwd=out.parent)
    assert done.code == 2
    for name in ("--controls long", "init.weights out/pruned"):
        assert name in done.err
    assert not (out.parent / "again").exists()


def test_a_run_that_trained_a_part_is_not_recovered_by_that_part(place, command_server, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["optim"]["trainable"], config["init"]["weights"] = "attention", str(place / "run")
    file.write_text(json.dumps(config))
    done = command_server.run(
        "prune", tmp_path / "run", *QUICK_PRUNING, "--out", tmp_path / "o", cwd=place
    )
    assert done.code == 2
    for name in ("attention", "optim.trainable"):
        assert name in done.err
    assert "--schedule" not in done.err  # as a schedule that trains a part is named


def test_a_run_that_is_not_finished_is_not_cut(place, command_server, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    done = command_server.run(
        "prune", tmp_path / "run", *QUICK_PRUNING, "--out", tmp_path / "o", cwd=place
    )
    assert done.code == 4
    for name in (str(tmp_path / "run"), "--resume"):
        assert name in done.err


def test_what_was_cut_is_quantized_after_its_recovery(pruned, command_server):
    pytest.importorskip("onnxruntime")
    out, _ = pruned
    done = command_server.run("quantize", out / "pruned", cwd=out.parent)
    assert done.code != 0
    for name in (f"{out / 'pruned'}: ", str(out / "recovered")):
        assert name in done.err


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", CRITERIA)
def test_a_dry_run_chooses_by_every_score_in_every_scope(
    place, command_server, tmp_path, scope, score
):
    arguments = (
        *WORDS,
        "--scope",
        scope,
        "--criterion",
        score,
        "--out",
        tmp_path / "out",
        "--dry-run",
    )
    done = command_server.run(*arguments, cwd=place)
    assert done.code == 0, done.err
    assert not (tmp_path / "out").exists()
    units = [units for _, units in stays(done)]
    assert (len(units), sum(units)) == (2, 96)
    if scope == "layerwise":
        assert units == [48, 48]
    elif score == "magnitude":
        student, _ = load_student(place / "run" / "best")
        kept = select_top(magnitudes(student.network).hidden, 96, scope="global")
        assert units == list(map(len, kept))


def test_a_share_of_the_arithmetic_is_not_exceeded_layer_by_layer(place, command_server, tmp_path):
    arguments = (
        "prune",
        "run",
        *QUICK_PRUNING,
        "--macs",
        "0.6",
        "--scope",
        "layerwise",
        "--dry-run",
    )
    done = command_server.run(*arguments, "--out", tmp_path / "out", cwd=place)
    assert done.code == 0, done.err
    told = re.search(r"\b192\b[^\d\n]*([\d.]+) %", done.out)  # behind the hidden units
    assert 0 < float(told[1]) <= 60


@pytest.mark.slow
def test_frozen_weights_are_cut_as_well(place, command_server, tmp_path):
    arguments = ("finetune", "--from", "run", "--optim.trainable", "heads", "--optim.epochs", "1")
    arguments = (*arguments, "--optim.warmup_epochs", "0", "--run.eval_every_epochs", "1", "--out")
    done = command_server.run(*arguments, tmp_path / "probe", cwd=place)
    assert done.code == 0, done.err
    arguments = (
        "prune",
        tmp_path / "probe",
        *QUICK_PRUNING,
        "--dry-run",
        "--out",
        tmp_path / "out",
    )
    done = command_server.run(*arguments, "--schedule", "int8", cwd=place)  # which trains all
    assert done.code == 0, done.err


def test_arithmetic_can_be_asked_for(place, command_server, tmp_path):
    arguments = (
        "prune",
        "run",
        *QUICK_PRUNING,
        "--macs",
        "0.6",
        "--out",
        tmp_path / "out",
        "--dry-run",
    )
    done = command_server.run(*arguments, cwd=place)
    assert done.code == 0, done.err
    assert sum(heads for heads, _ in stays(done)) in (3, 4)


def asked(**options):
    nothing = dict.fromkeys(("ratio", "heads", "hidden", "macs"))
    return prune_options(
        **{**nothing, "scope": "global", "criterion": "taylor", "images": 9, **options}
    )


def test_what_the_options_come_to():
    assert asked() == PruneOptions(0.5, 0.5, None, "global", "taylor", 9)
    assert asked(ratio=0.3) == PruneOptions(0.3, 0.3, None, "global", "taylor", 9)
    assert asked(heads=0.3) == PruneOptions(0.3, 0.0, None, "global", "taylor", 9)
    assert asked(heads=0.3, hidden=0.0) == PruneOptions(0.3, 0.0, None, "global", "taylor", 9)
    assert asked(macs=0.3) == PruneOptions(0.0, 0.0, 0.3, "global", "taylor", 9)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"ratio": 1.0}, {"ratio": 0.0}, {"ratio": -0.1}, {"ratio": float("nan")}),
        *({"heads": 1.0}, {"hidden": -1.0}, {"macs": 0.0}, {"macs": 1.5}),
        *({"ratio": 0.5, "macs": 0.5}, {"ratio": 0.5, "heads": 0.5}, {"macs": 0.1, "hidden": 0.1}),
        *({"scope": "2:4"}, {"criterion": "tailor"}, {"images": 0}),
    ],
)
def test_options_that_cannot_be(wrong):
    with raises(ConfigError, *(f"--{option}" for option in wrong)):
        asked(**wrong)


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
        (("prune", "run", "--init.weights", "teacher"), ("start.*",)),
        (("prune", "run", "--out", "run"), ("--out run", "prune.json")),
    ],
)
def test_a_mistake_is_told_before_the_work(place, command_server, arguments, names):
    done = command_server.run(
        *arguments, *(() if "--out" in arguments else ("--out", "new")), cwd=place
    )
    assert done.code == 2, done.err
    for name in names:
        assert name in done.err
    assert not (place / "new" / "pruned").exists()
