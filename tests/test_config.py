"""Configurations: every problem in one message, text converted by type, round trips."""

import dataclasses
import json
import re
from typing import get_type_hints

import pytest

from deit.arguments import parse_run
from deit.checks import CHECKS
from deit.config import Config, LossConfig, OptimConfig, mixes, peak_lr, to_dict
from deit.errors import NO_VALUE, ConfigError
from deit.presets import AUGMENTATIONS, OBJECTIVES, TEACHING, fit_epochs, put_presets
from deit.recipes import RECIPES, digits, find_recipe
from deit.seats import Member, Seat, members, seats
from deit.validation import build, field_names, load, validate
from tests.helpers.errors import raises


def problems(**sections):
    """The error of a configuration that is wrong, from plain values."""
    values = to_dict(digits())
    for section, fields in sections.items():
        values.setdefault(section, {}).update(fields)
    with pytest.raises(ConfigError) as caught:
        build(values)
    return caught.value


def test_every_problem_stands_in_one_message_with_field_value_and_advice():
    error = problems(
        optim={"lr": "fast", "epochz": 3},
        run={"precision": "fp33"},
        views={"crop_scale": "0.1,2,3"},
        student={"patch_size": 0},
        data={"download": True},
        nonsense={},
    )
    found = {problem.field: problem for problem in error.problems}
    # Sections without a broken field are held against each other all the same: data.download.
    assert {field: problem.value for field, problem in found.items()} == {
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
    for field, problem in found.items():
        assert problem.hint in str(error)
        value = "" if problem.value is NO_VALUE else f" = {problem.value!r}"
        assert f"{field}{value}: " in str(error)
    assert "optim.epochs?" in found["optim.epochz"].hint
    assert found["run.precision"].allowed == ("auto", "fp32", "bf16", "fp16")
    assert "fp32?" in found["run.precision"].hint
    assert all(name in found["data.download"].hint for name in ("mnist", "cifar10", "cifar100"))


WHOLE = [
    f"{section.name}.{leaf}"
    for section in dataclasses.fields(Config)
    for leaf, kind in get_type_hints(section.type).items()
    if re.search(r"\bint\b", str(kind))
]


def test_there_are_whole_numbers():
    assert {"student.depth", "views.crop_padding", "run.evaluation_batch"} <= set(WHOLE)


@pytest.mark.parametrize("wrong", [{"\ud800": 3}, {"data": {"\ud800": 3}}], ids=ascii)
def test_a_name_that_is_not_unicode_is_a_problem_like_any_other(wrong):
    """JSON spells it by an escape."""
    with raises(ConfigError, r"\ud800") as raised:
        build({"loss": {"kind": "none"}, **wrong})
    (problem,) = raised.value.problems
    assert problem.field.endswith(r"\ud800")


@pytest.mark.parametrize("wrong", [{"a\nb": 3}, {"data": {"a\nb": 3}}], ids=ascii)
def test_a_name_with_a_line_break_breaks_no_line(wrong):
    with raises(ConfigError, r"a\nb") as raised:
        build({"loss": {"kind": "none"}, **wrong})
    (problem,) = raised.value.problems
    assert problem.field.endswith(r"a\nb")
    assert "\n" not in str(problem)


@pytest.mark.parametrize("number", [10**30, 2**63], ids=["10^30", "2^63"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_number_larger_than_any_tensor_is_refused(name, number):
    section, leaf = name.split(".")
    with raises(ConfigError, f"{section}.{leaf}"):
        build({section: {leaf: number}})


def test_a_long_value_is_shortened():
    with pytest.raises(ConfigError) as raised:
        build({"optim": {"epochs": 10**3000}})
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("sections", "field", "names"),
    [
        ({"student": {"name": "deit_tinny"}}, "student.name", ["deit_tiny?"]),
        ({"teacher": {"layout": ("channel_last",)}}, "teacher.layout", ["channels_last?"]),
        (
            {"run": {"compile": "reduce-overhead"}, "optim": {"accumulate": 2}},
            "run.compile",
            ["default", "optim.accumulate"],
        ),
        (
            {"run": {"compile": "max-autotune", "fit_memory": True}},
            "run.compile",
            ["default", "run.fit_memory"],
        ),
        ({"student": {"name": "vit_micro"}}, "student.name", ["deit_micro", "loss.through class"]),
        ({"loss": {"through": "class"}}, "loss.through", ["student.name vit_micro"]),
        (
            {"loss": {"distillation_weight": 1}},
            "loss.distillation_weight",
            ["class", "deit_micro", "loss.through all"],
        ),
        (
            {"loss": {"distillation_weight": 0}},
            "loss.distillation_weight",
            ["--objective none"],
        ),
        ({"loss": {"kind": "hard", "temperature": 3}}, "loss.temperature", ["hard"]),
        (
            {"teacher": {"source": "none"}},
            "teacher.source",
            ["loss.kind 'soft'", "--objective none"],
        ),
        ({"loss": {"kind": "none"}}, "loss.temperature", ["loss.kind", "--objective none"]),
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
        ({"optim": {"accumulate": 3}}, "optim.accumulate", ["optim.batch_size", "32"]),
        ({"optim": {"warmup_epochs": 500}}, "optim.warmup_epochs", ["optim.epochs", "60"]),
        ({"optim": {"min_lr": 1}}, "optim.min_lr", ["0.001", "optim.lr"]),
        ({"optim": {"ema_epochs": 1000}}, "optim.ema_epochs", ["optim.epochs", "60"]),
        ({"optim": {"lr": float("nan")}}, "optim.lr", []),
        ({"optim": {"batch_size": 2.5}}, "optim.batch_size", []),
        ({"run": {"seed": -1}}, "run.seed", ["0"]),
        ({"run": {"seed": 2**63}}, "run.seed", [f"{2**63}"]),
        ({"loss": {"kind": "hard", "standardise": True}}, "loss.standardise", ["hard"]),
        ({"loss": {"others_weight": 2}}, "loss.others_weight", ["loss.kind dkd"]),
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
        ({"teacher": {"source": "a,b", "weight": "1,2,3"}}, "teacher.weight", ["2"]),
        ({"teacher": {"source": "a,b", "weight": "1,0"}}, "teacher.weight", []),
        ({"teacher": {"source": "a,b", "mean": "1,2,3,4", "std": "1,1,1"}}, "teacher.mean", ["6"]),
        ({"teacher": {"mean": "0,0,0"}}, "teacher.mean", ["teacher.std"]),
        ({"teacher": {"targets": "a,b"}}, "teacher.source", ["2"]),
        (
            {"teacher": {"source": "none", "targets": "a,none"}},
            "teacher.targets",
            ["'none'", "teacher.source"],
        ),
        ({"teacher": {"combine": "tokens"}}, "teacher.combine", []),
        (
            {"teacher": {"source": "a,b", "combine": "tokens"}},
            "student.distillation_tokens",
            ["2", "teacher.combine tokens"],
        ),
        (
            {"student": {"distillation_tokens": 2}},
            "student.distillation_tokens",
            ["teacher.combine tokens"],
        ),
        (
            {
                "student": {"distillation_tokens": 2},
                "teacher": {"source": "a,b", "combine": "tokens"},
                "loss": {"through": "all"},
            },
            "loss.through",
            ["teacher.combine tokens", "loss.through distillation"],
        ),
        (
            {"student": {"name": "vit_micro", "distillation_tokens": 2}},
            "student.distillation_tokens",
            ["deit_*", "vit_micro"],
        ),
        (
            {"views": {"teacher_view": "center"}},
            "views.teacher_view",
            ["--augmentation none", "--teaching"],
        ),
        ({"views": {"crop_side": 0.5}}, "views.crop_side", ["views.crop random"]),
        ({"views": {"teacher_crops": 65536}}, "views.teacher_crops", ["65536"]),
        ({"loss": {"distillation_warmup": 61}}, "loss.distillation_warmup", ["optim.epochs", "60"]),
        (
            {"views": {"teacher_view": "crops", "mixup_alpha": 0, "cutmix_alpha": 0}},
            "views.teacher_view",
            ["deit targets write", "teacher.targets"],
        ),
    ],
)
def test_contradictions_and_limits_are_explained(sections, field, names):
    hints = [one.hint for one in problems(**sections).problems if one.field == field]
    assert any(all(name in hint for name in names) for hint in hints), hints


def test_a_compiled_network_computes_its_linear_layers_itself():
    (problem,) = problems(run={"linear": "onednn", "compile": "default"}).problems
    assert problem.field == "run.linear"
    assert "run.compile" in problem.hint


def test_mixing_needs_even_micro_batches():
    error = problems(views={"mixup_alpha": 0.8}, optim={"batch_size": 6, "accumulate": 2})
    (problem,) = error.problems
    assert (problem.field, problem.value) == ("optim.batch_size", 6)
    assert "optim.accumulate" in problem.hint


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_valid_with_the_student_they_are_for(name):
    student = {"name": "vit_micro" if OBJECTIVES[name].through == "class" else "deit_micro"}
    views = AUGMENTATIONS["none" if name == "dkd" else "mix"]
    validate(digits().replace(student=student, views=views, loss=OBJECTIVES[name]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_configuration_survives_json(name, tmp_path):
    config = RECIPES[name]()
    if name.startswith("transfer"):  # not valid without what it starts from
        config = config.replace(start={"source": "weights.pth"})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert load(tmp_path / "config.json") == config
    assert find_recipe(str(tmp_path / "config.json")) == config


@pytest.mark.parametrize("content", ["", "[]", "{", '{"optim": {"lr": -1}}', '{"optim": 3}'])
def test_a_broken_file_is_a_configuration_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError):
        load(tmp_path / "config.json")


def parse(*arguments):
    return parse_run(list(arguments), program="train", about="").config


def test_text_becomes_what_its_field_wants():
    config = parse(
        "digits",
        *("--optim.lr", "5e-4", "--optim.epochs=7", "--data.classes", "1, 2,3"),
        *("--views.crop_scale", "0.25,1", "--views.mean", "none", "--optim.clip_norm", "1"),
        *(
            "--optim.lr_reference_batch",
            "none",
            "--teacher.allow_weak",
            "--student.embed-dim",
            "32",
        ),
    )
    assert config.optim.lr == 5e-4
    assert config.optim.epochs == 7
    assert config.data.classes == ("1", "2", "3")
    assert config.teacher.allow_weak is True
    assert config.views.crop_scale == (0.25, 1.0)
    assert config.views.mean is None
    assert config.optim.clip_norm == 1.0
    assert config.optim.lr_reference_batch is None
    assert config.student.embed_dim == 32


def test_fields_refine_a_preset_and_a_preset_replaces_the_recipes_section():
    config = parse("digits", "--objective", "deit-soft", "--loss.temperature", "4")
    assert config.loss.kind == "soft"
    assert config.loss.temperature == 4
    assert config.loss.distillation_weight == 0.1
    assert config.optim == digits().optim


def test_every_teaching_mode_is_valid_over_every_recipe_with_a_teacher():
    for recipe in RECIPES.values():
        config = recipe()
        if config.loss.kind == "none":
            continue
        for name, mode in TEACHING.items():
            fields = mode.fields(to_dict(config)["views"])
            online = name != "fix/ic_ens"
            found = validate(config.replace(views=fields), online=online)
            assert mixes(found.views) is (name == "function-matching")
            if config.views.crop == "padded" and name.endswith(("/rc", "/cc")):
                assert found.views.crop == "padded"  # the mild crop of small images
            if not online:
                with raises(ConfigError, "views.teacher_view", "deit targets write"):
                    validate(found)


def test_modes_have_the_papers_crops():
    views = to_dict(Config())["views"]
    assert TEACHING["fix/rs"].fields(views)["crop"] == "none"
    assert TEACHING["same/rc"].fields(views)["crop"] == "random"
    assert TEACHING["same/ic"].fields(views)["crop_scale"] == (0.05, 1.0)
    assert TEACHING["same/ic"].fields(views | {"crop_side": 0.5})["crop_side"] == 0.8
    own = views | {"crop_scale": [0.3, 1.0]}
    assert TEACHING["same/ic"].fields(own)["crop_scale"] == (0.3, 1.0)


def test_presets_are_put_over_each_other_and_refined():
    config = parse(
        "cifar10",
        *("--augmentation", "usi", "--teaching", "function-matching"),
        *("--objective", "function-matching", "--loss.temperature", "2", "--views.repeats", "1"),
    )
    assert config.views.policy == "randaugment"
    assert config.views.magnitude == 7.0
    assert (config.views.mixup_alpha, config.views.cutmix_alpha) == (1.0, 0.0)
    assert config.views.repeats == 1
    assert (config.loss.through, config.loss.temperature) == ("all", 2.0)
    with raises(ConfigError, "--teaching", "'same/cc'"):
        parse("digits", "--teaching", "same/cc")


def test_teachers_are_spread_one_by_one():
    config = parse(
        "digits-ensemble",
        *("--teacher.source", "a, b", "--teacher.weight", "1,3", "--teacher.image_size", "none,64"),
        *("--teacher.mean", "0.1,0.2,0.3,0.4,0.5,0.6", "--teacher.std", "1,1,1"),
        *("--teacher.architecture", "timm:resnet18", "--teacher.targets", "store,none"),
        *("--teacher.layout", "auto,channels_last"),
    )
    one, two = members(config.teacher)
    assert one == Member("a", "timm:resnet18", None, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), 0.25, "auto")
    colours = ((0.4, 0.5, 0.6), (1.0, 1.0, 1.0))
    assert two == Member("b", "timm:resnet18", 64, *colours, 0.75, "channels_last")
    assert seats(config.teacher) == (Seat((one,), "store", 0.25), Seat((two,), None, 0.75))


def test_one_store_may_hold_what_several_teachers_say_together():
    config = parse(
        "digits-ensemble",
        *("--teacher.combine", "logits", "--student.distillation_tokens", "1"),
        *("--teacher.source", "a,b", "--teacher.targets", "store"),
    )
    (seat,) = seats(config.teacher)
    assert (seat.targets, seat.weight, len(seat.members)) == ("store", 1.0, 2)
    with raises(ConfigError, "teacher.targets", "'store'"):
        parse("digits-ensemble", "--teacher.source", "a,b", "--teacher.targets", "store")


@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_none_is_none_however_it_is_written(word):
    config = parse("digits", "--teacher.source", "a,b", "--teacher.targets", f"{word},store")
    assert [seat.targets for seat in seats(config.teacher)] == [None, "store"]


def test_a_configuration_of_before_ensembles_is_still_read(tmp_path):
    values = to_dict(digits())
    values["teacher"] = {
        "source": "checkpoints/digits-teacher",
        "architecture": None,
        "image_size": None,
        "mean": None,
        "std": None,
        "allow_weak": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load(tmp_path / "config.json") == digits()


def test_nothing_is_abbreviated_or_guessed():
    with raises(ConfigError, "optim.epoch"):
        parse("digits", "--optim.epoch", "3")


def test_a_recipe_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from deit.recipes import digits\n\n\n"
        "def recipe():\n    return digits().replace(optim={'lr': 2e-3})\n"
        "def other():\n    return 3\n"
    )
    assert find_recipe(str(file)).optim.lr == 2e-3
    assert find_recipe(f"{file}:recipe").optim.lr == 2e-3
    with raises(ConfigError, f"{file}:other", "Config", "int"):
        find_recipe(f"{file}:other")
    with raises(ConfigError, "'nobody'"):
        find_recipe(f"{file}:nobody")
    with raises(ConfigError, tmp_path / "missing.py"):
        find_recipe(str(tmp_path / "missing.py"))
    with raises(ConfigError, "'digit'", "digits?"):
        find_recipe("digit")


def test_the_peak_learning_rate_follows_the_global_batch():
    optim = Config().replace(optim={"lr": 5e-4, "batch_size": 1024}).optim
    assert peak_lr(optim) == 1e-3
    assert len(field_names()) == len(set(field_names())) > 50


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"run": {"seed": 1, "seed": 2}}', "'seed'"),
        ('{"optim": {"lr": NaN}}', "NaN"),
        ('{"views": {"crop_ratio": [1, Infinity]}}', "Infinity"),
        ("[" * 100_000, ""),
        ('{"run": {"seed": 1}', ""),
        ("!!python/object/apply:os.system [ls]", ""),
        ("[]", ""),
    ],
)
def test_json_that_means_nothing_is_refused(text, name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with raises(ConfigError, path, name):
        load(path)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        *(("loss", "temperature", value) for value in (0, -1, "nan", "inf")),
        *(("loss", "distillation_weight", value) for value in (-0.1, 1.5, "nan")),
        *(("views", "mixup_alpha", value) for value in (-1, "nan", "inf")),
        *(("views", "crop_ratio", value) for value in ("1,inf", "nan,2", "-1,1")),
        *(("run", "seed", value) for value in (-1, 2**64, 2**63, "1.5")),
        *(("run", "keep_checkpoints", value) for value in (0, 1)),
        *(("run", "timeout", value) for value in (0, -1, "inf")),
        ("run", "max_skipped", 0),
        ("student", "depth", 1001),
    ],
)
def test_a_number_outside_its_range_is_refused_by_name(section, field, value):
    with raises(ConfigError, f"{section}.{field}"):
        build({section: {field: value}})


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_few_epochs_fit_every_recipe_with_every_objective(epochs):
    """What a recipe or preset sets in epochs is never longer than the run."""
    for recipe in RECIPES.values():
        for objective in (None, *OBJECTIVES):
            values = to_dict(recipe())
            put_presets(values, {"objective": objective})
            values["optim"]["epochs"] = epochs
            fit_epochs(values, ["optim.epochs"])
            config = recipe().replace(
                optim=OptimConfig(**values["optim"]),
                loss=LossConfig(**values["loss"]),
            )
            found = [problem.field for check in CHECKS for problem in check(config)]
            assert not [field for field in found if field.startswith("optim.") or "warmup" in field]


def test_few_epochs_shorten_what_was_not_typed_and_nothing_else():
    few = ("--optim.epochs", "4", "--augmentation", "none", "--objective", "dkd")
    config = run_of("digits", *few)
    assert (config.optim.warmup_epochs, config.loss.distillation_warmup) == (2, 2)
    config = run_of("digits", *few, "--loss.distillation_warmup", "3")
    assert (config.optim.warmup_epochs, config.loss.distillation_warmup) == (2, 3)
    with raises(ConfigError, "optim.epochs"):
        run_of("digits", *few, "--optim.warmup_epochs", "5")
    assert run_of("digits", "--optim.epochs", "30").optim.warmup_epochs == 5
    with raises(ConfigError, "optim.epochs") as raised:
        run_of("digits", "--optim.epochs", "0")
    assert [problem.field for problem in raised.value.problems] == ["optim.epochs"]


def run_of(*words):
    return parse_run(list(words), program="deit train", about="").config
