"""The teachers of a run as one call: what they say of a batch, by network or from a store."""

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from deit.config import Combine
from deit.ensembles import combine
from deit.environment import compiled
from deit.errors import NumericsError
from deit.models.teachers import Teacher
from deit.records import Answers, Batch

_CHECK_EVERY = 50  # batches; a check makes a GPU wait


class Voice(Protocol):
    """One teacher: (labels int64 [batch], logits float32 [batch, classes] or None)."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]: ...


class NetworkVoice:
    """A teacher that answers itself, in the precision of the run."""

    def __init__(self, teacher: Teacher, accelerator: Accelerator) -> None:
        self.teacher = teacher
        self.accelerator = accelerator

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(), self.accelerator.autocast():
            logits = self.teacher(batch.teacher_images)
        logits = logits.clone()  # what autograd may keep: made outside of inference mode
        return logits.argmax(dim=1), logits


class Panel:
    """All teachers of a run; watches that every answer is finite."""

    def __init__(
        self,
        voices: list[Voice],
        *,
        weights: tuple[float, ...],
        how: Combine,
        temperature: float,
        wants_logits: bool,
        name: Callable[[int], str],
    ) -> None:
        """weights, how, temperature: as `combine` takes them. wants_logits: whether labels alone
        would not do. name: what messages call a training image."""
        self.voices = voices
        self.weights = weights
        self.how = how
        self.temperature = temperature
        self.wants_logits = wants_logits or (len(voices) > 1 and how != "tokens")
        self.name = name
        self._suspects: Tensor | None = None
        self._heard = 0

    def __call__(self, batch: Batch) -> Answers:
        """What the student hears. Raises NumericsError, on a GPU some batches later, where an
        answer is not finite."""
        said = [voice(batch) for voice in self.voices]
        self._watch(batch.samples, [logits for _, logits in said if logits is not None])
        labels = torch.stack([labels for labels, _ in said], dim=1)
        if not self.wants_logits:
            return Answers(labels, None, self.weights)
        logits = torch.stack([logits for _, logits in said], dim=1)
        answers = combine(logits, self.weights, self.how, temperature=self.temperature)
        # Where nothing was combined, the label as it was said: rounding a stored answer may tie.
        return answers._replace(labels=labels) if len(answers.weights) == len(said) else answers

    def compile(self, mode: str) -> None:
        """Have the networks compiled, as deit.environment.compiled does."""
        for voice in self.voices:
            if isinstance(voice, NetworkVoice):
                compiled(voice.teacher, mode)

    def _watch(self, samples: Tensor, logits: list[Tensor]) -> None:
        for answers in logits:
            broken = ~answers.isfinite().flatten(1).all(dim=1)
            found = torch.where(broken, samples, -1)
            if self._suspects is not None and self._suspects.shape != found.shape:
                self.check()
            before = found if self._suspects is None else self._suspects
            self._suspects = torch.maximum(before, found)
        self._heard += 1
        if samples.device.type == "cpu" or self._heard % _CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        """Raises NumericsError naming the images where an answer heard so far is not finite."""
        if self._suspects is None:
            return
        broken = self._suspects[self._suspects >= 0].tolist()
        self._suspects = None
        if broken:
            named = ", ".join(self.name(index) for index in broken[:5])
            more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
            raise NumericsError(
                f"the teacher's answer is not finite for {named}{more}; look at these images, or "
                "use a teacher in fp32 (--run.precision fp32)"
            )
