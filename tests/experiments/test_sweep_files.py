"""Files and figures that a sweep's results give to a paper, from results written by hand."""

import csv
import re
import shutil
import statistics
import subprocess

import pytest

import deit
from deit.experiments.sweep_tables import markdown, write_results


def test_figure_of_a_sweep_leaves_out_points_without_a_finished_run(results, tmp_path):
    """Point c has a failed seed, all seeds of d failed; the sweep is of no study."""
    pytest.importorskip("matplotlib")
    write_results(results, tmp_path)
    figure = deit.SweepResult(tmp_path).figure()
    (axes,) = figure.axes
    assert {label.get_text() for label in axes.get_yticklabels()} == {"a", "b", "c"}
    assert figure.get_suptitle().startswith("mine, digits")


def table_of(text):
    """Return the cells of a table in LaTeX, header first."""
    body = text.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    lines = (line.strip() for line in body.splitlines())
    lines = [line.removesuffix(r"\\").strip() for line in lines if line.endswith(r"\\")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", line)] for line in lines]


def test_latex_table_has_test_accuracies_with_deviation(results, tmp_path):
    for point in results["rows"].values():
        for top1 in point["top1"]:
            top1["distillation"] = None
    write_results(results, tmp_path)
    header, teacher, a, b, c, d = table_of((tmp_path / "results.tex").read_text())
    assert header == ["temperature", "lr", "class head", "fused", "gain", "seeds"]
    assert teacher == ["teacher", "", "90.0", "100.0", "--", "1"]
    spread = f"{100 * statistics.stdev([0.5, 0.7]):.1f}"
    assert a == ["1", "0.1", rf"50.0 $\pm$ {spread}", rf"60.0 $\pm$ {spread}", "$+0.0$", "2"]
    assert b[3:] == [r"80.0 $\pm$ 0.0", "$+20.0$", "2"]
    assert c[3:] == ["40.0", "$-20.0$", "1"]  # one of its seeds failed
    assert d[2:] == ["failed", "--", "--", "0"]


SPECIAL = r"50%_a & b #1 $x {y} ~ ^ \z <|>"


def test_latex_table_escapes_special_characters(results, tmp_path):
    results |= {"sweep": SPECIAL, "command": "deit sweep\nx.yaml"}
    results["rows"]["a"]["values"]["loss.temperature"] = SPECIAL
    write_results(results, tmp_path)
    text = (tmp_path / "results.tex").read_text()
    assert text.count("\n%") == 0  # a line break in the command does not end the comment
    assert table_of(text)[2][0] == (
        r"50\%\_a \& b \#1 \$x \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}z "
        r"\textless{}\textbar{}\textgreater{}"
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_table_compiles(results, tmp_path):
    results["sweep"] = results["rows"]["a"]["values"]["loss.temperature"] = SPECIAL
    write_results(results, tmp_path)
    page = (
        r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{results}\end{document}"
    )
    (tmp_path / "page.tex").write_text(page)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_csv_of_points_has_mean_deviation_and_number_of_seeds(results, tmp_path):
    write_results(results, tmp_path)
    with (tmp_path / "points.csv").open() as file:
        lines = {line["point"]: line for line in csv.DictReader(file)}
    assert [*lines] == ["teacher", "a", "b", "c", "d"]
    a, c, d = lines["a"], lines["c"], lines["d"]
    assert (a["loss.temperature"], a["optim.lr"]) == ("1", "0.1")
    assert [line["seeds"] for line in lines.values()] == ["1", "2", "2", "1", "0"]
    assert (c["failed_seeds"], d["failed_seeds"]) == ("1", "2")
    assert float(a["fused_top1_percent_mean"]) == pytest.approx(60)
    deviation = 100 * statistics.stdev([0.5, 0.7])
    assert float(a["fused_top1_percent_std"]) == pytest.approx(deviation, abs=1e-3)
    assert (c["fused_top1_percent_mean"], c["fused_top1_percent_std"]) == ("40.0", "")
    assert d["fused_top1_percent_mean"] == ""


def test_both_csv_files_are_in_percent(results, tmp_path):
    """The tables of Markdown, LaTeX and both CSV files have the same unit."""
    classes = {"held_out": ["b"], "seen": 0.9, "unseen": 0.2, "per_class": {"a": 0.9, "b": 0.2}}
    results["rows"]["b"]["classes"] = [classes, classes]
    write_results(results, tmp_path)
    with (tmp_path / "results.csv").open() as file:
        runs = [line for line in csv.DictReader(file) if line["point"] == "b"]
    with (tmp_path / "points.csv").open() as file:
        (point,) = (line for line in csv.DictReader(file) if line["point"] == "b")
    shares = {"fused": 80, "unseen": 20, "seen": 90}
    for name, share in shares.items():
        assert [float(run[f"{name}_top1_percent"]) for run in runs] == [share, share]
        assert float(point[f"{name}_top1_percent_mean"]) == share
    assert {run["agreement_percent"] for run in runs} == {"50.0"}


@pytest.mark.parametrize("kind", ["md", "tex"])
def test_tables_say_which_deviation_they_show(kind, results, tmp_path):
    write_results(results, tmp_path)
    text = (tmp_path / f"results.{kind}").read_text()
    assert "sample standard deviation (n - 1) over the seeds 0, 1" in text


def test_disagreement_is_the_last_table_of_the_page(results):
    shares = {name: dict.fromkeys(("truth", "a", "b"), 0.5) for name in ("truth", "a", "b")}
    page = markdown({**results, "disagreement": shares})
    *_, last = re.findall(r"^\|  \| (.*) \|$", page, re.MULTILINE)
    assert last == "truth | a | b"
    assert page.index("Failed:") < page.index("| truth |") < page.index(results["command"])
