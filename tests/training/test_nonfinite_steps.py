"""Nonfinite steps, and steps that do not synchronize with the device."""

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
    """Nor the weight average. The next step changes all of them."""
    optim = OptimConfig(
        epochs=3,
        batch_size=16,
        grad_accum_steps=accumulate,
        lr=1e-3,
        warmup_epochs=1,
        clip_grad_norm=clip_norm,
    )
    context, loader = make_step_context(optim=optim, average=10)
    metrics = MetricAccumulator(context.accelerator, {})
    is_bad = iter([False] * accumulate + [True] + [False] * 9)

    def spoil_loss(point, loss):
        return loss * float(value) if next(is_bad) else loss

    monkeypatch.setattr("deit.training.loop.inject_nan", spoil_loss)
    updates = train_epoch(context, loader.epoch(0), metrics, step=0, steps=loader.steps_per_epoch)
    assert next(updates).applied

    def all_tensors():
        moments = [v for state in context.optimizer.state.values() for v in state.values()]
        tensors = [*context.student.parameters(), *context.average.model.parameters(), *moments]
        return [t.detach().clone() for t in (*tensors, metrics.sums)]

    before = all_tensors()
    result = next(updates)
    assert not result.applied
    assert len(result.nonfinite_samples()) == 16
    assert all(torch.equal(a, b) for a, b in zip(before, all_tensors(), strict=True))
    assert all(t.grad is None for t in context.student.parameters())
    assert next(iter(train_epoch(context, loader.epoch(1), metrics, step=2, steps=2))).applied
    assert not all(torch.equal(a, b) for a, b in zip(before, all_tensors(), strict=True))


def test_nonfinite_samples_are_those_with_nonfinite_logits():
    context, loader = make_step_context()
    metrics = MetricAccumulator(context.accelerator, {})
    batch = next(loader.epoch(0))
    logits = torch.zeros(16, CLASSES)
    logits[3, 1], logits[7] = float("nan"), float("inf")
    metrics.add({"loss": logits.sum()}, StudentOutput(logits), batch, None)
    not_applied = torch.tensor(False)
    assert torch.equal(
        StepResult(not_applied, metrics.commit(not_applied)).nonfinite_samples(),
        batch.sample_ids[[3, 7]],
    )
    # The mean is NaN, because nothing was counted.
    assert metrics.compute()["loss"] != metrics.compute()["loss"]


def test_metric_sums_resume_with_any_number_of_processes():
    context, loader = make_step_context()
    uninterrupted, resumed = (
        MetricAccumulator(context.accelerator, {}),
        MetricAccumulator(context.accelerator, {}),
    )
    logits = torch.randn(16, CLASSES)
    for index, batch in enumerate(loader.epoch(0)):
        for metrics in (uninterrupted, resumed):
            metrics.add({"loss": logits.sum() / 3}, StudentOutput(logits), batch, None)
            metrics.commit(torch.tensor(True))
        if index == 0:
            resumed = MetricAccumulator(
                context.accelerator, json.loads(json.dumps(resumed.state()))
            )
    assert resumed.compute() == uninterrupted.compute()
    sums_of_two = {"loss": [1.0, 2.5], "number": [2.0, 2.0]}
    assert MetricAccumulator(context.accelerator, sums_of_two).compute() == {"loss": 3.5 / 4}


@pytest.mark.fault("D13")
def test_fp16_scale_below_one_raises():
    """After many overflows the scale is 0, and finite gradients would become NaN."""
    from types import SimpleNamespace

    from deit.training.nonfinite import NonFiniteMonitor
    from deit.training.state import TrainState

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    accelerator = SimpleNamespace(scaler=scaler, device=torch.device("cpu"))
    run = SimpleNamespace(max_nonfinite_steps=10)
    fake_run = SimpleNamespace(
        state=TrainState(), accelerator=accelerator, config=SimpleNamespace(run=run)
    )
    skipped, monitor = StepResult(torch.tensor(False), []), NonFiniteMonitor(fake_run)
    monitor(1, skipped)  # at a scale of 2 the scaler can still recover
    scaler.update(0.5)
    with raises(NumericsError, "fp16", "--run.precision bf16", "optim.lr"):
        monitor(2, skipped)
    assert fake_run.state.skipped == 2


def test_nonfinite_monitor_reads_steps_after_a_fixed_lag():
    """The lag is the same in all processes, so that they stop at the same step."""
    from types import SimpleNamespace

    from deit.training.nonfinite import NonFiniteMonitor
    from deit.training.state import TrainState

    fake_run = SimpleNamespace(
        state=TrainState(),
        accelerator=SimpleNamespace(scaler=None, device=torch.device("cpu"), process_index=0),
        config=SimpleNamespace(
            run=SimpleNamespace(max_nonfinite_steps=2), optim=SimpleNamespace(clip_grad_norm=None)
        ),
        splits=SimpleNamespace(train=SimpleNamespace(name="image {}".format)),
        out=Path("nowhere"),
    )
    monitor = NonFiniteMonitor(fake_run)
    monitor.lag = 3
    micro_batches = [(torch.tensor([4, 9]), torch.zeros(2, 3))]
    good, bad = (
        StepResult(torch.tensor(True), micro_batches),
        StepResult(torch.tensor(False), micro_batches),
    )
    for step, result in enumerate((good, bad, bad, good, good), start=1):
        if step < 5:
            monitor(step, result)
            assert fake_run.state.skipped == 0
        else:
            monitor(step, result)
            assert fake_run.state.skipped == 1
    log_path = fake_run.out / run_log.NONFINITE_LOG
    with raises(NumericsError, "image 4", "image 9", log_path, "optim.lr") as raised:
        monitor.flush()
    assert fake_run.state.skipped == 2
    # The step, and the first of the steps that were skipped in a row.
    assert re.search(r"\b3\b.*\b2\b", str(raised.value))


# A step without a weight average is the same with less work: one loss covers it.
@pytest.mark.parametrize(
    ("name", "average"), [*((name, 10.0) for name in LOSS_PRESETS), ("deit-hard", None)]
)
def test_step_does_not_synchronize_with_the_device(name, average):
    """No number is read back: on a GPU the loop would wait for it. The teacher's outputs are
    checked now and then, on a CPU at every step."""
    from torch.profiler import ProfilerActivity, profile

    only_class_head = LOSS_PRESETS[name].head == "class"
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
    context, loader = make_step_context(
        LOSS_PRESETS[name],
        optim=optim,
        name="vit_micro" if only_class_head else "deit_micro",
        average=average,
        drop_path=0.2,
        views=views,
    )
    if context.teacher is not None:
        context.teacher._track_nonfinite = lambda samples, logits: None
    metrics = MetricAccumulator(context.accelerator, {})
    batches = list(loader.epoch(0))
    list(train_epoch(context, iter(batches), metrics, step=0, steps=2))
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        list(train_epoch(context, iter(batches), metrics, step=2, steps=2))
    operations = {event.name for event in profiler.events()}
    assert {"aten::_fused_adamw_", "aten::native_layer_norm"} <= operations
    sync_operations = {
        "aten::item",
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::is_nonzero",
    }
    sync_events = [event for event in profiler.events() if event.name in sync_operations]
    # AdamW's kernel for CPUs reads its own step, the one for GPUs does not.
    assert {"aten::_fused_adamw_"} >= {_outermost(event) for event in sync_events}


@pytest.mark.parametrize("policy", ["randaugment", "three_augment", "none"])
@pytest.mark.parametrize("fill", ["noise", "mean"])
def test_step_makes_no_blocking_copy_to_the_device(policy, fill, monkeypatch):
    """After the first step, which samples views: an ordinary copy to a GPU waits for all queued
    work, a copy by deit/core/tensors.py does not."""
    erasing = {"erasing_prob": 0.9, "erasing_mode": fill, "rotation": 10.0, "color_jitter": 0.3}
    views = ViewsConfig(crop="random_resized", auto_augment=policy, mixup_alpha=0.8, **erasing)
    optim = OptimConfig(epochs=9, batch_size=16, warmup_epochs=1)
    context, loader = make_step_context(LOSS_PRESETS["deit-soft"], optim=optim, views=views)
    updates = train_epoch(
        context, loader.epoch(0), MetricAccumulator(context.accelerator, {}), step=0, steps=4
    )
    next(updates)
    locations, original_tensor, original_to = [], torch.tensor, torch.Tensor.to

    def record(device):
        frame = sys._getframe(2)
        file = Path(frame.f_code.co_filename)
        in_project = file.is_relative_to(ROOT) and "site-packages" not in file.parts
        if device is not None and in_project:
            locations.append(f"{file}:{frame.f_lineno}")

    def recording_tensor(*arguments, **options):
        record(options.get("device"))
        return original_tensor(*arguments, **options)

    def recording_to(self, *arguments, **options):
        record(next((value for value in arguments if isinstance(value, torch.device)), None))
        return original_to(self, *arguments, **options)

    monkeypatch.setattr(torch, "tensor", recording_tensor)
    monkeypatch.setattr(torch.Tensor, "to", recording_to)
    next(updates)
    assert locations == []
    torch.tensor(0, device="cpu")
    torch.ones(1).to(torch.device("cpu"))
    assert len(locations) == 2, "the test cannot fail"


def _outermost(event):
    while event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::"):
        event = event.cpu_parent
    return event.name
