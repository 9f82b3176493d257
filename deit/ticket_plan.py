"""The runs of a search for lottery tickets: levels of pruning, and the controls beside them."""

from pathlib import Path
from typing import NamedTuple

from deit import checkpoint
from deit.at_once import Planned
from deit.config import Config, views_seed
from deit.ground import slug
from deit.ticket_options import ANEW, DENSE, ONE_SHOT, TICKET, Asked

_OTHER_WEIGHTS = 1_000_000  # from the seed of a run to that of its re-initialised control


class Plan(NamedTuple):
    """What follows for the runs. densities: the share of the prunable weights that each level
    keeps, from level 1 on. rewind: the update whose weights, schedule, order and views every level
    goes back to. controls, at: as in Asked."""

    scope: str
    densities: tuple[float, ...]
    rewind: int
    controls: tuple[str, ...]
    at: tuple[int, ...]


def plan_of(asked: Asked, config: Config, *, updates: int) -> Plan:
    """The plan of what is asked. updates: of an epoch. Raises ConfigError."""
    epochs = config.optim.warmup_epochs if asked.rewind is None else asked.rewind
    densities = asked.densities()
    at = tuple(range(1, len(densities) + 1)) if asked.at is None else asked.at
    return Plan(asked.scope, densities, round(epochs * updates), asked.controls, at)


class Ticket(NamedTuple):
    """A run of the search. kind: dense (level 0), ticket, or one of CONTROLS. masks: its file of
    masks; None of the dense run."""

    kind: str
    level: int
    seed: int
    run: Planned
    masks: Path | None


def folder_of(out: Path, seed: int, kind: str, level: int) -> Path:
    """Where a run of a search in `out` lies; of level 0 the dense one."""
    name = "level" if kind in (DENSE, TICKET) else slug(kind)
    return out / f"seed-{seed}" / f"{name}-{level}"


def tickets_of(plan: Plan, base: Config, seed: int, out: Path) -> list[Ticket]:
    """The runs of one seed, each behind those it needs. base: the dense run's configuration, but
    for the seed. out: the folder of the search."""
    config = base.replace(run={"seed": seed})
    kept = (plan.rewind,) if plan.rewind else ()
    first = Planned(
        f"dense, seed {seed}",
        config.replace(run={"keep_updates": kept}),
        folder_of(out, seed, DENSE, 0),
    )
    found = [Ticket(DENSE, 0, seed, first, None)]
    for level in range(1, len(plan.densities) + 1):
        for kind in (TICKET, *(plan.controls if level in plan.at else ())):
            if kind == ONE_SHOT and level == 1:
                continue  # that is the ticket itself
            folder = folder_of(out, seed, kind, level)
            # A re-initialised control has the ticket's own mask.
            of = folder_of(out, seed, TICKET if kind == ANEW else kind, level).name
            masks = folder.parent / "masks" / f"{of}.safetensors"
            run = Planned(
                f"{kind} of level {level}, seed {seed}",
                _pruned(config, kind, masks, plan.rewind, first.out),
                folder,
            )
            found.append(Ticket(kind, level, seed, run, masks))
    return found


def _pruned(config: Config, kind: str, masks: Path, rewind: int, dense: Path) -> Config:
    """A run under masks: from the dense run's weights of the update to go back to, and on from
    there; a re-initialised one from other random weights, its whole schedule, on the same views."""
    start: dict[str, object] = {"masks": str(masks), "heads": "keep"}
    if kind == ANEW:
        other = {"seed": config.run.seed + _OTHER_WEIGHTS}
        start |= {"source": None, "kernel": "deit"}
        return config.replace(run=other, views={"seed": views_seed(config)}, start=start)
    if rewind == 0:  # the same seed gives the same weights
        return config.replace(start={"masks": str(masks)})
    start |= {"source": str(checkpoint.folder_of(dense, rewind)), "update": rewind}
    return config.replace(start=start)
