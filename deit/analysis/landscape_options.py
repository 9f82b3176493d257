"""What of a loss landscape is asked for, and what cannot be; no torch."""

from dataclasses import dataclass

from deit.core.errors import ConfigError, did_you_mean
from deit.experiments.lottery_options import CONTROLS, TICKET

PARTS = ("lines", "planes", "curvature", "volume")
KINDS = (TICKET, *CONTROLS)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class LandscapeOptions:
    """What a command line says of a landscape.

    parts: of PARTS. kinds, levels, run_seed: of a search for tickets which runs, beside its dense
    one; levels None: all; run_seed None: the first. checkpoint: best or last. split, images: whose
    loss. points: of a line. grid, span: points along each axis of a plane, and how far it goes,
    in lengths of the filters. top, steps: largest eigenvalues, and steps to find them in. probes:
    of the trace. rays, rise: of the volume, and by how much [nats] the loss rises to its rim.
    seed: of everything that is drawn.
    """

    parts: tuple[str, ...] = PARTS
    kinds: tuple[str, ...] = (TICKET,)
    levels: tuple[int, ...] | None = None
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


_LEAST = {
    "images": 1,
    "points": 3,
    "grid": 3,
    "num_eigenvalues": 1,
    "steps": 2,
    "probes": 2,
    "rays": 1,
}


def check_asked(asked: LandscapeOptions) -> None:
    """Refuse what cannot be, before anything is loaded. Raises ConfigError."""
    known = {"measure": (asked.parts, PARTS), "kinds": (asked.kinds, KINDS)}
    known["split"] = ((asked.split,), SPLITS)
    for option, (names, all_of_them) in known.items():
        for name in names:
            if name not in all_of_them:
                listed = ", ".join(all_of_them)
                raise ConfigError(
                    f"--{option} {name}: should be of {listed}{did_you_mean(name, all_of_them)}"
                )
    for option, least in _LEAST.items():
        if getattr(asked, option) < least:
            raise ConfigError(
                f"{_option(option)} {getattr(asked, option)}: should be at least {least}"
            )
    for option in ("plane_extent", "loss_rise"):
        if not 0 < getattr(asked, option) < float("inf"):
            raise ConfigError(f"{_option(option)} {getattr(asked, option):g}: should be above 0")
    if asked.num_eigenvalues >= asked.steps:
        raise ConfigError(
            f"--num-eigenvalues {asked.num_eigenvalues}: should be below --steps ({asked.steps})"
        )


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")
