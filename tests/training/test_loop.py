"""The training loop: what it updates and leaves unchanged, accumulation, EMA, prediction."""

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


def teacher_of(context):
    return context.teacher.teachers[0].teacher


def train(context, loader, epochs):
    step, steps = 0, loader.steps_per_epoch
    for epoch in range(epochs):
        metrics = MetricAccumulator(context.accelerator, {})
        updates = list(train_epoch(context, loader.epoch(epoch), metrics, step=step, steps=steps))
        assert [bool(update.applied) for update in updates] == [True] * steps
        step += steps
    return metrics.compute()


def test_training_overfits_32_images_and_matches_the_teacher():
    context, loader = make_step_context(LossConfig(kind="hard", label_smoothing=0.0))
    results = train(context, loader, 40)
    assert results["class_top1"] == 1.0
    assert results["distillation_loss"] < 0.1
    assert results["loss"] == pytest.approx(
        (results["label_loss"] + results["distillation_loss"]) / 2
    )


@pytest.mark.fault("D3")
def test_teacher_gets_the_inputs_of_the_student_and_is_unchanged():
    views = ViewsConfig(crop="padded", crop_padding=2, mixup_alpha=0.8, cutmix_alpha=1.0)
    context, loader = make_step_context(views=views)
    before = copy.deepcopy(teacher_of(context).state_dict())
    student_inputs = []
    context.student.register_forward_pre_hook(
        lambda module, inputs: student_inputs.append(inputs[0].clone())
    )
    train(context, loader, 2)
    teacher_inputs = teacher_of(context).network.inputs
    assert len(teacher_inputs) == len(student_inputs) == 4
    assert all(torch.equal(*images) for images in zip(student_inputs, teacher_inputs))
    after = teacher_of(context).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in teacher_of(context).parameters())


def test_teacher_is_neither_optimized_nor_prepared():
    context, _ = make_step_context()
    teacher_ids = {id(parameter) for parameter in teacher_of(context).parameters()}
    optimized_ids = {id(p) for group in context.optimizer.param_groups for p in group["params"]}
    assert not teacher_ids & optimized_ids
    assert teacher_of(context) not in context.accelerator._models


def test_metrics_without_a_teacher_have_no_agreement():
    context, loader = make_step_context(LOSS_PRESETS["none"])
    results = train(context._replace(teacher=None), loader, 1)
    assert "agreement" not in results
    assert {"loss", "class_top1", "distillation_top1", "fused_top1"} <= results.keys()


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_every_student_parameter_is_updated(name):
    only_class_head = LOSS_PRESETS[name].head == "class"
    context, loader = make_step_context(
        LOSS_PRESETS[name], name="vit_micro" if only_class_head else "deit_micro"
    )
    before = copy.deepcopy(dict(context.student.named_parameters()))
    train(context, loader, 2)
    for parameter_name, parameter in context.student.named_parameters():
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
        context, loader = make_step_context(optim=optim, views=views)
        results = train(context, loader, 2)
        weights.append((context.student.network.head.weight.detach(), results["loss"]))
    assert torch.allclose(weights[0][0], weights[1][0], atol=1e-5)
    assert weights[0][1] == pytest.approx(weights[1][1], abs=1e-4)


def test_train_epoch_sets_the_learning_rate_of_each_step():
    context, loader = make_step_context()
    metrics = MetricAccumulator(context.accelerator, {})
    updates = train_epoch(context, loader.epoch(5), metrics, step=10, steps=loader.steps_per_epoch)
    for step, _ in enumerate(updates, start=10):
        expected = lr_at(step, optim=context.optim, steps_per_epoch=2)
        assert all(group["lr"] == expected for group in context.optimizer.param_groups)
    assert step == 11


def test_drop_path_depends_only_on_seed_and_step():
    weights = []
    for num_draws in (0, 5):
        context, loader = make_step_context(drop_path=0.5)
        torch.rand(num_draws)
        train(context, loader, 1)
        weights.append(context.student.network.head.weight.detach().clone())
    assert torch.equal(*weights)


def test_clip_grad_norm_bounds_the_gradient():
    optim = OptimConfig(epochs=2, batch_size=16, lr=1e-3, warmup_epochs=0, clip_grad_norm=1e-3)
    context, loader = make_step_context(optim=optim)
    norms = []
    context.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *rest: norms.append(
            torch.cat(
                [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
            ).norm()
        )
    )
    train(context, loader, 1)
    assert norms
    assert all(norm <= 1.001e-3 for norm in norms)


def test_ema_follows_the_student():
    context, loader = make_step_context(average=1e9)
    train(context, loader, 1)
    assert context.average.updates == 2
    weight = context.student.network.head.weight
    averaged_weight = context.average.model.network.head.weight
    assert not torch.equal(weight, averaged_weight)
    assert not averaged_weight.requires_grad


def test_predict_keeps_the_order_of_images_and_both_heads():
    context, _ = make_step_context()
    images = IMAGES.pixels.float() / 255
    outputs = predict(context.accelerator, context.student, iter(images.split(5)), 32)
    with torch.no_grad():
        expected = context.student.eval()(images)
    assert torch.allclose(outputs.class_logits, expected.class_logits, atol=1e-5)
    assert torch.allclose(outputs.distillation_logits, expected.distillation_logits, atol=1e-5)
    teacher_outputs = predict(context.accelerator, teacher_of(context), iter(images.split(5)), 32)
    assert teacher_outputs.distillation_logits is None
    assert teacher_outputs.class_logits.shape == (32, CLASSES)


def test_distillation_tokens_learn_the_labels_of_their_teachers():
    loss = LOSS_PRESETS["deit-hard"]
    context, loader = make_step_context(loss, tokens=2)
    ensemble = context.teacher
    ensemble.teachers = [
        lambda batch, label=label: (torch.full((16,), label), None) for label in (1, 2)
    ]
    ensemble.mode, ensemble.weights = "tokens", (0.5, 0.5)
    results = train(context, loader, 10)
    assert {"distillation_loss_1", "distillation_loss_2", "distillation_1_top1"} <= results.keys()
    outputs = predict(context.accelerator, context.student, iter([IMAGES.pixels.float() / 255]), 32)
    assert outputs.distillation_logits.argmax(dim=2).unique(dim=0).tolist() == [[1, 2]]


@pytest.mark.fault("D4")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_teacher_output_raises_before_the_step(value):
    context, loader = make_step_context()
    teacher_of(context).network.head.bias.data[2] = value
    before = context.student.network.head.weight.detach().clone()
    with raises(NumericsError, "teacher", "--run.precision fp32") as raised:
        train(context, loader, 1)
    message = str(raised.value)
    assert len(re.findall(r"\bimage \d+\b", message)) == 5
    assert re.search(r"\b11\b", message)  # 16 - 5 images are not named
    assert torch.equal(context.student.network.head.weight, before)
