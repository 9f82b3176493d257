"""The teachers of a run as one call: what they say of a batch, by network or from a store."""

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from deit.config.fields import EnsembleMode
from deit.core.accelerator import compile_module
from deit.core.errors import NumericsError
from deit.core.tensors import device_constant
from deit.core.types import Batch, TeacherOutput
from deit.models.teachers import Teacher

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
        teachers: list[TeacherFn],
        *,
        weights: tuple[float, ...],
        mode: EnsembleMode,
        temperature: float,
        needs_logits: bool,
        name: Callable[[int], str],
    ) -> None:
        """weights, mode, temperature: as `combine_teachers` takes them. needs_logits: whether
        labels alone would not do. name: what messages call a training image."""
        self.teachers = teachers
        self.weights = weights
        self.mode = mode
        self.temperature = temperature
        self.needs_logits = needs_logits or (len(teachers) > 1 and mode != "tokens")
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
        """Have the networks compiled, as deit.core.accelerator.compiled does."""
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


def combine_teachers(
    logits: Tensor, weights: tuple[float, ...], mode: EnsembleMode, *, temperature: float
) -> TeacherOutput:
    """What a student hears of teachers.

    logits: float32 [batch, teachers, classes]. weights: one a teacher, of sum 1.
    temperature: of the objective. A mean of probabilities depends on it, so the logits returned are
    those whose softmax at this temperature is that mean; the labels are those of the mean at 1.
    tokens: nothing is combined, a voice for each teacher.
    """
    if mode == "tokens" or logits.shape[1] == 1:
        return TeacherOutput(logits.argmax(dim=2), logits, weights)
    shares = device_constant(weights, logits.device)[:, None]
    if mode == "logits":
        mean = (shares * logits).sum(dim=1, keepdim=True)
        return TeacherOutput(mean.argmax(dim=2), mean)
    labels = _log_mean(logits, shares).argmax(dim=2)
    return TeacherOutput(labels, temperature * _log_mean(logits / temperature, shares))


def _log_mean(logits: Tensor, shares: Tensor) -> Tensor:
    """log of the weighted mean of softmaxes, [batch, 1, classes]."""
    return (logits.log_softmax(dim=2) + shares.log()).logsumexp(dim=1, keepdim=True)


def error_overlap(first: Tensor, second: Tensor, labels: Tensor) -> float | None:
    """Of the samples that either of two answers [number] gets wrong, the share that both do; in
    [0, 1], None where neither errs. Teachers of one kind err together."""
    wrong = torch.stack([first != labels, second != labels])
    either = int(wrong.any(dim=0).sum())
    return int(wrong.all(dim=0).sum()) / either if either else None
