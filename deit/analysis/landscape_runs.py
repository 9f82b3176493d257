"""The runs of a landscape: their weights, masks and images, and the loss around them."""

from collections.abc import Mapping, Sequence
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
from deit.distill.inference import views_of_chunks
from deit.evaluation.load_run import evaluation_config, resolve_run, warn_unfinished
from deit.experiments.lottery_options import DENSE, TICKET
from deit.experiments.lottery_plan import run_path
from deit.experiments.sweep_tables import MANIFEST, RESULTS, read_results
from deit.models.load_weights import load_weights_from
from deit.models.saved_student import load_student
from deit.models.student import Student
from deit.models.surgery.pruning_masks import Masks
from deit.models.weight_files import digest_of

_BATCH_SIZE = 128  # images; limits the memory of second derivatives


class LandscapePoint(NamedTuple):
    """A finished run at the weights of one of its checkpoints.

    name: for tables and messages. kind, level: of a run of a lottery search, else "" and 0.
    """

    name: str
    run: Path
    saved: Path
    kind: str = ""
    level: int = 0

    def masks(self) -> Masks:
        """Return the pruning masks, {} for a dense run. Adapters have the masks of their base."""
        return load_weights_from(str(self.saved)).masks or {}

    def follows(self, other: "LandscapePoint") -> bool:
        """Return whether this run was pruned according to the final weights of the other."""
        chain = (DENSE, TICKET)
        return self.kind == TICKET and other.kind in chain and other.level == self.level - 1


def landscape_points(runs: Sequence[str | Path], options: LandscapeOptions) -> list[LandscapePoint]:
    """Return the points for some run folders, or for the levels of one lottery search.

    The dense run of a search comes first. Raises ConfigError for options that do not fit the runs,
    CheckpointError if a run is missing or damaged.
    """
    paths = [Path(run) for run in runs]
    searches = [path for path in paths if (path / MANIFEST).is_file()]
    if searches and len(paths) > 1:
        raise ConfigError(
            f"{searches[0]}: is a lottery search, which cannot be combined with other runs"
        )
    if searches:
        return _points_of_search(searches[0], options)
    defaults = LandscapeOptions()
    for field in ("kinds", "rounds", "run_seed"):
        value = getattr(options, field)
        if value != getattr(defaults, field):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise ConfigError(
                f"{field} = {text}: applies to a lottery search, which {paths[0]} is not"
            )
    points = [
        LandscapePoint(path.resolve().name, path, resolve_run(path, options.checkpoint)[1])
        for path in paths
    ]
    for point in points:
        warn_unfinished(point.saved.parent)
    names = [point.name for point in points]
    return [
        point if names.count(point.name) == 1 else point._replace(name=str(point.run))
        for point in points
    ]


def _require_int(value: object) -> int:
    """Return the value, an integer. Raises TypeError for any other type."""
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value


def _points_of_search(out: Path, options: LandscapeOptions) -> list[LandscapePoint]:
    result = read_results(out)
    if "lottery" not in result:
        raise ConfigError(f"{out}: is a sweep; give some of its runs instead ({out}/runs/...)")
    with translate_value_errors(out / RESULTS):
        seeds = [_require_int(seed) for seed in result["seeds"]]
        first_seed = seeds[0]
        names = {
            (row["values"]["run"], _require_int(row["level"])): name
            for name, row in result["rows"].items()
            if "level" in row
        }
    seed = first_seed if options.run_seed is None else options.run_seed
    if seed not in seeds:
        raise ConfigError(f"run_seed = {seed}: {out} has {', '.join(map(str, seeds))}")
    if not names:
        raise CheckpointError(
            f"{out / RESULTS}: contains no levels; run the search (deit lottery) again"
        )
    levels = sorted({level for _, level in names})
    for level in options.rounds or ():
        if level not in levels:
            raise ConfigError(f"rounds = {level}: {out} has {', '.join(map(str, levels))}")
    selected = levels if options.rounds is None else sorted({0, *options.rounds})
    points = []
    for level in selected:
        for kind in (DENSE,) if level == 0 else options.kinds:
            run = run_path(out, seed, kind, level)
            if (kind, level) in names and run_folder.read_result(run) is not None:
                saved = resolve_run(run, options.checkpoint)[1]
                points.append(LandscapePoint(names[kind, level], run, saved, kind, level))
    if not points:
        raise CheckpointError(f"{out}: none of its runs is finished")
    for kind in options.kinds:
        if not any(point.kind == kind for point in points) and selected != [0]:
            raise ConfigError(f"kinds = {kind}: {out} has no such finished run at these levels")
    return points


class LandscapeData(NamedTuple):
    """The images that the loss is computed on.

    batches: views float32 [images, 3, side, side] in [0, 1] and labels int64 [images]. sizes:
    images of each batch. num_images: of all batches. digest: of views and labels.
    """

    batches: list[tuple[Tensor, Tensor]]
    sizes: list[int]
    num_images: int
    digest: str


def load_landscape_data(
    points: list[LandscapePoint],
    options: LandscapeOptions,
    *,
    root: str | None,
    device: torch.device,
) -> LandscapeData:
    """Load the images for all points, prepared as for evaluation and stratified by class.

    root: the current folder of the dataset, if it was moved. Raises ConfigError if the runs differ
    in their data or were trained with quantization, DataError if the data do not fit the runs.
    """
    configs = [
        evaluation_config(resolve_run(point.run, options.checkpoint)[0], root=root)
        for point in points
    ]
    first = configs[0]
    for point, config in zip(points, configs):
        if config.student.qat != "none":
            raise ConfigError(
                f"{point.name}: student.qat = {config.student.qat!r}: the loss of a quantized "
                "network is piecewise constant; use the run that it was fine-tuned from"
            )
        field = differing_split_field(config.data, first.data)
        if config.data.train_fraction != first.data.train_fraction:
            field = "data.train_fraction"
        if field is not None:
            raise ConfigError(
                f"{point.name}: has another {field} than {points[0].name}; landscapes can only be "
                "compared on the same images"
            )
    class_names, images = load_split(first.data, options.split)
    if class_names != load_student(points[0].saved)[1].class_names:
        raise DataError(f"{points[0].run}: was trained on other classes than the data have")
    rows = stratified_indices(images.labels, options.images, seed=options.seed, stream="landscape")
    num_classes = len(images.labels[rows].unique())
    if num_classes < len(class_names):
        warn(
            f"images = {options.images}: covers only {num_classes} of the {len(class_names)} "
            "classes; the loss does not include the others"
        )
    chunks = rows.split(_BATCH_SIZE)
    views = views_of_chunks(images, chunks, first.evaluation, device=device)
    labels = images.labels.to(device)
    batches = [(view, labels[chunk.to(device)]) for view, chunk in zip(views, chunks)]
    tensors = {
        f"{name}-{index}": tensor
        for index, batch in enumerate(batches)
        for name, tensor in zip(("views", "labels"), batch)
    }
    sizes = [len(chunk) for chunk in chunks]
    return LandscapeData(batches, sizes, len(rows), digest_of(tensors))


def share_weight_space(points: list[LandscapePoint]) -> bool:
    """Return whether all networks have the same parameter shapes, statistics and normalization."""
    first, *others = (load_student(point.saved)[0] for point in points)
    shapes = [(name, parameter.shape) for name, parameter in first.named_parameters()]
    return all(
        shapes == [(name, parameter.shape) for name, parameter in other.named_parameters()]
        and all(torch.equal(a, b) for a, b in zip(first.buffers(), other.buffers()))
        for other in others
    )


def surface_of(point: LandscapePoint, data: LandscapeData, *, masked: bool = True) -> LossSurface:
    """Return the loss around a point: the mean cross-entropy of the fused heads, or the only head.

    masked: only the weights that the masks keep are coordinates.
    """
    masks = {f"network.{name}": mask for name, mask in point.masks().items()} if masked else {}
    device = data.batches[0][0].device
    masks = {name: mask.to(device) for name, mask in masks.items()}
    return LossSurface(student_of(point, data), data.batches, _loss, sizes=data.sizes, masks=masks)


def student_of(point: LandscapePoint, data: LandscapeData) -> Student:
    """Load the student of a point onto the device of the images."""
    return load_student(point.saved)[0].to(data.batches[0][0].device)


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    heads = logits_by_head(network(images))
    return cross_entropy(heads.get("fused", heads["class"]), labels)


def loss_and_errors(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
    """Return `loss` and `error` of the final head, in [0, 1], and `error_HEAD` if it is fused."""
    images, labels = batch
    heads = logits_by_head(network(images))
    final = heads.get("fused", heads["class"])

    def error_rate(logits: Tensor) -> Tensor:
        return (logits.argmax(dim=1) != labels).float().mean()

    means = {"loss": cross_entropy(final, labels), "error": error_rate(final)}
    if "fused" in heads:
        means |= {f"error_{name}": error_rate(heads[name]) for name in ("class", "distillation")}
    return means
