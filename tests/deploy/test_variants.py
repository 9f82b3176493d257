"""Tests of `deit variants`: which variants are found, and that their numbers are right."""

import copy
import json
import re
import shutil

import pytest
from safetensors.torch import load_file

from deit.config.validation import load_config
from deit.deploy.variants import Variant, _load_variant, find_variants
from deit.deploy.variants_tables import draw_variants, markdown, print_variants
from deit.models.saved_student import load_student, save_weights
from tests.helpers.small_runs import QUICK_PRUNING, THREE_EPOCHS

pytest.importorskip("sklearn")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, command_server):
    """Return a folder with a run, its ONNX and int8 files, a pruning of it, and another run."""
    workspace = tmp_path_factory.mktemp("variants")
    arguments = ("--loss", "none", *THREE_EPOCHS, "--student.depth", "1", "--out", "run")
    commands = [
        ("train", "digits", *arguments),
        ("export", "run", "--format", "onnx", "--images", "64"),
        ("quantize", "run", "--max-drop", "5"),
        ("prune", "run", *QUICK_PRUNING, "--ratio", "0.5", "--out", "small"),
        ("train", "digits", *arguments[:-1], "other", "--run.seed", "1"),
    ]
    for command in commands:
        done = command_server.run(*command, cwd=workspace)
        assert done.code == 0, done.err
    return workspace


@pytest.fixture(scope="module")
def measured(workspace, command_server):
    done = command_server.run(
        "variants", "run", "--merge-tokens", "2", "other", "--json", "variants.json", cwd=workspace
    )
    assert done.code == 0, done.err
    return json.loads((workspace / "variants.json").read_text()), done


NAMES = ["run", "run, ONNX", "run, int8 static", "run, merging 2", "small, recovered", "other"]


def test_variants_exports_and_pruning_of_run_are_found(measured):
    result, done = measured
    assert list(result["rows"]) == NAMES
    assert "int8 static" in done.out


@pytest.mark.slow
def test_variants_accuracy_equals_that_of_evaluate_and_quantize(
    workspace, measured, command_server
):
    rows = measured[0]["rows"]
    for name, run in (("run", "run"), ("small, recovered", "small/recovered"), ("other", "other")):
        done = command_server.run(
            "evaluate", run, "--json", workspace / "e.json", "--force", cwd=workspace
        )
        assert done.code == 0, done.err
        heads = json.loads((workspace / "e.json").read_text())["heads"]
        assert rows[name]["top1"] == {head: heads[head]["top1"] for head in rows[name]["top1"]}
    arguments = (
        "evaluate",
        "run",
        "--merge-tokens",
        "2",
        "--json",
        workspace / "e.json",
        "--force",
    )
    done = command_server.run(*arguments, cwd=workspace)
    assert done.code == 0, done.err
    heads = json.loads((workspace / "e.json").read_text())["heads"]
    merging = rows["run, merging 2"]
    assert merging["top1"] == {head: heads[head]["top1"] for head in merging["top1"]}
    report = json.loads((workspace / "run/quantized-static/quantization.json").read_text())
    quantized = rows["run, int8 static"]
    assert quantized["top1"]["fused"] == report["int8"]["heads"]["fused"]["top1"]
    assert quantized["agreement"] == report["agreement"]["fused"]
    assert rows["run, ONNX"]["top1"] == rows["run"]["top1"]
    assert rows["run, ONNX"]["agreement"] == rows["run"]["agreement"] == 1


def test_variants_size_and_macs_equal_files_and_prune_results(workspace, measured):
    rows = measured[0]["rows"]
    files = {"run": "run/best/model.safetensors", "run, ONNX": "run/export-onnx/model.onnx"}
    files["small, recovered"] = "small/recovered/best/model.safetensors"
    for name, file in files.items():
        assert rows[name]["bytes"] == (workspace / file).stat().st_size
    pruning = json.loads((workspace / "small" / "results.json").read_text())["rows"]
    for name, step in (("run", "run"), ("small, recovered", "recovered")):
        for key in ("parameters", "gmacs"):
            assert rows[name][key] == pruning[step][key]
    assert rows["run"]["nonzero"] <= rows["run"]["parameters"]
    merging = rows["run, merging 2"]
    for key in ("parameters", "nonzero", "bytes"):
        assert merging[key] == rows["run"][key]
    assert merging["gmacs"] < rows["run"]["gmacs"]
    assert {row["engine"] for row in rows.values()} == {"PyTorch", "ONNX Runtime"}


def test_variants_latency_has_equal_number_of_turns(measured):
    for batch in ("1", "64"):
        latencies = [row["latency"][batch] for row in measured[0]["rows"].values()]
        assert len({latency["turns"] for latency in latencies}) == 1
        for latency in latencies:
            assert 0 < latency["p10_ms"] <= latency["median_ms"] <= latency["p90_ms"]


def test_variants_output_in_run_folder_is_json_markdown_and_plot(workspace, measured, tmp_path):
    result, _ = measured
    folder = workspace / "run" / "variants"
    assert {path.name for path in folder.iterdir()} == {
        "variants.json",
        "variants.md",
        "variants.png",
    }
    assert json.loads((folder / "variants.json").read_text()) == result
    text = (folder / "variants.md").read_text()
    assert text == markdown(result)
    assert all(f"| {name} |" in text for name in NAMES)
    assert "deit variants run --merge-tokens 2 other" in text
    assert result["environment"]["command"].startswith("deit variants run --merge-tokens 2")
    draw_variants(result, tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 20_000


def test_print_variants_table_fits_terminal_and_equals_markdown(measured, capsys):
    """The column of nonzero parameters is only printed if there are zeros."""
    result = copy.deepcopy(measured[0])
    for zeros in (0, 5):
        row = result["rows"]["run"]
        row["nonzero"] = row["parameters"] - zeros
        print_variants(result)
        lines = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "┃│"]
        assert max(map(len, lines)) <= 120
        (line,) = [line for line in lines if line.startswith("│ run  ")]
        assert lines[0].count("┃") == line.count("│")
        text = next(line for line in markdown(result).splitlines() if line.startswith("| run |"))
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        omitted = (1, 7)[: 2 - bool(zeros)]
        printed = [cell for column, cell in enumerate(cells) if column not in omitted]
        assert [cell.strip() for cell in line.strip("│").split("│")] == printed


def test_load_variant_masked_weights_are_not_nonzero(workspace, tmp_path):
    """The number of parameters does not change, that of nonzero ones does."""
    run = tmp_path / "run"
    shutil.copytree(workspace / "run", run)
    file = run / "best" / "model.safetensors"
    weights = load_file(file)
    before = sum(int(weight.count_nonzero()) for weight in weights.values())
    zeros = int(weights["blocks.0.mlp.fc1.weight"][:5].count_nonzero())
    weights["blocks.0.mlp.fc1.weight"][:5] = 0
    save_weights(file, weights)
    (run / "best" / "manifest.json").unlink()
    _, model_info = load_student(run / "best")
    config = load_config(run / "config.json")
    properties = _load_variant(Variant("x", run), config, model_info).properties
    assert properties["nonzero"] == before - zeros
    assert properties["parameters"] == sum(weight.numel() for weight in weights.values())


def test_find_variants_pruning_of_other_run_is_ignored(workspace):
    assert [variant.name for variant in find_variants(workspace / "other", [])] == ["other"]


def test_find_variants_unfinished_run_warns(workspace, tmp_path, capsys):
    shutil.copytree(workspace / "other", tmp_path / "half")
    find_variants(workspace / "run", [tmp_path / "half"])
    assert str(tmp_path / "half") not in "".join(capsys.readouterr())
    (tmp_path / "half" / "result.json").unlink()
    find_variants(workspace / "run", [tmp_path / "half"])
    assert str(tmp_path / "half") in "".join(capsys.readouterr())


def test_find_variants_pruned_run_given_as_well_is_listed_once(workspace):
    names = [
        variant.name
        for variant in find_variants(workspace / "run", [workspace / "small" / "recovered"])
    ]
    assert names == [*NAMES[:3], NAMES[4]]


def test_find_variants_equal_folder_names_are_named_by_path(workspace, tmp_path):
    shutil.copytree(workspace / "other", tmp_path / "run")
    names = [variant.name for variant in find_variants(workspace / "run", [tmp_path / "run"])]
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
def test_variants_invalid_arguments_fail_before_work(
    workspace, command_server, arguments, code, names
):
    (workspace / "e.json").touch()
    done = command_server.run("variants", *arguments, cwd=workspace)
    assert done.code == code, done.err
    for name in names:
        assert name in done.err


def test_variants_existing_output_is_replaced_with_force_only(
    workspace, measured, command_server, tmp_path
):
    folder = workspace / "run" / "variants"
    before = (folder / "variants.json").read_bytes()
    done = command_server.run("variants", "run", cwd=workspace)
    assert (done.code, done.out) == (5, "")
    assert done.err.startswith("deit: error: run/variants: ")
    assert "--force" in done.err
    assert (folder / "variants.json").read_bytes() == before
    shutil.copytree(workspace / "other", tmp_path / "other")
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
def test_variants_other_image_size_raises(workspace, command_server, tmp_path):
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
    assert command_server.run("train", "digits", *arguments, cwd=workspace).code == 0
    done = command_server.run("variants", "run", tmp_path / "large", "--force", cwd=workspace)
    assert done.code == 2
    assert re.search(rf"{tmp_path / 'large'}\b.*\bimage_size\b.*\b16\b.*\b8\b", done.err)


def test_variants_other_splits_raise(workspace, command_server, tmp_path):
    shutil.copytree(workspace / "other", tmp_path / "seen")
    config = json.loads((tmp_path / "seen" / "config.json").read_text())
    config["data"]["split_seed"] = 1
    (tmp_path / "seen" / "config.json").write_text(json.dumps(config))
    done = command_server.run("variants", "run", tmp_path / "seen", "--force", cwd=workspace)
    assert done.code == 3
    for name in (str(tmp_path / "seen"), "data.split_seed"):
        assert name in done.err


@pytest.mark.slow
def test_variants_files_of_other_weights_are_skipped(workspace, command_server, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workspace / "run", run, ignore=shutil.ignore_patterns("variants"))
    shutil.rmtree(run / "best")
    shutil.copytree(workspace / "other" / "best", run / "best")
    done = command_server.run("variants", run, cwd=workspace)
    assert done.code == 0, done.err
    assert "export-onnx/model.onnx" in done.err
    assert next(iter(json.loads((run / "variants" / "variants.json").read_text())["rows"])) == "run"
    assert "run, ONNX" not in json.loads((run / "variants" / "variants.json").read_text())["rows"]
