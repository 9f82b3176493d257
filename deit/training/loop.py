"""The training step and the epoch: the only module that calls backward."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from deit.config.sections.loss import LossConfig
from deit.config.sections.optim import OptimConfig
from deit.core.fault_injection import inject_nan
from deit.core.rng import step_seed
from deit.core.sharding import full_value
from deit.core.types import Batch, StudentOutput, TeacherOutput, logits_by_head
from deit.distill.losses import Losses, losses_of_step
from deit.distill.teacher_ensemble import TeacherEnsemble
from deit.models.surgery.fake_quant import ActivationRanges
from deit.models.surgery.pruning_masks import PruningMasks
from deit.training.lr_schedule import lr_at, set_lr
from deit.training.optimizer import EMA


class StepContext(NamedTuple):
    """What the training step works with.

    student, optimizer: prepared by Accelerate. teacher: the ensemble; None without any. average:
    the EMA of the unwrapped student; None without one. cuda_graphs: whether student and teachers
    are recorded as CUDA graphs. masks: of a pruned student.
    """

    accelerator: Accelerator
    student: nn.Module
    teacher: TeacherEnsemble | None
    optimizer: torch.optim.Optimizer
    average: EMA | None
    loss: LossConfig
    optim: OptimConfig
    seed: int
    cuda_graphs: bool = False
    masks: PruningMasks | None = None


class StepResult(NamedTuple):
    """The result of a training step; its tensors may still be computing on the device.

    applied: bool scalar, False if the loss or gradient of any process was not finite; then no
    weight has changed. micro_batches: (sample ids int64 [B], logits float [B, C]) of each of this
    process's micro-batches.
    """

    applied: Tensor
    micro_batches: list[tuple[Tensor, Tensor]]

    def nonfinite_samples(self) -> Tensor:
        """Return the sample ids with logits that are not finite, int64 [N]; all ids if the logits
        of all are finite."""
        bad = [ids[~logits.isfinite().all(dim=1)] for ids, logits in self.micro_batches]
        any_bad = any(len(ids) for ids in bad)
        return torch.cat(bad if any_bad else [ids for ids, _ in self.micro_batches])


def train_epoch(
    context: StepContext,
    batches: Iterator[Batch],
    metrics: "MetricAccumulator",
    *,
    step: int,
    steps: int,
) -> Iterator[StepResult]:
    """Train on the batches of an epoch; yield the result of each step.

    batches: micro-batches, optim.grad_accum_steps per step. metrics: accumulates the steps that
    were applied. step: the first step, counted from 0 over the run. steps: of a whole epoch.
    A step whose loss or gradient is not finite changes no weight. Raises NumericsError if a
    teacher's output is not finite. deit.training.epochs.step_context has an example.
    """
    accelerator, student = context.accelerator, context.student
    student.train()
    buffers = list(accelerator.unwrap_model(student).buffers())
    ranges = ActivationRanges(accelerator.unwrap_model(student))
    saved_buffers = [buffer.clone() for buffer in buffers]
    for micro_step, batch in enumerate(batches):
        seed_torch(context, step, micro_step)
        if context.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with accelerator.accumulate(student):
            outputs = student(batch.images)
            teacher = None if context.teacher is None else context.teacher(batch)
            losses = losses_of_step(
                outputs, batch.targets, teacher, context.loss, epoch=step / steps
            )
            accelerator.backward(_spread_nonfinite(inject_nan("loss", losses["loss"])))
        metrics.add(losses, outputs, batch, teacher)
        if accelerator.sync_gradients:
            applied = _optimizer_step(context, step, steps)
            ranges.update()
            # The forward pass alone has changed the buffers: batch norm statistics and ranges.
            for buffer, saved in zip(buffers, saved_buffers):
                buffer.copy_(saved.copy_(torch.where(applied, buffer, saved)))
            if context.average is not None:
                context.average.update(accelerator.unwrap_model(student), applied=applied)
            yield StepResult(applied, metrics.commit(applied))
            step += 1
    if context.teacher is not None:
        context.teacher.check()


def _spread_nonfinite(loss: Tensor) -> Tensor:
    """Return the loss; one with a gradient that is not finite if the loss is not.

    Summed over processes, such a gradient lets all of them skip the step. A finite loss is
    multiplied by exactly 1, so its gradient keeps its bits.
    """
    return loss * (1 + 0 * loss.detach())


def _optimizer_step(context: StepContext, step: int, steps: int) -> Tensor:
    """Update the weights unless the gradient is not finite; return whether it was applied.

    The result is a bool scalar on the device, the same in all processes; nothing waits for it here.
    """
    accelerator, optimizer = context.accelerator, context.optimizer
    set_lr(optimizer, lr_at(step, optim=context.optim, steps_per_epoch=steps))
    parameters = list(context.student.parameters())
    if context.masks is not None:
        context.masks.mask_gradients()  # before their norm is computed
    if context.optim.clip_grad_norm is not None:
        norm = accelerator.clip_grad_norm_(parameters, context.optim.clip_grad_norm)
    else:
        accelerator.unscale_gradients()
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    applied = full_value(norm).isfinite()
    if accelerator.scaler is None:  # a scaler sets found_inf itself
        optimizer.optimizer.found_inf = (~applied).float()
    optimizer.step()
    optimizer.zero_grad()
    return applied


def seed_torch(context: StepContext, step: int, micro_step: int) -> None:
    """Make torch's random numbers (drop path, dropout) a function of seed, step and process."""
    accelerator = context.accelerator
    rank_index = (
        micro_step % context.optim.grad_accum_steps * accelerator.num_processes
        + accelerator.process_index
    )
    seed = step_seed(context.seed, step, rank_index)
    # Not torch.manual_seed, which visits every kind of device and takes 0.4 ms.
    torch.default_generator.manual_seed(seed)
    if accelerator.device.type == "cuda":
        torch.cuda.manual_seed(seed)


class MetricAccumulator:
    """Sums of metrics over an epoch, kept on the device so that no step waits for them.

    The sums of a micro-batch count only if its step was applied.
    """

    def __init__(self, accelerator: Accelerator, sums: dict[str, list[float]]) -> None:
        """sums: from `state` in the middle of an epoch, empty at its start. If they are of another
        number of processes, the first process takes them all."""
        self.accelerator = accelerator
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        self.names = tuple(sums)
        values = [
            by_rank[rank] if len(by_rank) == num_processes else sum(by_rank) * (rank == 0)
            for by_rank in sums.values()
        ]
        self.sums = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
        self._pending: list[Tensor] = []
        self._micro_batches: list[tuple[Tensor, Tensor]] = []

    def add(
        self, losses: Losses, outputs: StudentOutput, batch: Batch, teacher: TeacherOutput | None
    ) -> None:
        """Add a micro-batch. losses: means over it. With several teachers, agreement and the
        teacher's accuracy are means over them."""
        size = len(batch.targets)
        labels = batch.targets.argmax(dim=1)
        heads = logits_by_head(StudentOutput(*(None if o is None else o.detach() for o in outputs)))
        values = {name: loss.detach().double() * size for name, loss in losses.items()}
        for name, logits in heads.items():
            values[f"{name}_top1"] = (logits.argmax(dim=1) == labels).sum()
        if teacher is not None:
            num_teachers = teacher.labels.shape[1]
            student = heads.get("fused", heads["class"]).argmax(dim=1)
            values["agreement"] = (student[:, None] == teacher.labels).sum() / num_teachers
            values["teacher_top1"] = (teacher.labels == labels[:, None]).sum() / num_teachers
        values["number"] = torch.full_like(labels[0], size)
        if not self.names:
            self.names = tuple(values)
            self.sums = self.sums.new_zeros(len(values))
        self._pending.append(torch.stack([values[name].double() for name in self.names]))
        # Copied, because a CUDA graph writes its next outputs into the same memory.
        self._micro_batches.append((batch.sample_ids, heads["class"].clone()))

    def commit(self, applied: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Add the micro-batches of a step to the sums if it was applied (a bool scalar); return
        their sample ids and logits, for StepResult."""
        for values in self._pending:
            self.sums = self.sums + torch.where(applied, values, 0.0)
        micro_batches, self._pending, self._micro_batches = self._micro_batches, [], []
        return micro_batches

    def state(self) -> dict[str, list[float]]:
        """Return the sums of every process by name, the same in all processes."""
        if not self.names:
            return {}
        by_name = self.accelerator.gather(self.sums[None]).T.tolist()
        return dict(zip(self.names, by_name))

    def compute(self) -> dict[str, float]:
        """Return means over the samples of all processes.

        These are the losses by name, `<head>_top1` in [0, 1] against the label with the largest
        weight in each view, and with teachers `agreement` and `teacher_top1`, both in [0, 1].
        """
        totals = {name: math.fsum(values) for name, values in self.state().items()}
        num_samples = totals.pop("number", 0)
        if not num_samples:
            return {"loss": math.nan}
        return {name: total / num_samples for name, total in totals.items()}
