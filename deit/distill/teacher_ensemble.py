"""The teachers of a run as one call, live or from a target store."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deit.config.arguments import checks_types
from deit.config.command_choices import check_choice
from deit.config.field_types import EnsembleMode
from deit.core.accelerator import compile_module
from deit.core.errors import ConfigError, NumericsError
from deit.core.tensors import device_constant
from deit.core.types import Batch, TeacherOutput
from deit.datasets.loader import TrainLoader
from deit.datasets.view_batches import TeacherInput
from deit.models.teachers import Teacher

TeacherQuery = Callable[[TeacherInput], TeacherOutput]
_CHECK_EVERY = 50  # batches; a check synchronizes a GPU


class TeacherFn(Protocol):
    """One teacher: returns labels, int64 [B], and logits, float32 [B, C], or None for these."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]: ...


class OnlineTeacher:
    """A teacher network, run in the precision of the run and without gradients.

    A call takes a batch with teacher images; it returns labels, int64 [B], and logits, float32
    [B, C].
    """

    def __init__(self, teacher: Teacher, accelerator: Accelerator | None = None) -> None:
        """accelerator: sets the precision; without one it is that of the caller's autocast."""
        self.teacher = teacher
        self.autocast = nullcontext if accelerator is None else accelerator.autocast

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.teacher_images is None:
            raise ConfigError(
                "teachers: the batch has no images for them; its loader was made without"
            )
        with torch.inference_mode(), self.autocast():
            logits = self.teacher(batch.teacher_images)
        logits = logits.clone()  # a normal tensor, which autograd can save
        return logits.argmax(dim=1), logits


class TeacherEnsemble:
    """One or several teachers as one call, live or stored; checks that every output is finite.

    Example:
        >>> def color(batch):  # a teacher: from a batch to labels [B] and logits [B, C]
        ...     logits = batch.teacher_images.mean(dim=(2, 3))
        ...     return logits.argmax(dim=1), logits
        >>> ensemble = TeacherEnsemble([color, color], mode="logits", weights=(3, 1))
        >>> images, rows = torch.rand(4, 3, 8, 8), torch.arange(4)
        >>> output = ensemble(Batch(images, images, torch.zeros(4, 3), rows, 0, rows))
        >>> output.labels.shape, output.logits.shape  # one output, which combines both teachers
        (torch.Size([4, 1]), torch.Size([4, 1, 3]))
    """

    @checks_types
    def __init__(
        self,
        teachers: Sequence[Teacher | TeacherFn],
        *,
        mode: EnsembleMode = "probabilities",
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        needs_logits: bool = True,
        name: Callable[[int], str] = "image {}".format,
    ) -> None:
        """teachers: of `load_teacher`, target stores, or functions as `TeacherFn`. mode,
        temperature: see `combine_teachers`; give that of the loss. weights: one per teacher; only
        the proportions matter; default: equal. needs_logits: whether the loss needs more than
        labels. name: returns the name of a training image in messages.

        Raises ConfigError for other teachers, another number of weights, an unknown mode or a
        temperature of 0 or less.
        """
        count = _check_teachers(teachers)
        weights = (1.0,) * count if weights is None else weights
        if not _are_weights(weights, count):
            raise ConfigError(
                f"weights = {weights}: should be {count} numbers of at least 0, one per teacher, "
                "with a positive sum"
            )
        weights = tuple(weights)
        check_choice("mode", mode, get_args(EnsembleMode))
        if not temperature > 0:
            raise ConfigError(f"temperature = {temperature}: should be above 0, that of the loss")
        self.teachers = [
            OnlineTeacher(teacher) if isinstance(teacher, Teacher) else teacher
            for teacher in teachers
        ]
        total = sum(weights)
        if not math.isclose(total, 1):  # otherwise the last bits would change
            weights = tuple(weight / total for weight in weights)
        self.weights = weights
        self.mode = mode
        self.temperature = temperature
        self.needs_logits = needs_logits or (count > 1 and mode != "tokens")
        self.name = name
        self._nonfinite_ids: Tensor | None = None
        self._num_batches = 0

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Return the teachers' output for a batch, combined by `mode`.

        Without logits if teachers give labels only, such as stores with content hard. Raises
        ConfigError if these should be combined, and NumericsError if an output is not finite; on a
        GPU some batches later.
        """
        if not isinstance(batch, Batch):
            raise ConfigError(
                "teachers: take a batch of a TrainLoader, with the images of the teachers; for "
                f"others call the teacher itself, teacher(images); got {type(batch).__name__}"
            )
        outputs = [teacher(batch) for teacher in self.teachers]
        self._track_nonfinite(
            batch.sample_ids, [logits for _, logits in outputs if logits is not None]
        )
        labels = torch.stack([labels for labels, _ in outputs], dim=1)
        labels_only = any(logits is None for _, logits in outputs)
        if labels_only and len(outputs) > 1 and self.mode != "tokens":
            raise ConfigError(
                f"mode = {self.mode}: a mean of teachers needs their logits, but one gives labels "
                "only; write its store with content full, or use mode='tokens'"
            )
        if labels_only or not self.needs_logits:
            return TeacherOutput(labels, None, self.weights)
        logits = torch.stack([logits for _, logits in outputs], dim=1)
        combined = combine_teachers(logits, self.weights, self.mode, temperature=self.temperature)
        if len(combined.weights) == len(outputs):
            # Nothing was combined: keep the labels, since rounded stored logits can tie.
            return combined._replace(labels=labels)
        return combined

    def compile(self, mode: str) -> None:
        """Compile the networks, as deit.core.accelerator.compile_module does."""
        for teacher in self.teachers:
            if isinstance(teacher, OnlineTeacher):
                compile_module(teacher.teacher, mode)

    def _track_nonfinite(self, samples: Tensor, logits: list[Tensor]) -> None:
        for output in logits:
            is_bad = ~output.isfinite().flatten(1).all(dim=1)
            bad_ids = torch.where(is_bad, samples, -1)
            if self._nonfinite_ids is not None and self._nonfinite_ids.shape != bad_ids.shape:
                self.check()
            before = bad_ids if self._nonfinite_ids is None else self._nonfinite_ids
            self._nonfinite_ids = torch.maximum(before, bad_ids)
        self._num_batches += 1
        if samples.device.type == "cpu" or self._num_batches % _CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        """Raise NumericsError naming the images if an output so far was not finite."""
        if self._nonfinite_ids is None:
            return
        bad_ids = self._nonfinite_ids[self._nonfinite_ids >= 0].tolist()
        self._nonfinite_ids = None
        if bad_ids:
            names = ", ".join(self.name(index) for index in bad_ids[:5])
            more = f" and {len(bad_ids) - 5} more" if len(bad_ids) > 5 else ""
            raise NumericsError(
                f"the teacher's logits are not finite for {names}{more}; check these images, or "
                "run in fp32 (--run.precision fp32)"
            )


def _check_teachers(teachers: Sequence[Teacher | TeacherFn]) -> int:
    """Return the number of teachers. Raises ConfigError for another type, or a bare network."""
    if not isinstance(teachers, Sequence) or isinstance(teachers, str):
        raise ConfigError(f"teachers: should be a list; got {type(teachers).__name__}")
    if not teachers:
        raise ConfigError("teachers: should be at least one")
    for teacher in teachers:
        is_other = not callable(teacher) or isinstance(teacher, nn.Module | type)
        if is_other and not isinstance(teacher, Teacher):
            raise ConfigError(
                "teachers: should be of load_teacher, target stores, or functions of a batch; got "
                f"{type(teacher).__name__}"
            )
    return len(teachers)


def _are_weights(weights: Any, count: int) -> bool:
    try:
        values = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        return False
    valid = len(values) == count and all(0 <= value < math.inf for value in values)
    return valid and sum(values) > 0


def combine_teachers(
    logits: Tensor, weights: tuple[float, ...], mode: EnsembleMode, *, temperature: float
) -> TeacherOutput:
    """Return the combined output of teachers.

    logits: float32 [B, teachers, C]. weights: one per teacher, of sum 1. temperature: of the loss.

    mode "probabilities": the softmax of the returned logits at this temperature is the weighted
    mean of the teachers' softmaxes at it; the labels are those of the mean at temperature 1.
    mode "logits": the weighted mean of the logits. mode "tokens": not combined.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 4.0]]])
        >>> combine_teachers(logits, (0.5, 0.5), "logits", temperature=1.0).logits.tolist()
        [[[1.0, 2.0]]]
    """
    if mode == "tokens" or logits.shape[1] == 1:
        return TeacherOutput(logits.argmax(dim=2), logits, weights)
    factors = device_constant(weights, logits.device)[:, None]
    if mode == "logits":
        mean = (factors * logits).sum(dim=1, keepdim=True)
        return TeacherOutput(mean.argmax(dim=2), mean)
    labels = _log_mean(logits, factors).argmax(dim=2)
    return TeacherOutput(labels, temperature * _log_mean(logits / temperature, factors))


def _log_mean(logits: Tensor, factors: Tensor) -> Tensor:
    """Return the log of the weighted mean of softmaxes, [B, 1, C]."""
    return (logits.log_softmax(dim=2) + factors.log()).logsumexp(dim=1, keepdim=True)


def error_overlap(first: Tensor, second: Tensor, labels: Tensor) -> float | None:
    """Return the share of errors that two teachers have in common, in [0, 1]; None without errors.

    It is |both wrong| / |at least one wrong|. first, second: predictions, int64 [N]. labels: true
    classes, int64 [N].

    Example:
        >>> labels = torch.tensor([0, 1, 2])
        >>> error_overlap(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0]), labels)
        0.5
    """
    errors = torch.stack([first != labels, second != labels])
    num_either = int(errors.any(dim=0).sum())
    return int(errors.all(dim=0).sum()) / num_either if num_either else None


def teacher_query(loader: TrainLoader, ensemble: TeacherEnsemble) -> TeacherQuery:
    """Return a function from a batch of teacher images to the outputs that a store keeps.

    With views.teacher_view crops, these are the mean probabilities over all crops of an image.
    """

    def query(inputs: TeacherInput) -> TeacherOutput:
        images, views = inputs
        empty = images[:0]
        return ensemble(
            Batch(empty, images, empty, views.sample_ids, views.epoch, views.target_rows)
        )

    def query_crops(inputs: TeacherInput) -> TeacherOutput:
        num_crops = loader.views.teacher_num_crops
        total = query(inputs).logits.log_softmax(dim=2)
        for crop in range(1, num_crops):
            rows = inputs.views.target_rows
            (other,) = loader.teacher_inputs(0, rows, batch_size=len(rows), repeat=crop)
            total = torch.logaddexp(total, query(other).logits.log_softmax(dim=2))
        logits = total - math.log(num_crops)
        return TeacherOutput(logits.argmax(dim=2), logits)

    return query_crops if loader.views.teacher_view == "crops" else query
