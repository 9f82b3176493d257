"""What of a loss landscape is asked for, and what cannot be; no torch."""

from dataclasses import dataclass

from deit.errors import ConfigError
from deit.text import nearest
from deit.ticket_options import CONTROLS, TICKET

PARTS = ("lines", "planes", "curvature", "volume")
KINDS = (TICKET, *CONTROLS)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Asked:
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
    span: float = 1.0
    top: int = 5
    steps: int = 60
    probes: int = 16
    rays: int = 32
    rise: float = 0.1
    seed: int = 0


_LEAST = {"images": 1, "points": 3, "grid": 3, "top": 1, "steps": 2, "probes": 2, "rays": 1}


def check_asked(asked: Asked) -> None:
    """Refuse what cannot be, before anything is loaded. Raises ConfigError."""
    known = {"only": (asked.parts, PARTS), "kinds": (asked.kinds, KINDS)}
    known["split"] = ((asked.split,), SPLITS)
    for option, (names, all_of_them) in known.items():
        for name in names:
            if name not in all_of_them:
                listed = ", ".join(all_of_them)
                raise ConfigError(
                    f"--{option} {name}: should be of {listed}{nearest(name, all_of_them)}"
                )
    for option, least in _LEAST.items():
        if getattr(asked, option) < least:
            raise ConfigError(f"--{option} {getattr(asked, option)}: should be at least {least}")
    for option in ("span", "rise"):
        if not 0 < getattr(asked, option) < float("inf"):
            raise ConfigError(f"--{option} {getattr(asked, option):g}: should be above 0")
    if asked.top >= asked.steps:
        raise ConfigError(f"--top {asked.top}: should be below --steps ({asked.steps})")
