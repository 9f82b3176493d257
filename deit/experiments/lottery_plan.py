"""The runs of a search for lottery tickets: levels of pruning, and the controls beside them."""

from pathlib import Path
from typing import NamedTuple

from deit.config.schema import Config
from deit.core import run_folder
from deit.experiments.base_runs import slugify
from deit.experiments.lottery_options import DENSE, ONE_SHOT, REINITIALIZED, TICKET, LotteryOptions
from deit.experiments.runner import RunSpec

_OTHER_WEIGHTS = 1_000_000  # from the seed of a run to that of its re-initialised control


class LotteryPlan(NamedTuple):
    """What follows for the runs. densities: the share of the prunable weights that each level
    keeps, from level 1 on. rewind: the update whose weights, schedule, order and views every level
    goes back to. controls, at: as in Asked."""

    scope: str
    densities: tuple[float, ...]
    rewind: int
    controls: tuple[str, ...]
    control_levels: tuple[int, ...]


def plan_of(asked: LotteryOptions, config: Config, *, updates: int) -> LotteryPlan:
    """The plan of what is asked. updates: of an epoch. Raises ConfigError."""
    epochs = config.optim.warmup_epochs if asked.rewind is None else asked.rewind
    densities = asked.densities()
    at = tuple(range(1, len(densities) + 1)) if asked.at is None else asked.at
    return LotteryPlan(asked.scope, densities, round(epochs * updates), asked.controls, at)


class LotteryRun(NamedTuple):
    """A run of the search. kind: dense (level 0), ticket, or one of CONTROLS. masks: its file of
    masks; None of the dense run."""

    kind: str
    level: int
    seed: int
    run: RunSpec
    masks: Path | None


def folder_of(out: Path, seed: int, kind: str, level: int) -> Path:
    """Where a run of a search in `out` lies; of level 0 the dense one."""
    name = "level" if kind in (DENSE, TICKET) else slugify(kind)
    return out / f"seed-{seed}" / f"{name}-{level}"


def lottery_runs(plan: LotteryPlan, base: Config, seed: int, out: Path) -> list[LotteryRun]:
    """The runs of one seed, each behind those it needs. base: the dense run's configuration, but
    for the seed. out: the folder of the search."""
    config = base.replace(run={"seed": seed})
    kept = (plan.rewind,) if plan.rewind else ()
    first = RunSpec(
        f"dense, seed {seed}",
        config.replace(run={"keep_steps": kept}),
        folder_of(out, seed, DENSE, 0),
    )
    found = [LotteryRun(DENSE, 0, seed, first, None)]
    for level in range(1, len(plan.densities) + 1):
        for kind in (TICKET, *(plan.controls if level in plan.control_levels else ())):
            if kind == ONE_SHOT and level == 1:
                continue  # that is the ticket itself
            folder = folder_of(out, seed, kind, level)
            # A re-initialised control has the ticket's own mask.
            of = folder_of(out, seed, TICKET if kind == REINITIALIZED else kind, level).name
            masks = folder.parent / "masks" / f"{of}.safetensors"
            run = RunSpec(
                f"{kind} of level {level}, seed {seed}",
                _pruned(config, kind, masks, plan.rewind, first.out),
                folder,
            )
            found.append(LotteryRun(kind, level, seed, run, masks))
    return found


def _pruned(config: Config, kind: str, masks: Path, rewind: int, dense: Path) -> Config:
    """A run under masks: from the dense run's weights of the update to go back to, and on from
    there; a re-initialised one from other random weights, its whole schedule, on the same views."""
    init: dict[str, object] = {"pruning_masks": str(masks), "head": "keep"}
    if kind == REINITIALIZED:
        other = {"seed": config.run.seed + _OTHER_WEIGHTS}
        init |= {"weights": None, "pos_embed_resize": "deit"}
        return config.replace(run=other, views={"seed": config.views_seed}, init=init)
    if rewind == 0:  # the same seed gives the same weights
        return config.replace(init={"pruning_masks": str(masks)})
    init |= {"weights": str(run_folder.checkpoint_path(dense, rewind)), "start_step": rewind}
    return config.replace(init=init)
