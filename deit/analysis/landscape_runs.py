"""Where landscapes are looked at: the runs, their weights and masks, and the loss around them."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deit.analysis.landscape_options import LandscapeOptions
from deit.analysis.loss_surface import LossSurface
from deit.config.schema import differing_split_field
from deit.core import run_folder
from deit.core.console import warn
from deit.core.errors import CheckpointError, ConfigError, DataError
from deit.core.json_io import translate_value_errors
from deit.core.types import logits_by_head
from deit.datasets.splits import load_split, stratified_indices
from deit.distill.inference import evaluation_batches
from deit.evaluation.load_run import evaluation_config, resolve_run, warn_unfinished
from deit.experiments.lottery_options import DENSE, TICKET
from deit.experiments.lottery_plan import run_path
from deit.experiments.sweep_tables import MANIFEST, RESULTS, read_results
from deit.models.load_weights import load_weights_from
from deit.models.saved import load_student
from deit.models.student import Student
from deit.models.surgery.pruning_masks import Masks
from deit.models.weight_files import digest_of

_AT_ONCE = 128  # images whose second derivatives are there at once


class LandscapePoint(NamedTuple):
    """A finished run, at the weights of one of its checkpoints. name: as it is told. kind, level:
    of a search for tickets, else "" and 0."""

    name: str
    run: Path
    saved: Path
    kind: str = ""
    level: int = 0

    def masks(self) -> Masks:
        """Its masks, those of its base where adapters were trained on one; {} of a dense run."""
        return load_weights_from(str(self.saved)).masks or {}

    def follows(self, other: "LandscapePoint") -> bool:
        """Whether this one was pruned by what the other ended with."""
        chain = (DENSE, TICKET)
        return self.kind == TICKET and other.kind in chain and other.level == self.level - 1


def places_of(runs: list[Path], asked: LandscapeOptions) -> list[LandscapePoint]:
    """The places that paths name: of a search for tickets its levels, the dense one first; of runs
    these themselves. Raises ConfigError and CheckpointError."""
    searches = [run for run in runs if (run / MANIFEST).is_file()]
    if searches and len(runs) > 1:
        raise ConfigError(f"{searches[0]}: is a search for tickets, which is looked at alone")
    if searches:
        return _of_search(searches[0], asked)
    usual = LandscapeOptions()
    options = {"kinds": "--kinds", "levels": "--rounds", "run_seed": "--run-seed"}
    for field, option in options.items():
        if getattr(asked, field) != getattr(usual, field):
            raise ConfigError(f"{option}: applies to a lottery search, and {runs[0]} is none")
    found = [
        LandscapePoint(run.resolve().name, run, resolve_run(run, asked.checkpoint)[1])
        for run in runs
    ]
    for place in found:
        warn_unfinished(place.saved.parent)
    names = [place.name for place in found]
    return [
        place if names.count(place.name) == 1 else place._replace(name=str(place.run))
        for place in found
    ]


def _whole(value: object) -> int:
    """The value, a whole number. Raises TypeError for any other."""
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _of_search(out: Path, asked: LandscapeOptions) -> list[LandscapePoint]:
    result = read_results(out)
    if "tickets" not in result:
        raise ConfigError(f"{out}: is a sweep; name some of its runs (OUT/runs/...)")
    with translate_value_errors(out / RESULTS):
        seeds = [_whole(seed) for seed in result["seeds"]]
        first = seeds[0]
        sparsity = {
            (row["values"]["run"], _whole(row["level"])): name
            for name, row in result["rows"].items()
            if "level" in row
        }
    seed = first if asked.run_seed is None else asked.run_seed
    if seed not in seeds:
        raise ConfigError(f"--run-seed {seed}: {out} has {', '.join(map(str, seeds))}")
    if not sparsity:
        raise CheckpointError(
            f"{out / RESULTS}: names no levels; run the search (deit lottery) again"
        )
    levels = sorted({level for _, level in sparsity})
    for level in asked.levels or ():
        if level not in levels:
            raise ConfigError(f"--rounds {level}: {out} has {', '.join(map(str, levels))}")
    wanted = levels if asked.levels is None else sorted({0, *asked.levels})
    found = []
    for level in wanted:
        for kind in (DENSE,) if level == 0 else asked.kinds:
            run = run_path(out, seed, kind, level)
            if (kind, level) in sparsity and run_folder.read_result(run) is not None:
                saved = resolve_run(run, asked.checkpoint)[1]
                found.append(LandscapePoint(sparsity[kind, level], run, saved, kind, level))
    if not found:
        raise CheckpointError(f"{out}: none of its runs is finished")
    for kind in asked.kinds:
        if not any(place.kind == kind for place in found) and wanted != [0]:
            raise ConfigError(f"--kinds {kind}: {out} has no such finished run at these levels")
    return found


class LandscapeData(NamedTuple):
    """The images whose loss is looked at: views float32 [images, 3, side, side] in [0, 1], labels
    int64 [images], in batches. digest: of both."""

    batches: list[tuple[Tensor, Tensor]]
    sizes: list[int]
    number: int
    digest: str


def view_of(
    places: list[LandscapePoint], asked: LandscapeOptions, *, root: str | None, device: torch.device
) -> LandscapeData:
    """The images that all places are looked at with, as an evaluation shows them: so many of a
    split, spread over the classes.

    Raises ConfigError where the runs are of other data, DataError.
    """
    configs = [
        evaluation_config(resolve_run(one.run, asked.checkpoint)[0], root=root) for one in places
    ]
    first = configs[0]
    for place, config in zip(places, configs):
        if config.student.qat != "none":
            raise ConfigError(
                f"{place.name}: student.qat = {config.student.qat!r}: its loss goes in "
                "steps, of which no curve can be drawn; look at the run it was fine-tuned from"
            )
        field = differing_split_field(config.data, first.data)
        if config.data.train_fraction != first.data.train_fraction:
            field = "data.train_fraction"
        if field is not None:
            raise ConfigError(
                f"{place.name}: has another {field} than {places[0].name}; landscapes stand beside "
                "each other on the same images alone"
            )
    names, images = load_split(first.data, asked.split)
    if names != load_student(places[0].saved)[1].class_names:
        raise DataError(f"{places[0].run}: was trained on other classes than the data has")
    rows = stratified_indices(images.labels, asked.images, seed=asked.seed, stream="landscape")
    there = len(images.labels[rows].unique())
    if there < len(names):
        warn(
            f"--images {asked.images}: of {there} of the {len(names)} classes alone; the loss says "
            "nothing of the others"
        )
    chunks = rows.split(_AT_ONCE)
    views = evaluation_batches(images, chunks, first.evaluation, device=device)
    labels = images.labels.to(device)
    batches = [(one, labels[chunk.to(device)]) for one, chunk in zip(views, chunks)]
    tensors = {
        f"{kind}-{place}": one
        for place, two in enumerate(batches)
        for kind, one in zip(("views", "labels"), two)
    }
    sizes = [len(chunk) for chunk in chunks]
    return LandscapeData(batches, sizes, len(rows), digest_of(tensors))


def share_weight_space(places: list[LandscapePoint]) -> bool:
    """Whether the weights of all places are points of one space: networks of one shape, with the
    same statistics and normalisation."""
    first, *others = (load_student(place.saved)[0] for place in places)
    shapes = [(name, one.shape) for name, one in first.named_parameters()]
    return all(
        shapes == [(name, one.shape) for name, one in other.named_parameters()]
        and all(torch.equal(a, b) for a, b in zip(first.buffers(), other.buffers()))
        for other in others
    )


def surface_of(place: LandscapePoint, view: LandscapeData, *, masked: bool = True) -> LossSurface:
    """The mean cross-entropy of the fused answer (or the only head's) with the labels, around a
    place; masked: along the weights that it keeps alone."""
    masks = {f"network.{name}": mask for name, mask in place.masks().items()} if masked else {}
    device = view.batches[0][0].device
    masks = {name: mask.to(device) for name, mask in masks.items()}
    return LossSurface(student_of(place, view), view.batches, _loss, sizes=view.sizes, masks=masks)


def student_of(place: LandscapePoint, view: LandscapeData) -> Student:
    """The student of a place, on the device of the images."""
    return load_student(place.saved)[0].to(view.batches[0][0].device)


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    heads = logits_by_head(network(images))
    return cross_entropy(heads.get("fused", heads["class"]), labels)


def measure(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
    """The loss, and the share of wrong answers of each head: `error`, with its name where there are
    several."""
    images, labels = batch
    heads = logits_by_head(network(images))
    final = heads.get("fused", heads["class"])

    def wrong(logits: Tensor) -> Tensor:
        return (logits.argmax(dim=1) != labels).float().mean()

    found = {"loss": cross_entropy(final, labels), "error": wrong(final)}
    if "fused" in heads:
        found |= {f"error_{name}": wrong(heads[name]) for name in ("class", "distillation")}
    return found
