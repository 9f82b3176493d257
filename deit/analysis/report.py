"""`deit report`: an HTML page about runs and sweeps, with its charts and tables as files."""

import re
import time
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from deit.analysis.run_images import RunImages, draw_run
from deit.analysis.run_report import RunReport, final_top1, write_csv
from deit.analysis.run_sections import card_of, sections_of
from deit.analysis.sweep_sections import sections_of_sweep
from deit.config.arguments import checks_types
from deit.config.command_choices import check_paths
from deit.config.schema import Config
from deit.config.validation import load_config
from deit.core import run_folder, run_log
from deit.core.console import count_noun, format_duration, format_percent, info, obeys_verbose, warn
from deit.core.errors import CheckpointError, ConfigError, DataError, SystemFault
from deit.core.filesystem import (
    atomic_write,
    check_writable,
    format_bytes,
    write_json,
)
from deit.core.json_io import translate_value_errors
from deit.evaluation.cache import EvaluationCache, disagreement_matrix
from deit.experiments.base_runs import slugify
from deit.experiments.shared_targets import HASH_LENGTH
from deit.experiments.sweep_tables import MANIFEST, RESULTS, cells, columns, read_results
from deit.training.summary import summary_of
from deit.viz import charts, html
from deit.viz.tables import prediction_name

PAGE = "index.html"
_MARKER = "report.json"  # lists the paths; identifies a folder as a report, also an unfinished one
_LARGE_PAGE = 2 * 2**20  # [bytes]
_HASH = re.compile(rf"-[0-9a-f]{{{HASH_LENGTH}}}$")
_HARDEST_NOTE = (
    "Misclassified images. Images that the teacher classifies correctly come first, then the most "
    "confident errors."
)


@checks_types
@obeys_verbose
def report(
    paths: str | PathLike | Sequence[str | PathLike],
    out: str | PathLike,
    *,
    root: str | PathLike | None = None,
    force: bool = False,
    verbose: bool = True,
) -> Path:
    """Write a page about finished runs and sweeps into a folder; return the path of the page.

    Every chart is also written as PNG, and every table as CSV. root: the current folder of the
    images, if they were moved. force: replace a report in the folder. verbose: show messages and
    progress; warnings are always shown. Raises ConfigError, CheckpointError or SystemFault before
    anything is drawn.

    >>> page = report("checkpoints/digits", "report", verbose=False)
    >>> page.as_posix(), (page.parent / "report.json").is_file()
    ('report/index.html', True)
    """
    started = time.monotonic()
    paths, out = check_paths("paths", paths), Path(out)
    root = None if root is None else fspath(root)
    sweeps = {path: read_results(path) for path in paths if (path / MANIFEST).is_file()}
    for path, result in sweeps.items():
        # A damaged result raises before anything is written.
        with translate_value_errors(path / RESULTS):
            columns(result)
            cells(result)
    runs = [path for path in paths if path not in sweeps]
    names = _names(paths)
    slugs = _slugs(names)
    for run in runs:
        _check_run(run)
    charts.require_matplotlib()
    _check_folder(out, force)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _MARKER, {"of": [str(path) for path in paths]})
    evaluations = EvaluationCache()
    reports = {
        run: _run_report(run, names[run], slugs[run], out, evaluations, root) for run in runs
    }
    body = []
    if len(paths) > 1:
        body.append(html.links({names[path]: slugs[path] for path in paths}))
    if len(reports) > 1:
        body.append(html.section("Comparison of runs", _comparison(list(reports.values()), out)))
    for path in paths:
        anchor = slugs[path]
        if path in sweeps:
            with translate_value_errors(path / RESULTS):
                parts = sections_of_sweep(sweeps[path], out, anchor)
            parts += _best_run_of(path, sweeps[path], anchor, out, evaluations, root)
        else:
            parts = _run_sections(path, reports[path], out, root)
        # The name of a single path is the title of the page.
        body += parts if len(paths) == 1 else [html.section(names[path], parts, anchor=anchor)]
    title = names[paths[0]] if len(paths) == 1 else f"{len(paths)} reports"
    page = html.page(title, _lead(paths, len(runs), len(sweeps)), body, foot=_FOOT)
    return _write_page(page, out / PAGE, started)


_FOOT = (
    "Written by deit report. This page is self-contained and makes no network requests. Its charts "
    "(PNG) and tables (CSV) are in the same folder."
)


def _lead(paths: Sequence[Path], num_runs: int, num_sweeps: int) -> str:
    """Return the line under the title: what the page is about."""
    kinds = [count_noun(num_runs, "run")] * bool(num_runs)
    kinds += [count_noun(num_sweeps, "sweep")] * bool(num_sweeps)
    return f"{' and '.join(kinds)}: {', '.join(map(str, paths))}"


def _write_page(page: str, path: Path, started: float) -> Path:
    """Write the page, log its size and the time since `started`, and return its path."""
    atomic_write(path, page.encode())
    num_bytes = path.stat().st_size
    if num_bytes > _LARGE_PAGE:
        warn(f"{path}: is large ({format_bytes(num_bytes)}); include fewer runs for a smaller page")
    seconds = format_duration(time.monotonic() - started)
    info(f"wrote {path} ({format_bytes(num_bytes)}) in {seconds}")
    return path


def _names(paths: list[Path]) -> dict[Path, str]:
    """Return a distinct name for each path.

    It is the name of the folder, without the hash that a sweep appends; if that is ambiguous, with
    the hash; if that is ambiguous too, the path.
    """
    folders = [path.resolve() for path in paths]
    if repeated := [path for path, folder in zip(paths, folders) if folders.count(folder) > 1]:
        raise ConfigError(f"{repeated[0]}: is given twice; give each run and sweep once")
    full_names = [folder.name for folder in folders]
    short_names = [
        _HASH.sub("", name) if (path.resolve().parent.parent / MANIFEST).is_file() else name
        for path, name in zip(paths, full_names)
    ]
    names = {}
    for path, short, full in zip(paths, short_names, full_names):
        if short_names.count(short) == 1:
            names[path] = short
        else:
            names[path] = full if full_names.count(full) == 1 else str(path)
    return names


def _slugs(names: dict[Path, str]) -> dict[Path, str]:
    """Return a distinct prefix for the files and anchors of each path.

    Prefixes differ even in names that differ only in case or special characters.
    """
    slugs: dict[Path, str] = {}
    for path, name in names.items():
        base = slug = slugify(name) or "run"
        while slug in slugs.values():
            slug = f"{base}-{1 + sum(used.startswith(base) for used in slugs.values())}"
        slugs[path] = slug
    return slugs


def _check_run(run: Path) -> None:
    """Raise CheckpointError if the folder is not a finished run."""
    run_folder.require_folder(run)
    if not (run / run_folder.CONFIG).is_file():
        raise CheckpointError(f"{run}: is neither a run (no {run_folder.CONFIG}) nor a sweep")
    if run_folder.read_result(run) is None:
        raise CheckpointError(
            f"{run}: is not finished; resume it first (its own command with --resume)"
        )


def _check_folder(out: Path, force: bool) -> None:
    """Raise ConfigError or SystemFault if the report cannot be written into the folder."""
    if out.exists() and not out.is_dir():
        raise SystemFault(f"out = {out}: is a file, should be a folder")
    check_writable(out, name="out")
    entries = list(out.iterdir()) if out.is_dir() else []
    if entries and not (out / _MARKER).is_file():
        raise ConfigError(
            f"out = {out}: is not empty and contains no report (no {_MARKER}); use another folder"
        )
    if (out / PAGE).is_file() and not force:
        raise SystemFault(
            f"out = {out}: already contains a report; use force=True (--force) to replace it"
        )


def _run_report(
    run: Path, name: str, slug: str, out: Path, evaluations: EvaluationCache, root: str | None
) -> RunReport:
    config: Config = load_config(run / run_folder.CONFIG)
    cache_path = out / f"{slug}.evaluation.json"
    with translate_value_errors(run / run_folder.RESULT):
        summary = summary_of(config, run, run_folder.read_result(run))
    return RunReport(
        name,
        slug,
        config,
        run_folder.read_environment(run),
        run_log.read_metrics(run),
        summary,
        evaluations.get(run, cache_path=cache_path, root=root, cost=True),
    )


def _run_sections(run: Path, run_report: RunReport, out: Path, root: str | None) -> list[str]:
    """Return all sections of a run; without its images if they are missing."""
    sections = sections_of(run_report, out)
    try:
        images = draw_run(run, run_report.evaluation, out, run_report.slug, root=root)
        sections += _image_sections(images)
    except DataError as error:
        warn(f"{run}: the report has no images of this run: {error}")
        note = f"The images are missing: {error}. If they were moved, give data.root."
        sections.append(html.paragraph(note, "note"))
    return [*sections, html.subsection("Run card", [card_of(run_report)])]


def _image_sections(images: RunImages) -> list[str]:
    sections = []
    if images.hardest:
        figures = (
            html.figure(html.image(image.thumbnail, image.lines[0]), "\n".join(image.lines))
            for image in images.hardest
        )
        content = [html.paragraph(_HARDEST_NOTE, "note"), html.gallery(figures)]
        sections.append(html.subsection("Hardest images", content))
    if images.attention is not None:
        image = html.image(images.attention, "attention maps of the tokens on some images")
        caption = "Attention rollout from the last block to the input image, for each token."
        sections.append(html.subsection("Attention maps", [html.figure(image, caption)]))
    if images.views is not None:
        image = html.image(images.views, "a sheet of training views")
        caption = "The first training views: image, view of the student, view of the teacher."
        sections.append(html.subsection("Views", [html.figure(image, caption)]))
    return sections


def _best_run_of(
    sweep: Path,
    result: dict[str, Any],
    anchor: str,
    out: Path,
    evaluations: EvaluationCache,
    root: str | None,
) -> list[str]:
    """Return the sections of the first run of the best point, collapsed."""
    if not result["best"]:
        return []
    with translate_value_errors(sweep / RESULTS):
        name = result["best"][0]
        row = result["rows"][name]
        run, seed = Path(row["folders"][0]), row["seeds"][0]
    run = run if run.is_dir() else sweep / "runs" / run.name  # the sweep may have been moved
    if not (run / run_folder.CONFIG).is_file():
        warn(f"{run}: not found; the report has no section about the best run of {sweep}")
        return []
    title = f"{sweep.resolve().name}, best"
    run_report = _run_report(run, title, f"{anchor}-best", out, evaluations, root)
    sections = _run_sections(run, run_report, out, root)
    return [html.details(f"Best run: {name}, seed {seed}", sections, opened=False)]


def _comparison(reports: list[RunReport], out: Path) -> list[str]:
    """Return a table and charts of several runs, and the disagreement between them."""
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
    rows = [_comparison_row(run_report) for run_report in reports]
    write_csv(out / "runs.csv", columns, [dict(zip(columns, row)) for row in rows])
    best = max(range(len(reports)), key=lambda index: reports[index].summary["selected"])
    caption = "Test top-1 % by head. Bold: best on the validation split."
    curves = {run_report.name: run_report.summary["curve"] for run_report in reports}
    svg = charts.chart(charts.curves(curves, {}), out / "runs.png")
    figures = [html.figure(svg, "Validation accuracy of the head that selects the best weights.")]
    if all("cost" in run_report.evaluation.metrics for run_report in reports):
        figures.append(_throughput_figure(reports, out))
    body = [html.table(columns, rows, caption=caption, best=best), html.side_by_side(*figures)]
    rates = disagreement_matrix({run_report.name: run_report.evaluation for run_report in reports})
    if rates:
        values = [[100 * rates[a][b] if a != b else None for b in rates] for a in rates]
        caption = "Images with different predictions, in %."
        csv_path = out / "disagreement.csv"
        labels = [prediction_name(name) for name in rates]
        table = html.heat_table(labels, labels, values, caption=caption, csv_path=csv_path)
        body.append(table)
    return body


def _comparison_row(run_report: RunReport) -> list[str]:
    heads, summary = run_report.evaluation.metrics["heads"], run_report.summary
    has_two_heads = heads["distillation"] is not None
    fused = heads["fused"] if has_two_heads else None
    speed = summary["images_per_s"]
    return [
        run_report.name,
        run_report.config.student.name,
        *(
            "-" if metrics is None else format_percent(metrics["top1"])
            for metrics in (heads["class"], heads["distillation"], fused)
        ),
        format_percent(heads["fused"]["calibration_error"]),
        str(summary["epochs"]),
        f"{summary['seconds']:.0f}",
        "-" if speed is None else f"{speed:.0f}",
    ]


def _throughput_figure(reports: list[RunReport], out: Path) -> str:
    costs = [run_report.evaluation.metrics["cost"] for run_report in reports]
    points = {
        run_report.name: (cost["images_per_s"], 100 * final_top1(run_report.evaluation))
        for run_report, cost in zip(reports, costs)
    }
    draw = charts.scatter(points, "images/s (inference)", "test top-1 %")
    svg = charts.chart(draw, out / "throughput.png")
    devices = "; ".join(sorted({cost["measured_on"] for cost in costs}))
    caption = (
        f"Accuracy against throughput on {devices}. Each run was measured when it was evaluated; "
        "deit variants measures in interleaved rounds."
    )
    return html.figure(svg, caption)
