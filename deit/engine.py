"""The training step, the epoch and the prediction of a split: the only file that calls backward."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn

from deit.config import LossConfig, OptimConfig
from deit.keys import step_seed
from deit.losses import Losses, objective
from deit.optim import WeightAverage, lr_at, set_lr
from deit.panel import Panel
from deit.records import Answers, Batch, Outputs, head_logits


class Job(NamedTuple):
    """What a training epoch works with.

    student: prepared by Accelerate. teach: what the teachers say of a batch; None without any.
    optimizer: prepared. average: of the unwrapped student; None if it is off.
    """

    accelerator: Accelerator
    student: nn.Module
    teach: Panel | None
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    loss: LossConfig
    optim: OptimConfig
    seed: int


def train_epoch(job: Job, batches: Iterator[Batch], *, step: int, steps: int) -> dict[str, float]:
    """One pass: `steps` updates, of which the first is update number `step` of the run.

    Returns the epoch's means over all processes: losses by name, `<head>_top1` against the
    label that dominates each view, `agreement` with the teacher, `teacher_top1`, and `lr`.
    """
    accelerator, student = job.accelerator, job.student
    student.train()
    tally = Tally(accelerator.device)
    lr = 0.0
    for part, batch in enumerate(batches):
        seed_torch(job, step, part)
        with accelerator.accumulate(student):
            outputs = student(batch.images)
            answers = None if job.teach is None else job.teach(batch)
            losses = objective(outputs, batch.targets, answers, job.loss, epoch=step / steps)
            accelerator.backward(losses["total"])
            if accelerator.sync_gradients:
                lr = lr_at(step, optim=job.optim, steps_per_epoch=steps)
                set_lr(job.optimizer, lr)
                if job.optim.clip_norm is not None:
                    accelerator.clip_grad_norm_(student.parameters(), job.optim.clip_norm)
            job.optimizer.step()
            job.optimizer.zero_grad()
        tally.add(losses, outputs, batch.targets, answers)
        if accelerator.sync_gradients:
            step += 1
            if job.average is not None and not job.optimizer.step_was_skipped:
                job.average.update(accelerator.unwrap_model(student))
    if job.teach is not None:
        job.teach.check()
    return {**tally.means(accelerator), "lr": lr}


def seed_torch(job: Job, step: int, part: int) -> None:
    """Make torch's own draws (drop path, dropout) a function of seed, step and process."""
    accelerator = job.accelerator
    place = part % job.optim.accumulate * accelerator.num_processes + accelerator.process_index
    seed = step_seed(job.seed, step, place)
    # Not torch.manual_seed: it visits every kind of device, at some 0.4 ms a call.
    torch.default_generator.manual_seed(seed)
    if accelerator.device.type == "cuda":
        torch.cuda.manual_seed(seed)


class Tally:
    """Sums over an epoch, kept on the device so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.number = 0

    def add(
        self, losses: Losses, outputs: Outputs, targets: Tensor, answers: Answers | None
    ) -> None:
        """Add a micro-batch; losses are means over it. With several voices, the mean over them."""
        number = len(targets)
        labels = targets.argmax(dim=1)
        heads = head_logits(Outputs(*(None if o is None else o.detach() for o in outputs)))
        for name, loss in losses.items():
            self._sum(f"loss_{name}" if name != "total" else "loss", loss.detach() * number)
        for name, logits in heads.items():
            self._sum(f"{name}_top1", (logits.argmax(dim=1) == labels).sum())
        if answers is not None:
            taught, voices = answers.labels, answers.labels.shape[1]
            student = heads.get("fused", heads["class"]).argmax(dim=1)
            self._sum("agreement", (student[:, None] == taught).sum() / voices)
            self._sum("teacher_top1", (taught == labels[:, None]).sum() / voices)
        self.number += number

    def _sum(self, name: str, value: Tensor) -> None:
        before = self.sums.get(name)
        value = value.double()
        self.sums[name] = value if before is None else before + value

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the samples of all processes."""
        number = torch.tensor(self.number, dtype=torch.float64, device=self.device)
        totals = torch.stack([*self.sums.values(), number])
        totals = accelerator.reduce(totals, reduction="sum").tolist()
        return {name: total / totals[-1] for name, total in zip(self.sums, totals)}


@torch.no_grad()
def predict(
    accelerator: Accelerator, model: nn.Module, batches: Iterator[Tensor], number: int
) -> Outputs:
    """The model's answers for a whole split, in its order, on the CPU of every process.

    batches: this process's images, in [0, 1]: samples process, process + processes, ... of the
    split, so that each is answered exactly once. number: samples in the split.
    A model that returns logits instead of Outputs gives Outputs with class_logits alone.
    """
    # Unwrapped: DDP exchanges buffers at every forward, and processes may differ in their number.
    model = accelerator.unwrap_model(model).eval()
    parts: list[Outputs] = []
    for images in batches:
        with accelerator.autocast():
            answer = model(images)
        parts.append(answer if isinstance(answer, Outputs) else Outputs(answer))
    if any(part.distillation_logits is not None for part in parts):
        return Outputs(*(_gathered(accelerator, list(heads), number) for heads in zip(*parts)))
    return Outputs(_gathered(accelerator, [part.class_logits for part in parts], number))


def _gathered(accelerator: Accelerator, parts: list[Tensor], number: int) -> Tensor:
    """Rows of all processes in the order of the split, float32 [number, ..., classes]."""
    rows = torch.cat(parts).float()
    processes = accelerator.num_processes
    longest = -(-number // processes)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    everyone = accelerator.gather(padded)
    # Row r of process p is sample r * processes + p; the padding ends up behind the last sample.
    ordered = rearrange(everyone, "(process row) ... -> (row process) ...", process=processes)
    return ordered[:number].cpu()
