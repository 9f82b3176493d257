"""deit report: the page and its files, opened in a real browser, and what is refused."""

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
from deit.evaluation.cache import EvaluationCache
from deit.viz import charts
from tests.helpers.errors import raises
from tests.helpers.json_edits import edits, error_of

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SMALL = ("--student.embed_dim", "16", "--student.depth", "2", "--student.num_heads", "2")
QUICK = ("--optim.epochs", "3", "--optim.warmup_epochs", "1", "--run.eval_every_epochs", "1")
CHARTS = ("accuracy", "loss", "schedules", "speed", "classes", "calibration", "tokens")
GRID = "loss-temperature-loss-distillation_weight"
# What goes wrong while the page loads, and whatever it asks of the outside.
LISTEN = """<script>window.wrong = [];
addEventListener("error", (e) => wrong.push(e.message || "not loaded: " + e.target.src), true);
addEventListener("securitypolicyviolation", (e) => wrong.push("asks for " + e.blockedURI));
</script>"""
TRY = """<script>addEventListener("load", () => {
  const told = {wrong, pictures: document.images.length};
  told.drawings = document.querySelectorAll("svg").length;
  told.empty = [...document.images].filter((one) => !one.complete || !one.naturalWidth).length;
  // A caption that is no block with its table stands beside it.
  const beside = [...document.querySelectorAll(".pair > *")];
  told.blocks = beside.length && beside.every((one) => one.matches("figure, .table"));
  told.wide = document.documentElement.scrollWidth - innerWidth;
  const colour = () => getComputedStyle(document.body).backgroundColor;
  const before = colour();
  document.getElementById("theme").click();
  told.colours = [before, colour()];
  told.sorted = [...document.querySelectorAll("table.sortable")].every((table) =>
    [...table.tHead.rows[0].cells].every((head, column) => [1, -1].every((way) => {
      head.click();
      const rows = [...table.tBodies[0].rows];
      const cells = rows.map((row) => parseFloat(row.cells[column].textContent));
      const known = cells.filter((one) => !Number.isNaN(one));
      return known.every((one, at) => !at || way * (known[at - 1] - one) >= 0)
        && cells.slice(known.length).every(Number.isNaN);
    })));
  told.tables = document.querySelectorAll("table.sortable").length;
  const result = document.createElement("pre");
  result.id = "told";
  result.textContent = JSON.stringify(told);
  document.body.append(result);
});</script>"""


def opened(path, *, width=1280):
    """What a browser finds when it opens the page, sorts every table and changes the theme."""
    text = path.read_text()
    assert len(text.encode()) < 2 * 2**20
    copy = path.with_name("opened.html")
    watched = text.replace("<head>", f"<head>{LISTEN}", 1)
    copy.write_text(watched.replace("</body>", f"{TRY}</body>"))
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
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    return json.loads(found.group(1).replace("&amp;", "&").replace("&lt;", "<"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, command_server):
    """A teacher, a student taught by it, and a sweep of four runs; a report of all of them."""
    place = tmp_path_factory.mktemp("report")
    fewer = ("--data.train_fraction", "0.3")
    commands = [
        ("train", "digits-teacher", *QUICK, *fewer, "--out", "teacher"),
        ("train", "digits", *QUICK, *SMALL, *fewer, "--teacher.source", "teacher", "--out", "run"),
    ]
    grid = {"loss.temperature": [1, 5], "loss.distillation_weight": [0.5, 1]}
    (place / "heat.json").write_text(json.dumps({"recipe": "digits-held-out", "grid": grid}))
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
        done = command_server.run(*command, cwd=place)
        assert done.code == 0, done.out + done.err
    return place


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
# What is on the page of one run is on that of all as well, which is the one that is narrow too.
@pytest.mark.parametrize(
    ("name", "tables", "width"), [("one", 2, 1280), ("all", 6, 1280), ("all", 6, 480)]
)
def test_a_browser_opens_the_page(place, name, tables, width):
    told = opened(place / name / "index.html", width=width)
    assert told["wrong"] == []
    assert (told["pictures"] > 3, told["empty"]) == (True, 0)
    assert told["drawings"] >= 6
    assert told["tables"] >= tables
    assert told["sorted"]
    assert told["colours"][0] != told["colours"][1]
    assert told["blocks"] is True
    assert told["wide"] <= 0  # what is wider scrolls for itself


def test_the_page_has_everything_and_names_the_outside_nowhere(place):
    text = (place / "all" / "index.html").read_text()
    runs = ("run", "teacher", "heat-best")  # the last folded, within its sweep
    drawn = {f"{run}-{chart}" for run in runs for chart in CHARTS} - {"teacher-tokens"}
    drawn |= {"runs", "throughput", "heat-time"}
    assert set(re.findall(r'id="([^"]*)-figure_1"', text)) == drawn
    # Attention maps of the students, and of each run its views and its hardest images.
    assert text.count("<img") == 2 + len(runs) * (1 + 12)
    sections = ["run", "teacher", "heat"]
    assert re.findall(r'<section id="([^"]*)"', text) == sections
    assert text.count("<h2>") == len(sections) + 1  # and of all side by side
    assert text.count("<details") == 1
    assert text.count("<h3>") == 9 + 8 + 9 + 2  # a teacher has no tokens; of the sweep itself
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"https?://", without_names)
    identifiers = re.findall(r'\bid="([^"]*)"', text)
    assert len(set(identifiers)) == len(identifiers)
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert target in identifiers


def test_charts_and_tables_lie_beside_the_page(place):
    names = {path.name for path in (place / "one").iterdir()}
    for chart in (*CHARTS, "attention"):
        assert f"run-{chart}.png" in names
    rows = list(csv.DictReader((place / "one" / "run-curves.csv").read_text().splitlines()))
    metrics = (place / "run" / "metrics.jsonl").read_text().splitlines()
    for row, line in zip(rows, map(json.loads, metrics), strict=True):
        assert float(row["validation_fused_top1"]) == line["validation"]["fused_top1"]
        assert float(row["train_loss"]) == line["train"]["loss"]
    classes = list(csv.DictReader((place / "one" / "run-classes.csv").read_text().splitlines()))
    for table in ("heads", "confusions", "confusion", "minus-teacher", "disagreement"):
        assert f"run-{table}.csv" in names
    heads = list(csv.DictReader((place / "one" / "run-heads.csv").read_text().splitlines()))
    found = json.loads((place / "one" / "run.evaluation.json").read_text())["value"]["metrics"][
        "heads"
    ]
    assert {row["head"]: row["top-1 %"] for row in heads if row["head"] != "teacher"} == {
        name.replace("_", " "): f"{100 * one['top1']:.1f}" for name, one in found.items() if one
    }
    whole = {path.name for path in (place / "all").iterdir()}
    for field in (GRID, "results", "classes"):
        assert f"heat-{field}.csv" in whole
    assert f"heat-{GRID}.png" in whole
    assert [row["class"] for row in classes] == list("0123456789")
    assert sum(int(row["num_samples"]) for row in classes) == 359


def test_the_numbers_are_those_of_the_evaluation(place, command_server):
    done = command_server.run("evaluate", "run", "--json", "found.json", "--force", cwd=place)
    assert done.code == 0, done.err
    found = json.loads((place / "found.json").read_text())
    text = (place / "one" / "index.html").read_text()
    for name, one in found["heads"].items():
        if one:
            cells = (name.replace("_", " "), *(f"{100 * one[key]:.1f}" for key in ("top1", "top5")))
            assert "".join(f"<td>{cell}</td>" for cell in cells) in text


def test_a_page_that_was_not_finished_is_gone_on_with_and_a_foreign_one_is_not(
    place, command_server
):
    (place / "one" / "index.html").rename(place / "kept.html")
    done = command_server.run("report", "run", "--out", "one", cwd=place)
    assert done.code == 0, done.err
    # The same run, the same page.
    assert (place / "one" / "index.html").read_bytes() == (place / "kept.html").read_bytes()
    (place / "kept.html").unlink()
    site = place / "site"
    site.mkdir()
    (site / "index.html").write_text("my own")
    done = command_server.run("report", "run", "--out", "site", "--force", cwd=place)
    assert done.code == 2, done.err
    for name in ("--out site", "report.json"):
        assert name in done.err
    assert (site / "index.html").read_text() == "my own"
    shutil.rmtree(site)


def test_runs_of_a_sweep_have_their_cost_too(place):
    """Evaluated before, without it."""
    (kept,) = (place / "all").glob("heat-best.evaluation.json")
    cost = json.loads(kept.read_text())["value"]["metrics"]["cost"]
    assert cost["parameters"] > 0
    text = (place / "all" / "index.html").read_text()
    assert html.escape(cost["measured_on"]) in text
    assert 'id="throughput-figure_1"' in text
    (first,) = place.glob("heat/runs/temperature-1-*-weight-0-5-*.evaluation.json")
    assert "cost" not in json.loads(first.read_text())["value"]["metrics"]


def test_a_kept_evaluation_that_was_edited_is_made_again(place, tmp_path):
    kept = tmp_path / "kept.json"
    made = EvaluationCache().get(place / "run", cache_path=kept)
    content = json.loads(kept.read_text())
    for change in ({"labels": content["value"]["labels"][1:]}, {"metrics": {}}, {"provenance": {}}):
        kept.write_text(json.dumps(content | {"value": content["value"] | change}))
        again = EvaluationCache().get(place / "run", cache_path=kept)
        assert (again.provenance, again.predictions, again.labels) == (
            made.provenance,
            made.predictions,
            made.labels,
        )
        assert again.metrics["heads"] == made.metrics["heads"]


def test_metrics_that_no_run_writes_are_named(place, tmp_path, monkeypatch):
    """They make a page where it needs nothing of what was changed; else the file is named."""
    axes = MagicMock()
    axes.get_legend_handles_labels.return_value = ([], [])
    monkeypatch.setattr(charts, "chart", lambda draw, *_, **__: (draw(axes) and "") or "")
    monkeypatch.setattr(report, "draw_run", lambda *_, **__: RunImages(None, None, []))
    shutil.copytree(place / "run", tmp_path / "run")
    EvaluationCache().get(tmp_path / "run", cost=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    first, *_, last = map(json.loads, metrics.read_text().splitlines())
    errors = {}
    for what, rows in [("nothing", [first, last]), *edits([first, last], depth=4)]:
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        errors[what] = error_of(report.report, [tmp_path / "run"], tmp_path / "page")
        shutil.rmtree(tmp_path / "page", ignore_errors=True)
    assert errors["nothing"] is None
    named = {what: error for what, error in errors.items() if error is not None}
    assert 50 < len(named) < len(errors) - 50
    for what, error in named.items():
        assert isinstance(error, CheckpointError), (what, error)
        assert f"{metrics}: " in str(error), what


@pytest.mark.parametrize(
    "wrong",
    [{"best": None}, {"best": {}}, {"best": {"epoch": "x"}}, {"skipped": "x"}, {"seconds": []}],
    ids=str,
)
def test_a_result_that_was_edited_is_named(wrong, place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with raises(CheckpointError, "result.json"):
        report.report([tmp_path / "run"], tmp_path / "out")


def test_what_is_written_is_replaced_only_when_asked(place, command_server):
    before = (place / "one" / "index.html").read_bytes()
    done = command_server.run("report", "run", "--out", "one", cwd=place)
    assert done.code == 5, done.err
    for name in ("--out one", "--force"):
        assert name in done.err
    assert (place / "one" / "index.html").read_bytes() == before


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
def test_a_mistake_is_told_before_the_work(place, command_server, arguments, code, names):
    (place / "found.txt").touch()
    before = sorted(place.rglob("*"))
    done = command_server.run("report", *arguments, cwd=place)
    assert done.code == code, done.err
    for name in names:
        assert name in done.err
    assert sorted(place.rglob("*")) == before


def test_an_unfinished_run_says_how_it_goes_on(place, command_server):
    shutil.copytree(place / "run", place / "half", dirs_exist_ok=True)
    (place / "half" / "result.json").unlink()
    done = command_server.run("report", "half", "--out", "of-half", cwd=place)
    shutil.rmtree(place / "half")
    assert done.code == 4, done.err
    for name in ("half", "--resume"):
        assert name in done.err
    assert not (place / "of-half").exists()


def test_without_its_images_or_its_epochs_the_rest_is_told(place, command_server, tmp_path):
    """Images in a folder that moves away: what was evaluated is kept, the pictures are left out."""
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for number in range(6):
                pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
                picture = Image.fromarray(pixels)
                picture.save(tmp_path / "images" / split / label / f"{number}.png")
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
    view = RunReport(
        "run", "run", load_config(tmp_path / "run" / "config.json"), {}, list(rows), {}, None
    )
    applied = schedules_of(view)
    assert len(applied) == 2  # of the learning rate and of the weights' average
    for curve in (*(f">{name}<" for name in applied), 'id="run-accuracy-figure_1"'):
        assert curve in text
    (tmp_path / "run" / "metrics.jsonl").unlink()
    done = command_server.run("report", "run", "--out", "page", "--force", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "deit: warning: run: " in done.err
    assert "data.root images" in done.err
    text = (tmp_path / "page" / "index.html").read_text()
    assert "<img" not in text
    assert "data.root images" in text  # why there are no pictures
    assert 'id="run-accuracy-figure_1"' not in text
    assert "metrics.jsonl" in text  # whose numbers are not there
    # Other images in that place: what was kept is of others.
    kept = json.loads((tmp_path / "page" / "run.evaluation.json").read_text())["value"][
        "provenance"
    ]
    next((tmp_path / "moved" / "test" / "a").iterdir()).unlink()
    done = command_server.run(*moved, "--out", "page", "--force", cwd=tmp_path)
    assert done.code == 0, done.err
    now = json.loads((tmp_path / "page" / "run.evaluation.json").read_text())["value"]["provenance"]
    assert [name for name in now if now[name] != kept[name]] == ["images"]


def test_without_matplotlib_it_is_said_before_the_work(
    place, command_server, monkeypatch, tmp_path
):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    with raises(SystemFault, "'deit[plot]'"):
        report.report([place / "run"], tmp_path / "page")
    assert not (tmp_path / "page").exists()
