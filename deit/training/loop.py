"""The training step, the epoch and the prediction of a split: the only file that calls backward."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from deit.config.schema import LossConfig, OptimConfig
from deit.core.fault_injection import inject_nan
from deit.core.rng import step_seed
from deit.core.sharding import full_value
from deit.core.types import Batch, StudentOutput, TeacherOutput, logits_by_head
from deit.distill.losses import Losses, distillation_loss
from deit.distill.teacher_ensemble import TeacherEnsemble
from deit.models.surgery.fake_quant import ActivationRanges
from deit.models.surgery.pruning_masks import PruningMasks
from deit.training.optimizer import EMA, lr_at, set_lr


class StepContext(NamedTuple):
    """What a training epoch works with.

    student: prepared by Accelerate. teach: what the teachers say of a batch; None without any.
    optimizer: prepared. average: of the unwrapped student; None if it is off. graphs: whether
    student and teachers are recorded as CUDA graphs. held: masks of a pruned student.
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
    """What became of an update; the device may not have come to it yet.

    applied: bool scalar, False where loss or gradient was not finite in any process; nothing moved
    then. heard: of each of this process's micro-batches, the images, int64 [block], and what the
    student said of them, float [block, classes].
    """

    applied: Tensor
    micro_batches: list[tuple[Tensor, Tensor]]

    def nonfinite_samples(self) -> Tensor:
        """Of an update that was not applied, int64 [images]: those without a finite answer, all
        where every answer is finite."""
        bad = [samples[~logits.isfinite().all(dim=1)] for samples, logits in self.micro_batches]
        some = any(len(part) for part in bad)
        return torch.cat(bad if some else [samples for samples, _ in self.micro_batches])


def train_epoch(
    job: StepContext, batches: Iterator[Batch], tally: "MetricAccumulator", *, step: int, steps: int
) -> Iterator[StepResult]:
    """Train on the batches of an epoch; an item after each update, the first number `step` of the
    run. steps: updates of a whole epoch. tally: takes up what was applied."""
    accelerator, student = job.accelerator, job.student
    student.train()
    statistics = list(accelerator.unwrap_model(student).buffers())
    ranges = ActivationRanges(accelerator.unwrap_model(student))
    before = [one.clone() for one in statistics]
    for part, batch in enumerate(batches):
        seed_torch(job, step, part)
        if job.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with accelerator.accumulate(student):
            outputs = student(batch.images)
            answers = None if job.teacher is None else job.teacher(batch)
            losses = distillation_loss(
                outputs, batch.targets, answers, job.loss, epoch=step / steps
            )
            accelerator.backward(_spread_nonfinite(inject_nan("loss", losses["total"])))
        tally.add(losses, outputs, batch, answers)
        if accelerator.sync_gradients:
            applied = _optimizer_step(job, step, steps)
            ranges.update()
            # Batch norms' statistics and these have moved by the forward pass alone.
            for one, kept in zip(statistics, before):
                one.copy_(kept.copy_(torch.where(applied, one, kept)))
            if job.average is not None:
                job.average.update(accelerator.unwrap_model(student), applied=applied)
            yield StepResult(applied, tally.commit(applied))
            step += 1
    if job.teacher is not None:
        job.teacher.check()


def _spread_nonfinite(loss: Tensor) -> Tensor:
    """The loss; where it is not finite, one whose gradient is not either, so that by the sum over
    the processes all notice. (A factor of exactly 1 else: the gradient stays to the bit.)"""
    return loss * (1 + 0 * loss.detach())


def _optimizer_step(job: StepContext, step: int, steps: int) -> Tensor:
    """Move the weights along the gradient, unless it is not finite; whether they moved, a bool
    scalar on the device: nothing here waits for it.

    The gradient is the same in all processes here, and so is the answer.
    """
    accelerator, optimizer = job.accelerator, job.optimizer
    set_lr(optimizer, lr_at(step, optim=job.optim, steps_per_epoch=steps))
    parameters = list(job.student.parameters())
    if job.masks is not None:
        job.masks.mask_gradients()  # before their norm is taken
    if job.optim.clip_grad_norm is not None:
        norm = accelerator.clip_grad_norm_(parameters, job.optim.clip_grad_norm)
    else:
        accelerator.unscale_gradients()
        norm = get_total_norm([one.grad for one in parameters if one.grad is not None])
    sound = full_value(norm).isfinite()
    if accelerator.scaler is None:  # which tells the optimizer itself, and lowers its scale
        optimizer.optimizer.found_inf = (~sound).float()
    optimizer.step()
    optimizer.zero_grad()
    return sound


def seed_torch(job: StepContext, step: int, micro_step: int) -> None:
    """Make torch's own draws (drop path, dropout) a function of seed, step and process."""
    accelerator = job.accelerator
    rank_index = (
        micro_step % job.optim.grad_accum_steps * accelerator.num_processes
        + accelerator.process_index
    )
    seed = step_seed(job.seed, step, rank_index)
    # Not torch.manual_seed: it visits every kind of device, at some 0.4 ms a call.
    torch.default_generator.manual_seed(seed)
    if accelerator.device.type == "cuda":
        torch.cuda.manual_seed(seed)


class MetricAccumulator:
    """Sums over an epoch, kept on the device so that no step waits for them.

    What a micro-batch adds counts once its update was applied.
    """

    def __init__(self, accelerator: Accelerator, begun: dict[str, list[float]]) -> None:
        """begun: what `dump` gave in the middle of the epoch; empty at its start. Sums of another
        number of processes all go to the first."""
        self.accelerator = accelerator
        own, several = accelerator.process_index, accelerator.num_processes
        self.names = tuple(begun)
        values = [
            values[own] if len(values) == several else sum(values) * (own == 0)
            for values in begun.values()
        ]
        self.sums = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
        self._pending: list[Tensor] = []
        self._heard: list[tuple[Tensor, Tensor]] = []

    def add(
        self, losses: Losses, outputs: StudentOutput, batch: Batch, answers: TeacherOutput | None
    ) -> None:
        """Add a micro-batch; losses are means over it. With several voices, the mean over them."""
        number = len(batch.targets)
        labels = batch.targets.argmax(dim=1)
        heads = logits_by_head(StudentOutput(*(None if o is None else o.detach() for o in outputs)))
        found = {
            f"loss_{name}" if name != "total" else "loss": loss.detach().double() * number
            for name, loss in losses.items()
        }
        for name, logits in heads.items():
            found[f"{name}_top1"] = (logits.argmax(dim=1) == labels).sum()
        if answers is not None:
            taught, voices = answers.labels, answers.labels.shape[1]
            student = heads.get("fused", heads["class"]).argmax(dim=1)
            found["agreement"] = (student[:, None] == taught).sum() / voices
            found["teacher_top1"] = (taught == labels[:, None]).sum() / voices
        found["number"] = torch.full_like(labels[0], number)
        if not self.names:
            self.names = tuple(found)
            self.sums = self.sums.new_zeros(len(found))
        self._pending.append(torch.stack([found[name].double() for name in self.names]))
        # A copy: a CUDA graph's answers are gone with the next ones.
        self._heard.append((batch.sample_ids, heads["class"].clone()))

    def commit(self, applied: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Count the update's micro-batches, unless it was not applied (a bool scalar); their images
        and what the student said of them, as in Update."""
        for found in self._pending:
            self.sums = self.sums + torch.where(applied, found, 0.0)
        heard, self._pending, self._heard = self._heard, [], []
        return heard

    def state(self) -> dict[str, list[float]]:
        """The sums of each process by name, the same in all of them."""
        if not self.names:
            return {}
        everyone = self.accelerator.gather(self.sums[None]).T.tolist()
        return dict(zip(self.names, everyone))

    def compute(self) -> dict[str, float]:
        """Means over the samples of all processes: losses by name, `<head>_top1` against the label
        that dominates each view, `agreement` with the teacher and `teacher_top1`."""
        totals = {name: math.fsum(values) for name, values in self.state().items()}
        number = totals.pop("number", 0)
        if not number:
            return {"loss": math.nan}
        return {name: total / number for name, total in totals.items()}
