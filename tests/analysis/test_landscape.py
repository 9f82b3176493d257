"""deit loss-landscape: the loss at and between runs by hand, the report, and measuring again."""

import csv
import json
import math
import re
import shutil

import pytest
import torch
from torch.nn.functional import cross_entropy

from deit.analysis import landscape_measure
from deit.analysis.landscape import _MeasurementCache
from deit.analysis.landscape_measure import segments, ticket_path
from deit.analysis.landscape_options import PARTS, LandscapeOptions
from deit.analysis.landscape_runs import (
    LandscapeData,
    LandscapePoint,
    landscape_points,
    load_landscape_data,
    surface_of,
)
from deit.analysis.landscape_tables import cells, line_cells, write_page
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.types import logits_by_head
from deit.datasets.splits import load_split, stratified_indices
from deit.models.saved import load_student
from deit.models.surgery.pruning_masks import MASKS, apply, read_masks
from tests.helpers.small_runs import WITH_AVERAGE

pytest.importorskip("sklearn")

FEW = (
    *("--images", "40", "--points", "5", "--grid", "3", "--rays", "3", "--steps", "8"),
    *("--num-eigenvalues", "2", "--probes", "2"),
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def looked(lottery_folder, command_server):
    arguments = ("loss-landscape", "search", *FEW, "--out", "out")
    done = command_server.run(
        *arguments, cwd=lottery_folder, SETUP_FUNCTION=f"{__name__}:few_products"
    )
    assert done.code == 0, done.err
    return lottery_folder / "out", done


def few_products():
    """For spectra 36 products with Hessians, not 360: no test here asks how exact they are."""
    landscape_measure._PROBES, landscape_measure._STEPS = 2, 6


def result(out):
    return json.loads((out / "landscape.json").read_text())


NAMES = ["dense", "ticket, 50.0 %", "ticket, 75.0 %"]


def answers_at(run, masks=None):
    """Loss and error of a run's end on the images the landscape looks at, by hand."""
    student, _ = load_student(run_folder.latest_checkpoint(run))
    if masks is not None:
        apply(masks, student.network)
    _names, images = load_split(load_config(run / "config.json").data, "train")
    rows = stratified_indices(images.labels, 40, seed=0, stream="landscape")
    with torch.no_grad():
        logits = logits_by_head(student.eval()(images.pixels[rows].float() / 255))["fused"]
    labels = images.labels[rows]
    wrong = (logits.argmax(dim=1) != labels).float().mean().item()
    return cross_entropy(logits, labels).item(), wrong


# Which places, which images


def test_the_places_of_a_search_are_its_levels(lottery_folder):
    search = [lottery_folder / "search"]
    assert [one.name for one in landscape_points(search, LandscapeOptions())] == NAMES
    some = landscape_points(search, LandscapeOptions(levels=(2,), kinds=("ticket", "random")))
    assert [one.name for one in some] == ["dense", "ticket, 75.0 %", "random, 75.0 %"]
    assert some[2].saved == run_folder.latest_checkpoint(lottery_folder / "search/seed-0/random-2")
    best = landscape_points(search, LandscapeOptions(checkpoint="best"))
    assert best[0].saved == lottery_folder / "search/seed-0/level-0/best"


def test_images_of_some_classes_alone_are_said_to_be(lottery_folder, capsys):
    places = landscape_points([lottery_folder / "search"], LandscapeOptions())
    load_landscape_data(places, LandscapeOptions(images=5), root=None, device=CPU)
    assert re.search(r"--images 5\b.*\b10\b", capsys.readouterr().err)  # of 10 classes
    load_landscape_data(places, LandscapeOptions(images=10), root=None, device=CPU)
    assert capsys.readouterr().err == ""


def test_around_a_level_only_what_it_keeps_moves(lottery_folder):
    places = landscape_points([lottery_folder / "search"], LandscapeOptions())
    view = load_landscape_data(places, LandscapeOptions(images=8), root=None, device=CPU)
    sizes = [surface_of(one, view).size for one in places]
    whole = surface_of(places[2], view, masked=False).size
    assert [sizes[0] - size for size in sizes] == [0, 1536, 2304]
    assert whole == sizes[0]


# By hand


def test_the_loss_of_each_place(lottery_folder, looked):
    found = result(looked[0])
    assert list(found["places"]) == NAMES
    for level, about in enumerate(found["places"].values()):
        loss, wrong = answers_at(lottery_folder / f"search/seed-0/level-{level}")
        assert about["loss"] == pytest.approx(loss, rel=1e-5)
        assert about["error"] == pytest.approx(wrong, abs=1e-6)
        middle = about["planes"]["values"]["loss"][1][1]
        assert middle == pytest.approx(loss, rel=1e-5)
        assert about["volume"]["threshold"] == pytest.approx(loss + 0.1, rel=1e-5)


def test_lines_begin_and_end_where_they_say(lottery_folder, looked):
    lines = result(looked[0])["lines"]
    assert list(lines) == [
        *("dense to ticket, 50.0 %", "dense cut to ticket, 50.0 %"),
        *("ticket, 50.0 % to ticket, 75.0 %", "ticket, 50.0 % cut to ticket, 75.0 %"),
    ]
    folder = lottery_folder / "search" / "seed-0"
    for level in (1, 2):
        across, cut = list(lines.values())[2 * level - 2 : 2 * level]
        before, after = folder / f"level-{level - 1}", folder / f"level-{level}"
        masks = read_masks(folder / "masks" / f"level-{level}.safetensors")
        for one, end in ((across, answers_at(after)), (cut, answers_at(before, masks))):
            losses, errors = one["values"]["loss"], one["values"]["error"]
            assert len(losses) == 5
            assert (losses[0], errors[0]) == pytest.approx(answers_at(before), rel=1e-5)
            assert (losses[-1], errors[-1]) == pytest.approx(end, rel=1e-5)
            rise = max(
                loss - ((1 - a) * losses[0] + a * losses[-1])
                for a, loss in zip((0, 0.25, 0.5, 0.75, 1), losses)
            )
            assert one["barrier"]["loss"] == pytest.approx(max(rise, 0), abs=1e-6)
        assert set(cut["values"]) == {"loss", "error", "error_class", "error_distillation"}


def test_the_path_goes_through_its_places(looked):
    found = result(looked[0])["path"]
    spots = list(found["places"].values())
    assert [spot[2] for spot in spots] == pytest.approx([0, 0, 0], abs=1e-3)
    assert spots[0][:2] == pytest.approx([0, 0], abs=1e-6)
    assert spots[2][1] == pytest.approx(0, abs=1e-4)
    for axis, name in ((0, "xs"), (1, "ys")):
        among = [spot[axis] for spot in spots]
        assert found[name][0] < min(among)
        assert found[name][-1] > max(among)


def test_curvature_and_volume_tell_how_good_they_are(looked):
    for about in result(looked[0])["places"].values():
        ends = about["curvature"]["eigenvalues"]
        assert len(ends["largest"]) == len(ends["largest_residuals"]) == 2
        assert ends["largest"][0] >= ends["largest"][1] > ends["smallest"][0]
        assert about["curvature"]["trace"]["probes"] == 2
        seen = about["volume"]
        assert seen["size"] == about["free_weights"]
        assert 1 <= seen["effective_rays"] <= 3
        assert len(seen["log_radii"]) == len(seen["evaluations"]) == 3


# What is told


def test_page_pictures_tables(looked):
    out, done = looked
    names = {path.name for path in out.iterdir()}
    charts = ("lines-loss", "lines-error", "spectra", "eigenvalues", "radii", "path")
    charts = (*charts, "plane-0", "plane-1", "plane-2")
    assert {f"{name}.png" for name in charts} | {"places.csv", "lines.csv"} <= names
    page = (out / "index.html").read_text()
    assert page.count("<svg") == len(charts)
    assert page.count("<h3>") == len(PARTS) + 1  # and the path
    for name in (*result(out)["places"], *result(out)["lines"]):
        assert name in page
    lines = list(csv.reader((out / "lines.csv").read_text().splitlines()))
    assert [line[0] for line in lines[1:]] == list(result(out)["lines"])
    text = (out / "landscape.md").read_text()
    assert all(f"| {name} |" in text for name in result(out)["lines"])
    assert "deit loss-landscape search" in text
    assert re.search(r"^loss .*\b40 train\b.*\bfused\b", done.out, re.MULTILINE)


def test_a_volume_that_is_only_a_bound_is_told_as_one(looked):
    found = result(looked[0])
    about = found["places"]["dense"]
    about["volume"] |= {"effective_rays": 2.5, "censored": 0, "log_volume_per_weight": -1.0}
    column = -3
    assert cells(found)[0][column] == "-1.0000"
    about["volume"]["censored"] = 1
    assert cells(found)[0][column] == ">= -1.0000"
    about["volume"] |= {"censored": 0, "effective_rays": 1.2}
    assert cells(found)[0][column] == ">= -1.0000"
    about["curvature"]["eigenvalues"]["converged"] = True
    sure = cells(found)[0][5]
    assert float(sure) == pytest.approx(about["curvature"]["eigenvalues"]["largest"][0], rel=1e-2)
    about["curvature"]["eigenvalues"]["converged"] = False
    assert cells(found)[0][5].startswith(f"{sure} (")
    assert [line[0] for line in line_cells(found)] == list(found["lines"])


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_makes_a_page(looked, tmp_path, part):
    found = result(looked[0])
    found["asked"]["parts"] = [part]
    for about in found["places"].values():
        for other in set(PARTS) - {part}:
            about.pop(other, None)
    if part != "lines":
        found["lines"] = {}
    if part != "planes":
        found["path"] = None
    assert [path.name for path in write_page(found, tmp_path)] == ["landscape.md", "index.html"]
    drawn = {path.stem.split("-")[0] for path in tmp_path.glob("*.png")}
    expected = {"lines": {"lines"}, "planes": {"plane", "path"}, "volume": {"radii"}}
    assert drawn == {"curvature": {"spectra", "eigenvalues"}, **expected}[part]


# Going on


def test_what_was_measured_is_not_measured_again(looked, lottery_folder, command_server, tmp_path):
    shutil.copytree(looked[0], tmp_path / "out")
    kept = tmp_path / "out" / "measured"
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    (lost,) = kept.glob("dense-volume-*.json")
    same = lost.read_bytes()
    lost.unlink()
    arguments = ("loss-landscape", "search", *FEW, "--out", tmp_path / "out")
    done = command_server.run(*arguments, cwd=lottery_folder)
    assert done.code == 0, done.err
    after = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {lost.name}
    assert lost.read_bytes() == same
    done = command_server.run(*arguments, "--seed", "1", cwd=lottery_folder)
    assert done.code == 2
    assert f"--out {tmp_path / 'out'}" in done.err
    assert re.search(r"\bseed\b.*\b0\b.*\b1\b", done.err)


def test_the_same_weights_under_other_masks_are_measured_apart(lottery_folder, tmp_path):
    run = lottery_folder / "search" / "seed-0" / "level-2"
    shutil.copytree(run, tmp_path / "bare")
    for name in (MASKS, "manifest.json"):
        (tmp_path / "bare" / "best" / name).unlink()
    kept = _MeasurementCache(tmp_path / "kept", LandscapeData([], [], 0, "of the images"), {})
    masked, bare = (
        LandscapePoint("level-2", one, one / "best") for one in (run, tmp_path / "bare")
    )
    assert kept("here", [masked], lambda: {"loss": 1}) == {"loss": 1}
    assert kept("here", [bare], lambda: {"loss": 2}) == {"loss": 2}
    assert kept("here", [masked, bare], lambda: {"loss": 3}) == {"loss": 3}
    assert kept("here", [masked], lambda: {"loss": 4}) == {"loss": 1}


def test_more_places_go_on_from_what_there_is(looked, lottery_folder, command_server, tmp_path):
    shutil.copytree(looked[0], tmp_path / "out")
    arguments = ("--kinds", "ticket,random", "--measure", "volume", "--out", tmp_path / "out")
    done = command_server.run("loss-landscape", "search", *FEW, *arguments, cwd=lottery_folder)
    assert done.code == 0, done.err
    assert list(result(tmp_path / "out")["places"]) == [*NAMES, "random, 75.0 %"]


@pytest.mark.slow
def test_of_other_weights_everything_is_measured_anew(lottery_folder, command_server, tmp_path):
    for level in (0, 1):
        shutil.copytree(lottery_folder / f"search/seed-0/level-{level}", tmp_path / f"run-{level}")
    arguments = ("--measure", "volume", *FEW, "--checkpoint", "best", "--out", "out")
    before, after = ({}, {})
    for found in (before, after):
        done = command_server.run("loss-landscape", "run-0", "run-1", *arguments, cwd=tmp_path)
        assert done.code == 0, done.err
        found |= result(tmp_path / "out")["places"]
        shutil.rmtree(tmp_path / "run-1" / "best")
        shutil.copytree(tmp_path / "run-0" / "best", tmp_path / "run-1" / "best")
    assert before["run-1"]["loss"] != after["run-1"]["loss"] == after["run-0"]["loss"]
    assert before["run-1"]["volume"] != after["run-1"]["volume"]
    assert before["run-0"] == after["run-0"]


def test_controls_stand_beside_the_ticket_of_their_level(lottery_folder):
    places = landscape_points(
        [lottery_folder / "search"], LandscapeOptions(kinds=("ticket", "random"))
    )
    names = [one.name for one in segments(places)]
    assert names == [
        *("dense to ticket, 50.0 %", "dense cut to ticket, 50.0 %"),
        *("ticket, 50.0 % to ticket, 75.0 %", "ticket, 50.0 % cut to ticket, 75.0 %"),
        "ticket, 75.0 % to random, 75.0 %",
    ]
    assert [one.name for one in ticket_path(places)] == NAMES


@pytest.mark.slow
def test_networks_of_other_shapes_have_no_line_between_them(
    lottery_folder, command_server, tmp_path
):
    arguments = ("train", "digits", *WITH_AVERAGE, "--loss", "none", "--student.embed_dim", "32")
    done = command_server.run(*arguments, "--out", tmp_path / "wide", cwd=lottery_folder)
    assert done.code == 0, done.err
    arguments = (
        "loss-landscape",
        "search/seed-0/level-0",
        tmp_path / "wide",
        *FEW,
        "--measure",
        "lines,volume",
    )
    done = command_server.run(*arguments, "--out", tmp_path / "o", cwd=lottery_folder)
    assert done.code == 0, done.err
    assert any({"lines", "path"} <= set(line.split()) for line in done.out.splitlines())
    found = result(tmp_path / "o")
    assert (found["lines"], found["path"]) == ({}, None)


def test_runs_stand_beside_each_other(lottery_folder, command_server, tmp_path):
    runs = ("search/seed-0/level-0", "search/seed-0/level-2")
    arguments = (
        "--measure",
        "lines",
        "--split",
        "test",
        "--checkpoint",
        "best",
        "--out",
        tmp_path / "o",
    )
    done = command_server.run("loss-landscape", *runs, *FEW, *arguments, cwd=lottery_folder)
    assert done.code == 0, done.err
    found = result(tmp_path / "o")
    assert list(found["places"]) == ["level-0", "level-2"]
    assert list(found["lines"]) == ["level-0 to level-2"]
    assert found["path"] is None


def test_radii_are_lengths(looked):
    for about in result(looked[0])["places"].values():
        radii = [math.exp(one) for one in about["volume"]["log_radii"]]
        assert all(0 < radius <= 4 * about["norm"] * 1.01 for radius in radii)
