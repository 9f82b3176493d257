"""Tables, files and plots of a sweep, from results written by hand."""

import csv
import itertools
import json
import random
import re
import statistics
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from deit.analysis.sweep_sections import sections_of_sweep
from deit.evaluation.cache import CachedEvaluation, disagreement_matrix
from deit.experiments.arm_difference import difference_line
from deit.experiments.sweep_collect import environment_of
from deit.experiments.sweep_plots import draw_sweep, heat_map, scatter_trials
from deit.experiments.sweep_tables import (
    best_of,
    best_summary,
    cells,
    changes,
    columns,
    markdown,
    write_results,
)
from deit.viz import charts, html
from tests.helpers.sweeps import row


def lines_of(out):
    return list(csv.DictReader((out / "results.csv").read_text().splitlines(keepends=True)))


def test_cells_have_mean_std_and_gain(results):
    assert columns(results)[:3] == ["temperature", "lr", "class head"]
    teacher, a, b, c, d = cells(results)
    assert teacher[:3] == ["teacher", "", "90.0"]
    assert teacher[5] == "-"
    spread = f"{100 * statistics.stdev([0.5, 0.7]):.1f}"
    assert a[4:6] == [f"60.0 +- {spread}", "+0.0"]
    assert b[4:7] == ["80.0 +- 0.0", "+20.0", "70.0 +- 28.3"]
    assert c[5] == "-20.0"
    assert re.fullmatch(r"10 \(1\b.*\b2\b.*\)", c[-1])  # one of two seeds failed
    assert d[2:] == ["failed", "-", "-", "-", "-", "-", "-"]


def test_cells_of_held_out_classes_have_their_own_columns(results):
    classes = {"held_out": ["b"], "seen": 0.9, "unseen": 0.2, "per_class": {"a": 0.9, "b": 0.2}}
    results["rows"]["a"]["classes"] = [classes, {**classes, "unseen": 0.4}]
    heads, rows = columns(results), cells(results)
    spread = f"{100 * statistics.stdev([0.2, 0.4]):.1f}"
    index = heads.index("unseen")
    assert [row[index] for row in rows] == ["-", f"30.0 +- {spread}", "-", "-", "-"]
    assert {len(row) for row in rows} == {len(heads)}
    lines = markdown(results).splitlines()
    assert "|  | a | b (unseen) |" in lines
    assert "| a | 90.0 +- 0.0 | 20.0 +- 0.0 |" in lines


def test_points_with_different_held_out_classes_are_marked_and_not_ranked(results):
    shares = {"a": 0.9, "b": 0.2, "c": None}
    for name, held in (("a", ["b"]), ("b", ["a", "b"])):
        classes = {"held_out": held, "seen": 0.9, "unseen": 0.2, "per_class": shares}
        results["rows"][name]["classes"] = [classes, classes]
    assert best_of(results["rows"], 2) == []
    results["best"] = []
    lines = markdown(results).splitlines()
    assert "|  | a | b | c |" in lines
    assert "| a | 90.0 +- 0.0 | 20.0 +- 0.0* | - |" in lines
    assert "| b | 90.0 +- 0.0* | 20.0 +- 0.0* | - |" in lines
    assert any(best_summary(results).capitalize() in line for line in lines)
    assert not any(re.match(r"\d\. ", line) for line in lines)
    classes["per_class"] = {"a": 0.9, "d": 0.5}  # points can have different classes
    results["rows"]["b"]["classes"] = [classes, classes]
    assert "| a | 90.0 +- 0.0 | 20.0 +- 0.0* | - | - |" in markdown(results).splitlines()


@pytest.mark.parametrize("field", ["optim.lr", "student.depth"])
def test_sections_plot_accuracy_over_time_and_throughput(field, results, tmp_path):
    results["fields"][1] = field
    for point in results["rows"].values():
        if point["values"]:
            point["values"] = {
                field if name == "optim.lr" else name: value
                for name, value in point["values"].items()
            }
    page = "".join(sections_of_sweep(results, tmp_path, "mine"))
    assert (tmp_path / "mine-time.png").is_file()
    assert (tmp_path / "mine-throughput.png").is_file() == (field == "student.depth")
    assert ("images/s" in page) == (field == "student.depth")


def test_sections_mark_unseen_classes(results, tmp_path):
    shares = {"a": 0.9, "b": 0.2, "c": None}
    for name, held in (("a", ["b"]), ("b", ["a"])):
        classes = {"held_out": held, "seen": 0.9, "unseen": 0.2, "per_class": shares}
        results["rows"][name]["classes"] = [classes, classes]
    results["best"] = []
    page = "".join(sections_of_sweep(results, tmp_path, "mine"))
    assert ">20*</td>" in page
    assert ">90*</td>" in page
    assert "*: " in page  # the legend of the mark
    assert best_summary(results).capitalize() in page


def test_page_and_tables_of_two_arms_have_a_sentence_about_them(results, tmp_path):
    del results["rows"]["c"], results["rows"]["d"]
    results["study"] = "table-3"
    sentence = difference_line(results)
    assert "b is ahead by 20.0 points" in sentence
    assert f"\n\n{sentence}\n\n" in markdown(results)
    assert f"<p>{sentence}.</p>" in sections_of_sweep(results, tmp_path, "mine")
    results["study"] = None
    assert "points (" not in markdown(results) + "".join(sections_of_sweep(results, tmp_path, "x"))


def test_points_with_and_without_held_out_classes_share_a_table(results, tmp_path):
    """If only some points held out a class, the mark is next to the number."""
    shares = {"per_class": {"a": 0.9, "b": 0.2}}
    some = {"held_out": ["b"], "seen": 0.9, "unseen": 0.2, **shares}
    none = {"held_out": [], "seen": 0.6, "unseen": None, **shares}
    results["rows"]["a"]["classes"], results["rows"]["b"]["classes"] = [some, some], [none, none]
    lines = markdown(results).splitlines()
    assert "| a | 90.0 +- 0.0 | 20.0 +- 0.0* |" in lines
    assert "| b | 90.0 +- 0.0 | 20.0 +- 0.0 |" in lines
    index = columns(results).index("unseen")
    _, a, b, *_ = cells(results)
    assert (a[index], b[index - 1 : index + 1]) == ("20.0 +- 0.0", ["60.0 +- 0.0", "-"])
    assert ">20*</td>" in "".join(sections_of_sweep(results, tmp_path, "mine"))


def test_best_of_ranks_by_validation(results):
    """Point c has the best validation accuracy, but fewer seeds than others."""
    assert results["best"] == ["b", "a"]
    assert best_of(results["rows"], 9) == ["b", "a"]


def test_best_summary_counts_ties(results):
    assert not re.search(r"\d", best_summary(results))
    results["rows"]["a"]["validation"] = [0.3 + 0.1 + 0.1, 0.8999999999999999]
    assert re.findall(r"\d+", best_summary(results)) == ["2"]


def test_stopped_trials_are_in_every_file(results, tmp_path):
    results["search"] = {"trials": 5, "finished": 3, "stopped": 1, "failed": 1}
    values = {"loss.temperature": "9", "optim.lr": "0.3"}
    results["fields"].insert(0, "run")
    trial = {"values": {"run": "trial 7", **values}, "epoch": 4, "top1": 0.25}
    results["stopped"] = {"trial 7": trial}
    line = r"^- trial 7: temperature 9, lr 0\.3\b.*\b25\.0\b.*\b4$"
    assert re.search(line, markdown(results), re.MULTILINE)
    write_results(results, tmp_path)
    *_, line = lines_of(tmp_path)
    assert (line["point"], line["status"], line["optim.lr"]) == ("trial 7", "stopped", "0.3")
    assert line["validation_top1_percent"] == "25.0"
    assert re.search(r"\bmedian\b.*\b4\b", line["reason"])
    for point in results["rows"].values():
        if point["values"]:
            point["values"]["run"] = "a trial"
    page = "".join(sections_of_sweep(results, tmp_path, "mine"))
    assert ">trial 7<" in page
    stopped = (tmp_path / "mine-stopped.csv").read_text().splitlines()
    assert stopped == [",temperature,lr,validation top-1 %,at epoch", "trial 7,9,0.3,25.0,4"]
    draws = [scatter_trials(results, field) for field in values]
    drawn = []
    for draw in draws:
        axes = Figure().subplots()
        draw(axes)
        ended, rings = axes.get_lines()
        drawn.append([list(line.get_xdata()) for line in (ended, rings)])
        assert rings.get_fillstyle() == "none"
        assert list(rings.get_ydata()) == [25.0]
    assert drawn == [[[1, 1, 3], [9]], [[0.1, 0.2, 0.1], [0.3]]]


def test_changes_list_the_fields_of_each_run(results, tmp_path):
    assert changes(results) == {}
    results["fields"] = ["run", "optim.lr"]
    for name, fields in {"a": {"loss.kind": "none", "optim.epochs": "9"}, "b": {}}.items():
        results["rows"][name] |= {"values": {"run": f"run {name}", "optim.lr": "2"}, "sets": fields}
    del results["rows"]["c"], results["rows"]["d"]
    fields, nothing = changes(results)["run a"], changes(results)["run b"]
    assert fields == "loss.kind none, optim.epochs 9"
    assert nothing.isalpha()
    assert f"| run a | {fields} |" in markdown(results).splitlines()
    page = "".join(sections_of_sweep(results, tmp_path, "mine"))
    assert f"<dt>run b</dt><dd>{nothing}</dd>" in page
    results["rows"]["c"] = {
        **results["rows"]["a"],
        "sets": {"loss.kind": "none", "optim.epochs": "18"},
    }
    assert re.fullmatch(r"loss\.kind none, optim\.epochs \D+", changes(results)["run a"])
    for name in "abc":
        results["rows"].get(name, {})["sets"] = {}
    assert changes(results) == {}


def test_csv_table_has_separate_mean_and_std_columns(results, tmp_path):
    sections_of_sweep(results, tmp_path, "mine")
    with (tmp_path / "mine-results.csv").open() as file:
        heads, teacher, a, *_ = csv.reader(file)
    index = heads.index("fused")
    assert heads[index : index + 2] == ["fused", "fused std"]
    spread = f"{100 * statistics.stdev([0.5, 0.7]):.1f}"
    assert (teacher[index : index + 2], a[index : index + 2]) == (["100.0", ""], ["60.0", spread])


def test_csv_table_has_a_column_for_remarks(tmp_path):
    rows = [["a (b)", "10 +- 0 (1 of 3 seeds failed)", "-"], ["c", "failed", "2"]]
    html.table(("", "seconds", "x"), rows, csv_path=tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        lines = list(csv.reader(file))
    assert lines == [
        ["", "seconds", "seconds std", "seconds remark", "x"],
        ["a (b)", "10", "0", "1 of 3 seeds failed", "-"],
        ["c", "failed", "", "", "2"],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_point_labels_overlap_neither_labels_nor_points(seed):
    generator = random.Random(seed)
    positions = {
        f"point {index}" + "n" * generator.randrange(20): (
            generator.uniform(0.12, 0.88),
            generator.uniform(0.4, 0.6),
        )
        for index in range(9)
    }
    height = charts._LINE_HEIGHT
    nears = charts._place_labels(list(positions.items()))
    boxes = {name: (*near.extent(name), near.height) for name, near in zip(positions, nears)}
    assert all(left >= 0 and right <= 1 and 0 <= at <= 1 for left, right, at in boxes.values())
    marks = {f"{name}'s mark": (x, x, y) for name, (x, y) in positions.items()}
    for first, second in itertools.combinations({**boxes, **marks}, 2):
        if first in marks:
            continue
        a, b = boxes[first], {**boxes, **marks}[second]
        is_disjoint = a[1] <= b[0] or b[1] <= a[0] or abs(a[2] - b[2]) >= height - 1e-9
        assert is_disjoint, (first, second)


def test_markdown_and_csv_escape_cells(results, tmp_path):
    lines = markdown(results).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "1. b (70.0 +- 28.3)" in lines
    assert "- c, seed 1: no memory | left" in lines
    assert "a processor, torch 2.15.0, commit 0123456789abcdef" in lines
    write_results(results, tmp_path)
    rows = lines_of(tmp_path)
    assert [line["status"] for line in rows] == ["finished"] * 5 + ["failed"] * 3
    assert rows[5]["reason"] == "no\nmemory | left"
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))


def cached_evaluation(labels, **predictions):
    return CachedEvaluation({}, {}, {k: list(v) for k, v in predictions.items()}, {}, list(labels))


def test_disagreement_matrix_has_heads_and_teacher(results):
    """As in the DeiT paper's Table 4, each head of a few runs has a row, and the teacher one."""
    with_token = cached_evaluation(
        "0120", teacher="0121", **{"class": "0120"}, distillation="0111", fused="0110"
    )
    class_only = cached_evaluation("0120", teacher="0121", **{"class": "1120"})
    shares = disagreement_matrix({"distilled": with_token, "undistilled": class_only})
    heads = ["distilled, class", "distilled, distillation", "distilled, fused"]
    assert list(shares) == ["truth", "teacher", *heads, "undistilled"]
    assert shares["truth"] == dict(zip(shares, (0, 0.25, 0, 0.5, 0.25, 0.25)))
    assert shares["teacher"]["undistilled"] == 0.5 == shares["undistilled"]["teacher"]
    many = disagreement_matrix({str(index): with_token for index in range(4)})
    assert list(many) == ["truth", "teacher", "0", "1", "2", "3"]
    assert many["truth"]["0"] == 0.25
    other = cached_evaluation("0121", **{"class": "0121"})
    assert disagreement_matrix({"a": with_token, "b": other}) == {} == disagreement_matrix({})
    text = markdown({**results, "disagreement": shares})
    lines = text.splitlines()
    assert "| undistilled | 25.0 | 50.0 | 25.0 | 75.0 | 50.0 | 0.0 |" in lines
    assert any(line.startswith("| distilled, class head | ") for line in lines)


def test_heat_map_averages_seeds_and_other_fields(results):
    down, across, means = heat_map(results, "loss.temperature", "optim.lr")
    assert (down, across) == (["1", "3"], ["0.1", "0.2"])
    assert means[0] == pytest.approx([60, 80])
    assert means[1][0] == pytest.approx(40)
    assert means[1][1] != means[1][1]
    results["rows"]["e"] = row({"loss.temperature": "1", "optim.lr": "0.1", "run": "x"}, [0.9, 0.9])
    assert heat_map(results, "loss.temperature", "optim.lr")[2][0][0] == pytest.approx(75)


@pytest.mark.parametrize(
    ("fields", "drawn"),
    [
        (["run"], ["runs.png"]),
        (["optim.lr"], ["optim.lr.png"]),
        (["run", "optim.lr"], ["optim.lr.png"]),
        (["loss.temperature", "optim.lr"], ["loss.temperature-optim.lr.png"]),
    ],
)
def test_draw_sweep_plots_depend_on_the_varied_fields(results, fields, drawn, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = {"run": "abcd", "optim.lr": ["0.1", "1", "0.1", "1"], "loss.temperature": "1122"}
    for index, name in enumerate("abcd"):
        results["rows"][name]["values"] = {field: arguments[field][index] for field in fields}
    paths = draw_sweep(results | {"fields": fields}, tmp_path)
    pdfs = [Path(name).with_suffix(".pdf").name for name in drawn]
    assert [path.name for path in paths] == [name for pair in zip(drawn, pdfs) for name in pair]
    assert all(path.stat().st_size > 5000 for path in paths)
    assert {path.read_bytes()[:4] for path in paths} == {b"\x89PNG", b"%PDF"}


def test_draw_sweep_without_finished_run_draws_nothing(results, tmp_path):
    for point in results["rows"].values():
        point["seeds"] = []
    assert draw_sweep(results, tmp_path) == []


def test_environment_of_runs_on_two_machines_names_both(tmp_path):
    """The sweep was started on one machine and finished on another."""
    folders = []
    for name, version in (("a", "2.14.1"), ("b", "2.15.0"), ("c", "2.14.1")):
        folder = tmp_path / name
        folder.mkdir()
        environment = {
            "device_name": f"processor of {version}",
            "commit": "0123",
            "threads": 2,
            "packages": {"torch": version, "timm": "1.0"},
            "command": "",
            "deit": "0.1.0",
            "processes": 1,
            "precision": "fp32",
        }
        (folder / "environment.json").write_text(json.dumps(environment))
        folders.append(str(folder))
    rows = {"x": {"values": {"lr": "1"}, "folders": folders}, "teacher": {"values": {}}}
    assert environment_of(rows) == {
        "device_name": "processor of 2.14.1; processor of 2.15.0",
        "commit": "0123",
        "threads": 2,
        "packages": {"torch": "2.14.1; 2.15.0", "timm": "1.0"},
        "command": "",
        "deit": "0.1.0",
        "processes": 1,
        "precision": "fp32",
    }
