"""`deit prune`: heads and hidden units of a run cut out, and what is left taught once more."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from deit.config.schema import Config, OptimConfig, to_dict
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.console import info
from deit.core.errors import CheckpointError, ConfigError
from deit.core.filesystem import check_writable, lock_dir, replace_dir, write_json
from deit.core.json_io import check_same_request
from deit.deploy.prune_options import CONTROLS, KEPT, MANIFEST, PRUNED, RECOVERED, PruneOptions
from deit.deploy.prune_selection import print_selection, scoring_config, select_units, units_to_keep
from deit.deploy.prune_tables import print_pruning, prune_page, prune_result
from deit.evaluation.load_run import resolve_run
from deit.experiments import shared_targets
from deit.experiments.finished_runs import FinishedRunChecker
from deit.experiments.runner import (
    RunProgress,
    RunSpec,
    check_num_parallel,
    combined_error,
)
from deit.experiments.sweep_execute import train_with_retries, unfinished
from deit.models.saved import WEIGHTS, ModelInfo, load_student, save_student
from deit.models.surgery.pruning_masks import MASKS
from deit.models.surgery.structured_pruning import KeptUnits, pruned_config, slice_weights
from deit.models.weight_files import digest_of, read_weights
from deit.training.progress_log import schedule_of

_MAY_DIFFER = ("drop_path", "dropout", "qat")


def prune(
    run: Path,
    asked: PruneOptions,
    recovery: Config,
    out: Path,
    *,
    dry_run: bool = False,
    name: str,
    controls: tuple[str, ...],
    parallel: int,
    command: str = "",
) -> dict[str, Any]:
    """Cut heads and hidden units out of a run's student, train what is left by a schedule with the
    run's own teacher, and tell what each step did to accuracy, size and arithmetic.

    recovery: the configuration and folder of that training, its student still whole. name: of the
    run's checkpoint, best or last. controls: of CONTROLS, students of the same shape from random
    weights. The same command goes on. Returns what results.json holds. Raises the
    errors of deit.core.errors.
    """
    check_num_parallel(parallel, option="--parallel")
    config, saved = resolve_run(run, name)
    _check(config, saved, run)
    _check_asked(config, recovery, controls)
    numbers = units_to_keep(config, asked)
    manifest = _asked_in_all(config, saved, asked, recovery)
    check_same_request(out, MANIFEST, manifest, what="pruning")
    controls = tuple(  # what is finished is told, whether it is asked for again or not
        one
        for one, folder in CONTROLS.items()
        if one in controls or run_folder.read_result(out / folder) is not None
    )
    _announce(config, recovery, controls)
    asking = scoring_config(config, recovery, saved)
    if dry_run:
        facts, kept, _ = select_units(asking, saved, asked, numbers)
        print_selection(facts, kept)
        info("dry run: nothing is written")
        return {}
    check_writable(out, option="--out")
    out.mkdir(parents=True, exist_ok=True)
    with lock_dir(out, option="--out"):
        write_json(out / MANIFEST, manifest)
        if not (out / PRUNED / run_folder.CONFIG).is_file():
            facts, kept, weights = select_units(asking, saved, asked, numbers)
            print_selection(facts, kept)
            _write(out / PRUNED, config, facts, kept, weights)
        _, facts = load_student(out / PRUNED / run_folder.BEST)
        runs = _runs(config, recovery, facts, out, controls)
        FinishedRunChecker().check(runs)
        left = unfinished(runs)
        failed = train_with_retries(
            left, parallel=parallel, retries=1, progress=RunProgress(len(left))
        )
        if failed:
            raise combined_error(failed)
        result = prune_result(run, name, out, runs, command)
        _write_results(out, result)
    print_pruning(result)
    return result


def _write_results(out: Path, result: dict[str, Any]) -> None:
    write_json(out / "results.json", result)
    (out / "results.md").write_text(prune_page(result), encoding="utf-8")
    info(f"wrote {out / 'results.json'}")
    info(f"wrote {out / 'results.md'}")


def _check(config: Config, saved: Path, run: Path) -> None:
    """Refuse what has no heads to cut. Raises ConfigError."""
    if saved.parent.name != PRUNED and run_folder.read_result(saved.parent) is None:
        raise CheckpointError(
            f"{run}: is not finished; resume it first (its own command with --resume)"
        )
    if not config.student.is_transformer:
        raise ConfigError(
            f"{run}: student.name = {config.student.name!r}: heads and hidden units are cut from "
            "deit_* and vit_* only"
        )
    if config.student.adapters != "none":
        raise ConfigError(
            f"{run}: student.adapters = {config.student.adapters!r}: cut the student first, then "
            "adapt it"
        )
    if config.student.shared_block_size > 1:
        raise ConfigError(
            f"{run}: student.shared_block_size = {config.student.shared_block_size}: blocks that "
            "share their weights "
            "cannot be cut apart"
        )
    if (saved / MASKS).is_file():
        raise ConfigError(
            f"{run}: is pruned weight by weight, and would be dense again; cut the run before "
            "that, then look for its tickets (deit lottery --init.weights)"
        )


def _check_asked(config: Config, recovery: Config, controls: tuple[str, ...]) -> None:
    """Refuse what would be told in the middle of the work, or never. Raises ConfigError."""
    for field in dataclasses.fields(config.student):
        own, asked = (getattr(one.student, field.name) for one in (config, recovery))
        if own != asked and field.name not in _MAY_DIFFER:
            raise ConfigError(
                f"student.{field.name} = {asked!r}: the student is the run's ({own!r}); "
                f"{', '.join(f'student.{name}' for name in _MAY_DIFFER)} may be another"
            )
    if recovery.optim.trainable != "all":
        raise ConfigError(
            f"optim.trainable = {recovery.optim.trainable!r}: what is left has to learn as a "
            "whole; "
            "use --optim.trainable all"
        )
    if "long" in controls and config.init.weights is not None:
        raise ConfigError(
            f"--controls long: the run itself began with weights (init.weights "
            f"{config.init.weights}), so no student from random weights has been trained as long; "
            "use --controls short"
        )


def _asked_in_all(
    config: Config, saved: Path, asked: PruneOptions, recovery: Config
) -> dict[str, Any]:
    """What every call in a folder must have in common: whose weights, what goes, and all that
    decides the result of what is trained."""
    if recovery.init != config.init:
        raise ConfigError("start.*: is what this command itself decides; leave it out")
    weights = {"weights": digest_of(read_weights(saved / WEIGHTS))}
    return {**weights, **dataclasses.asdict(asked), **shared_targets.result_fields(recovery)}


def _announce(run: Config, recovery: Config, controls: tuple[str, ...]) -> None:
    """What will be trained, and by whom it is taught."""
    taught = ", ".join(recovery.teacher.source or recovery.teacher.target_stores)
    if recovery.loss.kind == "none":
        taught = "the labels alone"
    info(f"recovery  {schedule_of(recovery.optim)}; taught by {taught}")
    schedules = {"short": recovery.optim, "long": _in_all(run, recovery)}
    for control in controls:
        info(
            f"control   {CONTROLS[control]}, from random weights: {schedule_of(schedules[control])}"
        )


def _in_all(run: Config, recovery: Config) -> OptimConfig:
    """The run's own schedule over its epochs and those of the recovery, in parts as small as those
    of the recovery: that is a matter of memory."""
    epochs = run.optim.epochs + recovery.optim.epochs
    return dataclasses.replace(
        run.optim, epochs=epochs, grad_accum_steps=recovery.optim.grad_accum_steps
    )


def _write(
    folder: Path, config: Config, facts: ModelInfo, kept: KeptUnits, weights: dict[str, Tensor]
) -> None:
    """The student that is left, in a folder like a run's: to be evaluated, exported, trained."""
    wide = facts.student.width // facts.student.heads
    left = dataclasses.replace(facts, student=pruned_config(facts.student, kept))
    folder.mkdir(exist_ok=True)
    slimmed = slice_weights(weights, kept, head_width=wide)
    replace_dir(folder / run_folder.BEST, lambda best: save_student(best, slimmed, left))
    write_json(folder / KEPT, kept._asdict())
    write_json(folder / run_folder.CONFIG, to_dict(config.replace(student=left.student)))  # the end


def _runs(
    run: Config, recovery: Config, facts: ModelInfo, out: Path, controls: tuple[str, ...]
) -> list[RunSpec]:
    """The training of what is left, and of the same shape from random weights: as long as that, and
    by the run's own schedule as long as the run and that together."""
    shape = {
        leaf: getattr(facts.student, leaf) for leaf in ("heads_per_block", "mlp_hidden_per_block")
    }
    recovery = recovery.replace(student=shape, run={"keep_steps": ()})
    anew = {
        "weights": None,
        "head": "keep",
        "pos_embed_resize": "deit",
        "pruning_masks": "keep",
        "start_step": 0,
    }
    source = str(out / PRUNED)
    begun = out / RECOVERED / run_folder.CONFIG
    if run_folder.list_checkpoints(
        out / RECOVERED
    ):  # from another directory it is spelled otherwise
        source = load_config(begun).init.weights
    else:
        begun.unlink(missing_ok=True)  # of a process that was killed before its first checkpoint
    # A control's normalisation is the same: that of the run which was cut.
    colours = {"mean": facts.mean, "std": facts.std}
    as_long = recovery.replace(init=anew, views=colours)
    configs = {
        RECOVERED: recovery.replace(init={**anew, "weights": source}),
        CONTROLS["short"]: as_long,
        CONTROLS["long"]: dataclasses.replace(as_long, optim=_in_all(run, recovery)),
    }
    names = [RECOVERED, *(CONTROLS[control] for control in controls)]
    return [RunSpec(name, configs[name], out / name) for name in names]
