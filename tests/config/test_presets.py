"""Configurations: presets, recipes, JSON and text become valid ones."""

import json

import pytest

from deit.cli.run_args import parse_run
from deit.config.checks import CHECKS
from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS, VIEW_MODES, apply_presets, fit_epochs
from deit.config.recipes import RECIPES, find_recipe
from deit.config.recipes.handwriting import digits
from deit.config.schema import Config, LossConfig, OptimConfig, to_dict
from deit.config.teachers import TeacherSlot, TeacherSpec, teacher_slots, teacher_specs
from deit.config.validation import config_from_dict, field_names, load_config, validate
from deit.core.errors import ConfigError
from tests.helpers.errors import raises


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_objectives_are_valid_with_the_student_they_are_for(name):
    student = {"name": "vit_micro" if LOSS_PRESETS[name].head == "class" else "deit_micro"}
    views = AUGMENTATIONS["none" if name == "dkd" else "mix"]
    validate(digits().replace(student=student, views=views, loss=LOSS_PRESETS[name]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_configuration_survives_json(name, tmp_path):
    config = RECIPES[name]()
    if name.startswith("transfer"):  # not valid without what it starts from
        config = config.replace(init={"weights": "weights.pth"})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert load_config(tmp_path / "config.json") == config
    assert find_recipe(str(tmp_path / "config.json")) == config


@pytest.mark.fault("E10")
@pytest.mark.parametrize("content", ["", "[]", "{", '{"optim": {"lr": -1}}', '{"optim": 3}'])
def test_a_broken_file_is_a_configuration_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "config.json")


def parse(*arguments):
    return parse_run(list(arguments), program="train", about="").config


def test_text_becomes_what_its_field_wants():
    config = parse(
        "digits",
        *("--optim.lr", "5e-4", "--optim.epochs=7", "--data.classes", "1, 2,3"),
        *("--views.crop_scale", "0.25,1", "--views.mean", "none", "--optim.clip_grad_norm", "1"),
        *(
            "--optim.lr_base_batch_size",
            "none",
            "--teacher.allow_near_chance",
            "--student.embed-dim",
            "32",
        ),
    )
    assert config.optim.lr == 5e-4
    assert config.optim.epochs == 7
    assert config.data.classes == ("1", "2", "3")
    assert config.teacher.allow_near_chance is True
    assert config.views.crop_scale == (0.25, 1.0)
    assert config.views.mean is None
    assert config.optim.clip_grad_norm == 1.0
    assert config.optim.lr_base_batch_size is None
    assert config.student.embed_dim == 32


def test_fields_refine_a_preset_and_a_preset_replaces_the_recipes_section():
    config = parse("digits", "--loss", "deit-soft", "--loss.temperature", "4")
    assert config.loss.kind == "soft"
    assert config.loss.temperature == 4
    assert config.loss.distillation_weight == 0.1
    assert config.optim == digits().optim


def test_every_teaching_mode_is_valid_over_every_recipe_with_a_teacher():
    for recipe in RECIPES.values():
        config = recipe()
        if config.loss.kind == "none":
            continue
        for name, mode in VIEW_MODES.items():
            fields = mode.fields(to_dict(config)["views"])
            online = name != "fix/ic_ens"
            found = validate(config.replace(views=fields), live_teacher=online)
            assert found.views.uses_mixing is (name == "function-matching")
            if config.views.crop == "padded" and name.endswith(("/rc", "/cc")):
                assert found.views.crop == "padded"  # the mild crop of small images
            if not online:
                with raises(ConfigError, "views.teacher_view", "deit targets write"):
                    validate(found)


def test_modes_have_the_papers_crops():
    views = to_dict(Config())["views"]
    assert VIEW_MODES["fix/rs"].fields(views)["crop"] == "none"
    assert VIEW_MODES["same/rc"].fields(views)["crop"] == "random"
    assert VIEW_MODES["same/ic"].fields(views)["crop_scale"] == (0.05, 1.0)
    assert VIEW_MODES["same/ic"].fields(views | {"crop_pct": 0.5})["crop_pct"] == 0.8
    own = views | {"crop_scale": [0.3, 1.0]}
    assert VIEW_MODES["same/ic"].fields(own)["crop_scale"] == (0.3, 1.0)


def test_presets_are_put_over_each_other_and_refined():
    config = parse(
        "cifar10",
        *("--augmentation", "usi", "--view-mode", "function-matching"),
        *(
            "--loss",
            "function-matching",
            "--loss.temperature",
            "2",
            "--views.aug_repeats",
            "1",
        ),
    )
    assert config.views.auto_augment == "randaugment"
    assert config.views.randaugment_magnitude == 7.0
    assert (config.views.mixup_alpha, config.views.cutmix_alpha) == (1.0, 0.0)
    assert config.views.aug_repeats == 1
    assert (config.loss.head, config.loss.temperature) == ("all", 2.0)
    with raises(ConfigError, "--view-mode", "'same/cc'"):
        parse("digits", "--view-mode", "same/cc")


def test_teachers_are_spread_one_by_one():
    config = parse(
        "digits-ensemble",
        *(
            "--teacher.source",
            "a, b",
            "--teacher.weights",
            "1,3",
            "--teacher.image_size",
            "none,64",
        ),
        *("--teacher.mean", "0.1,0.2,0.3,0.4,0.5,0.6", "--teacher.std", "1,1,1"),
        *("--teacher.architecture", "timm:resnet18", "--teacher.target_stores", "store,none"),
        *("--teacher.memory_format", "auto,channels_last"),
    )
    one, two = teacher_specs(config.teacher)
    assert one == TeacherSpec(
        "a", "timm:resnet18", None, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), 0.25, "auto"
    )
    colours = ((0.4, 0.5, 0.6), (1.0, 1.0, 1.0))
    assert two == TeacherSpec("b", "timm:resnet18", 64, *colours, 0.75, "channels_last")
    assert teacher_slots(config.teacher) == (
        TeacherSlot((one,), "store", 0.25),
        TeacherSlot((two,), None, 0.75),
    )


def test_one_store_may_hold_what_several_teachers_say_together():
    config = parse(
        "digits-ensemble",
        *("--teacher.combine", "logits", "--student.num_distillation_tokens", "1"),
        *("--teacher.source", "a,b", "--teacher.target_stores", "store"),
    )
    (seat,) = teacher_slots(config.teacher)
    assert (seat.target_store, seat.weight, len(seat.members)) == ("store", 1.0, 2)
    with raises(ConfigError, "teacher.target_stores", "'store'"):
        parse("digits-ensemble", "--teacher.source", "a,b", "--teacher.target_stores", "store")


@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_none_is_none_however_it_is_written(word):
    config = parse("digits", "--teacher.source", "a,b", "--teacher.target_stores", f"{word},store")
    assert [seat.target_store for seat in teacher_slots(config.teacher)] == [None, "store"]


def test_a_configuration_of_before_ensembles_is_still_read(tmp_path):
    values = to_dict(digits())
    values["teacher"] = {
        "source": "checkpoints/digits-teacher",
        "architecture": None,
        "image_size": None,
        "mean": None,
        "std": None,
        "allow_near_chance": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(tmp_path / "config.json") == digits()


def test_nothing_is_abbreviated_or_guessed():
    with raises(ConfigError, "optim.epoch"):
        parse("digits", "--optim.epoch", "3")


def test_a_recipe_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from deit.config.recipes import find_recipe\n\n\n"
        "def recipe():\n    return find_recipe('digits').replace(optim={'lr': 2e-3})\n"
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
    assert optim.peak_lr == 1e-3
    assert len(field_names()) == len(set(field_names())) > 50


@pytest.mark.fault("E10")
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
        load_config(path)


@pytest.mark.fault("D16")
@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        *(("loss", "temperature", value) for value in (0, -1, "nan", "inf")),
        *(("loss", "distillation_weight", value) for value in (-0.1, 1.5, "nan")),
        *(("views", "mixup_alpha", value) for value in (-1, "nan", "inf")),
        *(("views", "crop_ratio", value) for value in ("1,inf", "nan,2", "-1,1")),
        *(("run", "seed", value) for value in (-1, 2**64, 2**63, "1.5")),
        *(("run", "num_checkpoints", value) for value in (0, 1)),
        *(("run", "timeout_s", value) for value in (0, -1, "inf")),
        ("run", "max_nonfinite_steps", 0),
        ("student", "depth", 1001),
    ],
)
def test_a_number_outside_its_range_is_refused_by_name(section, field, value):
    with raises(ConfigError, f"{section}.{field}"):
        config_from_dict({section: {field: value}})


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_few_epochs_fit_every_recipe_with_every_objective(epochs):
    """What a recipe or preset sets in epochs is never longer than the run."""
    for recipe in RECIPES.values():
        for objective in (None, *LOSS_PRESETS):
            values = to_dict(recipe())
            apply_presets(values, {"loss": objective})
            values["optim"]["epochs"] = epochs
            fit_epochs(values, ["optim.epochs"])
            config = recipe().replace(
                optim=OptimConfig(**values["optim"]),
                loss=LossConfig(**values["loss"]),
            )
            found = [problem.field for check in CHECKS for problem in check(config)]
            assert not [field for field in found if field.startswith("optim.") or "warmup" in field]


def test_few_epochs_shorten_what_was_not_typed_and_nothing_else():
    few = ("--optim.epochs", "4", "--augmentation", "none", "--loss", "dkd")
    config = run_of("digits", *few)
    assert (config.optim.warmup_epochs, config.loss.distillation_warmup_epochs) == (2, 2)
    config = run_of("digits", *few, "--loss.distillation_warmup_epochs", "3")
    assert (config.optim.warmup_epochs, config.loss.distillation_warmup_epochs) == (2, 3)
    with raises(ConfigError, "optim.epochs"):
        run_of("digits", *few, "--optim.warmup_epochs", "5")
    assert run_of("digits", "--optim.epochs", "30").optim.warmup_epochs == 5
    with raises(ConfigError, "optim.epochs") as raised:
        run_of("digits", "--optim.epochs", "0")
    assert [problem.field for problem in raised.value.problems] == ["optim.epochs"]


def run_of(*arguments):
    return parse_run(list(arguments), program="deit train", about="").config
