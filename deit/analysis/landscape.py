"""`deit loss-landscape`: lines, planes, curvature and basin volume around trained weights."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deit.analysis.landscape_measure import AROUND, at_point, path_plane, segments, ticket_path
from deit.analysis.landscape_options import LandscapeOptions, check_options
from deit.analysis.landscape_runs import (
    LandscapeData,
    LandscapePoint,
    landscape_points,
    load_landscape_data,
    share_weight_space,
)
from deit.analysis.landscape_tables import MANIFEST, cells, columns, write_page
from deit.core.accelerator import environment_info, own_accelerate_state
from deit.core.console import format_duration, info, table
from deit.core.errors import ConfigError
from deit.core.filesystem import check_writable, lock_dir, to_paths, write_json
from deit.core.json_io import check_same_request, read_sealed, write_sealed
from deit.distill.build import build_accelerator
from deit.evaluation.load_run import resolve_run
from deit.experiments.base_runs import slugify
from deit.experiments.shared_targets import content_hash
from deit.models.saved_student import load_student
from deit.models.weight_files import digest_of

_CACHE = "measured"  # a folder with one file per measurement


@own_accelerate_state()
def landscape(
    runs: str | Path | Sequence[str | Path],
    out: str | Path,
    options: LandscapeOptions = LandscapeOptions(),
    *,
    root: str | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Measure the loss around and between finished runs, or around the levels of a lottery search.

    Writes landscape.json, landscape.md and a page with its charts into `out`. Each measurement is
    saved as soon as it is done, so the same call resumes after an interruption. root: the current
    folder of the dataset, if it was moved. command: recorded in the results. Returns the content of
    landscape.json. Raises ConfigError, DataError, CheckpointError, NumericsError or SystemFault.

    >>> from deit.core.console import quiet
    >>> options = LandscapeOptions(measure=("curvature",), images=32, probes=2, steps=6)
    >>> with quiet():
    ...     result = landscape("checkpoints/digits", "landscape", options)
    >>> result["images"]
    32
    """
    started = time.monotonic()
    runs, out = to_paths(runs), Path(out)
    check_options(options)
    points = landscape_points(runs, options)
    settings = _measurement_settings(options)
    request = {"runs": [run.resolve().name for run in runs], **settings}
    check_same_request(out, MANIFEST, request, what="landscape")
    _check_lines(points, options)
    accelerator = build_accelerator(resolve_run(points[0].run, options.checkpoint)[0].run)
    data = load_landscape_data(points, options, root=root, device=accelerator.device)
    check_writable(out, name="out")
    out.mkdir(parents=True, exist_ok=True)
    with lock_dir(out, name="out"):
        write_json(out / MANIFEST, request)
        info(
            f"loss      {data.num_images} {options.split} images, prepared as for evaluation: "
            "cross-entropy of the fused heads (or the only head) with the labels"
        )
        cache = _MeasurementCache(out / _CACHE, data, settings)
        result = {
            "options": asdict(options),
            "images": data.num_images,
            "points": {point.name: _around(point, data, options, cache) for point in points},
            **_between(points, data, options, cache),
            "command": command,
            "environment": environment_info(accelerator, command),
        }
        write_json(out / "landscape.json", result)
        for path in write_page(result, out):
            info(f"wrote {path}")
    title = f"loss landscape, {data.num_images} {options.split} images"
    table(title, columns(result), cells(result))
    info(f"took {format_duration(time.monotonic() - started)}")
    return result


def _check_lines(points: list[LandscapePoint], options: LandscapeOptions) -> None:
    """Report that lines are skipped for a single run; raise ConfigError if nothing is left."""
    if "lines" in options.measure and len(points) < 2:
        if options.measure == ("lines",):
            raise ConfigError(
                f"measure = lines: needs at least two runs, but there is only {points[0].name}"
            )
        info("lines     skipped: they need at least two runs")


def _measurement_settings(options: LandscapeOptions) -> dict[str, Any]:
    """Return the options that affect a measurement, other than its weights and images."""
    values = asdict(options)
    for selection in ("measure", "kinds", "rounds", "run_seed"):
        del values[selection]
    return values


class _MeasurementCache:
    """Measurements on disk, one file each; the file name ends in a hash of everything it depends
    on."""

    def __init__(self, folder: Path, data: LandscapeData, settings: dict[str, Any]) -> None:
        self._folder, self._inputs = folder, {**settings, "view": data.digest}
        self._digests: dict[Path, str] = {}
        folder.mkdir(exist_ok=True)

    def __call__(
        self, what: str, points: list[LandscapePoint], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return a stored measurement, or make and store it.

        what: its name. points: what it depends on, in this order.
        """
        weights = [self._digest(point) for point in points]
        key = content_hash({**self._inputs, "what": what, "weights": weights})
        file = self._folder / f"{slugify(points[0].name)[:60]}-{what}-{key}.json"
        if (measurement := read_sealed(file, dict[str, Any])) is None:
            measurement = write_sealed(file, measure())
        return measurement

    def _digest(self, point: LandscapePoint) -> str:
        """Return the digest of the weights and of the masks."""
        if point.saved not in self._digests:
            student, _ = load_student(point.saved)  # includes the base weights of adapters
            masks = {f"mask of {name}": mask for name, mask in point.masks().items()}
            self._digests[point.saved] = digest_of({**student.network.state_dict(), **masks})
        return self._digests[point.saved]


def _around(
    point: LandscapePoint, data: LandscapeData, options: LandscapeOptions, cache: _MeasurementCache
) -> dict[str, Any]:
    """Return all measurements around a point."""
    result = {"kind": point.kind, "level": point.level, "run": str(point.run)}
    result |= cache("point", [point], lambda: at_point(point, data))
    for part, measure in AROUND.items():
        if part in options.measure:
            result[part] = cache(part, [point], lambda of=measure: of(point, data, options))
    return result


def _between(
    points: list[LandscapePoint],
    data: LandscapeData,
    options: LandscapeOptions,
    cache: _MeasurementCache,
) -> dict[str, Any]:
    """Return the measurements between points: `lines` by name, and the plane of their `path`.

    They are empty if the points do not share a weight space.
    """
    result: dict[str, Any] = {"lines": {}, "path": None}
    parts = {"lines", "planes"} & set(options.measure)
    if not parts or len(points) < 2:
        return result
    if not share_weight_space(points):
        info(
            "lines and path skipped: the networks differ in shape, BatchNorm statistics or "
            "normalization"
        )
        return result
    if "lines" in parts:
        result["lines"] = {
            segment.name: cache(
                segment.kind,
                [segment.first, segment.second],
                lambda of=segment: of.measure(data, options),
            )
            for segment in segments(points)
        }
    chain = ticket_path(points)
    if "planes" in parts and len(chain) > 2:
        result["path"] = cache("path", chain, lambda: path_plane(chain, data, options))
    return result
