"""Steps that are not finite, and how often a step synchronizes with the device."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from deit.config.presets import LOSS_PRESETS
from deit.config.sections.optim import OptimConfig
from deit.config.sections.views import ViewsConfig
from deit.core import run_log
from deit.core.errors import NumericsError
from deit.core.types import StudentOutput
from deit.training.loop import MetricAccumulator, StepResult, train_epoch
from tests.helpers.errors import raises
from tests.helpers.loop_runs import CLASSES, make_step_context

ROOT = Path(__file__).parents[2]


@pytest.mark.fault("D11", "D14")
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_nonfinite_step_changes_no_weights_moments_or_metrics(
    value, accumulate, clip_norm, monkeypatch
):
    """Neither weights nor moments nor average, nor the sums of the epoch; the next one does."""
    optim = OptimConfig(
        epochs=3,
        batch_size=16,
        grad_accum_steps=accumulate,
        lr=1e-3,
        warmup_epochs=1,
        clip_grad_norm=clip_norm,
    )
    job, data = make_step_context(optim=optim, average=10)
    tally = MetricAccumulator(job.accelerator, {})
    bad = iter([False] * accumulate + [True] + [False] * 9)

    def spoiled(point, loss):
        return loss * float(value) if next(bad) else loss

    monkeypatch.setattr("deit.training.loop.inject_nan", spoiled)
    updates = train_epoch(job, data.epoch(0), tally, step=0, steps=data.steps_per_epoch)
    assert next(updates).applied

    def everything():
        moments = [v for state in job.optimizer.state.values() for v in state.values()]
        tensors = [*job.student.parameters(), *job.average.model.parameters(), *moments]
        return [t.detach().clone() for t in (*tensors, tally.sums)]

    before = everything()
    result = next(updates)
    assert not result.applied
    assert len(result.nonfinite_samples()) == 16
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert all(t.grad is None for t in job.student.parameters())
    assert next(iter(train_epoch(job, data.epoch(1), tally, step=2, steps=2))).applied
    assert not all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def test_nonfinite_samples_are_those_with_nonfinite_logits():
    job, data = make_step_context()
    tally = MetricAccumulator(job.accelerator, {})
    batch = next(data.epoch(0))
    logits = torch.zeros(16, CLASSES)
    logits[3, 1], logits[7] = float("nan"), float("inf")
    tally.add({"total": logits.sum()}, StudentOutput(logits), batch, None)
    no = torch.tensor(False)
    assert torch.equal(
        StepResult(no, tally.commit(no)).nonfinite_samples(), batch.sample_ids[[3, 7]]
    )
    assert tally.compute()["loss"] != tally.compute()["loss"]  # nothing was counted


def test_metric_sums_resume_with_any_number_of_processes():
    job, data = make_step_context()
    whole, first = MetricAccumulator(job.accelerator, {}), MetricAccumulator(job.accelerator, {})
    logits = torch.randn(16, CLASSES)
    for index, batch in enumerate(data.epoch(0)):
        for tally in (whole, first):
            tally.add({"total": logits.sum() / 3}, StudentOutput(logits), batch, None)
            tally.commit(torch.tensor(True))
        if index == 0:
            first = MetricAccumulator(job.accelerator, json.loads(json.dumps(first.state())))
    assert first.compute() == whole.compute()
    of_two = {"loss": [1.0, 2.5], "number": [2.0, 2.0]}
    assert MetricAccumulator(job.accelerator, of_two).compute() == {"loss": 3.5 / 4}


@pytest.mark.fault("D13")
def test_fp16_scale_below_one_raises():
    """After endless infinities the scale is 0, and good gradients would become NaN."""
    from types import SimpleNamespace

    from deit.training.nonfinite import NonFiniteMonitor
    from deit.training.state import TrainState

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    accelerator = SimpleNamespace(scaler=scaler, device=torch.device("cpu"))
    run = SimpleNamespace(max_nonfinite_steps=10)
    parts = SimpleNamespace(
        state=TrainState(), accelerator=accelerator, config=SimpleNamespace(run=run)
    )
    skipped, monitor = StepResult(torch.tensor(False), []), NonFiniteMonitor(parts)
    monitor(1, skipped)  # a scale of 2: it is still looking for one
    scaler.update(0.5)
    with raises(NumericsError, "fp16", "--run.precision bf16", "optim.lr"):
        monitor(2, skipped)
    assert parts.state.skipped == 2


def test_nonfinite_monitor_reads_steps_after_a_fixed_lag():
    """Always the same number of them, so that several processes stop at the same update."""
    from types import SimpleNamespace

    from deit.training.nonfinite import NonFiniteMonitor
    from deit.training.state import TrainState

    parts = SimpleNamespace(
        state=TrainState(),
        accelerator=SimpleNamespace(scaler=None, device=torch.device("cpu"), process_index=0),
        config=SimpleNamespace(
            run=SimpleNamespace(max_nonfinite_steps=2), optim=SimpleNamespace(clip_grad_norm=None)
        ),
        splits=SimpleNamespace(train=SimpleNamespace(name="image {}".format)),
        out=Path("nowhere"),
    )
    monitor = NonFiniteMonitor(parts)
    monitor.lag = 3
    micro_batches = [(torch.tensor([4, 9]), torch.zeros(2, 3))]
    good, bad = (
        StepResult(torch.tensor(True), micro_batches),
        StepResult(torch.tensor(False), micro_batches),
    )
    for step, update in enumerate((good, bad, bad, good, good), start=1):
        if step < 5:
            monitor(step, update)
            assert parts.state.skipped == 0
        else:
            monitor(step, update)
            assert parts.state.skipped == 1
    anomalies = parts.out / run_log.NONFINITE_LOG
    with raises(NumericsError, "image 4", "image 9", anomalies, "optim.lr") as raised:
        monitor.flush()
    assert parts.state.skipped == 2
    assert re.search(r"\b3\b.*\b2\b", str(raised.value))  # the update, and the first in a row


# A step without a weight average is the same with less work: one loss covers it.
@pytest.mark.parametrize(
    ("name", "average"), [*((name, 10.0) for name in LOSS_PRESETS), ("deit-hard", None)]
)
def test_step_does_not_synchronize_with_the_device(name, average):
    """No number is read back: on a GPU the loop would wait for it. The teacher's outputs are
    checked now and then, on a CPU at every step."""
    from torch.profiler import ProfilerActivity, profile

    single = LOSS_PRESETS[name].head == "class"
    optim = OptimConfig(
        epochs=9, batch_size=16, grad_accum_steps=2, warmup_epochs=1, clip_grad_norm=1.0
    )
    views = ViewsConfig(
        crop="random_resized",
        auto_augment="none" if name == "dkd" else "randaugment",
        erasing_prob=0.5,
        mixup_alpha=0 if name == "dkd" else 0.8,
        cutmix_alpha=0 if name == "dkd" else 1.0,
    )
    job, data = make_step_context(
        LOSS_PRESETS[name],
        optim=optim,
        name="vit_micro" if single else "deit_micro",
        average=average,
        drop_path=0.2,
        views=views,
    )
    if job.teacher is not None:
        job.teacher._track_nonfinite = lambda samples, logits: None
    tally = MetricAccumulator(job.accelerator, {})
    batches = list(data.epoch(0))
    list(train_epoch(job, iter(batches), tally, step=0, steps=2))
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        list(train_epoch(job, iter(batches), tally, step=2, steps=2))
    called = {event.name for event in seen.events()}
    assert {"aten::_fused_adamw_", "aten::native_layer_norm"} <= called
    waits = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
    waiting = [event for event in seen.events() if event.name in waits]
    # AdamW's kernel for CPUs reads its own step, the one for GPUs does not.
    assert {"aten::_fused_adamw_"} >= {_outermost(event) for event in waiting}


@pytest.mark.parametrize("policy", ["randaugment", "three_augment", "none"])
@pytest.mark.parametrize("fill", ["noise", "mean"])
def test_step_makes_no_blocking_copy_to_the_device(policy, fill, monkeypatch):
    """Once views are drawn and an update was made: an ordinary copy to a GPU waits until all that
    is queued there is done; what comes by deit/core/tensors.py does not."""
    erasing = {"erasing_prob": 0.9, "erasing_mode": fill, "rotation": 10.0, "color_jitter": 0.3}
    views = ViewsConfig(crop="random_resized", auto_augment=policy, mixup_alpha=0.8, **erasing)
    optim = OptimConfig(epochs=9, batch_size=16, warmup_epochs=1)
    job, data = make_step_context(LOSS_PRESETS["deit-soft"], optim=optim, views=views)
    updates = train_epoch(
        job, data.epoch(0), MetricAccumulator(job.accelerator, {}), step=0, steps=4
    )
    next(updates)
    locations, tensor, to = [], torch.tensor, torch.Tensor.to

    def note(target):
        frame = sys._getframe(2)
        file = Path(frame.f_code.co_filename)
        in_project = file.is_relative_to(ROOT) and "site-packages" not in file.parts
        if target is not None and in_project:
            locations.append(f"{file}:{frame.f_lineno}")

    def create(*arguments, **options):
        note(options.get("device"))
        return tensor(*arguments, **options)

    def brought(self, *arguments, **options):
        note(next((t for t in arguments if isinstance(t, torch.device)), None))
        return to(self, *arguments, **options)

    monkeypatch.setattr(torch, "tensor", create)
    monkeypatch.setattr(torch.Tensor, "to", brought)
    next(updates)
    assert locations == []
    torch.tensor(0, device="cpu")
    torch.ones(1).to(torch.device("cpu"))
    assert len(locations) == 2, "the test cannot fail"


def _outermost(event):
    while event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::"):
        event = event.cpu_parent
    return event.name
