"""`deit loss-landscape`: lines, planes, curvature and volume around trained weights, run beside
run."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deit.analysis.landscape_measure import AROUND, at_point, path, segments, ticket_path
from deit.analysis.landscape_options import LandscapeOptions, check_asked
from deit.analysis.landscape_runs import (
    LandscapeData,
    LandscapePoint,
    places_of,
    share_weight_space,
    view_of,
)
from deit.analysis.landscape_tables import MANIFEST, cells, columns, write_page
from deit.core.accelerator import environment_info
from deit.core.console import format_duration, info, table
from deit.core.errors import ConfigError
from deit.core.filesystem import check_writable, lock_dir, write_json
from deit.core.json_io import check_same_request, read_sealed, write_sealed
from deit.distill.build import build_accelerator
from deit.evaluation.load_run import resolve_run
from deit.experiments.base_runs import slugify
from deit.experiments.shared_targets import content_hash
from deit.models.saved import load_student
from deit.models.weight_files import digest_of

_KEPT = "measured"  # a file for each thing that was measured


def landscape(
    runs: list[Path], out: Path, asked: LandscapeOptions, *, root: str | None, command: str = ""
) -> dict[str, Any]:
    """Look at the loss around finished runs, or around the levels of a search for tickets, and
    between them; write landscape.json, landscape.md, a page and its pictures into a folder.

    Whatever was measured is kept at once, so the same command goes on. root: where the images lie
    now. Returns what landscape.json holds. Raises the errors of deit.core.errors.
    """
    started = time.monotonic()
    check_asked(asked)
    places = places_of(runs, asked)
    how = _how(asked)
    begun = {"runs": [run.resolve().name for run in runs], **how}
    check_same_request(out, MANIFEST, begun, what="landscape")
    if "lines" in asked.parts and len(places) < 2:
        if asked.parts == ("lines",):
            raise ConfigError(
                f"--measure lines: need two places, and there is {places[0].name} alone"
            )
        info("lines     need two places, and there is one")
    accelerator = build_accelerator(resolve_run(places[0].run, asked.checkpoint)[0].run)
    view = view_of(places, asked, root=root, device=accelerator.device)
    check_writable(out, option="--out")
    out.mkdir(parents=True, exist_ok=True)
    with lock_dir(out, option="--out"):
        write_json(out / MANIFEST, begun)
        info(
            f"loss      of {view.number} {asked.split} images as evaluation shows them: "
            "cross-entropy of the fused answer (or the only head's) with the labels"
        )
        kept = _Kept(out / _KEPT, view, how)
        result = {
            "asked": dataclasses.asdict(asked),
            "images": view.number,
            "places": {place.name: _around(place, view, asked, kept) for place in places},
            **_between(places, view, asked, kept),
            "command": command,
            "environment": environment_info(accelerator, command),
        }
        write_json(out / "landscape.json", result)
        for written in write_page(result, out):
            info(f"wrote {written}")
    table(f"landscapes, {view.number} {asked.split} images", columns(result), cells(result))
    info(f"took {format_duration(time.monotonic() - started)}")
    return result


def _how(asked: LandscapeOptions) -> dict[str, Any]:
    """What every measurement depends on beside weights and images."""
    values = dataclasses.asdict(asked)
    for which in ("parts", "kinds", "levels", "run_seed"):
        del values[which]
    return values


class _Kept:
    """What was measured, each in a file of its own, whose name ends in a hash of all it depends on:
    asked for again, it is read."""

    def __init__(self, folder: Path, view: LandscapeData, how: dict[str, Any]) -> None:
        self._folder, self._of = folder, {**how, "view": view.digest}
        self._digests: dict[Path, str] = {}
        folder.mkdir(exist_ok=True)

    def __call__(
        self, what: str, places: list[LandscapePoint], measured: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """what: is measured, of these places in this order."""
        weights = [self._digest(place) for place in places]
        key = content_hash({**self._of, "what": what, "weights": weights})
        file = self._folder / f"{slugify(places[0].name)[:60]}-{what}-{key}.json"
        if (found := read_sealed(file, dict[str, Any])) is None:
            found = write_sealed(file, measured())
        return found

    def _digest(self, place: LandscapePoint) -> str:
        """Of the weights, and of the masks along which they may move."""
        if place.saved not in self._digests:
            student, _ = load_student(place.saved)  # whole, where a file holds adapters alone
            masks = {f"mask of {name}": mask for name, mask in place.masks().items()}
            self._digests[place.saved] = digest_of({**student.network.state_dict(), **masks})
        return self._digests[place.saved]


def _around(
    place: LandscapePoint, view: LandscapeData, asked: LandscapeOptions, kept: _Kept
) -> dict[str, Any]:
    """What is measured around a place."""
    about = {"kind": place.kind, "level": place.level, "run": str(place.run)}
    about |= kept("here", [place], lambda: at_point(place, view))
    for part, measured in AROUND.items():
        if part in asked.parts:
            about[part] = kept(part, [place], lambda of=measured: of(place, view, asked))
    return about


def _between(
    places: list[LandscapePoint], view: LandscapeData, asked: LandscapeOptions, kept: _Kept
) -> dict[str, Any]:
    """What is measured between places: `lines` by name, and the plane of their `path`; none where
    they are not points of one space."""
    found: dict[str, Any] = {"lines": {}, "path": None}
    wanted = {"lines", "planes"} & set(asked.parts)
    if not wanted or len(places) < 2:
        return found
    if not share_weight_space(places):
        info("lines and path are left out: these networks differ in shape, statistics or colours")
        return found
    if "lines" in wanted:
        found["lines"] = {
            one.name: kept(
                one.kind, [one.first, one.second], lambda of=one: of.measure(view, asked)
            )
            for one in segments(places)
        }
    along = ticket_path(places)
    if "planes" in wanted and len(along) > 2:
        found["path"] = kept("path", along, lambda: path(along, view, asked))
    return found
