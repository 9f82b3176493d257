"""The section `teacher`: the frozen networks that the student learns from."""

from dataclasses import dataclass

from deit.config.field_types import (
    STRICT,
    EnsembleMode,
    FloatTuple,
    MemoryFormats,
    NamesOrNone,
    OptIntTuple,
    StrTuple,
)

CLASS_ORDERS = ("data", "sorted", "natural", "natural_cased", "caseless", "reversed")
"""Names of class orders that teacher.classes accepts."""


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen networks that the student learns from; several form an ensemble.

    With several teachers, a list holds one value per teacher in the order of source; a single value
    applies to all.
    """

    __pydantic_config__ = STRICT
    source: StrTuple = ()
    """A run folder, a timm name or folder, a checkpoint file, or FILE.py:FUNCTION; several
    separated by commas."""
    architecture: StrTuple = ()
    """Network of a checkpoint file: a name that student.name accepts."""
    classes: NamesOrNone = ()
    """Classes of a teacher in the order of its outputs: names separated by commas, @FILE with one
    per line, or an order of the data's names: data (unchanged), sorted, natural (room2 before
    room10, as timm numbers folders), natural_cased, caseless or reversed. With several teachers,
    one @FILE, order or none each. Default: the names stored with the teacher, else the data's
    order."""
    image_size: OptIntTuple = ()
    """Side [px] of the teacher's input. Default: the size of its training."""
    mean: FloatTuple = ()
    """Mean of the teacher's normalization, three numbers per teacher. Default: that of its
    training."""
    std: FloatTuple = ()
    """Standard deviation of the teacher's normalization, three numbers per teacher. Default: that
    of its training."""
    weights: FloatTuple = ()
    """Weight of each teacher in the ensemble; only the proportions matter. Default: equal
    weights."""
    combine: EnsembleMode = "probabilities"
    """Output of an ensemble. probabilities: their mean (at loss.temperature); logits: their mean;
    tokens: not combined, each teacher has its own distillation token."""
    memory_format: MemoryFormats = ()
    """Memory format of a teacher's images: contiguous, channels_last or auto (channels_last for
    ConvNets on a CPU or in mixed precision); which one is faster depends on the network. Default:
    auto."""
    target_stores: StrTuple = ()
    """Stored teacher outputs (`deit targets write`), used instead of running the teachers. With
    several teachers: one per teacher (`none` to run it), or one store of their combined outputs."""
    allow_near_chance: bool = False
    """Train even if the teacher's accuracy on the validation split is near chance."""

    @property
    def code_sources(self) -> tuple[str, ...]:
        """The sources that run Python code (FILE.py:FUNCTION)."""
        return tuple(source for source in self.source if source is not None and ".py:" in source)
