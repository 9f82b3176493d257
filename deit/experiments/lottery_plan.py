"""Plan the runs of a lottery experiment, the pruning levels and their controls, and print them."""

from pathlib import Path
from typing import NamedTuple

from deit.config.schema import Config
from deit.core import run_folder
from deit.core.console import format_duration, info, table
from deit.experiments.base_runs import NEEDED_FIRST, slugify
from deit.experiments.lottery_options import DENSE, ONE_SHOT, REINITIALIZED, TICKET, LotteryOptions
from deit.experiments.parallel_runs import RunSpec
from deit.experiments.sweep_execute import unfinished
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


def log_plan(
    plan: LotteryPlan, config: Config, runs: list[LotteryRun], steps_per_epoch: int
) -> None:
    """Log the levels, the number of runs and their estimated time."""
    sparsities = ", ".join(f"{100 * (1 - density):.1f}" for density in plan.densities)
    info(f"levels    sparsity {sparsities} % of the prunable weights (scope {plan.scope})")
    epoch = f" (epoch {plan.rewind_step / steps_per_epoch:g})" if plan.rewind_step else ""
    info(f"rewind    to the weights, schedule, order and views of step {plan.rewind_step}{epoch}")
    specs = [run.spec for run in runs]
    num_finished = len(runs) - len(unfinished(specs))
    info(
        f"runs      {len(runs)} of {config.optim.epochs} epochs, {num_finished} of them finished; "
        "each level waits for the level before"
    )
    info(f"time      {work_left(specs, steps_per_epoch)}")


def work_left(runs: list[RunSpec], steps_per_epoch: int) -> str:
    """Return the number of steps left, without those of teachers, and the time that they take,
    estimated from finished runs."""
    num_left = sum(
        run.config.optim.epochs * steps_per_epoch
        - max(run.config.init.start_step, _num_steps_done(run))
        for run in unfinished(runs)
    )
    results = [result for run in runs if (result := run_folder.read_result(run.out)) is not None]
    batch_size = runs[0].config.optim.batch_size
    num_measured = sum(result["samples_seen"] for result in results) / batch_size
    if not num_left or not num_measured:
        later = "; their time is estimated once a run has finished" if num_left else ""
        return f"{num_left:,} steps, without those of teachers{later}"
    step_seconds = sum(result["seconds"] for result in results) / num_measured
    return (
        f"{num_left:,} steps, without those of teachers; {format_duration(num_left * step_seconds)}"
        f" one run after another, at {step_seconds:.3g} s per step as in the finished runs"
    )


def _num_steps_done(run: RunSpec) -> int:
    """Return the step of a run's latest checkpoint; 0 without one."""
    return max((step for step, _ in run_folder.list_checkpoints(run.out)), default=0)


def print_runs(plan: LotteryPlan, base_runs: list[RunSpec], runs: list[LotteryRun]) -> None:
    """Print the runs that the plan has."""
    rows = [(NEEDED_FIRST, "", run.name, str(run.out)) for run in base_runs]
    rows += [(run.kind, sparsity_text(run, plan), str(run.seed), str(run.spec.out)) for run in runs]
    title = "dry run: nothing is trained or written"
    table(title, ("", "sparsity %", "seed", "folder"), rows, text=True)
