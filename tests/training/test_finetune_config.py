"""Fine-tuning: what follows from the weights, schedules, and what is refused."""

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
from deit.core.errors import ConfigError
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
    facts = json.loads((pretrained / "student" / "best" / "model.json").read_text())
    statistics = [",".join(f"{value:.3g}" for value in facts[name]) for name in ("mean", "std")]
    (setting,) = [line for line in capsys.readouterr().out.splitlines() if "--views.mean" in line]
    assert all(value in setting for value in (*statistics, "0.5,0.5,0.5"))


# the configuration of a fine-tuning


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
            validate(FINETUNE_SCHEDULES[name](config))  # a ConvNet
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
ODD = {
    "sgd": {"name": "sgd", "momentum": 0.5, "lr_milestones": (0.5,), "layer_decay": 0.7},
    "adamw": {"beta1": 0.8, "beta2": 0.95, "independent_weight_decay": True, "min_lr": 2e-4},
}
"""Settings of runs that no schedule left behind."""
BEFORE = {
    **SCHEDULES,
    **{name: partial(Config.replace, optim=fields) for name, fields in ODD.items()},
    "dkd": partial(
        Config.replace, loss=LOSS_PRESETS["dkd"], views=AUGMENTATIONS["none"], optim={"epochs": 30}
    ),
}
OF_THE_RUN = {"trainable", "grad_accum_steps", "clip_grad_norm", "ema_epochs"}
"""Fields of the optimizer that are no schedule's."""
LENGTH = {"epochs", "warmup_epochs"}
DECIDES = {"deit": set(), "deit3": set(), "bit": set(), "convpass": {"batch_size"} | LENGTH}
"""Schedules that are their own, and what they leave to the run even so."""
ADAPTERS_THAT_ROUND = ("student.adapters = 'convpass'", "student.qat")
DIFFERENT = {
    ("int8", "convpass"): ADAPTERS_THAT_ROUND,
    ("convpass", "int8"): ADAPTERS_THAT_ROUND,
    ("int8", "linear-probe"): ("optim.trainable = 'heads'", "int8"),
}
"""Networks of one that the other cannot train, and what is named: adapters do not round, and ranges
have to learn."""


@pytest.mark.parametrize("after", SCHEDULES)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("twice", [False, True])
def test_schedule_does_not_depend_on_the_schedule_before(before, after, twice):
    recipe = digits().replace(init={"weights": "somewhere"})
    config = BEFORE[before](recipe)
    if twice:
        config = BEFORE[before](config)
    if (before, after) in DIFFERENT:
        with raises(ConfigError, *DIFFERENT[before, after]):
            validate(SCHEDULES[after](config))
        return
    tuned = validate(SCHEDULES[after](config)).optim
    if after in DECIDES:
        recipe_fields, run_fields = (
            asdict(SCHEDULES[after](recipe).optim),
            OF_THE_RUN | DECIDES[after],
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
    odd = StudentConfig(name="vit_small", image_size=224, patch_size=16, depth=9)
    config = with_init(base, "w.pth", odd)
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


# the command


@pytest.fixture
def command(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = run_command("finetune", [str(word) for word in arguments], "finetune_deit.py")
        return code, capsys.readouterr()

    return run


def test_finetune_without_a_recipe_uses_the_config_of_the_run(pretrained, tmp_path, command):
    taught = ("--teacher.source", pretrained / "teacher16", "--optim.epochs", "1")
    code, completed = command("--from", pretrained / "student", "--resolution", "16", *taught)
    assert code == 0, completed.err
    config = load_config(tmp_path / "checkpoints" / "student-finetuned" / "config.json")
    before = load_config(pretrained / "student" / "config.json")
    assert isinstance(config, Config)
    assert config.student == before.replace(student={"image_size": 16}).student
    assert config.optim.epochs == 1
    assert config.optim.lr == before.optim.lr


def test_finetune_takes_the_normalization_of_the_initial_weights(pretrained, tmp_path):
    facts = json.loads((pretrained / "student" / "best" / "model.json").read_text())
    train(finer(pretrained), tmp_path / "run")
    saved = load_config(tmp_path / "run" / "config.json")
    assert saved.views.mean == tuple(facts["mean"])
    assert saved.views.std == tuple(facts["std"])
    model = json.loads((tmp_path / "run" / "best" / "model.json").read_text())
    assert (model["mean"], model["std"]) == (facts["mean"], facts["std"])


def test_finetune_from_a_file_needs_a_recipe_that_fits(pretrained, tmp_path, command):
    file = tmp_path / "weights.safetensors"  # without the model.json of a run
    shutil.copy(pretrained / "student" / "best" / "model.safetensors", file)
    code, completed = command("--from", file)
    assert code == 2
    assert f"--from {file} RECIPE" in completed.err
    arguments = ("digits", "--from", file, "--loss", "none", "--dry-run")
    code, completed = command(*arguments)
    assert code == 0, completed.err
    _, notes = completed.out.split(f" {file}\n")
    assert re.match(r" +10 classes\b", notes)  # it names none: those of the data
    shape = "--student.embed_dim", "32", "--student.num_heads", "2"
    code, completed = command(*arguments, *shape)
    assert code == 4
    assert f"init.weights {file}" in completed.err
    assert re.search(r"blocks\.0\.attn\.proj\.bias: \(16,\) .*\(32,\)", completed.err)
    assert re.search(r"\b11\b", completed.err.splitlines()[-1])  # as many differ that are not shown


BAD = {
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
    "tuning": (("--from", "STUDENT", "--schedule", "shrot"), 2, ("--schedule shrot: ", "short?")),
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


@pytest.mark.parametrize("name", BAD)
def test_finetune_with_invalid_arguments_writes_nothing(name, pretrained, tmp_path, command):
    arguments, expected, named = BAD[name]
    code, completed = command(*(pretrained / "student" if w == "STUDENT" else w for w in arguments))
    assert (code, [text for text in named if text not in completed.err]) == (expected, []), (
        completed.err
    )
    assert not any(tmp_path.iterdir())


def test_finetune_from_a_file_takes_num_heads_of_the_recipe(pretrained, tmp_path, command):
    """Its width is the recipe's, and how many heads it has only the recipe can know."""
    weight_file = tmp_path / "weights.safetensors"
    shutil.copy(pretrained / "student" / "best" / "model.safetensors", weight_file)
    shape = ("--student.embed_dim", "16", "--student.num_heads", "2")
    arguments = ("digits", "--from", weight_file, "--loss", "none", "--out", "run")
    code, completed = command(
        *arguments, *shape, "--optim.epochs", "1", "--optim.warmup_epochs", "0"
    )
    assert code == 0, completed.err
    assert load_config(tmp_path / "run" / "config.json").student.num_heads == 2
    notes = json.loads((tmp_path / "run" / "init.json").read_text())["notes"]
    (setting,) = [note for note in notes if "--student.num_heads" in note]
    assert re.search(r"\b2\b", setting)
    assert setting in completed.out


@pytest.mark.fault("A9", "A25", "B8")
def test_finetune_resumes_without_its_initial_weights(pretrained, tmp_path, command):
    start = tmp_path / "start"
    shutil.copytree(pretrained / "student", start)
    arguments = ("--from", start, "--resolution", "16", "--loss", "none", "--out", "run")
    quick = ("--optim.epochs", "1", "--optim.warmup_epochs", "0")
    assert command(*arguments, *quick)[0] == 0
    shutil.rmtree(start)
    trained = tree(tmp_path / "run")
    code, completed = command(*arguments, *quick, "--resume")
    assert code == 0, completed.err
    assert tree(tmp_path / "run") == trained
    other = ("--from", start, "--resolution", "24", "--out", "run", "--resume")
    code, completed = command(*other)
    assert code == 2
    assert re.search(r"--resume: .*\b16 px\b.*\b24\b.*--resolution", completed.err)
    differing = {
        "--schedule deit": (*arguments, "--schedule", "deit"),
        "RECIPE digits": ("--from", start, "digits", "--out", "run"),
    }
    for named, more in differing.items():
        code, completed = command(*more, *quick, "--resume")
        assert code == 2
        assert named in completed.err
    code, completed = command("--from", pretrained / "student", "--out", "run", "--resume")
    assert code == 2
    assert all(word in completed.err for word in (f"--from {start}", str(pretrained / "student")))


@pytest.mark.fault("B7")
def test_finetune_with_another_number_of_classes_is_refused(pretrained, tmp_path, command):
    file = tmp_path / "weights.safetensors"
    shutil.copy(pretrained / "student" / "best" / "model.safetensors", file)
    arguments = ("digits", "--from", file, "--loss", "none", "--data.classes", "1,2,3")
    code, completed = command(*arguments)
    assert code == 4
    assert re.search(r"\b10\b.*\b3\b.*--init\.head new\b", completed.err)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("heads", ["zero", "new"])
def test_finetune_keeps_the_heads_that_the_run_trained(pretrained, tmp_path, heads):
    """What a run did to the heads of its initial weights is not done to its trained heads."""
    shutil.copytree(pretrained / "student", tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["init"] = {**config["init"], "head": heads, "weights": str(pretrained / "student")}
    file.write_text(json.dumps(config))
    arguments = ["--from", str(tmp_path / "run")]
    assert parse_finetune(arguments, "deit finetune").config.init.head == "keep"
    parsed = parse_finetune([*arguments, "--init.head", heads], "deit finetune")
    assert parsed.config.init.head == heads


def test_option_value_named_like_a_recipe_is_not_the_recipe(pretrained):
    arguments = ["--from", str(pretrained / "student"), "--data.source", "digits"]
    assert parse_finetune(arguments, "deit finetune").config.data.source == "digits"


@pytest.mark.parametrize(
    "tuning", [name for name in FINETUNE_SCHEDULES if name not in DATA_SIZED_SCHEDULES]
)
def test_schedule_with_fewer_epochs_scales_its_warmup(pretrained, tuning):
    arguments = ["--from", str(pretrained / "student"), "--schedule", tuning]
    usual = parse_finetune(arguments, "deit finetune").config.optim
    few = parse_finetune([*arguments, "--optim.epochs", "5", "--optim.epochs=1"], "deit finetune")
    optim = few.config.optim
    assert optim.epochs == 1
    assert optim.warmup_epochs == pytest.approx(usual.warmup_epochs / usual.epochs)
    arguments += ["--optim.epochs", "2", "--optim.warmup_epochs", "1.5"]
    assert parse_finetune(arguments, "deit finetune").config.optim.warmup_epochs == 1.5
