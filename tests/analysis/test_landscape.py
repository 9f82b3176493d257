"""deit loss-landscape: losses at and between runs by hand, the page, and resuming."""

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
from deit.models.saved_student import load_student
from deit.models.surgery.pruning_masks import MASKS, apply, read_masks
from tests.helpers.small_runs import WITH_AVERAGE

pytest.importorskip("sklearn")

FEW = (
    *("--images", "40", "--points", "5", "--grid", "3", "--rays", "3", "--steps", "8"),
    *("--num-eigenvalues", "2", "--probes", "2"),
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def landscape_run(lottery_folder, command_server):
    """The folder of a landscape of the search, and the finished command."""
    arguments = ("loss-landscape", "search", *FEW, "--out", "out")
    done = command_server.run(
        *arguments, cwd=lottery_folder, SETUP_FUNCTION=f"{__name__}:few_products"
    )
    assert done.code == 0, done.err
    return lottery_folder / "out", done


def few_products():
    """Use 36 instead of 360 Hessian products per spectrum; no test here needs exact ones."""
    landscape_measure._PROBES, landscape_measure._STEPS = 2, 6


def read_landscape(out):
    return json.loads((out / "landscape.json").read_text())


NAMES = ["dense", "ticket, 50.0 %", "ticket, 75.0 %"]


def loss_and_error_at(run, masks=None):
    """Loss and error of the final weights of a run on the images of the landscape, by hand."""
    student, _ = load_student(run_folder.latest_checkpoint(run))
    if masks is not None:
        apply(masks, student.network)
    _names, images = load_split(load_config(run / "config.json").data, "train")
    rows = stratified_indices(images.labels, 40, seed=0, stream="landscape")
    with torch.no_grad():
        logits = logits_by_head(student.eval()(images.pixels[rows].float() / 255))["fused"]
    labels = images.labels[rows]
    error = (logits.argmax(dim=1) != labels).float().mean().item()
    return cross_entropy(logits, labels).item(), error


# Runs and images


def test_landscape_points_of_search_are_its_levels(lottery_folder):
    search = [lottery_folder / "search"]
    assert [point.name for point in landscape_points(search, LandscapeOptions())] == NAMES
    some = landscape_points(search, LandscapeOptions(rounds=(2,), kinds=("ticket", "random")))
    assert [point.name for point in some] == ["dense", "ticket, 75.0 %", "random, 75.0 %"]
    assert some[2].saved == run_folder.latest_checkpoint(lottery_folder / "search/seed-0/random-2")
    best = landscape_points(search, LandscapeOptions(checkpoint="best"))
    assert best[0].saved == lottery_folder / "search/seed-0/level-0/best"


def test_load_landscape_data_without_some_classes_warns(lottery_folder, capsys):
    points = landscape_points([lottery_folder / "search"], LandscapeOptions())
    load_landscape_data(points, LandscapeOptions(images=5), root=None, device=CPU)
    assert re.search(r"images = 5\b.*\b10\b", capsys.readouterr().err)  # of 10 classes
    load_landscape_data(points, LandscapeOptions(images=10), root=None, device=CPU)
    assert capsys.readouterr().err == ""


def test_surface_of_level_has_only_unmasked_weights(lottery_folder):
    points = landscape_points([lottery_folder / "search"], LandscapeOptions())
    data = load_landscape_data(points, LandscapeOptions(images=8), root=None, device=CPU)
    sizes = [surface_of(point, data).size for point in points]
    full_size = surface_of(points[2], data, masked=False).size
    assert [sizes[0] - size for size in sizes] == [0, 1536, 2304]
    assert full_size == sizes[0]


# By hand


def test_landscape_loss_of_each_run_by_hand(lottery_folder, landscape_run):
    landscape = read_landscape(landscape_run[0])
    assert list(landscape["points"]) == NAMES
    for level, values in enumerate(landscape["points"].values()):
        loss, error = loss_and_error_at(lottery_folder / f"search/seed-0/level-{level}")
        assert values["loss"] == pytest.approx(loss, rel=1e-5)
        assert values["error"] == pytest.approx(error, abs=1e-6)
        middle = values["planes"]["values"]["loss"][1][1]
        assert middle == pytest.approx(loss, rel=1e-5)
        assert values["volume"]["threshold"] == pytest.approx(loss + 0.1, rel=1e-5)


def test_landscape_lines_have_the_losses_of_their_ends(lottery_folder, landscape_run):
    lines = read_landscape(landscape_run[0])["lines"]
    assert list(lines) == [
        *("dense to ticket, 50.0 %", "dense pruned to ticket, 50.0 %"),
        *("ticket, 50.0 % to ticket, 75.0 %", "ticket, 50.0 % pruned to ticket, 75.0 %"),
    ]
    folder = lottery_folder / "search" / "seed-0"
    for level in (1, 2):
        direct, pruning = list(lines.values())[2 * level - 2 : 2 * level]
        before, after = folder / f"level-{level - 1}", folder / f"level-{level}"
        masks = read_masks(folder / "masks" / f"level-{level}.safetensors")
        for line, end in (
            (direct, loss_and_error_at(after)),
            (pruning, loss_and_error_at(before, masks)),
        ):
            losses, errors = line["values"]["loss"], line["values"]["error"]
            assert len(losses) == 5
            assert (losses[0], errors[0]) == pytest.approx(loss_and_error_at(before), rel=1e-5)
            assert (losses[-1], errors[-1]) == pytest.approx(end, rel=1e-5)
            barrier = max(
                loss - ((1 - a) * losses[0] + a * losses[-1])
                for a, loss in zip((0, 0.25, 0.5, 0.75, 1), losses)
            )
            assert line["barrier"]["loss"] == pytest.approx(max(barrier, 0), abs=1e-6)
        assert set(pruning["values"]) == {"loss", "error", "error_class", "error_distillation"}


def test_landscape_path_plane_contains_its_runs(landscape_run):
    path = read_landscape(landscape_run[0])["path"]
    projections = list(path["points"].values())
    assert [projection[2] for projection in projections] == pytest.approx([0, 0, 0], abs=1e-3)
    assert projections[0][:2] == pytest.approx([0, 0], abs=1e-6)
    assert projections[2][1] == pytest.approx(0, abs=1e-4)
    for axis, name in ((0, "xs"), (1, "ys")):
        coordinates = [projection[axis] for projection in projections]
        assert path[name][0] < min(coordinates)
        assert path[name][-1] > max(coordinates)


def test_landscape_curvature_and_volume_report_their_quality(landscape_run):
    for values in read_landscape(landscape_run[0])["points"].values():
        eigenvalues = values["curvature"]["eigenvalues"]
        assert len(eigenvalues["largest"]) == len(eigenvalues["largest_residuals"]) == 2
        assert eigenvalues["largest"][0] >= eigenvalues["largest"][1] > eigenvalues["smallest"][0]
        assert values["curvature"]["trace"]["probes"] == 2
        volume = values["volume"]
        assert volume["size"] == values["free_weights"]
        assert 1 <= volume["effective_rays"] <= 3
        assert len(volume["log_radii"]) == len(volume["evaluations"]) == 3


# Page and tables


def test_landscape_writes_page_charts_and_tables(landscape_run):
    out, done = landscape_run
    names = {path.name for path in out.iterdir()}
    charts = ("lines-loss", "lines-error", "spectra", "eigenvalues", "radii", "path")
    charts = (*charts, "plane-0", "plane-1", "plane-2")
    assert {f"{name}.png" for name in charts} | {"points.csv", "lines.csv"} <= names
    page = (out / "index.html").read_text()
    assert page.count("<svg") == len(charts)
    assert page.count("<h3>") == len(PARTS) + 1  # and the path
    for name in (*read_landscape(out)["points"], *read_landscape(out)["lines"]):
        assert name in page
    lines = list(csv.reader((out / "lines.csv").read_text().splitlines()))
    assert [line[0] for line in lines[1:]] == list(read_landscape(out)["lines"])
    text = (out / "landscape.md").read_text()
    assert all(f"| {name} |" in text for name in read_landscape(out)["lines"])
    assert "deit loss-landscape search" in text
    assert re.search(r"^loss .*\b40 train\b.*\bfused\b", done.out, re.MULTILINE)


def test_landscape_cells_mark_volumes_that_are_lower_bounds(landscape_run):
    landscape = read_landscape(landscape_run[0])
    values = landscape["points"]["dense"]
    values["volume"] |= {"effective_rays": 2.5, "censored": 0, "log_volume_per_weight": -1.0}
    column = -3
    assert cells(landscape)[0][column] == "-1.0000"
    values["volume"]["censored"] = 1
    assert cells(landscape)[0][column] == ">= -1.0000"
    values["volume"] |= {"censored": 0, "effective_rays": 1.2}
    assert cells(landscape)[0][column] == ">= -1.0000"
    values["curvature"]["eigenvalues"]["converged"] = True
    converged = cells(landscape)[0][5]
    assert float(converged) == pytest.approx(
        values["curvature"]["eigenvalues"]["largest"][0], rel=1e-2
    )
    values["curvature"]["eigenvalues"]["converged"] = False
    assert cells(landscape)[0][5].startswith(f"{converged} (")
    assert [line[0] for line in line_cells(landscape)] == list(landscape["lines"])


@pytest.mark.parametrize("part", PARTS)
def test_write_page_with_a_single_part_draws_its_charts(landscape_run, tmp_path, part):
    landscape = read_landscape(landscape_run[0])
    landscape["options"]["measure"] = [part]
    for values in landscape["points"].values():
        for other in set(PARTS) - {part}:
            values.pop(other, None)
    if part != "lines":
        landscape["lines"] = {}
    if part != "planes":
        landscape["path"] = None
    assert [path.name for path in write_page(landscape, tmp_path)] == ["landscape.md", "index.html"]
    charts = {path.stem.split("-")[0] for path in tmp_path.glob("*.png")}
    expected = {"lines": {"lines"}, "planes": {"plane", "path"}, "volume": {"radii"}}
    assert charts == {"curvature": {"spectra", "eigenvalues"}, **expected}[part]


# Resuming


def test_landscape_resumed_repeats_only_missing_measurements(
    landscape_run, lottery_folder, command_server, tmp_path
):
    shutil.copytree(landscape_run[0], tmp_path / "out")
    cache = tmp_path / "out" / "measured"
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    (lost,) = cache.glob("dense-volume-*.json")
    content = lost.read_bytes()
    lost.unlink()
    arguments = ("loss-landscape", "search", *FEW, "--out", tmp_path / "out")
    done = command_server.run(*arguments, cwd=lottery_folder)
    assert done.code == 0, done.err
    after = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {lost.name}
    assert lost.read_bytes() == content
    done = command_server.run(*arguments, "--seed", "1", cwd=lottery_folder)
    assert done.code == 2
    assert f"--out {tmp_path / 'out'}" in done.err
    assert re.search(r"\bseed\b.*\b0\b.*\b1\b", done.err)


def test_measurement_cache_distinguishes_masks(lottery_folder, tmp_path):
    run = lottery_folder / "search" / "seed-0" / "level-2"
    shutil.copytree(run, tmp_path / "bare")
    for name in (MASKS, "manifest.json"):
        (tmp_path / "bare" / "best" / name).unlink()
    cache = _MeasurementCache(tmp_path / "kept", LandscapeData([], [], 0, "of the images"), {})
    masked, bare = (
        LandscapePoint("level-2", path, path / "best") for path in (run, tmp_path / "bare")
    )
    assert cache("here", [masked], lambda: {"loss": 1}) == {"loss": 1}
    assert cache("here", [bare], lambda: {"loss": 2}) == {"loss": 2}
    assert cache("here", [masked, bare], lambda: {"loss": 3}) == {"loss": 3}
    assert cache("here", [masked], lambda: {"loss": 4}) == {"loss": 1}


def test_landscape_with_more_runs_extends_the_results(
    landscape_run, lottery_folder, command_server, tmp_path
):
    shutil.copytree(landscape_run[0], tmp_path / "out")
    arguments = ("--kinds", "ticket,random", "--measure", "volume", "--out", tmp_path / "out")
    done = command_server.run("loss-landscape", "search", *FEW, *arguments, cwd=lottery_folder)
    assert done.code == 0, done.err
    assert list(read_landscape(tmp_path / "out")["points"]) == [*NAMES, "random, 75.0 %"]


@pytest.mark.slow
def test_landscape_of_changed_weights_repeats_the_measurements(
    lottery_folder, command_server, tmp_path
):
    for level in (0, 1):
        shutil.copytree(lottery_folder / f"search/seed-0/level-{level}", tmp_path / f"run-{level}")
    arguments = ("--measure", "volume", *FEW, "--checkpoint", "best", "--out", "out")
    before, after = ({}, {})
    for runs in (before, after):
        done = command_server.run("loss-landscape", "run-0", "run-1", *arguments, cwd=tmp_path)
        assert done.code == 0, done.err
        runs |= read_landscape(tmp_path / "out")["points"]
        shutil.rmtree(tmp_path / "run-1" / "best")
        shutil.copytree(tmp_path / "run-0" / "best", tmp_path / "run-1" / "best")
    assert before["run-1"]["loss"] != after["run-1"]["loss"] == after["run-0"]["loss"]
    assert before["run-1"]["volume"] != after["run-1"]["volume"]
    assert before["run-0"] == after["run-0"]


def test_segments_connect_controls_with_the_ticket_of_their_level(lottery_folder):
    points = landscape_points(
        [lottery_folder / "search"], LandscapeOptions(kinds=("ticket", "random"))
    )
    names = [segment.name for segment in segments(points)]
    assert names == [
        *("dense to ticket, 50.0 %", "dense pruned to ticket, 50.0 %"),
        *("ticket, 50.0 % to ticket, 75.0 %", "ticket, 50.0 % pruned to ticket, 75.0 %"),
        "ticket, 75.0 % to random, 75.0 %",
    ]
    assert [segment.name for segment in ticket_path(points)] == NAMES


@pytest.mark.slow
def test_landscape_of_different_shapes_skips_lines_and_path(
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
    landscape = read_landscape(tmp_path / "o")
    assert (landscape["lines"], landscape["path"]) == ({}, None)


def test_landscape_of_two_runs_has_one_line_and_no_path(lottery_folder, command_server, tmp_path):
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
    landscape = read_landscape(tmp_path / "o")
    assert list(landscape["points"]) == ["level-0", "level-2"]
    assert list(landscape["lines"]) == ["level-0 to level-2"]
    assert landscape["path"] is None


def test_landscape_radii_are_within_the_largest_radius(landscape_run):
    for values in read_landscape(landscape_run[0])["points"].values():
        radii = [math.exp(log_radius) for log_radius in values["volume"]["log_radii"]]
        assert all(0 < radius <= 4 * values["norm"] * 1.01 for radius in radii)
