"""Which heads and hidden units of a run stay, by what they are worth."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from deit.config import Config, heads_of_blocks, hidden_of_blocks
from deit.console import percent, progress, say, table
from deit.errors import ConfigError
from deit.losses import objective
from deit.models.saved import Facts, load_student
from deit.models.slimming import (
    Kept,
    Scores,
    Watch,
    largest,
    macs_of,
    magnitudes,
    numbers_for_macs,
)
from deit.models.student import Student
from deit.parts import Parts
from deit.prune_options import Asked
from deit.run import parts_of


def choose(
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


def numbers_of(config: Config, asked: Asked) -> tuple[int, int]:
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


def scoring(config: Config, recovery: Config, saved: Path) -> Config:
    """The run's own configuration, begun with its weights, with the data, the teachers and the
    device where the command line says that they are now."""
    where = {leaf: getattr(recovery.data, leaf) for leaf in ("root", "workers", "storage")}
    device = {leaf: getattr(recovery.run, leaf) for leaf in ("device", "precision")}
    plain = {"compile": "none", "linear": "torch", "shard": "none", "trackers": ()}
    config = dataclasses.replace(config, teacher=recovery.teacher)
    return config.replace(
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


def tell(facts: Facts, kept: Kept) -> None:
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
