"""Open the target stores of a run, and check that they hold what its loss needs."""

from pathlib import Path

from deit.config.sections.loss import LossConfig
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import teacher_slots
from deit.core.errors import ConfigError
from deit.distill.losses import needs_logits
from deit.distill.target_format import top_k_of
from deit.distill.target_store import TargetStore, open_store


def open_stores(teacher: TeacherConfig, loss: LossConfig) -> list[TargetStore | None]:
    """Return the store of each teacher slot, None for a live teacher.

    Raises DataError or CheckpointError if a store is missing, incomplete or damaged, and
    ConfigError if it does not hold what the loss needs.
    """
    if loss.kind == "none":
        return []
    stores: list[TargetStore | None] = []
    for slot in teacher_slots(teacher):
        if slot.target_store is None:
            stores.append(None)
            continue
        store = open_store(Path(slot.target_store).expanduser())
        where = f"teacher.target_stores {store.path}"
        combine = store.fingerprint.get("combine")
        check_content(store.record_format.content, teacher, loss, combine=combine, where=where)
        stores.append(store)
    return stores


def check_content(
    content: str, teacher: TeacherConfig, loss: LossConfig, *, combine: str | None, where: str
) -> None:
    """Raise ConfigError if a loss cannot be computed from what a store holds.

    content: hard, full or top-K. combine: how the stored outputs of several teachers were combined;
    None for those of one teacher. where: how the message begins.
    """
    averaged = len(teacher_slots(teacher)) > 1 and teacher.combine != "tokens"
    if content == "hard" and (needs_logits(loss) or averaged):
        consumer = f"loss.kind {loss.kind!r}"
        alternative = "use the loss for hard labels (the preset deit-hard)"
        if averaged:
            consumer = f"a mean of several teachers (teacher.combine {teacher.combine!r})"
            alternative = "give each teacher a token (teacher.combine tokens)"
        raise ConfigError(
            f"{where}: holds hard labels, but {consumer} needs probabilities; write a store with "
            f"content full, or {alternative}"
        )
    inexact = loss.temperature != 1 or loss.standardize_logits or loss.kind == "dkd"
    inexact |= averaged and teacher.combine == "logits"
    top_k = top_k_of(content)
    if top_k is not None and needs_logits(loss) and inexact:
        raise ConfigError(
            f"{where}: holds only the {top_k} largest probabilities; all of them are needed for a "
            "loss.temperature other than 1, loss.standardize_logits, loss.kind dkd and "
            "teacher.combine logits; write the store with content full"
        )
    if combine == "probabilities" and needs_logits(loss) and loss.temperature != 1:
        raise ConfigError(
            f"{where}: holds a mean of probabilities, which differs at loss.temperature "
            f"{loss.temperature:g}; write a store for each teacher (teacher_index 1, "
            "teacher_index 2) and give all of them, or write one with teacher.combine logits"
        )
