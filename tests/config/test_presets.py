"""Presets, recipes, teachers, JSON files and command-line text as configurations."""

import json

import pytest

from deit.cli.run_args import parse_run
from deit.config.cross_field_checks import CHECKS
from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS, VIEW_MODES, apply_presets, fit_epochs
from deit.config.recipes import RECIPES, find_recipe
from deit.config.recipes.handwriting import digits
from deit.config.schema import Config, to_dict
from deit.config.sections.loss import LossConfig
from deit.config.sections.optim import OptimConfig
from deit.config.teachers import TeacherSlot, TeacherSpec, teacher_slots, teacher_specs
from deit.config.validation import config_from_dict, field_names, load_config, validate
from deit.core.errors import ConfigError
from tests.helpers.errors import raises


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_loss_presets_are_valid_for_their_students(name):
    student = {"name": "vit_micro" if LOSS_PRESETS[name].head == "class" else "deit_micro"}
    views = AUGMENTATIONS["none" if name == "dkd" else "mix"]
    validate(digits().replace(student=student, views=views, loss=LOSS_PRESETS[name]))


@pytest.mark.parametrize("name", RECIPES)
def test_config_round_trip_through_json(name, tmp_path):
    config = RECIPES[name]()
    if name.startswith("transfer"):  # requires pretrained weights
        config = config.replace(init={"weights": "weights.pth"})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert load_config(tmp_path / "config.json") == config
    assert find_recipe(str(tmp_path / "config.json")) == config


@pytest.mark.fault("E10")
@pytest.mark.parametrize("content", ["", "[]", "{", '{"optim": {"lr": -1}}', '{"optim": 3}'])
def test_broken_config_file_raises_config_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "config.json")


def parse(*arguments):
    return parse_run(list(arguments), program="train").config


def test_text_is_converted_to_the_type_of_the_field():
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


def test_options_override_presets_and_presets_override_recipes():
    config = parse("digits", "--loss", "deit-soft", "--loss.temperature", "4")
    assert config.loss.kind == "soft"
    assert config.loss.temperature == 4
    assert config.loss.distillation_weight == 0.1
    assert config.optim == digits().optim


def test_view_modes_are_valid_for_all_recipes_with_a_teacher():
    for recipe in RECIPES.values():
        config = recipe()
        if config.loss.kind == "none":
            continue
        for name, mode in VIEW_MODES.items():
            fields = mode.fields(to_dict(config)["views"])
            live_teacher = name != "fix/ic_ens"
            validated = validate(config.replace(views=fields), live_teacher=live_teacher)
            assert validated.views.uses_mixing is (name == "function-matching")
            if config.views.crop == "padded" and name.endswith(("/rc", "/cc")):
                assert validated.views.crop == "padded"  # the mild crop of small images
            if not live_teacher:
                with raises(ConfigError, "views.teacher_view", "deit targets write"):
                    validate(validated)


def test_view_modes_have_the_crops_of_the_paper():
    views = to_dict(Config())["views"]
    assert VIEW_MODES["fix/rs"].fields(views)["crop"] == "none"
    assert VIEW_MODES["same/rc"].fields(views)["crop"] == "random"
    assert VIEW_MODES["same/ic"].fields(views)["crop_scale"] == (0.05, 1.0)
    assert VIEW_MODES["same/ic"].fields(views | {"crop_pct": 0.5})["crop_pct"] == 0.8
    with_scale = views | {"crop_scale": [0.3, 1.0]}
    assert VIEW_MODES["same/ic"].fields(with_scale)["crop_scale"] == (0.3, 1.0)


def test_presets_are_applied_in_order_and_overridden_by_options():
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


def test_teacher_specs_of_two_teachers():
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
    first, second = teacher_specs(config.teacher)
    assert first == TeacherSpec(
        "a", "timm:resnet18", None, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), 0.25, "auto"
    )
    normalization = ((0.4, 0.5, 0.6), (1.0, 1.0, 1.0))
    assert second == TeacherSpec("b", "timm:resnet18", 64, *normalization, 0.75, "channels_last")
    assert teacher_slots(config.teacher) == (
        TeacherSlot((first,), "store", 0.25),
        TeacherSlot((second,), None, 0.75),
    )


def test_one_store_with_combined_outputs_is_one_slot():
    config = parse(
        "digits-ensemble",
        *("--teacher.combine", "logits", "--student.num_distillation_tokens", "1"),
        *("--teacher.source", "a,b", "--teacher.target_stores", "store"),
    )
    (slot,) = teacher_slots(config.teacher)
    assert (slot.target_store, slot.weight, len(slot.members)) == ("store", 1.0, 2)
    with raises(ConfigError, "teacher.target_stores", "'store'"):
        parse("digits-ensemble", "--teacher.source", "a,b", "--teacher.target_stores", "store")


@pytest.mark.parametrize("text", ["none", "None", "NONE"])
def test_none_in_any_case_is_none(text):
    config = parse("digits", "--teacher.source", "a,b", "--teacher.target_stores", f"{text},store")
    assert [slot.target_store for slot in teacher_slots(config.teacher)] == [None, "store"]


def test_scalar_teacher_fields_are_read(tmp_path):
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


def test_abbreviated_option_raises():
    with raises(ConfigError, "optim.epoch"):
        parse("digits", "--optim.epoch", "3")


def test_recipe_from_a_python_file(tmp_path):
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
    with raises(ConfigError, "'unknown'"):
        find_recipe(f"{file}:unknown")
    with raises(ConfigError, tmp_path / "missing.py"):
        find_recipe(str(tmp_path / "missing.py"))
    with raises(ConfigError, "'digit'", "digits?"):
        find_recipe("digit")


def test_peak_lr_is_scaled_by_the_batch_size():
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
def test_invalid_json_raises(text, name, tmp_path):
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
def test_number_out_of_range_raises(section, field, value):
    with raises(ConfigError, f"{section}.{field}"):
        config_from_dict({section: {field: value}})


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_fit_epochs_makes_few_epochs_valid_for_all_recipes_and_losses(epochs):
    """No duration in epochs of a recipe or preset is longer than the run."""
    for recipe in RECIPES.values():
        for loss in (None, *LOSS_PRESETS):
            values = to_dict(recipe())
            apply_presets(values, {"loss": loss})
            values["optim"]["epochs"] = epochs
            fit_epochs(values, ["optim.epochs"])
            config = recipe().replace(
                optim=OptimConfig(**values["optim"]),
                loss=LossConfig(**values["loss"]),
            )
            fields = [problem.field for check in CHECKS for problem in check(config)]
            assert not any(field.startswith("optim.") or "warmup" in field for field in fields)


def test_fit_epochs_keeps_given_values():
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
    return parse_run(list(arguments), program="deit train").config
