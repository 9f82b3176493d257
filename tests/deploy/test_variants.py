"""deit variants: which versions stand on it, and that their numbers are their own commands'."""

import copy
import json
import re
import shutil

import pytest
from safetensors.torch import load_file

from deit.config.validation import load_config
from deit.deploy.variants import Variant, _rung, versions_of
from deit.deploy.variants_tables import draw_variants, markdown, print_variants
from deit.models.saved import load_student, save_weights
from tests.helpers.small_runs import QUICK_PRUNING, THREE_EPOCHS

pytest.importorskip("sklearn")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def place(tmp_path_factory, command_server):
    """A run, its ONNX and int8 files, and what pruning left of it."""
    place = tmp_path_factory.mktemp("variants")
    arguments = ("--loss", "none", *THREE_EPOCHS, "--student.depth", "1", "--out", "run")
    commands = [
        ("train", "digits", *arguments),
        ("export", "run", "--format", "onnx", "--images", "64"),
        ("quantize", "run", "--max-drop", "5"),
        ("prune", "run", *QUICK_PRUNING, "--ratio", "0.5", "--out", "small"),
        ("train", "digits", *arguments[:-1], "other", "--run.seed", "1"),
    ]
    for command in commands:
        done = command_server.run(*command, cwd=place)
        assert done.code == 0, done.err
    return place


@pytest.fixture(scope="module")
def measured(place, command_server):
    done = command_server.run(
        "variants", "run", "--merge-tokens", "2", "other", "--json", "variants.json", cwd=place
    )
    assert done.code == 0, done.err
    return json.loads((place / "variants.json").read_text()), done


NAMES = ["run", "run, ONNX", "run, int8 static", "run, merging 2", "small, recovered", "other"]


def test_everything_made_of_the_run_is_found(measured):
    found, done = measured
    assert list(found["rows"]) == NAMES
    assert "int8 static" in done.out


@pytest.mark.slow
def test_accuracy_is_that_of_the_own_command(place, measured, command_server):
    rows = measured[0]["rows"]
    for name, run in (("run", "run"), ("small, recovered", "small/recovered"), ("other", "other")):
        done = command_server.run("evaluate", run, "--json", place / "e.json", "--force", cwd=place)
        assert done.code == 0, done.err
        heads = json.loads((place / "e.json").read_text())["heads"]
        assert rows[name]["top1"] == {head: heads[head]["top1"] for head in rows[name]["top1"]}
    arguments = ("evaluate", "run", "--merge-tokens", "2", "--json", place / "e.json", "--force")
    done = command_server.run(*arguments, cwd=place)
    assert done.code == 0, done.err
    heads = json.loads((place / "e.json").read_text())["heads"]
    merging = rows["run, merging 2"]
    assert merging["top1"] == {head: heads[head]["top1"] for head in merging["top1"]}
    told = json.loads((place / "run/quantized-static/quantization.json").read_text())
    quantized = rows["run, int8 static"]
    assert quantized["top1"]["fused"] == told["int8"]["heads"]["fused"]["top1"]
    assert quantized["same_answers"] == told["agreement"]["fused"]
    assert rows["run, ONNX"]["top1"] == rows["run"]["top1"]
    assert rows["run, ONNX"]["same_answers"] == rows["run"]["same_answers"] == 1


def test_size_and_arithmetic(place, measured):
    rows = measured[0]["rows"]
    files = {"run": "run/best/model.safetensors", "run, ONNX": "run/export-onnx/model.onnx"}
    files["small, recovered"] = "small/recovered/best/model.safetensors"
    for name, file in files.items():
        assert rows[name]["bytes"] == (place / file).stat().st_size
    told = json.loads((place / "small" / "results.json").read_text())["rows"]
    for name, step in (("run", "run"), ("small, recovered", "recovered")):
        for key in ("parameters", "gmacs"):
            assert rows[name][key] == told[step][key]
    assert rows["run"]["nonzero"] <= rows["run"]["parameters"]
    merging = rows["run, merging 2"]
    for key in ("parameters", "nonzero", "bytes"):
        assert merging[key] == rows["run"][key]
    assert merging["gmacs"] < rows["run"]["gmacs"]
    assert {row["engine"] for row in rows.values()} == {"PyTorch", "ONNX Runtime"}


def test_every_version_is_timed_as_often(measured):
    for batch in ("1", "64"):
        latencies = [row["latency"][batch] for row in measured[0]["rows"].values()]
        assert len({one["turns"] for one in latencies}) == 1
        assert all(0 < one["p10_ms"] <= one["median_ms"] <= one["p90_ms"] for one in latencies)


def test_numbers_table_and_picture_lie_in_the_runs_folder(place, measured, tmp_path):
    found, _ = measured
    folder = place / "run" / "variants"
    assert {path.name for path in folder.iterdir()} == {
        "variants.json",
        "variants.md",
        "variants.png",
    }
    assert json.loads((folder / "variants.json").read_text()) == found
    text = (folder / "variants.md").read_text()
    assert text == markdown(found)
    assert all(f"| {name} |" in text for name in NAMES)
    assert "deit variants run --merge-tokens 2 other" in text
    assert found["environment"]["command"].startswith("deit variants run --merge-tokens 2")
    draw_variants(found, tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 20_000


def test_the_table_on_a_terminal_is_no_wider_than_it_must_be(measured, capsys):
    """With every number of the file's, and a column of its own for zeros only where there are."""
    found = copy.deepcopy(measured[0])
    for zeros in (0, 5):
        found["rows"]["run"]["nonzero"] = found["rows"]["run"]["parameters"] - zeros
        print_variants(found)
        lines = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "┃│"]
        assert max(map(len, lines)) <= 120
        (row,) = [line for line in lines if line.startswith("│ run  ")]
        assert lines[0].count("┃") == row.count("│")
        text = next(line for line in markdown(found).splitlines() if line.startswith("| run |"))
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        told = [cell for place, cell in enumerate(cells) if place not in (1, 7)[: 2 - bool(zeros)]]
        assert [cell.strip() for cell in row.strip("│").split("│")] == told


def test_masked_weights_are_not_counted(place, tmp_path):
    """A run with zeros: parameters stay, those that are not 0 do not."""
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    file = run / "best" / "model.safetensors"
    weights = load_file(file)
    before = sum(int(one.count_nonzero()) for one in weights.values())
    zeros = int(weights["blocks.0.mlp.fc1.weight"][:5].count_nonzero())
    weights["blocks.0.mlp.fc1.weight"][:5] = 0
    save_weights(file, weights)
    (run / "best" / "manifest.json").unlink()
    _, facts = load_student(run / "best")
    about = _rung(Variant("x", run), load_config(run / "config.json"), facts).about
    assert about["nonzero"] == before - zeros
    assert about["parameters"] == sum(one.numel() for one in weights.values())


def test_a_pruning_of_another_run_is_not_its(place):
    assert [one.name for one in versions_of(place / "other", [])] == ["other"]


def test_a_run_that_is_not_finished_is_said_to_be(place, tmp_path, capsys):
    shutil.copytree(place / "other", tmp_path / "half")
    versions_of(place / "run", [tmp_path / "half"])
    assert str(tmp_path / "half") not in "".join(capsys.readouterr())
    (tmp_path / "half" / "result.json").unlink()
    versions_of(place / "run", [tmp_path / "half"])
    assert str(tmp_path / "half") in "".join(capsys.readouterr())


def test_what_is_found_by_itself_may_be_named(place):
    names = [one.name for one in versions_of(place / "run", [place / "small" / "recovered"])]
    assert names == [*NAMES[:3], NAMES[4]]


def test_two_runs_of_one_name_keep_apart(place, tmp_path):
    shutil.copytree(place / "other", tmp_path / "run")
    names = [one.name for one in versions_of(place / "run", [tmp_path / "run"])]
    assert names == [*NAMES[:3], NAMES[4], str(tmp_path / "run")]


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        ((), 2, ("RUN", "deit variants --help")),
        (("ohter",), 4, ("ohter", "other")),
        (("elsewhere",), 4, ("elsewhere",)),
        (("run", "elsewhere"), 4, ("elsewhere",)),
        (("run", "run"), 2, ("error: run: ",)),
        (("run", "other", "other"), 2, ("error: other: ",)),
        (("other", "--merge-tokens", "9"), 2, ("--merge-tokens 9", "8", "16")),
        (("run", "--merge-tokens", "two"), 2, ("--merge-tokens two",)),
        (("run", "--merge-tokens", "0"), 2, ("--merge-tokens 0",)),
        (("run", "--json", "e.json"), 5, ("--json e.json", "--force")),
    ],
)
def test_a_mistake_is_told_before_the_work(place, command_server, arguments, code, names):
    (place / "e.json").touch()
    done = command_server.run("variants", *arguments, cwd=place)
    assert done.code == code, done.err
    for name in names:
        assert name in done.err


def test_a_ladder_that_is_there_is_replaced_only_when_asked(
    place, measured, command_server, tmp_path
):
    folder = place / "run" / "variants"
    before = (folder / "variants.json").read_bytes()
    done = command_server.run("variants", "run", cwd=place)
    assert (done.code, done.out) == (5, "")
    assert done.err.startswith("deit: error: run/variants: ")
    assert "--force" in done.err
    assert (folder / "variants.json").read_bytes() == before
    shutil.copytree(place / "other", tmp_path / "other")
    (tmp_path / "other" / "variants").mkdir()
    (tmp_path / "other" / "variants" / "notes.md").touch()
    done = command_server.run("variants", "other", "--force", cwd=tmp_path)
    assert done.code == 5
    for name in ("other/variants", "notes.md"):
        assert name in done.err
    (tmp_path / "other" / "variants" / "notes.md").rename(tmp_path / "other/variants/variants.md")
    done = command_server.run("variants", "other", "--force", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (
        "deit variants other --force"
        in (tmp_path / "other" / "variants" / "variants.md").read_text()
    )


@pytest.mark.slow
def test_a_run_of_another_size_is_refused(place, command_server, tmp_path):
    arguments = (
        "--loss",
        "none",
        *THREE_EPOCHS,
        "--optim.epochs",
        "2",
        "--student.image_size",
        "16",
    )
    arguments = (*arguments, "--student.patch_size", "4", "--out", tmp_path / "large")
    assert command_server.run("train", "digits", *arguments, cwd=place).code == 0
    done = command_server.run("variants", "run", tmp_path / "large", "--force", cwd=place)
    assert done.code == 2
    assert re.search(rf"{tmp_path / 'large'}\b.*\bimage_size\b.*\b16\b.*\b8\b", done.err)


def test_a_run_of_other_splits_is_refused(place, command_server, tmp_path):
    shutil.copytree(place / "other", tmp_path / "seen")
    config = json.loads((tmp_path / "seen" / "config.json").read_text())
    config["data"]["split_seed"] = 1
    (tmp_path / "seen" / "config.json").write_text(json.dumps(config))
    done = command_server.run("variants", "run", tmp_path / "seen", "--force", cwd=place)
    assert done.code == 3
    for name in (str(tmp_path / "seen"), "data.split_seed"):
        assert name in done.err


@pytest.mark.slow
def test_files_of_other_weights_are_left_out(place, command_server, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(place / "run", run, ignore=shutil.ignore_patterns("variants"))
    shutil.rmtree(run / "best")
    shutil.copytree(place / "other" / "best", run / "best")
    done = command_server.run("variants", run, cwd=place)
    assert done.code == 0, done.err
    assert "export-onnx/model.onnx" in done.err
    assert next(iter(json.loads((run / "variants" / "variants.json").read_text())["rows"])) == "run"
    assert "run, ONNX" not in json.loads((run / "variants" / "variants.json").read_text())["rows"]
