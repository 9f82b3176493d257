"""deit report: the page and its files, opened in a real browser, and invalid requests."""

import csv
import html
import json
import re
import shutil
import subprocess
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image

from deit.analysis import report
from deit.analysis.run_images import RunImages
from deit.analysis.run_report import RunReport
from deit.analysis.run_sections import schedules_of
from deit.config.validation import load_config
from deit.core.errors import CheckpointError, SystemFault
from deit.core.metrics import format_margin
from deit.evaluation.cache import EvaluationCache
from deit.viz import charts
from deit.viz.tables import head_name
from tests.helpers.errors import raises
from tests.helpers.json_edits import edits, error_of

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SMALL = ("--student.embed_dim", "16", "--student.depth", "2", "--student.num_heads", "2")
QUICK = ("--optim.epochs", "3", "--optim.warmup_epochs", "1", "--run.eval_every_epochs", "1")
CHARTS = ("accuracy", "loss", "schedules", "speed", "classes", "calibration", "tokens")
GRID = "loss-temperature-loss-distillation_weight"
# Record errors while the page loads, and all requests to the network.
RECORD_ERRORS = """<script>window.problems = [];
addEventListener("error", (e) => problems.push(e.message || "not loaded: " + e.target.src), true);
addEventListener("securitypolicyviolation", (e) => problems.push("requests " + e.blockedURI));
</script>"""
TRY_PAGE = """<script>addEventListener("load", () => {
  const outcome = {problems, images: document.images.length};
  outcome.svgs = document.querySelectorAll("svg").length;
  const isEmpty = (image) => !image.complete || !image.naturalWidth;
  outcome.empty = [...document.images].filter(isEmpty).length;
  // A caption outside the block of its table would be next to it.
  const blocks = [...document.querySelectorAll(".pair > *")];
  outcome.blocks = blocks.length && blocks.every((block) => block.matches("figure, .table"));
  outcome.overflow = document.documentElement.scrollWidth - innerWidth;
  const background = () => getComputedStyle(document.body).backgroundColor;
  const before = background();
  document.getElementById("theme").click();
  outcome.backgrounds = [before, background()];
  outcome.sorted = [...document.querySelectorAll("table.sortable")].every((table) =>
    [...table.tHead.rows[0].cells].every((header, column) => [1, -1].every((sign) => {
      header.click();
      const rows = [...table.tBodies[0].rows];
      const cells = rows.map((row) => parseFloat(row.cells[column].textContent));
      const known = cells.filter((value) => !Number.isNaN(value));
      return known.every((value, i) => !i || sign * (known[i - 1] - value) >= 0)
        && cells.slice(known.length).every(Number.isNaN);
    })));
  outcome.tables = document.querySelectorAll("table.sortable").length;
  const result = document.createElement("pre");
  result.id = "outcome";
  result.textContent = JSON.stringify(outcome);
  document.body.append(result);
});</script>"""


def open_in_browser(path, *, width=1280):
    """Open the page in a browser, sort every table, change the theme; return what happened."""
    text = path.read_text()
    assert len(text.encode()) < 2 * 2**20
    copy = path.with_name("opened.html")
    instrumented = text.replace("<head>", f"<head>{RECORD_ERRORS}", 1)
    copy.write_text(instrumented.replace("</body>", f"{TRY_PAGE}</body>"))
    profile = path.parent / "profile"
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
    flags += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    done = subprocess.run(
        [
            CHROMIUM,
            *flags,
            f"--user-data-dir={profile}",
            f"--window-size={width},900",
            "--virtual-time-budget=5000",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    copy.unlink()
    shutil.rmtree(profile, ignore_errors=True)
    match = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stdout[-2000:]
    return json.loads(match.group(1).replace("&amp;", "&").replace("&lt;", "<"))


@pytest.fixture(scope="module")
def report_folder(tmp_path_factory, command_server):
    """A teacher, a distilled student and a sweep of four runs, with reports."""
    report_folder = tmp_path_factory.mktemp("report")
    fewer = ("--data.train_fraction", "0.3")
    commands = [
        ("train", "digits-teacher", *QUICK, *fewer, "--out", "teacher"),
        ("train", "digits", *QUICK, *SMALL, *fewer, "--teacher.source", "teacher", "--out", "run"),
    ]
    grid = {"loss.temperature": [1, 5], "loss.distillation_weight": [0.5, 1]}
    (report_folder / "heat.json").write_text(
        json.dumps({"recipe": "digits-held-out", "grid": grid})
    )
    arguments = (
        "heat.json",
        *QUICK,
        *SMALL,
        *fewer,
        "--teacher.source",
        "teacher",
        "--out",
        "heat",
    )
    commands += [
        ("sweep", *arguments, "--parallel", "2"),
        ("report", "run", "--out", "one"),
        ("report", "run", "teacher", "heat", "--out", "all"),
    ]
    for command in commands:
        done = command_server.run(*command, cwd=report_folder)
        assert done.code == 0, done.out + done.err
    return report_folder


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
# The page of all contains everything of the page of one run, so only that one is tested narrow.
@pytest.mark.parametrize(
    ("name", "tables", "width"), [("one", 2, 1280), ("all", 6, 1280), ("all", 6, 480)]
)
def test_report_page_works_in_a_browser(report_folder, name, tables, width):
    outcome = open_in_browser(report_folder / name / "index.html", width=width)
    assert outcome["problems"] == []
    assert (outcome["images"] > 3, outcome["empty"]) == (True, 0)
    assert outcome["svgs"] >= 6
    assert outcome["tables"] >= tables
    assert outcome["sorted"]
    assert outcome["backgrounds"][0] != outcome["backgrounds"][1]
    assert outcome["blocks"] is True
    assert outcome["overflow"] <= 0  # wide content scrolls within its block


def test_report_page_is_complete_and_has_no_external_links(report_folder):
    text = (report_folder / "all" / "index.html").read_text()
    runs = ("run", "teacher", "heat-best")  # the last one is collapsed within its sweep
    charts = {f"{run}-{chart}" for run in runs for chart in CHARTS} - {"teacher-tokens"}
    charts |= {"runs", "throughput", "heat-time"}
    assert set(re.findall(r'id="([^"]*)-figure_1"', text)) == charts
    # Attention maps of the students; views and hardest images of each run.
    assert text.count("<img") == 2 + len(runs) * (1 + 12)
    sections = ["run", "teacher", "heat"]
    assert re.findall(r'<section id="([^"]*)"', text) == sections
    assert text.count("<h2>") == len(sections) + 1  # and the comparison of the runs
    assert text.count("<details") == 1
    assert text.count("<h3>") == 9 + 8 + 9 + 2  # the teacher has no tokens; 2 of the sweep itself
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"https?://", without_names)
    identifiers = re.findall(r'\bid="([^"]*)"', text)
    assert len(set(identifiers)) == len(identifiers)
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert target in identifiers


def test_report_writes_charts_and_tables_as_files(report_folder):
    names = {path.name for path in (report_folder / "one").iterdir()}
    for chart in (*CHARTS, "attention"):
        assert f"run-{chart}.png" in names
    rows = list(csv.DictReader((report_folder / "one" / "run-curves.csv").read_text().splitlines()))
    metrics = (report_folder / "run" / "metrics.jsonl").read_text().splitlines()
    for row, line in zip(rows, map(json.loads, metrics), strict=True):
        assert float(row["validation_fused_top1"]) == line["validation"]["fused_top1"]
        assert float(row["train_loss"]) == line["train"]["loss"]
    text = (report_folder / "one" / "run-classes.csv").read_text()
    classes = list(csv.DictReader(text.splitlines()))
    for table in ("heads", "confusions", "confusion", "minus-teacher", "disagreement"):
        assert f"run-{table}.csv" in names
    heads = list(csv.DictReader((report_folder / "one" / "run-heads.csv").read_text().splitlines()))
    metrics_by_head = json.loads((report_folder / "one" / "run.evaluation.json").read_text())[
        "value"
    ]["metrics"]["heads"]
    assert {row["head"]: row["top-1 %"] for row in heads if row["head"] != "teacher"} == {
        head_name(name): f"{100 * head_metrics['top1']:.1f}"
        for name, head_metrics in metrics_by_head.items()
        if head_metrics
    }
    all_names = {path.name for path in (report_folder / "all").iterdir()}
    for field in (GRID, "results", "classes"):
        assert f"heat-{field}.csv" in all_names
    assert f"heat-{GRID}.png" in all_names
    assert [row["class"] for row in classes] == list("0123456789")
    assert sum(int(row["num_samples"]) for row in classes) == 359


def test_report_page_has_the_numbers_of_evaluate(report_folder, command_server):
    done = command_server.run(
        "evaluate", "run", "--json", "found.json", "--force", cwd=report_folder
    )
    assert done.code == 0, done.err
    evaluation = json.loads((report_folder / "found.json").read_text())
    text = (report_folder / "one" / "index.html").read_text()
    for name, metrics in evaluation["heads"].items():
        if metrics:
            top1, top5 = (f"{100 * metrics[key]:.1f}" for key in ("top1", "top5"))
            margin = format_margin(metrics["top1"], evaluation["num_samples"])
            cells = (head_name(name), top1, *margin, top5)
            assert "".join(f"<td>{cell}</td>" for cell in cells) in text


def test_report_replaces_an_unfinished_page_but_no_other_folder(report_folder, command_server):
    (report_folder / "one" / "index.html").rename(report_folder / "first.html")
    done = command_server.run("report", "run", "--out", "one", cwd=report_folder)
    assert done.code == 0, done.err
    # The same run gives an identical page.
    assert (report_folder / "one" / "index.html").read_bytes() == (
        report_folder / "first.html"
    ).read_bytes()
    (report_folder / "first.html").unlink()
    site = report_folder / "site"
    site.mkdir()
    (site / "index.html").write_text("my own")
    done = command_server.run("report", "run", "--out", "site", "--force", cwd=report_folder)
    assert done.code == 2, done.err
    assert all(name in done.err for name in ("--out site", "report.json")), done.err
    assert (site / "index.html").read_text() == "my own"
    shutil.rmtree(site)


def test_report_measures_cost_of_sweep_runs(report_folder):
    """Their stored evaluations do not contain it."""
    (evaluation_file,) = (report_folder / "all").glob("heat-best.evaluation.json")
    cost = json.loads(evaluation_file.read_text())["value"]["metrics"]["cost"]
    assert cost["parameters"] > 0
    text = (report_folder / "all" / "index.html").read_text()
    assert html.escape(cost["measured_on"]) in text
    assert 'id="throughput-figure_1"' in text
    (first,) = report_folder.glob("heat/runs/temperature-1-*-weight-0-5-*.evaluation.json")
    assert "cost" not in json.loads(first.read_text())["value"]["metrics"]


def test_evaluation_cache_with_edited_file_evaluates_again(report_folder, tmp_path):
    cache_file = tmp_path / "kept.json"
    original = EvaluationCache().get(report_folder / "run", cache_path=cache_file)
    content = json.loads(cache_file.read_text())
    for change in ({"labels": content["value"]["labels"][1:]}, {"metrics": {}}, {"provenance": {}}):
        cache_file.write_text(json.dumps(content | {"value": content["value"] | change}))
        repeated = EvaluationCache().get(report_folder / "run", cache_path=cache_file)
        assert (repeated.provenance, repeated.predictions, repeated.labels) == (
            original.provenance,
            original.predictions,
            original.labels,
        )
        assert repeated.metrics["heads"] == original.metrics["heads"]


def test_report_with_damaged_metrics_names_the_file(report_folder, tmp_path, monkeypatch):
    """An edit that the report does not use makes a page; any other error names the file."""
    axes = MagicMock()
    axes.get_legend_handles_labels.return_value = ([], [])
    monkeypatch.setattr(charts, "chart", lambda draw, *_, **__: (draw(axes) and "") or "")
    monkeypatch.setattr(report, "draw_run", lambda *_, **__: RunImages(None, None, []))
    shutil.copytree(report_folder / "run", tmp_path / "run")
    EvaluationCache().get(tmp_path / "run", cost=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    first, *_, last = map(json.loads, metrics.read_text().splitlines())
    errors = {}
    for edit, rows in [("nothing", [first, last]), *edits([first, last], depth=4)]:
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        errors[edit] = error_of(report.report, [tmp_path / "run"], tmp_path / "page")
        shutil.rmtree(tmp_path / "page", ignore_errors=True)
    assert errors["nothing"] is None
    named = {edit: error for edit, error in errors.items() if error is not None}
    assert 50 < len(named) < len(errors) - 50
    for edit, error in named.items():
        assert isinstance(error, CheckpointError), (edit, error)
        assert f"{metrics}: " in str(error), edit


@pytest.mark.parametrize(
    "damage",
    [{"best": None}, {"best": {}}, {"best": {"epoch": "x"}}, {"skipped": "x"}, {"seconds": []}],
    ids=str,
)
def test_report_with_damaged_result_names_the_file(damage, report_folder, tmp_path):
    shutil.copytree(report_folder / "run", tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with raises(CheckpointError, "result.json"):
        report.report([tmp_path / "run"], tmp_path / "out")


def test_report_without_force_keeps_the_existing_page(report_folder, command_server):
    before = (report_folder / "one" / "index.html").read_bytes()
    done = command_server.run("report", "run", "--out", "one", cwd=report_folder)
    assert done.code == 5, done.err
    assert all(name in done.err for name in ("--out one", "--force")), done.err
    assert (report_folder / "one" / "index.html").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        (("nowhere",), 4, ("nowhere",)),
        ((".",), 4, ("config.json",)),
        (("/",), 4, ("config.json",)),
        (("run", "teacher", "run"), 2, ("error: run: ",)),
        (("run", "--out", "run"), 2, ("--out run", "report.json")),
        (("run", "--out", "found.txt"), 5, ("--out found.txt",)),
    ],
)
def test_report_with_invalid_options_writes_nothing(
    report_folder, command_server, arguments, code, names
):
    (report_folder / "found.txt").touch()
    before = sorted(report_folder.rglob("*"))
    done = command_server.run("report", *arguments, cwd=report_folder)
    assert done.code == code, done.err
    for name in names:
        assert name in done.err
    assert sorted(report_folder.rglob("*")) == before


def test_report_of_unfinished_run_names_the_resume_option(report_folder, command_server):
    shutil.copytree(report_folder / "run", report_folder / "half", dirs_exist_ok=True)
    (report_folder / "half" / "result.json").unlink()
    done = command_server.run("report", "half", "--out", "of-half", cwd=report_folder)
    shutil.rmtree(report_folder / "half")
    assert done.code == 4, done.err
    assert all(name in done.err for name in ("half", "--resume")), done.err
    assert not (report_folder / "of-half").exists()


def test_report_without_images_or_metrics_has_the_other_sections(
    report_folder, command_server, tmp_path
):
    """The images are in a folder that moves: the evaluation is reused, the images are left out."""
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for index in range(6):
                pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
                image = Image.fromarray(pixels)
                image.save(tmp_path / "images" / split / label / f"{index}.png")
    arguments = ("--data.source", "folder", "--data.root", "images", "--loss", "none")
    arguments += ("--teacher.source", "none", "--optim.batch_size", "4", "--optim.epochs", "2")
    arguments += ("--optim.warmup_epochs", "1", "--optim.ema_epochs", "1", "--data.image_size", "8")
    done = command_server.run("train", "digits", *arguments, *SMALL, "--out", "run", cwd=tmp_path)
    assert done.code == 0, done.err
    (tmp_path / "images").rename(tmp_path / "moved")
    done = command_server.run("report", "run", "--out", "none", cwd=tmp_path)
    assert (done.code, "data.root images" in done.err) == (3, True), done.err
    moved = ("report", "run", "--data.root", "moved")
    done = command_server.run(*moved, "--out", "page", cwd=tmp_path)
    assert done.code == 0, done.err
    text = (tmp_path / "page" / "index.html").read_text()
    assert "<img" in text
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    run_report = RunReport(
        "run", "run", load_config(tmp_path / "run" / "config.json"), {}, list(rows), {}, None
    )
    schedules = schedules_of(run_report)
    assert len(schedules) == 2  # learning rate and EMA decay
    for content in (*(f">{name}<" for name in schedules), 'id="run-accuracy-figure_1"'):
        assert content in text
    (tmp_path / "run" / "metrics.jsonl").unlink()
    done = command_server.run("report", "run", "--out", "page", "--force", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "deit: warning: run: " in done.err
    assert "data.root images" in done.err
    text = (tmp_path / "page" / "index.html").read_text()
    assert "<img" not in text
    assert "data.root images" in text  # the reason for the missing images
    assert 'id="run-accuracy-figure_1"' not in text
    assert "metrics.jsonl" in text  # the reason for the missing curves
    # With other images in that folder, the stored evaluation is not reused.
    provenance = json.loads((tmp_path / "page" / "run.evaluation.json").read_text())["value"][
        "provenance"
    ]
    next((tmp_path / "moved" / "test" / "a").iterdir()).unlink()
    done = command_server.run(*moved, "--out", "page", "--force", cwd=tmp_path)
    assert done.code == 0, done.err
    new = json.loads((tmp_path / "page" / "run.evaluation.json").read_text())["value"]["provenance"]
    assert [name for name in new if new[name] != provenance[name]] == ["images"]


def test_report_without_matplotlib_writes_nothing(report_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    with raises(SystemFault, "'deit[plot]'"):
        report.report([report_folder / "run"], tmp_path / "page")
    assert not (tmp_path / "page").exists()
