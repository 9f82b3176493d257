"""`deit landscape`: lines, planes, curvature and volume around trained weights, run beside run."""

import dataclasses
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deit.console import clock, say, table
from deit.disk import check_writable, hold, write_json
from deit.environment import create_accelerator, describe
from deit.errors import ConfigError
from deit.evaluation import find_run
from deit.ground import slug
from deit.landscape_options import Asked, check_asked
from deit.landscape_page import MANIFEST, cells, columns, write_page
from deit.landscape_parts import AROUND, here, neighbours, path
from deit.landscape_places import Place, places_of, view_of
from deit.models.saved import WEIGHTS
from deit.models.weights import digest_of, read_weights
from deit.shared_targets import content_hash
from deit.typed_json import read_typed

_KEPT = "measured"  # a file for each thing that was measured


def landscape(
    runs: list[Path], out: Path, asked: Asked, *, root: str | None, arguments: list[str]
) -> dict[str, Any]:
    """Look at the loss around finished runs, or around the levels of a search for tickets, and
    between them; write landscape.json, landscape.md, a page and its pictures into a folder.

    Whatever was measured is kept at once, so the same command goes on. root: where the images lie
    now. Returns what landscape.json holds. Raises the errors of deit.errors.
    """
    started = time.monotonic()
    check_asked(asked)
    places = places_of(runs, asked)
    manifest = _manifest(asked, places)
    _check_folder(out, manifest)
    accelerator = create_accelerator(find_run(places[0].run, asked.checkpoint)[0].run)
    _, view = view_of(places, asked, root=root, device=accelerator.device)
    check_writable(out, option="--out")
    out.mkdir(parents=True, exist_ok=True)
    with hold(out, option="--out"):
        write_json(out / MANIFEST, manifest)
        say(
            f"loss      of {view.number} {asked.split} images as evaluation shows them: "
            "cross-entropy of the fused answer (or the only head's) with the labels"
        )
        kept = _Kept(out / _KEPT)
        found: dict[str, dict[str, Any]] = {}
        for place in places:
            name = slug(place.name)
            about = {"kind": place.kind, "level": place.level, "run": str(place.run)}
            about |= kept(f"{name}-here", lambda one=place: here(one, view, asked))
            for part, measured in AROUND.items():
                if part in asked.parts:
                    about[part] = kept(
                        f"{name}-{part}", lambda one=place, of=measured: of(one, view, asked)
                    )
            found[place.name] = about
        result = {
            "asked": dataclasses.asdict(asked),
            "images": view.number,
            "places": found,
            "lines": {},
            "path": None,
            "command": f"deit landscape {shlex.join(arguments)}",
            "environment": describe(accelerator, []),
        }
        if "lines" in asked.parts:
            result["lines"] = {
                name: kept(f"line-{slug(name)}", lambda of=measured: of(view, asked))
                for name, measured in neighbours(places)
            }
        if "planes" in asked.parts and len(places) > 2:
            through = content_hash({"through": [place.name for place in places]})
            result["path"] = kept(f"path-{through}", lambda: path(places, view, asked))
        write_json(out / "landscape.json", result)
        for written in write_page(result, out):
            say(f"wrote {written}")
    table(f"landscapes, {view.number} {asked.split} images", columns(result), cells(result))
    say(f"took {clock(time.monotonic() - started)}")
    return result


class _Kept:
    """What was measured, each in a file of its own: asked for again, it is read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def __call__(self, name: str, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        file = self._folder / f"{name}.json"
        if not file.is_file():
            write_json(file, measured())
        return read_typed(file, dict[str, Any])


def _manifest(asked: Asked, places: list[Place]) -> dict[str, Any]:
    """What measurements depend on: what is asked, but not of which places, and their weights."""
    values = dataclasses.asdict(asked)
    for which in ("parts", "kinds", "levels"):
        del values[which]
    weights = {place.name: digest_of(read_weights(place.saved / WEIGHTS)) for place in places}
    return {"asked": values, "weights": weights}


def _check_folder(out: Path, manifest: dict[str, Any]) -> None:
    """Refuse a folder that holds something else. Raises ConfigError."""
    before = out / MANIFEST
    if before.is_file():
        there = read_typed(before, dict[str, Any])
        for section in manifest:
            mine, theirs = manifest[section], there.get(section) or {}
            for key in mine.keys() & theirs.keys():
                now, then = mine[key], theirs[key]
                if now != then:
                    raise ConfigError(
                        f"--out {out}: holds a landscape with other {section} ({key}: {then}, now "
                        f"{now}); give another --out"
                    )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: holds something, but no landscape; give another --out")
