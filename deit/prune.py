"""`deit prune`: heads and hidden units of a run cut out, and what is left taught once more."""

import dataclasses
import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from deit import checkpoint, shared_targets
from deit.arguments import RunArguments
from deit.at_once import Planned, Progress, check_number, failure_of
from deit.begun import check_begun
from deit.config import (
    Config,
    derive,
    heads_in,
    heads_of_blocks,
    hidden_of_blocks,
    is_transformer,
    to_dict,
    width_of,
)
from deit.console import percent, progress, say, table
from deit.disk import check_writable, hold, replace_folder, write_json
from deit.drawing import HEADS, markdown_table
from deit.errors import ConfigError
from deit.evaluation import evaluate, find_run
from deit.finished import Finished
from deit.losses import objective
from deit.measured import Evaluations
from deit.models.masks import MASKS
from deit.models.saved import WEIGHTS, Facts, load_student, save_student
from deit.models.slimming import (
    Kept,
    Scores,
    Watch,
    cut,
    largest,
    macs_of,
    magnitudes,
    numbers_for_macs,
    slim,
)
from deit.models.student import Student
from deit.models.weights import digest_of, read_weights
from deit.outcome import top1_by_head
from deit.parts import Parts
from deit.prune_options import CONTROL, MANIFEST, PRUNED, RECOVERED, Asked
from deit.run import parts_of
from deit.sweep_training import trained, unfinished
from deit.typed_json import read_typed
from deit.validation import load

_KEPT = "kept.json"


def prune(
    run: Path,
    asked: Asked,
    recovery: RunArguments,
    *,
    name: str,
    control: bool,
    at_once: int,
    arguments: list[str],
) -> dict[str, Any]:
    """Cut heads and hidden units out of a run's student, train what is left by a schedule with the
    run's own teacher, and tell what each step did to accuracy, size, arithmetic and speed.

    recovery: the configuration and folder of that training, its student still whole. name: of the
    run's checkpoint, best or last. control: whether a student of the same shape is trained as long
    from random weights. The same command goes on. Returns what results.json holds. Raises the
    errors of deit.errors.
    """
    check_number(at_once, option="--at_once")
    config, saved = find_run(run, name)
    _check(config, saved, run)
    numbers = _numbers(config, asked)
    out = recovery.out
    manifest = _asked_in_all(config, saved, asked, recovery.config)
    check_begun(out, MANIFEST, manifest, what="pruning")
    scoring = _scoring(config, recovery.config, saved)
    if recovery.dry_run:
        facts, kept, _ = _choose(scoring, saved, asked, numbers)
        _tell(facts, kept)
        say("dry run: nothing is written")
        return {}
    check_writable(out, option="--out")
    out.mkdir(parents=True, exist_ok=True)
    with hold(out, option="--out"):
        write_json(out / MANIFEST, manifest)
        if not (out / PRUNED / checkpoint.CONFIG).is_file():
            facts, kept, weights = _choose(scoring, saved, asked, numbers)
            _tell(facts, kept)
            _write(out / PRUNED, config, facts, kept, weights)
        _, facts = load_student(out / PRUNED / checkpoint.BEST)
        runs = _runs(recovery.config, facts, out, control=control)
        Finished().check(runs)
        left = unfinished(runs)
        failed = trained(left, at_once=at_once, retries=1, progress=Progress(len(left)))
        if failed:
            raise failure_of(failed)
        result = _result(run, name, out, runs, arguments)
        write_json(out / "results.json", result)
        (out / "results.md").write_text(_markdown(result))
        say(f"wrote {out / 'results.json'}")
        say(f"wrote {out / 'results.md'}")
    table(_title(result), _COLUMNS, _cells(result))
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


def _asked_in_all(config: Config, saved: Path, asked: Asked, recovery: Config) -> dict[str, Any]:
    """What every call in a folder must have in common: whose weights, what goes, and all that
    decides the result of what is trained."""
    if recovery.start != config.start:
        raise ConfigError("start.*: is what this command itself decides; leave it out")
    weights = {"weights": digest_of(read_weights(saved / WEIGHTS))}
    return {**weights, **dataclasses.asdict(asked), **shared_targets.identity(recovery)}


def _choose(
    config: Config, saved: Path, asked: Asked, numbers: tuple[int, int]
) -> tuple[Facts, Kept, dict[str, Tensor]]:
    """What the student is, which parts of it stay, and its weights. numbers: of heads and hidden
    units that stay. Raises the errors of deit.errors."""
    student, facts = load_student(saved)
    if asked.score == "taylor":
        scores = _by_images(config, asked.images)
    else:
        scores = magnitudes(student.network)
    kept = Kept(
        largest(scores.heads, numbers[0], scope=asked.scope),
        largest(scores.hidden, numbers[1], scope=asked.scope),
    )
    return facts, kept, student.network.state_dict()


def _numbers(config: Config, asked: Asked) -> tuple[int, int]:
    """How many heads and hidden units stay, at least one of each in every block. Raises
    ConfigError where that is none of what was asked."""
    student = config.student
    if asked.macs is not None:
        try:
            return numbers_for_macs(student, asked.macs)
        except ValueError:
            raise ConfigError(
                f"--macs {asked.macs:g}: one head and one hidden unit in every block are more"
            ) from None
    totals = heads_of_blocks(student), hidden_of_blocks(student)
    found = []
    for option, parts, share in zip(("heads", "hidden"), totals, (asked.heads, asked.hidden)):
        number = round(sum(parts) * (1 - share))
        if number < len(parts):
            raise ConfigError(
                f"--{option} {share:g}: leaves {number} of {sum(parts)}, and each of {len(parts)} "
                "blocks needs one"
            )
        found.append(number)
    return found[0], found[1]


def _scoring(config: Config, recovery: Config, saved: Path) -> Config:
    """The run's own configuration, begun with its weights, with the data, the teachers and the
    device where the command line says that they are now."""
    where = {leaf: getattr(recovery.data, leaf) for leaf in ("root", "workers", "storage")}
    device = {leaf: getattr(recovery.run, leaf) for leaf in ("device", "precision")}
    plain = {"compile": "none", "linear": "torch", "shard": "none", "trackers": ()}
    config = dataclasses.replace(config, teacher=recovery.teacher)
    return derive(
        config,
        data=where,
        start={"source": str(saved), "heads": "keep", "masks": "keep", "update": 0},
        optim={"trained": "all"},
        run={**plain, **device, "keep_updates": ()},
    )


def _by_images(config: Config, number: int) -> Scores:
    """What parts are worth to the run's own objective, on training views and with its teacher."""
    parts = parts_of(config)
    student: Student = parts.accelerator.unwrap_model(parts.student).eval()
    watch = Watch(student.network)
    with watch.on(student.network):
        for loss in _losses(parts, student, number):
            watch.add(loss)
    return watch.scores()


def _losses(parts: Parts, student: Student, number: int) -> Iterator[Tensor]:
    """The objective of batches of about so many training views, each the sum over its images."""
    epochs, block = parts.config.optim.epochs, parts.loader.block
    all_of_them = parts.loader.steps_per_epoch * parts.config.optim.accumulate
    total = min(-(-number // block), all_of_them)
    batches = itertools.islice(parts.loader.epoch(0), total)
    for batch in progress(batches, total=total, title="what parts are worth"):
        answers = None if parts.panel is None else parts.panel(batch)
        # As at the end of the training, where a teacher's term has its whole weight.
        losses = objective(
            student(batch.images), batch.targets, answers, parts.config.loss, epoch=epochs
        )
        yield losses["total"] * len(batch.targets)


def _tell(facts: Facts, kept: Kept) -> None:
    """Which parts stay, block by block."""
    rows = [
        (str(place), f"{len(heads)} of {of_heads}", f"{len(hidden)} of {of_hidden}")
        for place, (heads, of_heads, hidden, of_hidden) in enumerate(
            zip(
                kept.heads,
                heads_of_blocks(facts.student),
                kept.hidden,
                hidden_of_blocks(facts.student),
            )
        )
    ]
    table("what stays", ("block", "heads", "hidden units"), rows)
    numbers = [sum(map(len, one)) for one in (kept.heads, kept.hidden)]
    whole = [sum(of(facts.student)) for of in (heads_of_blocks, hidden_of_blocks)]
    share = macs_of(facts.student, *numbers) / macs_of(facts.student, *whole)
    say(
        f"{numbers[0]} of {whole[0]} heads and {numbers[1]} of {whole[1]} hidden units: "
        f"{percent(share)} % of the blocks' arithmetic"
    )


def _write(
    folder: Path, config: Config, facts: Facts, kept: Kept, weights: dict[str, Tensor]
) -> None:
    """The student that is left, in a folder like a run's: to be evaluated, exported, trained."""
    wide = width_of(facts.student) // heads_in(facts.student)
    left = dataclasses.replace(facts, student=slim(facts.student, kept))
    folder.mkdir(exist_ok=True)
    slimmed = cut(weights, kept, head_width=wide)
    replace_folder(folder / checkpoint.BEST, lambda best: save_student(best, slimmed, left))
    write_json(folder / _KEPT, kept._asdict())
    write_json(folder / checkpoint.CONFIG, to_dict(derive(config, student=left.student)))  # the end


def _runs(config: Config, facts: Facts, out: Path, *, control: bool) -> list[Planned]:
    """The training of what is left, and of the same shape from random weights."""
    shape = {leaf: getattr(facts.student, leaf) for leaf in ("block_heads", "block_hidden")}
    config = derive(config, student=shape, run={"keep_updates": ()})
    anew = {"source": None, "heads": "keep", "kernel": "deit", "masks": "keep", "update": 0}
    source = str(out / PRUNED)
    if checkpoint.found(out / RECOVERED):  # from another directory it is spelled otherwise
        source = load(out / RECOVERED / checkpoint.CONFIG).start.source
    begun = {**anew, "source": source}
    runs = [Planned(RECOVERED, derive(config, start=begun), out / RECOVERED)]
    if control:
        # Its normalisation is the same: that of the run which was cut.
        colours = {"mean": facts.mean, "std": facts.std}
        runs.append(Planned(CONTROL, derive(config, start=anew, views=colours), out / CONTROL))
    return runs


def _result(
    run: Path, name: str, out: Path, runs: list[Planned], arguments: list[str]
) -> dict[str, Any]:
    """What results.json holds: of each step top-1 by head, agreement, cost and bytes."""
    rows = {}
    root = runs[0].config.data.root
    found = evaluate(run, checkpoint=name, root=root, cost=True)
    rows[_called(run)] = _row(found, find_run(run, name)[1], 0)
    found = evaluate(out / PRUNED, root=root, cost=True)
    rows[PRUNED] = _row(found, out / PRUNED / checkpoint.BEST, 0)
    evaluations = Evaluations()
    for one in runs:
        found = evaluations.of(one.out, root=root, cost=True).found
        rows[one.name] = _row(found, one.out / checkpoint.BEST, one.config.optim.epochs)
    return {
        "run": str(run),
        "split": found["split"],
        "num_samples": found["num_samples"],
        "rows": rows,
        "kept": read_typed(out / PRUNED / _KEPT, dict[str, Any]),
        "asked": read_typed(out / MANIFEST, dict[str, Any]),
        "command": f"deit prune {shlex.join(arguments)}",
        "environment": found["environment"],
    }


def _called(run: Path) -> str:
    name = run.resolve().name
    return f"{name} itself" if name in (PRUNED, RECOVERED, CONTROL) else name


def _row(found: dict[str, Any], saved: Path, epochs: int) -> dict[str, Any]:
    agreed = found["agreement"].get("fused", found["agreement"]["class"]).get("teacher")
    return {
        "top1": top1_by_head(found),
        "agreement": agreed,
        "epochs": epochs,
        "bytes": (saved / "model.safetensors").stat().st_size,
        **{name: found["cost"][name] for name in ("parameters", "gmacs", "images_per_s")},
    }


_COLUMNS = (
    "",
    "class head",
    "distillation head",
    "fused",
    "= teacher",
    "epochs",
    "parameters",
    "MMACs",
    "KB",
    "images/s",
)


def _cells(result: dict[str, Any]) -> list[list[str]]:
    found = []
    for name, row in result["rows"].items():
        shares = [*(row["top1"][head] for head in HEADS), row["agreement"]]
        found.append(
            [
                name,
                *("-" if one is None else percent(one) for one in shares),
                str(row["epochs"] or "-"),
                f"{row['parameters']:,}",
                f"{1000 * row['gmacs']:.1f}",
                f"{row['bytes'] / 1e3:,.0f}",
                f"{row['images_per_s']:,.0f}",
            ]
        )
    return found


def _title(result: dict[str, Any]) -> str:
    return f"{result['run']} pruned: top-1 % on {result['num_samples']} {result['split']} images"


def _markdown(result: dict[str, Any]) -> str:
    kept = result["kept"]
    blocks = ", ".join(
        f"{len(heads)} heads and {len(hidden)} units"
        for heads, hidden in zip(kept["heads"], kept["hidden"])
    )
    environment = result["environment"]
    where = f"{environment['device_name']}, commit {environment['commit']}"
    return (
        f"# {_title(result)}\n\n{markdown_table(_COLUMNS, _cells(result))}\n\n"
        f"Kept, block by block: {blocks}.\n\n`{result['command']}`\n\n{where}\n"
    )
