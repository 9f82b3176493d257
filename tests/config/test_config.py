"""Validation of configurations: all problems in one error, with field, value and hint."""

import dataclasses
import re
from typing import get_type_hints

import pytest

from deit.config.recipes.handwriting import digits
from deit.config.schema import Config, to_dict
from deit.config.teachers import given_sources
from deit.config.validation import config_from_dict
from deit.core.errors import NO_VALUE, ConfigError
from tests.helpers.errors import raises


def problems(**sections):
    """Return the error of digits with these fields replaced."""
    values = to_dict(digits())
    for section, fields in sections.items():
        values.setdefault(section, {}).update(fields)
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values)
    return caught.value


@pytest.mark.fault("E10")
def test_one_error_reports_all_problems_with_field_value_and_hint():
    error = problems(
        optim={"lr": "fast", "epochz": 3},
        run={"precision": "fp33"},
        views={"crop_scale": "0.1,2,3"},
        student={"patch_size": 0},
        data={"download": True},
        nonsense={},
    )
    by_field = {problem.field: problem for problem in error.problems}
    # data.download comes from a check of several fields, which runs for the valid sections.
    assert {field: problem.value for field, problem in by_field.items()} == {
        "optim.lr": "fast",
        "optim.epochz": NO_VALUE,
        "run.precision": "fp33",
        "views.crop_scale": ("0.1", "2", "3"),
        "student.patch_size": 0,
        "data.download": True,
        "nonsense": NO_VALUE,
    }
    assert len(error.problems) == 7
    assert "7 " in str(error)
    for field, problem in by_field.items():
        assert problem.hint in str(error)
        value = "" if problem.value is NO_VALUE else f" = {problem.value!r}"
        assert f"{field}{value}: " in str(error)
    assert "optim.epochs?" in by_field["optim.epochz"].hint
    assert by_field["run.precision"].allowed == ("auto", "fp32", "bf16", "fp16")
    assert "fp32?" in by_field["run.precision"].hint
    assert all(name in by_field["data.download"].hint for name in ("mnist", "cifar10", "cifar100"))


INTEGER_FIELDS = [
    f"{section.name}.{leaf}"
    for section in dataclasses.fields(Config)
    for leaf, kind in get_type_hints(section.type).items()
    if re.search(r"\bint\b", str(kind))
]


def test_integer_fields_are_found():
    assert {"student.depth", "views.crop_padding", "run.eval_batch_size"} <= set(INTEGER_FIELDS)


@pytest.mark.parametrize("values", [{"\ud800": 3}, {"data": {"\ud800": 3}}], ids=ascii)
def test_name_that_is_not_unicode_is_reported(values):
    """JSON can hold it as an escape."""
    with raises(ConfigError, r"\ud800") as raised:
        config_from_dict({"loss": {"kind": "none"}, **values})
    (problem,) = raised.value.problems
    assert problem.field.endswith(r"\ud800")


@pytest.mark.parametrize("values", [{"a\nb": 3}, {"data": {"a\nb": 3}}], ids=ascii)
def test_name_with_a_line_break_is_escaped(values):
    with raises(ConfigError, r"a\nb") as raised:
        config_from_dict({"loss": {"kind": "none"}, **values})
    (problem,) = raised.value.problems
    assert problem.field.endswith(r"a\nb")
    assert "\n" not in str(problem)


@pytest.mark.parametrize("value", [10**30, 2**63], ids=["10^30", "2^63"])
@pytest.mark.parametrize("name", INTEGER_FIELDS)
def test_integer_of_more_than_64_bits_raises(name, value):
    section, leaf = name.split(".")
    with raises(ConfigError, f"{section}.{leaf}"):
        config_from_dict({section: {leaf: value}})


def test_long_value_is_shortened():
    with pytest.raises(ConfigError) as raised:
        config_from_dict({"optim": {"epochs": 10**3000}})
    assert len(str(raised.value)) < 1000


@pytest.mark.fault("D16", "D17", "E16")
@pytest.mark.parametrize(
    ("sections", "field", "names"),
    [
        ({"student": {"name": "deit_tinny"}}, "student.name", ["deit_tiny?"]),
        (
            {"teacher": {"memory_format": ("channel_last",)}},
            "teacher.memory_format",
            ["channels_last?"],
        ),
        (
            {"run": {"compile": "reduce-overhead"}, "optim": {"grad_accum_steps": 2}},
            "run.compile",
            ["default", "optim.grad_accum_steps"],
        ),
        (
            {"run": {"compile": "max-autotune", "auto_micro_batch": True}},
            "run.compile",
            ["default", "run.auto_micro_batch"],
        ),
        ({"student": {"name": "vit_micro"}}, "student.name", ["deit_micro", "loss.head class"]),
        ({"loss": {"head": "class"}}, "loss.head", ["student.name vit_micro"]),
        (
            {"loss": {"distillation_weight": 1}},
            "loss.distillation_weight",
            ["class", "deit_micro", "loss.head all"],
        ),
        (
            {"loss": {"distillation_weight": 0}},
            "loss.distillation_weight",
            ["loss preset none"],
        ),
        ({"loss": {"kind": "hard", "temperature": 3}}, "loss.temperature", ["hard"]),
        (
            {"teacher": {"source": "none"}},
            "teacher.source",
            ["loss.kind 'soft'", "--loss none"],
        ),
        ({"loss": {"kind": "none"}}, "loss.temperature", ["loss.kind", "loss preset none"]),
        ({"student": {"patch_size": 3}}, "student.patch_size", ["student.image_size", "8"]),
        ({"student": {"num_heads": 5}}, "student.num_heads", ["student.embed_dim", "64"]),
        (
            {"student": {"name": "small_convnet"}},
            "student.patch_size",
            ["deit_*", "vit_*", "small_convnet"],
        ),
        ({"views": {"crop_scale": "0.9,0.1"}}, "views.crop_scale", []),
        ({"views": {"crop_scale": "0.9,1.5"}}, "views.crop_scale", ["1.0"]),
        ({"views": {"mean": "0.5,0.5,0.5"}}, "views.mean", ["views.std"]),
        ({"teacher": {"mean": "0,0,0", "std": "1,0,1"}}, "teacher.std", []),
        ({"views": {"flip": 1.5}}, "views.flip", ["1"]),
        ({"optim": {"grad_accum_steps": 3}}, "optim.grad_accum_steps", ["optim.batch_size", "32"]),
        ({"optim": {"warmup_epochs": 500}}, "optim.warmup_epochs", ["optim.epochs", "60"]),
        ({"optim": {"min_lr": 1}}, "optim.min_lr", ["0.001", "optim.lr"]),
        ({"optim": {"ema_epochs": 1000}}, "optim.ema_epochs", ["optim.epochs", "60"]),
        ({"optim": {"lr": float("nan")}}, "optim.lr", []),
        ({"optim": {"batch_size": 2.5}}, "optim.batch_size", []),
        ({"run": {"seed": -1}}, "run.seed", ["0"]),
        ({"run": {"seed": 2**63}}, "run.seed", [f"{2**63}"]),
        (
            {"loss": {"kind": "hard", "standardize_logits": True}},
            "loss.standardize_logits",
            ["hard"],
        ),
        ({"loss": {"dkd_beta": 2}}, "loss.dkd_beta", ["loss.kind dkd"]),
        (
            {"loss": {"distillation_weight": 5}},
            "loss.distillation_weight",
            ["loss.label_weight"],
        ),
        (
            {"loss": {"kind": "dkd", "temperature": 4}},
            "loss.kind",
            ["--augmentation none"],
        ),
        ({"teacher": {"source": "a,b", "weights": "1,2,3"}}, "teacher.weights", ["2"]),
        ({"teacher": {"source": "a,b", "weights": "1,0"}}, "teacher.weights", []),
        ({"teacher": {"source": "a,b", "mean": "1,2,3,4", "std": "1,1,1"}}, "teacher.mean", ["6"]),
        ({"teacher": {"mean": "0,0,0"}}, "teacher.mean", ["teacher.std"]),
        ({"teacher": {"target_stores": "a,b"}}, "teacher.source", ["2"]),
        (
            {"teacher": {"source": "none", "target_stores": "a,none"}},
            "teacher.target_stores",
            ["'none'", "teacher.source"],
        ),
        ({"teacher": {"combine": "tokens"}}, "teacher.combine", []),
        (
            {"teacher": {"source": "a,b", "combine": "tokens"}},
            "student.num_distillation_tokens",
            ["2", "teacher.combine tokens"],
        ),
        (
            {"student": {"num_distillation_tokens": 2}},
            "student.num_distillation_tokens",
            ["teacher.combine tokens"],
        ),
        (
            {
                "student": {"num_distillation_tokens": 2},
                "teacher": {"source": "a,b", "combine": "tokens"},
                "loss": {"head": "all"},
            },
            "loss.head",
            ["teacher.combine tokens", "loss.head distillation"],
        ),
        (
            {"student": {"name": "vit_micro", "num_distillation_tokens": 2}},
            "student.num_distillation_tokens",
            ["deit_*", "vit_micro"],
        ),
        (
            {"views": {"teacher_view": "center"}},
            "views.teacher_view",
            ["--augmentation none", "--view-mode"],
        ),
        ({"views": {"crop_pct": 0.5}}, "views.crop_pct", ["views.crop random"]),
        ({"views": {"teacher_num_crops": 65536}}, "views.teacher_num_crops", ["65536"]),
        (
            {"loss": {"distillation_warmup_epochs": 61}},
            "loss.distillation_warmup_epochs",
            ["optim.epochs", "60"],
        ),
        (
            {"views": {"teacher_view": "crops", "mixup_alpha": 0, "cutmix_alpha": 0}},
            "views.teacher_view",
            ["deit targets write", "teacher.target_stores"],
        ),
    ],
)
def test_hints_of_invalid_combinations(sections, field, names):
    hints = [problem.hint for problem in problems(**sections).problems if problem.field == field]
    assert any(all(name in hint for name in names) for hint in hints), hints


def test_onednn_with_compile_raises():
    (problem,) = problems(run={"linear_backend": "onednn", "compile": "default"}).problems
    assert problem.field == "run.linear_backend"
    assert "run.compile" in problem.hint


def test_mixing_with_odd_micro_batches_raises():
    error = problems(views={"mixup_alpha": 0.8}, optim={"batch_size": 6, "grad_accum_steps": 2})
    (problem,) = error.problems
    assert (problem.field, problem.value) == ("optim.batch_size", 6)
    assert "optim.grad_accum_steps" in problem.hint


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [("", "empty"), ("a, ", "empty"), (("a", ""), "empty"), ("none,a", "none")],
)
def test_invalid_teacher_sources_raise(teacher, reason):
    with raises(ConfigError, "teacher = ", reason):
        given_sources(teacher)
