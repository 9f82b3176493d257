"""Plan the runs of a lottery experiment: the pruning levels and their controls."""

from pathlib import Path
from typing import NamedTuple

from deit.config.schema import Config
from deit.core import run_folder
from deit.experiments.base_runs import slugify
from deit.experiments.lottery_options import DENSE, ONE_SHOT, REINITIALIZED, TICKET, LotteryOptions
from deit.experiments.parallel_runs import RunSpec
from deit.experiments.sweep_grid import Point

_SEED_OFFSET = 1_000_000  # from the seed of a run to that of its reinitialized control


class LotteryPlan(NamedTuple):
    """What is common to the runs of a lottery experiment.

    densities: the share of the prunable weights that each level keeps, from level 1.
    rewind_step: the step of the dense run to whose weights, schedule, order and views every level
    is rewound. controls: as in LotteryOptions. control_levels: its control_rounds.
    """

    scope: str
    densities: tuple[float, ...]
    rewind_step: int
    controls: tuple[str, ...]
    control_levels: tuple[int, ...]


def plan_lottery(options: LotteryOptions, config: Config, *, steps_per_epoch: int) -> LotteryPlan:
    """Return the plan of a lottery experiment. Raises ConfigError for an invalid scope."""
    epochs = config.optim.warmup_epochs if options.rewind_epoch is None else options.rewind_epoch
    densities = options.densities()
    all_levels = tuple(range(1, len(densities) + 1))
    control_levels = all_levels if options.control_rounds is None else options.control_rounds
    rewind = round(epochs * steps_per_epoch)
    return LotteryPlan(options.scope, densities, rewind, options.controls, control_levels)


class LotteryRun(NamedTuple):
    """A run of a lottery experiment.

    kind: dense (level 0), ticket, or one of CONTROLS. masks: the file of its pruning masks; None
    for the dense run.
    """

    kind: str
    level: int
    seed: int
    spec: RunSpec
    masks: Path | None


def run_path(out: str | Path, seed: int, kind: str, level: int) -> Path:
    """Return the run folder in the folder of the experiment. Level 0 is the dense run."""
    name = "level" if kind in (DENSE, TICKET) else slugify(kind)
    return Path(out) / f"seed-{seed}" / f"{name}-{level}"


def lottery_runs(plan: LotteryPlan, base: Config, seed: int, out: str | Path) -> list[LotteryRun]:
    """Return the runs of a seed, each after the runs that it depends on.

    base: the configuration of the dense run, without the seed. out: the folder of the experiment.
    """
    config = base.replace(run={"seed": seed})
    keep_steps = (plan.rewind_step,) if plan.rewind_step else ()
    dense = RunSpec(
        f"dense, seed {seed}",
        config.replace(run={"keep_steps": keep_steps}),
        run_path(out, seed, DENSE, 0),
    )
    runs = [LotteryRun(DENSE, 0, seed, dense, None)]
    for level in range(1, len(plan.densities) + 1):
        for kind in (TICKET, *(plan.controls if level in plan.control_levels else ())):
            if kind == ONE_SHOT and level == 1:
                continue  # the same as the ticket
            folder = run_path(out, seed, kind, level)
            # A reinitialized control uses the masks of the ticket.
            mask_kind = TICKET if kind == REINITIALIZED else kind
            name = run_path(out, seed, mask_kind, level).name
            masks = folder.parent / "masks" / f"{name}.safetensors"
            spec = RunSpec(
                f"{kind} of level {level}, seed {seed}",
                _pruned_config(config, kind, masks, plan.rewind_step, dense.out),
                folder,
            )
            runs.append(LotteryRun(kind, level, seed, spec, masks))
    return runs


def _pruned_config(config: Config, kind: str, masks: Path, rewind: int, dense: Path) -> Config:
    """Return the configuration of a masked run, which starts from the dense run's weights at step
    `rewind`. A reinitialized control starts at step 0 from other random weights, with the same
    views."""
    init: dict[str, object] = {"pruning_masks": str(masks), "head": "keep"}
    if kind == REINITIALIZED:
        run = {"seed": config.run.seed + _SEED_OFFSET}
        init |= {"weights": None, "pos_embed_resize": "deit"}
        return config.replace(run=run, views={"seed": config.views_seed}, init=init)
    if rewind == 0:  # the seed gives the same initial weights
        return config.replace(init={"pruning_masks": str(masks)})
    init |= {"weights": str(run_folder.checkpoint_path(dense, rewind)), "start_step": rewind}
    return config.replace(init=init)


def sparsity_text(run: LotteryRun, plan: LotteryPlan) -> str:
    """Return the sparsity in %, with as many digits as make those of all levels distinct."""
    for digits in range(1, 9):
        texts = [f"{100 * (1 - density):.{digits}f}" for density in (1.0, *plan.densities)]
        if len(set(texts)) == len(texts):
            break
    return texts[run.level]


def point_of(run: LotteryRun, plan: LotteryPlan) -> Point:
    """Return a run as a point of a sweep over its kind and sparsity."""
    sparsity = sparsity_text(run, plan)
    name = DENSE if run.kind == DENSE else f"{run.kind}, {sparsity} %"
    return Point(name, {"run": run.kind, "sparsity %": sparsity}, run.spec.config)
