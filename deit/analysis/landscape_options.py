"""The options of `deit loss-landscape` and their checks; no torch."""

from dataclasses import dataclass

from deit.config.command_choices import check_at_least, check_choice
from deit.core.errors import ConfigError
from deit.experiments.lottery_options import CONTROLS, TICKET

PARTS = ("lines", "planes", "curvature", "volume")
KINDS = (TICKET, *CONTROLS)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class LandscapeOptions:
    """What to measure of a loss landscape.

    measure: a subset of PARTS. kinds, rounds, run_seed: which runs of a lottery search to include,
    in addition to its dense run; rounds: all by default; run_seed: the first by default.
    checkpoint: best or last. split, images: the split, and how many of its images the loss is
    computed on.
    points: number of points of a line. grid: points along each axis of a plane. plane_extent: from
    the center to the border of a plane, in filter norms. num_eigenvalues: number of the largest
    eigenvalues. steps: maximum number of Lanczos steps for them. probes: random vectors for the
    trace. rays: random rays for the volume. loss_rise: the rise of the loss [nats] that bounds the
    basin. seed: of all random directions, and of the choice of images.
    """

    measure: tuple[str, ...] = PARTS
    kinds: tuple[str, ...] = (TICKET,)
    rounds: tuple[int, ...] | None = None
    run_seed: int | None = None
    checkpoint: str = "last"
    split: str = "train"
    images: int = 512
    points: int = 21
    grid: int = 15
    plane_extent: float = 1.0
    num_eigenvalues: int = 5
    steps: int = 60
    probes: int = 16
    rays: int = 32
    loss_rise: float = 0.1
    seed: int = 0


_MINIMUM = {
    "images": 1,
    "points": 3,
    "grid": 3,
    "num_eigenvalues": 1,
    "steps": 2,
    "probes": 2,
    "rays": 1,
}


def check_options(options: LandscapeOptions) -> None:
    """Raise ConfigError if an option has an invalid value."""
    for part in options.measure:
        check_choice("measure", part, PARTS)
    for kind in options.kinds:
        check_choice("kinds", kind, KINDS)
    check_choice("split", options.split, SPLITS)
    for field, minimum in _MINIMUM.items():
        check_at_least(field, getattr(options, field), minimum)
    for field in ("plane_extent", "loss_rise"):
        value = getattr(options, field)
        if not 0 < value < float("inf"):
            raise ConfigError(f"{field} = {value:g}: should be positive and finite")
    if options.num_eigenvalues >= options.steps:
        raise ConfigError(
            f"num_eigenvalues = {options.num_eigenvalues}: should be less than steps "
            f"({options.steps})"
        )
