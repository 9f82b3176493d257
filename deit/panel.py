"""The teachers of a run as one call: what they say of a batch, by network or from a store."""

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from deit.config import EnsembleMode
from deit.ensembles import combine_teachers
from deit.environment import compile_module
from deit.errors import NumericsError
from deit.models.teachers import Teacher
from deit.records import Batch, TeacherOutput

_CHECK_EVERY = 50  # batches; a check makes a GPU wait


class TeacherFn(Protocol):
    """One teacher: (labels int64 [batch], logits float32 [batch, classes] or None)."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]: ...


class OnlineTeacher:
    """A teacher that answers itself, in the precision of the run."""

    def __init__(self, teacher: Teacher, accelerator: Accelerator) -> None:
        self.teacher = teacher
        self.accelerator = accelerator

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(), self.accelerator.autocast():
            logits = self.teacher(batch.teacher_images)
        logits = logits.clone()  # what autograd may keep: made outside of inference mode
        return logits.argmax(dim=1), logits


class TeacherEnsemble:
    """All teachers of a run; watches that every answer is finite."""

    def __init__(
        self,
        voices: list[TeacherFn],
        *,
        weights: tuple[float, ...],
        how: EnsembleMode,
        temperature: float,
        wants_logits: bool,
        name: Callable[[int], str],
    ) -> None:
        """weights, how, temperature: as `combine` takes them. wants_logits: whether labels alone
        would not do. name: what messages call a training image."""
        self.teachers = voices
        self.weights = weights
        self.mode = how
        self.temperature = temperature
        self.needs_logits = wants_logits or (len(voices) > 1 and how != "tokens")
        self.name = name
        self._nonfinite_ids: Tensor | None = None
        self._num_batches = 0

    def __call__(self, batch: Batch) -> TeacherOutput:
        """What the student hears. Raises NumericsError, on a GPU some batches later, where an
        answer is not finite."""
        said = [voice(batch) for voice in self.teachers]
        self._track_nonfinite(
            batch.sample_ids, [logits for _, logits in said if logits is not None]
        )
        labels = torch.stack([labels for labels, _ in said], dim=1)
        if not self.needs_logits:
            return TeacherOutput(labels, None, self.weights)
        logits = torch.stack([logits for _, logits in said], dim=1)
        answers = combine_teachers(logits, self.weights, self.mode, temperature=self.temperature)
        # Where nothing was combined, the label as it was said: rounding a stored answer may tie.
        return answers._replace(labels=labels) if len(answers.weights) == len(said) else answers

    def compile(self, mode: str) -> None:
        """Have the networks compiled, as deit.environment.compiled does."""
        for voice in self.teachers:
            if isinstance(voice, OnlineTeacher):
                compile_module(voice.teacher, mode)

    def _track_nonfinite(self, samples: Tensor, logits: list[Tensor]) -> None:
        for answers in logits:
            broken = ~answers.isfinite().flatten(1).all(dim=1)
            found = torch.where(broken, samples, -1)
            if self._nonfinite_ids is not None and self._nonfinite_ids.shape != found.shape:
                self.check()
            before = found if self._nonfinite_ids is None else self._nonfinite_ids
            self._nonfinite_ids = torch.maximum(before, found)
        self._num_batches += 1
        if samples.device.type == "cpu" or self._num_batches % _CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        """Raises NumericsError naming the images where an answer heard so far is not finite."""
        if self._nonfinite_ids is None:
            return
        broken = self._nonfinite_ids[self._nonfinite_ids >= 0].tolist()
        self._nonfinite_ids = None
        if broken:
            named = ", ".join(self.name(index) for index in broken[:5])
            more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
            raise NumericsError(
                f"the teacher's answer is not finite for {named}{more}; look at these images, or "
                "use a teacher in fp32 (--run.precision fp32)"
            )
