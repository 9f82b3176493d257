"""`deit prune`: remove attention heads and hidden units of a run, and distill the rest again."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deit.config.schema import Config, to_dict
from deit.config.sections.optim import OptimConfig
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.console import info
from deit.core.errors import CheckpointError, ConfigError
from deit.core.filesystem import check_writable, lock_dir, replace_dir, write_json
from deit.core.json_io import check_same_request
from deit.deploy.prune_options import (
    CONTROLS,
    MANIFEST,
    PRUNED,
    RECOVERED,
    SELECTION,
    PruneOptions,
    check_controls,
    check_options,
    recovery_config,
)
from deit.deploy.prune_selection import print_selection, scoring_config, select_units, units_to_keep
from deit.deploy.prune_tables import print_pruning, prune_page, prune_result
from deit.evaluation.load_run import resolve_run
from deit.experiments import shared_targets
from deit.experiments.finished_runs import FinishedRunChecker
from deit.experiments.parallel_runs import RunProgress, RunSpec, check_num_parallel, combined_error
from deit.experiments.sweep_execute import train_with_retries, unfinished
from deit.models.saved_student import WEIGHTS, ModelInfo, load_student, write_student
from deit.models.surgery.pruning_masks import MASKS
from deit.models.surgery.structured_pruning import KeptUnits, pruned_config, slice_weights
from deit.models.weight_files import digest_of, read_weights
from deit.training.progress_log import schedule_of

_MAY_DIFFER = ("drop_path", "dropout", "qat")


def prune(
    run: str | Path,
    out: str | Path,
    options: PruneOptions = PruneOptions(),
    *,
    recovery: Config | None = None,
    checkpoint: str = "best",
    controls: Sequence[str] = (),
    parallel: int = 1,
    dry_run: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Prune the heads and hidden units of a run's student, train it again, and compare the steps.

    out: folder of all results. recovery: the configuration of the training after pruning, with the
    student before pruning; default: `recovery_config` of the run's. checkpoint: of the run, best or
    last. controls: keys of CONTROLS, students of the same shape trained from random weights.
    parallel: number of trainings in parallel. dry_run: print what would be kept, and write nothing.
    command: the command line, for the records. The same call resumes an interrupted one.

    Returns the content of results.json; empty for a dry run. Raises the errors of deit.core.errors.

    >>> from deit.core.console import quiet
    >>> with quiet():
    ...     result = prune("checkpoints/digits", "pruned", PruneOptions(hidden=0.5))
    >>> {name: row["parameters"] for name, row in result["rows"].items()}
    {'digits': 4180, 'pruned': 3124, 'recovered': 3124}
    """
    run, out = Path(run), Path(out)
    check_options(options)
    check_controls(controls)
    check_num_parallel(parallel, name="parallel")
    config, saved = resolve_run(run, checkpoint)
    recovery = recovery_config(config) if recovery is None else recovery
    _check_run(config, saved, run)
    _check_recovery(config, recovery, controls)
    num_units = units_to_keep(config, options)
    manifest = _manifest(config, saved, options, recovery)
    check_same_request(out, MANIFEST, manifest, what="pruning")
    controls = _with_finished(controls, out)
    _print_plan(config, recovery, controls)
    score_config = scoring_config(config, recovery, saved)
    if dry_run:
        _select(score_config, saved, options, num_units)
        info("dry run: nothing is written")
        return {}
    check_writable(out, name="out")
    out.mkdir(parents=True, exist_ok=True)
    with lock_dir(out, name="out"):
        write_json(out / MANIFEST, manifest)
        if not (out / PRUNED / run_folder.CONFIG).is_file():
            model_info, units, weights = _select(score_config, saved, options, num_units)
            _write_pruned(out / PRUNED, config, model_info, units, weights)
        _, model_info = load_student(out / PRUNED / run_folder.BEST)
        runs = _runs(config, recovery, model_info, out, controls)
        _train(runs, parallel)
        result = prune_result(run, checkpoint, out, runs, command)
        _write_results(out, result)
    print_pruning(result)
    return result


def _select(
    config: Config, saved: Path, options: PruneOptions, num_units: tuple[int, int]
) -> tuple[ModelInfo, KeptUnits, dict[str, Tensor]]:
    """Select the units to keep and print how many they are; returned as by `select_units`."""
    model_info, units, weights = select_units(config, saved, options, num_units)
    print_selection(model_info, units)
    return model_info, units, weights


def _with_finished(controls: Sequence[str], out: Path) -> tuple[str, ...]:
    """Return the requested controls and the finished ones, which stay in the table."""
    return tuple(
        control
        for control, folder in CONTROLS.items()
        if control in controls or run_folder.read_result(out / folder) is not None
    )


def _train(runs: list[RunSpec], parallel: int) -> None:
    """Train the runs that are not finished. Raises the errors of those that fail twice."""
    FinishedRunChecker().check(runs)
    remaining = unfinished(runs)
    progress = RunProgress(len(remaining))
    failed = train_with_retries(remaining, parallel=parallel, retries=1, progress=progress)
    if failed:
        raise combined_error(failed)


def _write_results(out: Path, result: dict[str, Any]) -> None:
    write_json(out / "results.json", result)
    (out / "results.md").write_text(prune_page(result), encoding="utf-8")
    info(f"wrote {out / 'results.json'}")
    info(f"wrote {out / 'results.md'}")


def _check_run(config: Config, saved: Path, run: Path) -> None:
    """Raise CheckpointError if a run is not finished, ConfigError if it cannot be pruned."""
    if saved.parent.name != PRUNED and run_folder.read_result(saved.parent) is None:
        raise CheckpointError(
            f"{run}: is not finished; resume it first (its own command with --resume)"
        )
    if not config.student.is_transformer:
        raise ConfigError(
            f"{run}: student.name = {config.student.name!r}: only deit_* and vit_* have heads and "
            "hidden units to prune"
        )
    if config.student.adapters != "none":
        raise ConfigError(
            f"{run}: student.adapters = {config.student.adapters!r}: a student with adapters "
            "cannot be pruned; prune it first, then add adapters"
        )
    if config.student.shared_block_size > 1:
        raise ConfigError(
            f"{run}: student.shared_block_size = {config.student.shared_block_size}: blocks with "
            "shared weights cannot be pruned to different shapes"
        )
    if (saved / MASKS).is_file():
        raise ConfigError(
            f"{run}: has pruning masks, which structured pruning would lose; prune the run without "
            "masks, then search for lottery tickets in the result (deit lottery --init.weights)"
        )


def _check_recovery(config: Config, recovery: Config, controls: Sequence[str]) -> None:
    """Raise ConfigError if the recovery does not fit the run."""
    for field in dataclasses.fields(config.student):
        trained = getattr(config.student, field.name)
        requested = getattr(recovery.student, field.name)
        if trained != requested and field.name not in _MAY_DIFFER:
            raise ConfigError(
                f"student.{field.name} = {requested!r}: the student is the run's ({trained!r}); "
                f"only {', '.join(f'student.{name}' for name in _MAY_DIFFER)} can be changed"
            )
    if recovery.optim.trainable != "all":
        raise ConfigError(
            f"optim.trainable = {recovery.optim.trainable!r}: a pruned student has to be trained "
            "as a whole; use optim.trainable all"
        )
    if "long" in controls and config.init.weights is not None:
        raise ConfigError(
            f"controls = long: the run was itself initialized from weights (init.weights "
            f"{config.init.weights}), so the length of its whole training is unknown; use "
            "controls short"
        )


def _manifest(
    config: Config, saved: Path, options: PruneOptions, recovery: Config
) -> dict[str, Any]:
    """Return what all calls in a folder must have in common.

    These are the weights, the options, and all of the recovery that decides its result.
    """
    if recovery.init != config.init:
        raise ConfigError("init.*: is set by this command; omit it")
    weights = {"weights": digest_of(read_weights(saved / WEIGHTS))}
    return {**weights, **options.recorded(), **shared_targets.result_fields(recovery)}


def _print_plan(run: Config, recovery: Config, controls: Sequence[str]) -> None:
    """Print the schedules and teachers of the trainings."""
    teachers = ", ".join(recovery.teacher.source or recovery.teacher.target_stores)
    if recovery.loss.kind == "none":
        teachers = "no distillation"
    else:
        teachers = f"distilled from {teachers}"
    info(f"recovery  {schedule_of(recovery.optim)}; {teachers}")
    schedules = {"short": recovery.optim, "long": _combined_schedule(run, recovery)}
    for control in controls:
        schedule = schedule_of(schedules[control])
        info(f"control   {CONTROLS[control]}, from random weights: {schedule}")


def _combined_schedule(run: Config, recovery: Config) -> OptimConfig:
    """Return the run's schedule, for the epochs of the run and of the recovery together.

    Gradient accumulation is that of the recovery, as it only depends on the memory.
    """
    epochs = run.optim.epochs + recovery.optim.epochs
    return dataclasses.replace(
        run.optim, epochs=epochs, grad_accum_steps=recovery.optim.grad_accum_steps
    )


def _write_pruned(
    folder: Path,
    config: Config,
    model_info: ModelInfo,
    units: KeptUnits,
    weights: dict[str, Tensor],
) -> None:
    """Write the pruned student into a folder that can be evaluated and exported like a run."""
    head_width = model_info.student.width // model_info.student.heads
    pruned = dataclasses.replace(model_info, student=pruned_config(model_info.student, units))
    folder.mkdir(exist_ok=True)
    sliced = slice_weights(weights, units, head_width=head_width)
    replace_dir(folder / run_folder.BEST, lambda best: write_student(best, sliced, pruned))
    write_json(folder / SELECTION, units._asdict())
    # The configuration comes last: it marks the folder as complete.
    write_json(folder / run_folder.CONFIG, to_dict(config.replace(student=pruned.student)))


def _runs(
    run: Config, recovery: Config, model_info: ModelInfo, out: Path, controls: Sequence[str]
) -> list[RunSpec]:
    """Return the recovery of the pruned student and its controls (see CONTROLS)."""
    shape = {
        field: getattr(model_info.student, field)
        for field in ("heads_per_block", "mlp_hidden_per_block")
    }
    recovery = recovery.replace(student=shape, run={"keep_steps": ()})
    random_init = {
        "weights": None,
        "head": "keep",
        "pos_embed_resize": "deit",
        "pruning_masks": "keep",
        "start_step": 0,
    }
    source = str(out / PRUNED)
    config_file = out / RECOVERED / run_folder.CONFIG
    if run_folder.list_checkpoints(out / RECOVERED):
        # From another working directory, the same path is written differently.
        source = load_config(config_file).init.weights
    else:
        config_file.unlink(missing_ok=True)  # of a process killed before its first checkpoint
    # Controls are normalized like the pruned run.
    channel_stats = {"mean": model_info.mean, "std": model_info.std}
    control = recovery.replace(init=random_init, views=channel_stats)
    configs = {
        RECOVERED: recovery.replace(init={**random_init, "weights": source}),
        CONTROLS["short"]: control,
        CONTROLS["long"]: dataclasses.replace(control, optim=_combined_schedule(run, recovery)),
    }
    names = [RECOVERED, *(CONTROLS[name] for name in controls)]
    return [RunSpec(name, configs[name], out / name) for name in names]
