"""Configuration of fine-tuning: initial weights, schedules and refused arguments."""

import json
import re
import shutil
from dataclasses import asdict
from functools import partial

import pytest

from deit.cli import run_command
from deit.cli.finetune_args import parse_finetune
from deit.config.finetune_schedules import (
    DATA_SIZED_SCHEDULES,
    FINETUNE_SCHEDULES,
    at_resolution,
    with_init,
)
from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS
from deit.config.recipes import RECIPES
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.schema import Config
from deit.config.sections.student import StudentConfig
from deit.config.validation import load_config, validate
from deit.core.errors import CheckpointError, ConfigError
from deit.training.finetune import finetune_config
from deit.training.lr_schedule import lr_at
from deit.training.train import train
from tests.helpers.commands import tree
from tests.helpers.errors import raises
from tests.helpers.finetune_runs import finer

pytest.importorskip("sklearn")


def test_finetune_with_another_normalization_logs_both(pretrained, tmp_path, capsys):
    train(
        finer(pretrained, views={"mean": (0.5,) * 3, "std": (0.5,) * 3}),
        tmp_path / "r",
        dry_run=True,
    )
    model_info = json.loads((pretrained / "student" / "best" / "model.json").read_text())
    statistics = [
        ",".join(f"{value:.3g}" for value in model_info[name]) for name in ("mean", "std")
    ]
    (log_line,) = [line for line in capsys.readouterr().out.splitlines() if "--views.mean" in line]
    assert all(value in log_line for value in (*statistics, "0.5,0.5,0.5"))


# ---- the configuration


def test_at_resolution_scales_image_sizes_and_padding():
    config = at_resolution(digits().replace(views={"crop_padding": 2}), 24)
    assert config.student.image_size == 24
    assert config.data.image_size == 24
    assert config.views.crop_padding == 6
    assert config.teacher.image_size == (24,)
    larger = RECIPES["folder"]().replace(student={"image_size": 64}, data={"image_size": 72})
    assert at_resolution(larger, 128).data.image_size == 144
    assert at_resolution(digits_teacher(), 16).teacher.image_size == ()


@pytest.mark.parametrize("name", FINETUNE_SCHEDULES)
@pytest.mark.parametrize("recipe", ["digits", "digits-teacher", "cifar10", "tiny-imagenet"])
def test_every_schedule_is_valid_for_every_recipe(name, recipe):
    config = RECIPES[recipe]().replace(init={"weights": "somewhere"})
    if name in ("convpass", "int8") and recipe == "digits-teacher":
        field = {"convpass": "adapters", "int8": "qat"}[name]
        with raises(ConfigError, f"student.{field}", f"'{name}'"):
            validate(FINETUNE_SCHEDULES[name](config))  # not for a ConvNet
        return
    tuned = validate(FINETUNE_SCHEDULES[name](config))
    assert tuned.init == config.init
    assert tuned.data == config.data
    if name in ("deit", "deit3"):
        assert tuned.optim.peak_lr == tuned.optim.min_lr  # constant after the warm-up


SCHEDULES = {
    **FINETUNE_SCHEDULES,
    **{name: partial(rule, images=1000) for name, rule in DATA_SIZED_SCHEDULES.items()},
}
CUSTOM_OPTIM = {
    "sgd": {"name": "sgd", "momentum": 0.5, "lr_milestones": (0.5,), "layer_decay": 0.7},
    "adamw": {"beta1": 0.8, "beta2": 0.95, "independent_weight_decay": True, "min_lr": 2e-4},
}
"""Optimizer settings that no schedule has."""
BEFORE = {
    **SCHEDULES,
    **{name: partial(Config.replace, optim=fields) for name, fields in CUSTOM_OPTIM.items()},
    "dkd": partial(
        Config.replace, loss=LOSS_PRESETS["dkd"], views=AUGMENTATIONS["none"], optim={"epochs": 30}
    ),
}
RUN_FIELDS = {"trainable", "grad_accum_steps", "clip_grad_norm", "ema_epochs"}
"""Fields of the optimizer that no schedule sets."""
LENGTH = {"epochs", "warmup_epochs"}
FIXED_SCHEDULES = {"deit": set(), "deit3": set(), "bit": set(), "convpass": {"batch_size"} | LENGTH}
"""Schedules that ignore the optimizer settings of the run, except for these fields."""
QUANTIZED_ADAPTERS = ("student.adapters = 'convpass'", "student.qat")
INCOMPATIBLE = {
    ("int8", "convpass"): QUANTIZED_ADAPTERS,
    ("convpass", "int8"): QUANTIZED_ADAPTERS,
    ("int8", "linear-probe"): ("optim.trainable = 'heads'", "int8"),
}
"""Pairs (before, after) that are refused, and the texts of the error: adapters cannot be quantized,
and quantization ranges have to be trained."""


@pytest.mark.parametrize("after", SCHEDULES)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("twice", [False, True])
def test_schedule_does_not_depend_on_the_schedule_before(before, after, twice):
    recipe = digits().replace(init={"weights": "somewhere"})
    config = BEFORE[before](recipe)
    if twice:
        config = BEFORE[before](config)
    if (before, after) in INCOMPATIBLE:
        with raises(ConfigError, *INCOMPATIBLE[before, after]):
            validate(SCHEDULES[after](config))
        return
    tuned = validate(SCHEDULES[after](config)).optim
    if after in FIXED_SCHEDULES:
        recipe_fields, run_fields = (
            asdict(SCHEDULES[after](recipe).optim),
            RUN_FIELDS | FIXED_SCHEDULES[after],
        )
        assert {k: v for k, v in asdict(tuned).items() if k not in run_fields} == {
            k: v for k, v in recipe_fields.items() if k not in run_fields
        }
    if after == "convpass":
        assert tuned.warmup_epochs == pytest.approx(tuned.epochs / 10)
    if after == "int8":
        assert (tuned.trainable, tuned.lr_milestones) == ("all", ())
        end = lr_at(tuned.epochs * 10 - 1, optim=tuned, steps_per_epoch=10)
        assert end == pytest.approx(tuned.peak_lr / 10)


def test_deit_schedule_has_the_values_of_the_paper():
    optim = FINETUNE_SCHEDULES["deit"](RECIPES["cifar10"]()).optim
    assert (optim.epochs, optim.batch_size, optim.weight_decay) == (30, 512, 1e-8)
    assert (optim.peak_lr, optim.min_lr) == (5e-6, 5e-6)
    assert optim.warmup_lr == pytest.approx(1e-6)
    assert optim.warmup_epochs == 5


def test_linear_probe_trains_the_heads_on_labels():
    probe = FINETUNE_SCHEDULES["linear-probe"](digits().replace(init={"weights": "x"}))
    assert (probe.optim.trainable, probe.loss.kind) == ("heads", "none")
    assert (probe.views.mixup_alpha, probe.views.cutmix_alpha) == (0, 0)


def test_with_init_takes_the_architecture_of_the_weights():
    base = RECIPES["cifar10"]()
    student = StudentConfig(name="vit_small", image_size=224, patch_size=16, depth=9)
    config = with_init(base, "w.pth", student)
    assert config.init.weights == "w.pth"
    assert config.student == StudentConfig(
        name="deit_small", image_size=32, patch_size=16, depth=9, drop_path=0.1
    )
    assert with_init(base, "w.pth", None).student == base.student


@pytest.mark.parametrize(
    ("section", "fields", "problem"),
    [
        ("init", {"head": "new"}, "init.head"),
        ("init", {"pos_embed_resize": "timm"}, "init.pos_embed_resize"),
        ("optim", {"trainable": "heads"}, "optim.trainable"),
    ],
)
def test_options_that_need_initial_weights_are_refused_without(section, fields, problem):
    with raises(ConfigError, problem):
        validate(digits().replace(**{section: fields}))


# ---- the command


@pytest.fixture
def command(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = run_command("finetune", [str(word) for word in arguments], "finetune_deit.py")
        return code, capsys.readouterr()

    return run


def test_finetune_without_a_recipe_uses_the_config_of_the_run(pretrained, tmp_path, command):
    options = ("--teacher.source", pretrained / "teacher16", "--optim.epochs", "1")
    code, output = command("--from", pretrained / "student", "--resolution", "16", *options)
    assert code == 0, output.err
    config = load_config(tmp_path / "checkpoints" / "student-finetuned" / "config.json")
    before = load_config(pretrained / "student" / "config.json")
    assert isinstance(config, Config)
    assert config.student == before.replace(student={"image_size": 16}).student
    assert config.optim.epochs == 1
    assert config.optim.lr == before.optim.lr


def test_finetune_takes_the_normalization_of_the_initial_weights(pretrained, tmp_path):
    model_info = json.loads((pretrained / "student" / "best" / "model.json").read_text())
    train(finer(pretrained), tmp_path / "run")
    saved = load_config(tmp_path / "run" / "config.json")
    assert saved.views.mean == tuple(model_info["mean"])
    assert saved.views.std == tuple(model_info["std"])
    model = json.loads((tmp_path / "run" / "best" / "model.json").read_text())
    assert (model["mean"], model["std"]) == (model_info["mean"], model_info["std"])


def test_finetune_from_a_file_needs_a_recipe_that_fits(pretrained, tmp_path, command):
    file = tmp_path / "weights.safetensors"  # without the model.json of a run
    shutil.copy(pretrained / "student" / "best" / "model.safetensors", file)
    code, output = command("--from", file)
    assert code == 2
    assert f"--from {file} RECIPE" in output.err
    arguments = ("digits", "--from", file, "--loss", "none", "--dry-run")
    code, output = command(*arguments)
    assert code == 0, output.err
    _, notes = output.out.split(f" {file}\n")
    assert re.match(r" +10 classes\b", notes)  # the file has no class names: those of the data
    shape = "--student.embed_dim", "32", "--student.num_heads", "2"
    code, output = command(*arguments, *shape)
    assert code == 4
    assert f"init.weights {file}" in output.err
    assert re.search(r"blocks\.0\.attn\.proj\.bias: \(16,\) .*\(32,\)", output.err)
    # The last line has the number of other tensors that differ.
    assert re.search(r"\b11\b", output.err.splitlines()[-1])


INVALID = {
    "no start": ((), 2, ("finetune_deit.py: ", "--from")),
    "late recipe after a value": (
        ("--from", "STUDENT", "--out=x", "digits"),
        2,
        ("RECIPE", " digits "),
    ),
    "late recipe": (("--from", "STUDENT", "--out", "x", "digits"), 2, ("RECIPE", " digits ")),
    "no such start": (("--from", "runs/none"), 4, ("--from runs/none: ",)),
    "patches": (("--from", "STUDENT", "--resolution", "15"), 4, ("--resolution 15: ", "14", "16")),
    "no resolution": (("--from", "STUDENT", "--resolution", "0"), 2, ("--resolution 0: ",)),
    "schedule": (("--from", "STUDENT", "--schedule", "shrot"), 2, ("--schedule shrot: ", "short?")),
    "classes": (
        ("--from", "STUDENT", "digits", "--data.classes=1,2", "--loss=deit-hard", "--dry-run"),
        3,
        ("teacher.source ",),
    ),
    "teacher at another size": (
        ("--from", "STUDENT", "--resolution", "32", "--dry-run"),
        3,
        (" 8 px", "--resolution 32", "--teacher.image_size"),
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_finetune_with_invalid_arguments_writes_nothing(name, pretrained, tmp_path, command):
    arguments, expected, named = INVALID[name]
    code, output = command(*(pretrained / "student" if w == "STUDENT" else w for w in arguments))
    assert (code, [text for text in named if text not in output.err]) == (expected, []), output.err
    assert not any(tmp_path.iterdir())


def test_finetune_from_a_file_takes_num_heads_of_the_recipe(pretrained, tmp_path, command):
    """A file of weights alone does not store the number of heads."""
    weight_file = tmp_path / "weights.safetensors"
    shutil.copy(pretrained / "student" / "best" / "model.safetensors", weight_file)
    shape = ("--student.embed_dim", "16", "--student.num_heads", "2")
    arguments = ("digits", "--from", weight_file, "--loss", "none", "--out", "run")
    code, output = command(*arguments, *shape, "--optim.epochs", "1", "--optim.warmup_epochs", "0")
    assert code == 0, output.err
    assert load_config(tmp_path / "run" / "config.json").student.num_heads == 2
    notes = json.loads((tmp_path / "run" / "init.json").read_text())["notes"]
    (num_heads_note,) = [note for note in notes if "--student.num_heads" in note]
    assert re.search(r"\b2\b", num_heads_note)
    assert num_heads_note in output.out


@pytest.mark.fault("A9", "A25", "B8")
def test_finetune_resumes_without_its_initial_weights(pretrained, tmp_path, command):
    start = tmp_path / "start"
    shutil.copytree(pretrained / "student", start)
    arguments = ("--from", start, "--resolution", "16", "--loss", "none", "--out", "run")
    quick = ("--optim.epochs", "1", "--optim.warmup_epochs", "0")
    assert command(*arguments, *quick)[0] == 0
    shutil.rmtree(start)
    files = tree(tmp_path / "run")
    code, output = command(*arguments, *quick, "--resume")
    assert code == 0, output.err
    assert tree(tmp_path / "run") == files
    other_resolution = ("--from", start, "--resolution", "24", "--out", "run", "--resume")
    code, output = command(*other_resolution)
    assert code == 2
    assert re.search(r"--resolution 24: .*\b16 px\b.*leave it out", output.err)
    differing = {
        "--schedule deit": (*arguments, "--schedule", "deit"),
        "RECIPE digits": ("--from", start, "digits", "--out", "run"),
    }
    for expected_text, more in differing.items():
        code, output = command(*more, *quick, "--resume")
        assert code == 2
        assert expected_text in output.err
    code, output = command("--from", pretrained / "student", "--out", "run", "--resume")
    assert code == 2
    assert all(word in output.err for word in (str(start), f"--from {pretrained / 'student'}: "))


@pytest.mark.fault("B7")
def test_finetune_with_another_number_of_classes_is_refused(pretrained, tmp_path, command):
    file = tmp_path / "weights.safetensors"
    shutil.copy(pretrained / "student" / "best" / "model.safetensors", file)
    arguments = ("digits", "--from", file, "--loss", "none", "--data.classes", "1,2,3")
    code, output = command(*arguments)
    assert code == 4
    assert re.search(r"\b10\b.*\b3\b.*--init\.head new\b", output.err)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("heads", ["zero", "new"])
def test_finetune_keeps_the_heads_that_the_run_trained(pretrained, tmp_path, heads):
    """init.head of the run applied to its initial weights, not to its trained heads."""
    shutil.copytree(pretrained / "student", tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["init"] = {**config["init"], "head": heads, "weights": str(pretrained / "student")}
    file.write_text(json.dumps(config))
    arguments = ["--from", str(tmp_path / "run")]
    assert parse_finetune(arguments, "deit finetune").config.init.head == "keep"
    parsed = parse_finetune([*arguments, "--init.head", heads], "deit finetune")
    assert parsed.config.init.head == heads


@pytest.mark.parametrize("from_run", [True, False])
def test_finetune_config_equals_that_of_the_command(pretrained, from_run):
    source = pretrained / "student"
    recipe = [] if from_run else ["digits"]
    arguments = [*recipe, "--from", str(source), "--resolution", "16", "--optim.epochs", "2"]
    parsed = parse_finetune([*arguments, "--schedule", "int8"], "deit finetune").config
    config = None if from_run else digits()
    options = {"resolution": 16, "schedule": "int8", "epochs": 2}
    assert validate(finetune_config(source, config, **options)) == parsed


def test_finetune_config_invalid_arguments_raise(pretrained, tmp_path):
    with raises(ConfigError, "schedule = shrt", "short?"):
        finetune_config(pretrained / "student", schedule="shrt")
    with raises(ConfigError, "resolution = 32", "bit"):
        finetune_config(pretrained / "student", schedule="bit", resolution=32)
    with raises(CheckpointError, tmp_path):
        finetune_config(tmp_path)


def test_option_value_named_like_a_recipe_is_not_the_recipe(pretrained):
    arguments = ["--from", str(pretrained / "student"), "--data.source", "digits"]
    assert parse_finetune(arguments, "deit finetune").config.data.source == "digits"


@pytest.mark.parametrize(
    "schedule", [name for name in FINETUNE_SCHEDULES if name not in DATA_SIZED_SCHEDULES]
)
def test_schedule_with_fewer_epochs_scales_its_warmup(pretrained, schedule):
    arguments = ["--from", str(pretrained / "student"), "--schedule", schedule]
    default = parse_finetune(arguments, "deit finetune").config.optim
    parsed = parse_finetune(
        [*arguments, "--optim.epochs", "5", "--optim.epochs=1"], "deit finetune"
    )
    optim = parsed.config.optim
    assert optim.epochs == 1
    assert optim.warmup_epochs == pytest.approx(default.warmup_epochs / default.epochs)
    arguments += ["--optim.epochs", "2", "--optim.warmup_epochs", "1.5"]
    assert parse_finetune(arguments, "deit finetune").config.optim.warmup_epochs == 1.5
