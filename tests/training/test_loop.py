"""The training step: what it learns, what it leaves alone, and that layouts do not matter."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from deit.config.data_section import ViewsConfig
from deit.config.presets import LOSS_PRESETS
from deit.config.schema import LossConfig, OptimConfig
from deit.config.student_section import StudentConfig
from deit.core import run_log
from deit.core.errors import NumericsError
from deit.core.types import StudentOutput
from deit.datasets.images import InMemoryImages
from deit.datasets.loader import Sizes, TrainLoader
from deit.datasets.views import ChannelStats
from deit.distill.inference import predict
from deit.distill.losses import needs_logits
from deit.distill.teacher_ensemble import OnlineTeacher, TeacherEnsemble
from deit.models.saved import ModelInfo, build_student
from deit.models.teachers import LoadedNetwork, Teacher
from deit.training.loop import MetricAccumulator, StepContext, StepResult, train_epoch
from deit.training.optimizer import EMA, build_optimizer, lr_at
from tests.helpers.errors import raises

CLASSES = 4
IMAGES = InMemoryImages(
    torch.randint(
        256, (32, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    ),
    torch.arange(32) % CLASSES,
)

ROOT = Path(__file__).parents[2]


class Shown(nn.Module):
    """A teacher that keeps what it is shown; it has statistics that training would move."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, CLASSES)
        self.shown = []

    def forward(self, images):
        self.shown.append(images.clone())
        return self.head(self.norm(images).mean(dim=(2, 3)))


def panel_of(teacher, accelerator, loss):
    return TeacherEnsemble(
        [OnlineTeacher(teacher, accelerator)],
        weights=(1.0,),
        mode="probabilities",
        temperature=loss.temperature,
        needs_logits=needs_logits(loss),
        name="image {}".format,
    )


def teacher_of(job):
    return job.teacher.teachers[0].teacher


def make_job(
    loss=LOSS_PRESETS["deit-hard"],
    *,
    optim=None,
    name="deit_micro",
    average=None,
    drop_path=0.0,
    tokens=1,
    **loader,
):
    torch.manual_seed(0)
    optim = optim or OptimConfig(
        epochs=40, batch_size=16, lr=3e-3, lr_base_batch_size=None, warmup_epochs=1
    )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=optim.grad_accum_steps)
    student_config = StudentConfig(
        name=name,
        image_size=16,
        embed_dim=24,
        depth=2,
        drop_path=drop_path,
        num_distillation_tokens=tokens,
    )
    facts = ModelInfo(student_config, tuple("abcd"), (0.5,) * 3, (0.25,) * 3, 1.0)
    student = build_student(facts)
    teacher = Teacher(LoadedNetwork(Shown(), "shown", None, (0.0,) * 3, (1.0,) * 3, None))
    panel = None if loss.kind == "none" else panel_of(teacher, accelerator, loss)
    weights = None if average is None else EMA(student, horizon=average)
    optimizer = build_optimizer(student, optim)
    prepared, optimizer = accelerator.prepare(student, optimizer)
    data = TrainLoader(
        IMAGES,
        CLASSES,
        views=loader.get("views", ViewsConfig(flip=0)),
        optim=optim,
        sizes=Sizes(16, 16, 16),
        colours=ChannelStats((0.5,) * 3, (0.25,) * 3),
        seed=0,
    )
    job = StepContext(accelerator, prepared, panel, optimizer, weights, loss, optim, 0)
    return job, data


def train(job, data, epochs):
    step, steps = 0, data.steps_per_epoch
    for epoch in range(epochs):
        tally = MetricAccumulator(job.accelerator, {})
        updates = list(train_epoch(job, data.epoch(epoch), tally, step=step, steps=steps))
        assert [bool(update.applied) for update in updates] == [True] * steps
        step += steps
    return tally.compute()


def test_it_learns_32_images_by_heart_and_imitates_the_teacher():
    job, data = make_job(LossConfig(kind="hard", label_smoothing=0.0))
    means = train(job, data, 40)
    assert means["class_top1"] == 1.0
    assert means["loss_teacher"] < 0.1
    assert means["loss"] == pytest.approx((means["loss_class"] + means["loss_teacher"]) / 2)


@pytest.mark.fault("D3")
def test_the_teacher_sees_the_very_tensor_of_the_student_and_stays_as_it_was():
    views = ViewsConfig(crop="padded", crop_padding=2, mixup_alpha=0.8, cutmix_alpha=1.0)
    job, data = make_job(views=views)
    before = copy.deepcopy(teacher_of(job).state_dict())
    seen = []
    job.student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    train(job, data, 2)
    shown = teacher_of(job).network.shown
    assert len(shown) == len(seen) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, shown))
    after = teacher_of(job).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in teacher_of(job).parameters())


def test_the_teacher_is_in_neither_optimizer_nor_prepared_models():
    job, _ = make_job()
    taught = {id(parameter) for parameter in teacher_of(job).parameters()}
    optimised = {id(p) for group in job.optimizer.param_groups for p in group["params"]}
    assert not taught & optimised
    assert teacher_of(job) not in job.accelerator._models


def test_without_a_teacher_there_is_no_agreement():
    job, data = make_job(LOSS_PRESETS["none"])
    means = train(job._replace(teacher=None), data, 1)
    assert "agreement" not in means
    assert {"loss", "class_top1", "distillation_top1", "fused_top1"} <= means.keys()


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_every_parameter_of_the_student_learns(name):
    single = LOSS_PRESETS[name].head == "class"
    job, data = make_job(LOSS_PRESETS[name], name="vit_micro" if single else "deit_micro")
    before = copy.deepcopy(dict(job.student.named_parameters()))
    train(job, data, 2)
    for parameter_name, parameter in job.student.named_parameters():
        assert not torch.equal(parameter, before[parameter_name]), parameter_name


def test_accumulation_is_the_large_batch():
    weights = []
    for accumulate in (1, 4):
        optim = OptimConfig(
            epochs=3,
            batch_size=16,
            grad_accum_steps=accumulate,
            lr=1e-3,
            warmup_epochs=1,
            clip_grad_norm=0.5,
        )
        views = ViewsConfig(flip=0.5, mixup_alpha=0.8, cutmix_alpha=1.0)
        job, data = make_job(optim=optim, views=views)
        means = train(job, data, 2)
        weights.append((job.student.network.head.weight.detach(), means["loss"]))
    assert torch.allclose(weights[0][0], weights[1][0], atol=1e-5)
    assert weights[0][1] == pytest.approx(weights[1][1], abs=1e-4)


def test_the_loop_writes_the_learning_rate_of_its_step():
    job, data = make_job()
    tally = MetricAccumulator(job.accelerator, {})
    updates = train_epoch(job, data.epoch(5), tally, step=10, steps=data.steps_per_epoch)
    for step, _ in enumerate(updates, start=10):
        expected = lr_at(step, optim=job.optim, steps_per_epoch=2)
        assert all(group["lr"] == expected for group in job.optimizer.param_groups)
    assert step == 11


def test_drop_path_is_a_function_of_seed_and_step():
    weights = []
    for waste in (0, 5):
        job, data = make_job(drop_path=0.5)
        torch.rand(waste)
        train(job, data, 1)
        weights.append(job.student.network.head.weight.detach().clone())
    assert torch.equal(*weights)


def test_clipping_bounds_the_first_step():
    optim = OptimConfig(epochs=2, batch_size=16, lr=1e-3, warmup_epochs=0, clip_grad_norm=1e-3)
    job, data = make_job(optim=optim)
    norms = []
    job.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *rest: norms.append(
            torch.cat(
                [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
            ).norm()
        )
    )
    train(job, data, 1)
    assert norms
    assert all(norm <= 1.001e-3 for norm in norms)


def test_the_average_follows_the_student():
    job, data = make_job(average=1e9)
    train(job, data, 1)
    assert job.average.updates == 2
    raw = job.student.network.head.weight
    averaged = job.average.model.network.head.weight
    assert not torch.equal(raw, averaged)
    assert not averaged.requires_grad


def test_a_prediction_keeps_the_order_of_the_split_and_both_heads():
    job, _ = make_job()
    images = IMAGES.pixels.float() / 255
    outputs = predict(job.accelerator, job.student, iter(images.split(5)), 32)
    with torch.no_grad():
        expected = job.student.eval()(images)
    assert torch.allclose(outputs.class_logits, expected.class_logits, atol=1e-5)
    assert torch.allclose(outputs.distillation_logits, expected.distillation_logits, atol=1e-5)
    logits = predict(job.accelerator, teacher_of(job), iter(images.split(5)), 32)
    assert logits.distillation_logits is None
    assert logits.class_logits.shape == (32, CLASSES)


def test_a_token_for_each_teacher_learns_from_it_alone():
    loss = LOSS_PRESETS["deit-hard"]
    job, data = make_job(loss, tokens=2)
    panel = job.teacher
    panel.teachers = [
        lambda batch, answer=answer: (torch.full((16,), answer), None) for answer in (1, 2)
    ]
    panel.mode, panel.weights = "tokens", (0.5, 0.5)
    means = train(job, data, 10)
    assert {"loss_teacher_1", "loss_teacher_2", "distillation_1_top1"} <= means.keys()
    outputs = predict(job.accelerator, job.student, iter([IMAGES.pixels.float() / 255]), 32)
    assert outputs.distillation_logits.argmax(dim=2).unique(dim=0).tolist() == [[1, 2]]


@pytest.mark.fault("D4")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_stops_the_run_before_the_update(value):
    job, data = make_job()
    teacher_of(job).network.head.bias.data[2] = value
    before = job.student.network.head.weight.detach().clone()
    with raises(NumericsError, "teacher", "--run.precision fp32") as raised:
        train(job, data, 1)
    said = str(raised.value)
    assert len(re.findall(r"\bimage \d+\b", said)) == 5
    assert re.search(r"\b11\b", said)  # of the 16 that are not named
    assert torch.equal(job.student.network.head.weight, before)


@pytest.mark.fault("D11", "D14")
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_an_update_that_is_not_finite_moves_nothing(value, accumulate, clip_norm, monkeypatch):
    """Neither weights nor moments nor average, nor the sums of the epoch; the next one does."""
    optim = OptimConfig(
        epochs=3,
        batch_size=16,
        grad_accum_steps=accumulate,
        lr=1e-3,
        warmup_epochs=1,
        clip_grad_norm=clip_norm,
    )
    job, data = make_job(optim=optim, average=10)
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
        return [one.detach().clone() for one in (*tensors, tally.sums)]

    before = everything()
    found = next(updates)
    assert not found.applied
    assert len(found.nonfinite_samples()) == 16
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert all(one.grad is None for one in job.student.parameters())
    assert next(iter(train_epoch(job, data.epoch(1), tally, step=2, steps=2))).applied
    assert not all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def test_the_images_with_an_answer_that_is_not_finite_are_told_apart():
    job, data = make_job()
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


def test_sums_go_on_where_they_were_and_to_other_processes():
    job, data = make_job()
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
def test_fp16_without_a_scale_left_stops():
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
    skipped, watch = StepResult(torch.tensor(False), []), NonFiniteMonitor(parts)
    watch(1, skipped)  # a scale of 2: it is still looking for one
    scaler.update(0.5)
    with raises(NumericsError, "fp16", "--run.precision bf16", "optim.lr"):
        watch(2, skipped)
    assert parts.state.skipped == 2


def test_what_the_device_decides_is_looked_at_some_updates_later():
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
    watch = NonFiniteMonitor(parts)
    watch.lag = 3
    heard = [(torch.tensor([4, 9]), torch.zeros(2, 3))]
    good, bad = StepResult(torch.tensor(True), heard), StepResult(torch.tensor(False), heard)
    for step, update in enumerate((good, bad, bad, good, good), start=1):
        if step < 5:
            watch(step, update)
            assert parts.state.skipped == 0
        else:
            watch(step, update)
            assert parts.state.skipped == 1
    anomalies = parts.out / run_log.NONFINITE_LOG
    with raises(NumericsError, "image 4", "image 9", anomalies, "optim.lr") as raised:
        watch.flush()
    assert parts.state.skipped == 2
    assert re.search(r"\b3\b.*\b2\b", str(raised.value))  # the update, and the first in a row


# Without an average an update is the same, less a part: one objective stands for all.
@pytest.mark.parametrize(
    ("name", "average"), [*((name, 10.0) for name in LOSS_PRESETS), ("deit-hard", None)]
)
def test_an_update_asks_the_device_for_nothing(name, average):
    """No number is read back: on a GPU the loop would wait for it. (The teacher's answers are
    looked at from time to time, on a CPU always.)"""
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
    job, data = make_job(
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
    found = [event for event in seen.events() if event.name in waits]
    # AdamW's kernel for CPUs reads its own step, the one for GPUs does not.
    assert {"aten::_fused_adamw_"} >= {_outermost(event) for event in found}


@pytest.mark.parametrize("policy", ["randaugment", "three_augment", "none"])
@pytest.mark.parametrize("fill", ["noise", "mean"])
def test_nothing_is_copied_in_a_way_that_a_gpu_waits_for(policy, fill, monkeypatch):
    """Once views are drawn and an update was made: an ordinary copy to a GPU waits until all that
    is queued there is done; what comes by deit/core/tensors.py does not."""
    erasing = {"erasing_prob": 0.9, "erasing_mode": fill, "rotation": 10.0, "color_jitter": 0.3}
    views = ViewsConfig(crop="random_resized", auto_augment=policy, mixup_alpha=0.8, **erasing)
    optim = OptimConfig(epochs=9, batch_size=16, warmup_epochs=1)
    job, data = make_job(LOSS_PRESETS["deit-soft"], optim=optim, views=views)
    updates = train_epoch(
        job, data.epoch(0), MetricAccumulator(job.accelerator, {}), step=0, steps=4
    )
    next(updates)
    found, tensor, to = [], torch.tensor, torch.Tensor.to

    def note(target):
        frame = sys._getframe(2)
        file = Path(frame.f_code.co_filename)
        own = file.is_relative_to(ROOT) and "site-packages" not in file.parts
        if target is not None and own and file.name != "transfer.py":
            found.append(f"{file}:{frame.f_lineno}")

    def made(*arguments, **options):
        note(options.get("device"))
        return tensor(*arguments, **options)

    def brought(self, *arguments, **options):
        note(next((one for one in arguments if isinstance(one, torch.device)), None))
        return to(self, *arguments, **options)

    monkeypatch.setattr(torch, "tensor", made)
    monkeypatch.setattr(torch.Tensor, "to", brought)
    next(updates)
    assert found == []
    torch.tensor(0, device="cpu")
    torch.ones(1).to(torch.device("cpu"))
    assert len(found) == 2, "the test cannot fail"


def _outermost(event):
    while event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::"):
        event = event.cpu_parent
    return event.name
