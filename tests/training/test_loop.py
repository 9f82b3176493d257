"""The training step: what it learns, what it leaves alone, and that layouts do not matter."""

import copy
import re

import pytest
import torch

from deit.config.presets import LOSS_PRESETS
from deit.config.sections.loss import LossConfig
from deit.config.sections.optim import OptimConfig
from deit.config.sections.views import ViewsConfig
from deit.core.errors import NumericsError
from deit.distill.inference import predict
from deit.training.loop import MetricAccumulator, train_epoch
from deit.training.lr_schedule import lr_at
from tests.helpers.errors import raises
from tests.helpers.loop_runs import CLASSES, IMAGES, make_step_context


def teacher_of(job):
    return job.teacher.teachers[0].teacher


def train(job, data, epochs):
    step, steps = 0, data.steps_per_epoch
    for epoch in range(epochs):
        tally = MetricAccumulator(job.accelerator, {})
        updates = list(train_epoch(job, data.epoch(epoch), tally, step=step, steps=steps))
        assert [bool(update.applied) for update in updates] == [True] * steps
        step += steps
    return tally.compute()


def test_training_overfits_32_images_and_matches_the_teacher():
    job, data = make_step_context(LossConfig(kind="hard", label_smoothing=0.0))
    means = train(job, data, 40)
    assert means["class_top1"] == 1.0
    assert means["loss_teacher"] < 0.1
    assert means["loss"] == pytest.approx((means["loss_class"] + means["loss_teacher"]) / 2)


@pytest.mark.fault("D3")
def test_teacher_gets_the_inputs_of_the_student_and_is_unchanged():
    views = ViewsConfig(crop="padded", crop_padding=2, mixup_alpha=0.8, cutmix_alpha=1.0)
    job, data = make_step_context(views=views)
    before = copy.deepcopy(teacher_of(job).state_dict())
    seen = []
    job.student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    train(job, data, 2)
    teacher_images = teacher_of(job).network.inputs
    assert len(teacher_images) == len(seen) == 4
    assert all(
        torch.equal(actual, teacher_image) for actual, teacher_image in zip(seen, teacher_images)
    )
    after = teacher_of(job).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in teacher_of(job).parameters())


def test_teacher_is_neither_optimized_nor_prepared():
    job, _ = make_step_context()
    taught = {id(parameter) for parameter in teacher_of(job).parameters()}
    optimised = {id(p) for group in job.optimizer.param_groups for p in group["params"]}
    assert not taught & optimised
    assert teacher_of(job) not in job.accelerator._models


def test_metrics_without_a_teacher_have_no_agreement():
    job, data = make_step_context(LOSS_PRESETS["none"])
    means = train(job._replace(teacher=None), data, 1)
    assert "agreement" not in means
    assert {"loss", "class_top1", "distillation_top1", "fused_top1"} <= means.keys()


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_every_student_parameter_is_updated(name):
    single = LOSS_PRESETS[name].head == "class"
    job, data = make_step_context(LOSS_PRESETS[name], name="vit_micro" if single else "deit_micro")
    before = copy.deepcopy(dict(job.student.named_parameters()))
    train(job, data, 2)
    for parameter_name, parameter in job.student.named_parameters():
        assert not torch.equal(parameter, before[parameter_name]), parameter_name


def test_gradient_accumulation_matches_the_large_batch():
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
        job, data = make_step_context(optim=optim, views=views)
        means = train(job, data, 2)
        weights.append((job.student.network.head.weight.detach(), means["loss"]))
    assert torch.allclose(weights[0][0], weights[1][0], atol=1e-5)
    assert weights[0][1] == pytest.approx(weights[1][1], abs=1e-4)


def test_train_epoch_sets_the_learning_rate_of_each_step():
    job, data = make_step_context()
    tally = MetricAccumulator(job.accelerator, {})
    updates = train_epoch(job, data.epoch(5), tally, step=10, steps=data.steps_per_epoch)
    for step, _ in enumerate(updates, start=10):
        expected = lr_at(step, optim=job.optim, steps_per_epoch=2)
        assert all(group["lr"] == expected for group in job.optimizer.param_groups)
    assert step == 11


def test_drop_path_depends_only_on_seed_and_step():
    weights = []
    for waste in (0, 5):
        job, data = make_step_context(drop_path=0.5)
        torch.rand(waste)
        train(job, data, 1)
        weights.append(job.student.network.head.weight.detach().clone())
    assert torch.equal(*weights)


def test_clip_grad_norm_bounds_the_gradient():
    optim = OptimConfig(epochs=2, batch_size=16, lr=1e-3, warmup_epochs=0, clip_grad_norm=1e-3)
    job, data = make_step_context(optim=optim)
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


def test_ema_follows_the_student():
    job, data = make_step_context(average=1e9)
    train(job, data, 1)
    assert job.average.updates == 2
    raw = job.student.network.head.weight
    averaged = job.average.model.network.head.weight
    assert not torch.equal(raw, averaged)
    assert not averaged.requires_grad


def test_predict_keeps_the_order_of_images_and_both_heads():
    job, _ = make_step_context()
    images = IMAGES.pixels.float() / 255
    outputs = predict(job.accelerator, job.student, iter(images.split(5)), 32)
    with torch.no_grad():
        expected = job.student.eval()(images)
    assert torch.allclose(outputs.class_logits, expected.class_logits, atol=1e-5)
    assert torch.allclose(outputs.distillation_logits, expected.distillation_logits, atol=1e-5)
    logits = predict(job.accelerator, teacher_of(job), iter(images.split(5)), 32)
    assert logits.distillation_logits is None
    assert logits.class_logits.shape == (32, CLASSES)


def test_distillation_tokens_learn_the_labels_of_their_teachers():
    loss = LOSS_PRESETS["deit-hard"]
    job, data = make_step_context(loss, tokens=2)
    ensemble = job.teacher
    ensemble.teachers = [
        lambda batch, label=label: (torch.full((16,), label), None) for label in (1, 2)
    ]
    ensemble.mode, ensemble.weights = "tokens", (0.5, 0.5)
    means = train(job, data, 10)
    assert {"loss_teacher_1", "loss_teacher_2", "distillation_1_top1"} <= means.keys()
    outputs = predict(job.accelerator, job.student, iter([IMAGES.pixels.float() / 255]), 32)
    assert outputs.distillation_logits.argmax(dim=2).unique(dim=0).tolist() == [[1, 2]]


@pytest.mark.fault("D4")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_teacher_output_raises_before_the_step(value):
    job, data = make_step_context()
    teacher_of(job).network.head.bias.data[2] = value
    before = job.student.network.head.weight.detach().clone()
    with raises(NumericsError, "teacher", "--run.precision fp32") as raised:
        train(job, data, 1)
    message = str(raised.value)
    assert len(re.findall(r"\bimage \d+\b", message)) == 5
    assert re.search(r"\b11\b", message)  # of the 16 that are not named
    assert torch.equal(job.student.network.head.weight, before)
