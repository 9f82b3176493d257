"""`deit prune`: heads and hidden units of a run cut out, and what is left taught once more."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from deit import checkpoint, shared_targets
from deit.announce import schedule_of
from deit.arguments import RunArguments
from deit.at_once import Planned, Progress, check_number, closing_idle, failure_of
from deit.begun import check_begun
from deit.config import Config, OptimConfig, heads_in, is_transformer, to_dict, width_of
from deit.console import say
from deit.disk import check_writable, hold, replace_folder, write_json
from deit.errors import CheckpointError, ConfigError
from deit.evaluation import find_run
from deit.finished import Finished
from deit.models.masks import MASKS
from deit.models.saved import WEIGHTS, Facts, load_student, save_student
from deit.models.slimming import Kept, cut, slim
from deit.models.weights import digest_of, read_weights
from deit.prune_choice import choose, numbers_of, scoring, tell
from deit.prune_options import CONTROLS, KEPT, MANIFEST, PRUNED, RECOVERED, Asked
from deit.prune_results import print_pruning, prune_page, prune_result
from deit.sweep_training import trained, unfinished
from deit.validation import load

_MAY_DIFFER = ("drop_path", "dropout", "rounding")


@closing_idle()
def prune(
    run: Path,
    asked: Asked,
    recovery: RunArguments,
    *,
    name: str,
    controls: tuple[str, ...],
    at_once: int,
    arguments: list[str],
) -> dict[str, Any]:
    """Cut heads and hidden units out of a run's student, train what is left by a schedule with the
    run's own teacher, and tell what each step did to accuracy, size and arithmetic.

    recovery: the configuration and folder of that training, its student still whole. name: of the
    run's checkpoint, best or last. controls: of CONTROLS, students of the same shape from random
    weights. The same command goes on. Returns what results.json holds. Raises the
    errors of deit.errors.
    """
    check_number(at_once, option="--at_once")
    config, saved = find_run(run, name)
    if saved.parent.name != PRUNED and checkpoint.result_of(saved.parent) is None:
        raise CheckpointError(
            f"{run}: is not finished; go on with it first (its own command with --resume)"
        )
    _check(config, saved, run)
    _check_asked(config, recovery.config, controls)
    numbers = numbers_of(config, asked)
    out = recovery.out
    manifest = _asked_in_all(config, saved, asked, recovery.config)
    check_begun(out, MANIFEST, manifest, what="pruning")
    controls = tuple(  # what is finished is told, whether it is asked for again or not
        one
        for one, folder in CONTROLS.items()
        if one in controls or checkpoint.result_of(out / folder) is not None
    )
    _announce(config, recovery.config, controls)
    asking = scoring(config, recovery.config, saved)
    if recovery.dry_run:
        facts, kept, _ = choose(asking, saved, asked, numbers)
        tell(facts, kept)
        say("dry run: nothing is written")
        return {}
    check_writable(out, option="--out")
    out.mkdir(parents=True, exist_ok=True)
    with hold(out, option="--out"):
        write_json(out / MANIFEST, manifest)
        if not (out / PRUNED / checkpoint.CONFIG).is_file():
            facts, kept, weights = choose(asking, saved, asked, numbers)
            tell(facts, kept)
            _write(out / PRUNED, config, facts, kept, weights)
        _, facts = load_student(out / PRUNED / checkpoint.BEST)
        runs = _runs(config, recovery.config, facts, out, controls)
        Finished().check(runs)
        left = unfinished(runs)
        failed = trained(left, at_once=at_once, retries=1, progress=Progress(len(left)))
        if failed:
            raise failure_of(failed)
        result = prune_result(run, name, out, runs, arguments)
        write_json(out / "results.json", result)
        (out / "results.md").write_text(prune_page(result), encoding="utf-8")
        say(f"wrote {out / 'results.json'}")
        say(f"wrote {out / 'results.md'}")
    print_pruning(result)
    return result


def _check(config: Config, saved: Path, run: Path) -> None:
    """Refuse what has no heads to cut. Raises ConfigError."""
    if not is_transformer(config.student):
        raise ConfigError(
            f"{run}: student.name = {config.student.name!r}: heads and hidden units are cut from "
            "deit_* and vit_* only"
        )
    if config.student.adapters != "none":
        raise ConfigError(
            f"{run}: student.adapters = {config.student.adapters!r}: cut the student first, then "
            "adapt it"
        )
    if config.student.share > 1:
        raise ConfigError(
            f"{run}: student.share = {config.student.share}: blocks that share their weights "
            "cannot be cut apart"
        )
    if (saved / MASKS).is_file():
        raise ConfigError(
            f"{run}: is pruned weight by weight, and would be dense again; cut the run before "
            "that, then look for its tickets (deit tickets --start.source)"
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
    if recovery.optim.trained != "all":
        raise ConfigError(
            f"optim.trained = {recovery.optim.trained!r}: what is left has to learn as a whole; "
            "use --optim.trained all"
        )
    if "long" in controls and config.start.source is not None:
        raise ConfigError(
            f"--controls long: the run itself began with weights (start.source "
            f"{config.start.source}), so no student from random weights has been trained as long; "
            "use --controls short"
        )


def _asked_in_all(config: Config, saved: Path, asked: Asked, recovery: Config) -> dict[str, Any]:
    """What every call in a folder must have in common: whose weights, what goes, and all that
    decides the result of what is trained."""
    if recovery.start != config.start:
        raise ConfigError("start.*: is what this command itself decides; leave it out")
    weights = {"weights": digest_of(read_weights(saved / WEIGHTS))}
    return {**weights, **dataclasses.asdict(asked), **shared_targets.identity(recovery)}


def _announce(run: Config, recovery: Config, controls: tuple[str, ...]) -> None:
    """What will be trained, and by whom it is taught."""
    taught = ", ".join(recovery.teacher.source or recovery.teacher.targets)
    if recovery.loss.kind == "none":
        taught = "the labels alone"
    say(f"recovery  {schedule_of(recovery.optim)}; taught by {taught}")
    schedules = {"short": recovery.optim, "long": _in_all(run, recovery)}
    for control in controls:
        say(
            f"control   {CONTROLS[control]}, from random weights: {schedule_of(schedules[control])}"
        )


def _in_all(run: Config, recovery: Config) -> OptimConfig:
    """The run's own schedule over its epochs and those of the recovery, in parts as small as those
    of the recovery: that is a matter of memory."""
    epochs = run.optim.epochs + recovery.optim.epochs
    return dataclasses.replace(run.optim, epochs=epochs, accumulate=recovery.optim.accumulate)


def _write(
    folder: Path, config: Config, facts: Facts, kept: Kept, weights: dict[str, Tensor]
) -> None:
    """The student that is left, in a folder like a run's: to be evaluated, exported, trained."""
    wide = width_of(facts.student) // heads_in(facts.student)
    left = dataclasses.replace(facts, student=slim(facts.student, kept))
    folder.mkdir(exist_ok=True)
    slimmed = cut(weights, kept, head_width=wide)
    replace_folder(folder / checkpoint.BEST, lambda best: save_student(best, slimmed, left))
    write_json(folder / KEPT, kept._asdict())
    write_json(folder / checkpoint.CONFIG, to_dict(config.replace(student=left.student)))  # the end


def _runs(
    run: Config, recovery: Config, facts: Facts, out: Path, controls: tuple[str, ...]
) -> list[Planned]:
    """The training of what is left, and of the same shape from random weights: as long as that, and
    by the run's own schedule as long as the run and that together."""
    shape = {leaf: getattr(facts.student, leaf) for leaf in ("block_heads", "block_hidden")}
    recovery = recovery.replace(student=shape, run={"keep_updates": ()})
    anew = {"source": None, "heads": "keep", "kernel": "deit", "masks": "keep", "update": 0}
    source = str(out / PRUNED)
    begun = out / RECOVERED / checkpoint.CONFIG
    if checkpoint.found(out / RECOVERED):  # from another directory it is spelled otherwise
        source = load(begun).start.source
    else:
        begun.unlink(missing_ok=True)  # of a process that was killed before its first checkpoint
    # A control's normalisation is the same: that of the run which was cut.
    colours = {"mean": facts.mean, "std": facts.std}
    as_long = recovery.replace(start=anew, views=colours)
    configs = {
        RECOVERED: recovery.replace(start={**anew, "source": source}),
        CONTROLS["short"]: as_long,
        CONTROLS["long"]: dataclasses.replace(as_long, optim=_in_all(run, recovery)),
    }
    names = [RECOVERED, *(CONTROLS[control] for control in controls)]
    return [Planned(name, configs[name], out / name) for name in names]
