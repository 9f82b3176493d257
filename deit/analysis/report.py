"""`deit report`: one page of HTML about runs and sweeps, with its charts and tables beside it."""

import re
import time
from pathlib import Path
from typing import Any

from deit.analysis.run_images import Pictures, draw_run
from deit.analysis.run_sections import RunReport, card_of, final_top1, sections_of, write_csv
from deit.analysis.sweep_sections import sections_of_sweep
from deit.config.schema import Config
from deit.config.validation import load_config
from deit.core import run_folder, run_log
from deit.core.console import count_noun, format_duration, format_percent, info, warn
from deit.core.errors import CheckpointError, ConfigError, DataError, SystemFault
from deit.core.filesystem import atomic_write, check_writable, format_bytes, write_json
from deit.core.json_io import translate_value_errors
from deit.evaluation.cache import EvaluationCache, disagreement_matrix
from deit.experiments.base_runs import slugify
from deit.experiments.shared_targets import HASH_LENGTH
from deit.experiments.sweep_tables import MANIFEST, RESULTS, cells, columns, read_results
from deit.training.summary import summary_of
from deit.viz import charts, html

PAGE = "index.html"
_MARK = "report.json"  # of which runs; by it a folder is known, also one that was not finished
_LARGE = 2 * 2**20
_HASH = re.compile(rf"-[0-9a-f]{{{HASH_LENGTH}}}$")


def report(paths: list[Path], out: Path, *, root: str | None = None, force: bool = False) -> Path:
    """Write the page of finished runs and sweeps into a folder, as index.html, and beside it every
    chart as PNG and every table as CSV. Returns the page.

    root: where the images of the runs lie now, if not where the runs found them. force: whether a
    report in the folder may be replaced. Raises the errors of deit.core.errors before the first
    picture is drawn."""
    started = time.monotonic()
    sweeps = {path: read_results(path) for path in paths if (path / MANIFEST).is_file()}
    for path, result in sweeps.items():
        with translate_value_errors(path / RESULTS):  # before anything is written
            columns(result)
            cells(result)
    runs = [path for path in paths if path not in sweeps]
    names = _names(paths)
    slugs = _slugs(names)
    for run in runs:
        _check_run(run)
    charts.check()
    _check_folder(out, force)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _MARK, {"of": [str(path) for path in paths]})
    evaluations = EvaluationCache()
    views = {run: _view(run, names[run], slugs[run], out, evaluations, root) for run in runs}
    body = []
    if len(paths) > 1:
        body.append(html.links({names[path]: slugs[path] for path in paths}))
    if len(views) > 1:
        body.append(html.section("Side by side", _side_by_side(list(views.values()), out)))
    for path in paths:
        anchor = slugs[path]
        if path in sweeps:
            with translate_value_errors(path / RESULTS):
                parts = sections_of_sweep(sweeps[path], out, anchor)
            parts += _best_of(path, sweeps[path], anchor, out, evaluations, root)
        else:
            parts = _of_run(path, views[path], out, root)
        alone = len(paths) == 1  # its name is the title of the page
        body += parts if alone else [html.section(names[path], parts, anchor=anchor)]
    title = names[paths[0]] if len(paths) == 1 else f"{len(paths)} reports"
    kinds = [count_noun(len(runs), "run")] * bool(runs)
    kinds += [count_noun(len(sweeps), "sweep")] * bool(sweeps)
    whole = html.page(
        title,
        f"{' and '.join(kinds)}: {', '.join(map(str, paths))}",
        body,
        foot="Written by deit report. This page is one file and asks the network for nothing; "
        "charts (PNG) and tables (CSV) lie beside it.",
    )
    written = out / PAGE
    atomic_write(written, whole.encode())
    bytes_ = written.stat().st_size
    if bytes_ > _LARGE:
        warn(f"{written}: {format_bytes(bytes_)}; fewer runs make a smaller page")
    info(
        f"wrote {written} ({format_bytes(bytes_)}) in {format_duration(time.monotonic() - started)}"
    )
    return written


def _names(paths: list[Path]) -> dict[Path, str]:
    """What each is called: its folder, without the hash that a sweep puts behind it; with it, or in
    full, where two would be called the same."""
    places = [path.resolve() for path in paths]
    if twice := [path for path, place in zip(paths, places) if places.count(place) > 1]:
        raise ConfigError(f"{twice[0]}: is named twice; once is enough")
    whole = [place.name for place in places]
    short = [
        _HASH.sub("", name) if (path.resolve().parent.parent / MANIFEST).is_file() else name
        for path, name in zip(paths, whole)
    ]
    found = {}
    for path, *names in zip(paths, short, whole):
        alone = [one for one, all_ in zip(names, (short, whole)) if all_.count(one) == 1]
        found[path] = alone[0] if alone else str(path)
    return found


def _slugs(names: dict[Path, str]) -> dict[Path, str]:
    """What the files and anchors of each begin with: no two the same, whatever the case and the
    signs in their names."""
    found: dict[Path, str] = {}
    for path, name in names.items():
        first = called = slugify(name) or "run"
        while called in found.values():
            called = f"{first}-{1 + sum(one.startswith(first) for one in found.values())}"
        found[path] = called
    return found


def _check_run(run: Path) -> None:
    """Raises CheckpointError for what is no finished run."""
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run folder")
    if not (run / run_folder.CONFIG).is_file():
        raise CheckpointError(f"{run}: neither a run (no {run_folder.CONFIG}) nor a sweep")
    if run_folder.read_result(run) is None:
        raise CheckpointError(f"{run}: is not finished; its command with --resume goes on")


def _check_folder(out: Path, force: bool) -> None:
    """Refuse a folder that holds something else than a report, or one that is to stay. Raises
    ConfigError and SystemFault."""
    if out.exists() and not out.is_dir():
        raise SystemFault(f"--out {out}: is a file, not a folder")
    check_writable(out, option="--out")
    inside = list(out.iterdir()) if out.is_dir() else []
    if inside and not (out / _MARK).is_file():
        raise ConfigError(
            f"--out {out}: holds something, but no report (no {_MARK}); give another --out"
        )
    if (out / PAGE).is_file() and not force:
        raise SystemFault(f"--out {out}: holds a report already; --force replaces it")


def _view(
    run: Path, name: str, called: str, out: Path, evaluations: EvaluationCache, root: str | None
) -> RunReport:
    config: Config = load_config(run / run_folder.CONFIG)
    kept = out / f"{called}.evaluation.json"
    with translate_value_errors(run / run_folder.RESULT):
        summary = summary_of(config, run, run_folder.read_result(run))
    return RunReport(
        name,
        called,
        config,
        run_folder.read_environment(run),
        run_log.read_metrics(run),
        summary,
        evaluations.get(run, cache_path=kept, root=root, cost=True),
    )


def _of_run(run: Path, view: RunReport, out: Path, root: str | None) -> list[str]:
    parts = sections_of(view, out)
    try:
        shown = _pictures(draw_run(run, view.evaluation, out, view.slug, root=root))
    except DataError as error:
        warn(f"{run}: without pictures of its images: {error}")
        told = f"No pictures of its images: {error}. Where they were moved, --data.root tells."
        shown = [html.paragraph(told, "note")]
    return [*parts, *shown, html.subsection("Run card", [card_of(view)])]


def _pictures(pictures: Pictures) -> list[str]:
    parts = []
    if pictures.hardest:
        images = (
            html.figure(html.picture(one.picture, one.lines[0]), "\n".join(one.lines))
            for one in pictures.hardest
        )
        told = "Answered wrongly: first where the teacher is right, the surest first."
        shown = [html.paragraph(told, "note"), html.gallery(images)]
        parts.append(html.subsection("Hardest images", shown))
    if pictures.attention is not None:
        told = "Attention rolled out from the last block to the image, for each token."
        picture = html.picture(pictures.attention, "attention of the tokens on some images")
        parts.append(html.subsection("What the tokens look at", [html.figure(picture, told)]))
    if pictures.views is not None:
        told = "The first training views: the image, what the student sees, what the teacher sees."
        picture = html.picture(pictures.views, "a sheet of training views")
        parts.append(html.subsection("Views", [html.figure(picture, told)]))
    return parts


def _best_of(
    sweep: Path,
    result: dict[str, Any],
    anchor: str,
    out: Path,
    evaluations: EvaluationCache,
    root: str | None,
) -> list[str]:
    """The best point's first run, folded."""
    if not result["best"]:
        return []
    with translate_value_errors(sweep / RESULTS):
        name = result["best"][0]
        row = result["rows"][name]
        run, seed = Path(row["folders"][0]), row["seeds"][0]
    run = run if run.is_dir() else sweep / "runs" / run.name  # the sweep may have been moved
    if not (run / run_folder.CONFIG).is_file():
        warn(f"{run}: is not there any more, so the best run is not shown")
        return []
    view = _view(run, f"{sweep.resolve().name}, best", f"{anchor}-best", out, evaluations, root)
    return [
        html.details(f"The best: {name}, seed {seed}", _of_run(run, view, out, root), opened=False)
    ]


def _side_by_side(views: list[RunReport], out: Path) -> list[str]:
    """Several runs in one table and one chart, and who answers otherwise than whom."""
    columns = (
        "run",
        "student",
        "class head",
        "distillation head",
        "fused",
        "calibration error %",
        "epochs",
        "seconds",
        "images/s",
    )
    rows, lines = [], []
    for view in views:
        heads, told = view.evaluation.metrics["heads"], view.summary
        two = heads["distillation"] is not None
        shares = [heads["class"], heads["distillation"], heads["fused"] if two else None]
        speed = told["images_per_s"]
        cells = [
            view.name,
            view.config.student.name,
            *("-" if one is None else format_percent(one["top1"]) for one in shares),
            format_percent(heads["fused"]["calibration_error"]),
            str(told["epochs"]),
            f"{told['seconds']:.0f}",
            "-" if speed is None else f"{speed:.0f}",
        ]
        rows.append(cells)
        lines.append(dict(zip(columns, cells)))
    write_csv(out / "runs.csv", columns, lines)
    best = max(range(len(views)), key=lambda place: views[place].summary["selected"])
    curves = {view.name: view.summary["curve"] for view in views}
    drawn = charts.chart(charts.curves(curves, {}), out / "runs.png")
    told = "Test top-1 % by head; in bold the best on the validation split."
    figures = [html.figure(drawn, "Validation accuracy of the answer that selects the weights.")]
    if all("cost" in view.evaluation.metrics for view in views):
        speeds = [view.evaluation.metrics["cost"]["images_per_s"] for view in views]
        shares = [100 * final_top1(view.evaluation) for view in views]
        dots = dict(zip((view.name for view in views), zip(speeds, shares)))
        dots = charts.scatter(dots, "images/s (inference)", "test top-1 %")
        drawn = charts.chart(dots, out / "throughput.png")
        places = {view.evaluation.metrics["cost"]["measured_on"] for view in views}
        speed = (
            "Accuracy against speed, each measured when it was evaluated (deit variants: in "
            "turns), "
            f"on {'; '.join(sorted(places))}."
        )
        figures.append(html.figure(drawn, speed))
    body = [html.table(columns, rows, caption=told, best=best), html.side_by_side(*figures)]
    shares = disagreement_matrix({view.name: view.evaluation for view in views})
    if shares:
        values = [[100 * shares[a][b] if a != b else None for b in shares] for a in shares]
        told = "Different answers in % of the images."
        file = out / "disagreement.csv"
        body.append(html.heat_table(list(shares), list(shares), values, caption=told, file=file))
    return body
