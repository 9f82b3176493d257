"""Fine-tuning: from a run at a higher resolution, taught or not, in whole or in part."""

import json
import re
import shutil
from dataclasses import asdict
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

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
from deit.config.student_section import StudentConfig
from deit.config.validation import load_config, validate
from deit.core import run_folder, run_log
from deit.core.errors import CheckpointError, ConfigError
from deit.distill.write_targets import write_targets
from deit.evaluation.evaluate import evaluate
from deit.models.pos_embed import resize_positions
from deit.training.optimizer import lr_at
from deit.training.train import train
from tests.helpers.commands import tree
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import same_end, stop_and_go_on
from tests.helpers.trained import trained

pytest.importorskip("sklearn")
SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2}
FEW = {"train_fraction": 0.2}
BRIEF = {"epochs": 2, "batch_size": 64, "warmup_epochs": 1}
STILL = {"lr": 1e-12, "min_lr": 0, "warmup_lr": 0, "weight_decay": 0}
"""Next to no learning rate: the weights stay those that a run started from."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher and a student at 8 px, and the teacher fitted to 16 px."""
    folder = tmp_path_factory.mktemp("runs")
    trained(digits_teacher().replace(optim={"epochs": 3}), folder / "teacher")
    source = str(folder / "teacher")
    student = digits().replace(data=FEW, student=SMALL, teacher={"source": (source,)}, optim=BRIEF)
    train(student, folder / "student")
    fitted = at_resolution(digits_teacher(), 16).replace(data=FEW, init={"weights": source})
    train(fitted.replace(optim={"epochs": 1, "warmup_epochs": 0}), folder / "teacher16")
    return folder


def finer(runs, **sections):
    """The student at 16 px, taught at 16 px."""
    config = load_config(runs / "student" / "config.json")
    config = with_init(config, str(runs / "student"), None)
    config = at_resolution(config, 16)
    config = config.replace(teacher={"source": (str(runs / "teacher16"),)}, optim=BRIEF)
    return config.replace(**sections)


def weights(run, name="last"):
    return load_file(run_folder.find_checkpoint(run, name) / "model.safetensors")


@pytest.mark.fault("B8")
def test_a_run_goes_on_at_twice_its_resolution(runs, tmp_path, capsys):
    out = tmp_path / "run"
    train(finer(runs), out)
    said = capsys.readouterr().out.splitlines()
    (taught,) = [line for line in said if str(runs / "teacher16") in line]
    assert re.search(r"\b16 px\b.*\d\.\d %", taught)  # it answers at its own size
    notes = json.loads((out / "init.json").read_text())
    assert notes["source"] == str(runs / "student")
    (note,) = notes["notes"]
    assert re.search(r"4 x 4 .*\b8 x 8 .*\bdeit\b", note)
    assert any(line.strip() == note for line in said)
    assert weights(out)["pos_embed"].shape == (1, 66, 16)
    found = evaluate(out)
    assert found["heads"]["distillation"]["top1"] > 0
    assert run_log.read(out / run_log.METRICS)[0]["train"]["loss_teacher"] > 0


@pytest.mark.fault("A25")
def test_it_begins_where_the_other_run_ended(runs, tmp_path):
    """With a learning rate of next to nothing, the weights are those it started from."""
    train(finer(runs, optim=STILL), tmp_path / "run")
    before, after = weights(runs / "student", "best"), weights(tmp_path / "run")
    for name, value in before.items():
        if name == "pos_embed":
            value = resize_positions(value, prefix=2, side=8, kernel="deit").positions
        torch.testing.assert_close(after[name], value, atol=1e-8, rtol=0)


def test_the_other_kernel_gives_other_positions(runs, tmp_path):
    train(finer(runs, optim=STILL, init={"pos_embed_resize": "timm"}), tmp_path / "run")
    before, after = weights(runs / "student", "best"), weights(tmp_path / "run")
    expected = resize_positions(before["pos_embed"], prefix=2, side=8, kernel="timm").positions
    torch.testing.assert_close(after["pos_embed"], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("trained", ["heads", "attention"])
def test_what_is_held_still_stays_to_the_bit(trained, runs, tmp_path):
    config = finer(
        runs, student={"drop_path": 0.2}, optim={"trainable": trained, "ema_epochs": 1.0}
    )
    train(config, tmp_path / "run")
    before, after = weights(runs / "student", "best"), weights(tmp_path / "run")
    average = load_file(run_folder.latest_checkpoint(tmp_path / "run") / "average.safetensors")
    for name, value in before.items():
        moved = name.startswith("head") or (trained == "attention" and ".attn." in name)
        if name == "pos_embed":
            value = resize_positions(value, prefix=2, side=8, kernel="deit").positions
        assert torch.equal(after[name], value) != moved, name
        if not moved:
            torch.testing.assert_close(average[name], value, atol=1e-7, rtol=1e-6)


def test_held_still_it_resumes_to_the_bit(runs, tmp_path):
    config = finer(runs, optim={"trainable": "heads", "layer_decay": 0.5})
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(config, straight)
    stop_and_go_on(config, broken, "metrics:1:term")
    same_end(broken, straight)


def test_a_resumed_run_needs_its_start_no_more(runs, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(runs / "student", start)
    config = finer(runs, init={"weights": str(start)})
    train(config, tmp_path / "run")
    shutil.rmtree(start)
    train(config, tmp_path / "run", resume=True)
    with raises(CheckpointError, "init.weights", start):
        train(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_layer_decay_slows_the_layers_near_the_image(runs, tmp_path):
    """With Adam, the first steps are as large as the learning rate, whatever the gradient."""
    quiet = {"weight_decay": 0.0, "epochs": 1, "warmup_epochs": 0, "lr": 1e-4, "min_lr": 1e-4}
    moved = {}
    for decay in (1.0, 0.1):
        out = tmp_path / str(decay)
        train(finer(runs, optim={**quiet, "layer_decay": decay}), out)
        before, after = weights(runs / "student", "best"), weights(out)
        for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "head.weight"):
            moved[decay, name] = (after[name] - before[name]).abs().mean().item()
    ratio = {name: moved[0.1, name] / moved[1.0, name] for _, name in moved}
    assert ratio["head.weight"] == pytest.approx(1, rel=0.3)
    assert ratio["blocks.0.mlp.fc1.weight"] == pytest.approx(0.1, rel=0.3)
    assert ratio["patch_embed.proj.weight"] == pytest.approx(0.01, rel=0.5)


def test_by_labels_alone_and_onto_other_classes(runs, tmp_path):
    few = {"classes": ("1", "3", "7")}
    config = finer(runs, data=few, loss=LOSS_PRESETS["none"], optim=STILL)
    before = weights(runs / "student", "best")
    rows = {name: before[name][[1, 3, 7]] for name in ("head.weight", "head_dist.weight")}
    for heads in ("keep", "new"):
        out = tmp_path / heads
        train(config.replace(init={"head": heads}), out)
        after = weights(out)
        for name, kept in rows.items():
            assert after[name].shape == (3, 16)
            assert torch.allclose(after[name], kept, atol=1e-8, rtol=0) == (heads == "keep")
        _, note = json.loads((out / "init.json").read_text())["notes"]
        assert re.search(r"\b3\b.*\b10\b", note)


def test_stored_targets_train_to_the_same_bits(runs, tmp_path):
    config = finer(runs, loss=LOSS_PRESETS["deit-hard"])
    train(config, tmp_path / "online")
    write_targets(config, tmp_path / "store")
    stored = config.replace(teacher={"target_stores": (str(tmp_path / "store"),)})
    train(stored, tmp_path / "stored")
    ours, theirs = weights(tmp_path / "stored"), weights(tmp_path / "online")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_plain_vit_becomes_a_distilled_student(runs, tmp_path):
    plain = digits().replace(
        data=FEW,
        student={"name": "vit_micro", **SMALL},
        loss=LOSS_PRESETS["none"],
        optim=BRIEF,
    )
    train(plain, tmp_path / "plain")
    config = finer(runs, init={"weights": str(tmp_path / "plain")}, optim=STILL)
    train(config, tmp_path / "run")
    before, after = weights(tmp_path / "plain", "best"), weights(tmp_path / "run")
    torch.testing.assert_close(after["dist_token"], before["cls_token"], atol=1e-8, rtol=0)
    torch.testing.assert_close(after["head_dist.weight"], before["head.weight"], atol=1e-8, rtol=0)
    note, _ = json.loads((tmp_path / "run" / "init.json").read_text())["notes"]
    assert "distillation token" in note


def test_a_start_with_another_normalisation_is_told(runs, tmp_path, capsys):
    train(finer(runs, views={"mean": (0.5,) * 3, "std": (0.5,) * 3}), tmp_path / "r", dry_run=True)
    facts = json.loads((runs / "student" / "best" / "model.json").read_text())
    theirs = [",".join(f"{value:.3g}" for value in facts[name]) for name in ("mean", "std")]
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "--views.mean" in line]
    assert all(value in told for value in (*theirs, "0.5,0.5,0.5"))


# the configuration of a fine-tuning


def test_at_resolution_everything_follows():
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
def test_every_schedule_suits_every_recipe(name, recipe):
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
APART = {
    ("int8", "convpass"): ADAPTERS_THAT_ROUND,
    ("convpass", "int8"): ADAPTERS_THAT_ROUND,
    ("int8", "linear-probe"): ("optim.trainable = 'heads'", "int8"),
}
"""Networks of one that the other cannot train, and what is named: adapters do not round, and ranges
have to learn."""


@pytest.mark.parametrize("after", SCHEDULES)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("twice", [False, True])
def test_every_schedule_is_itself_after_every_other(before, after, twice):
    recipe = digits().replace(init={"weights": "somewhere"})
    config = BEFORE[before](recipe)
    if twice:
        config = BEFORE[before](config)
    if (before, after) in APART:
        with raises(ConfigError, *APART[before, after]):
            validate(SCHEDULES[after](config))
        return
    tuned = validate(SCHEDULES[after](config)).optim
    if after in DECIDES:
        alone, own = asdict(SCHEDULES[after](recipe).optim), OF_THE_RUN | DECIDES[after]
        assert {k: v for k, v in asdict(tuned).items() if k not in own} == {
            k: v for k, v in alone.items() if k not in own
        }
    if after == "convpass":
        assert tuned.warmup_epochs == pytest.approx(tuned.epochs / 10)
    if after == "int8":
        assert (tuned.trainable, tuned.lr_milestones) == ("all", ())
        end = lr_at(tuned.epochs * 10 - 1, optim=tuned, steps_per_epoch=10)
        assert end == pytest.approx(tuned.peak_lr / 10)


def test_deits_schedule_at_higher_resolution():
    optim = FINETUNE_SCHEDULES["deit"](RECIPES["cifar10"]()).optim
    assert (optim.epochs, optim.batch_size, optim.weight_decay) == (30, 512, 1e-8)
    assert (optim.peak_lr, optim.min_lr) == (5e-6, 5e-6)
    assert optim.warmup_lr == pytest.approx(1e-6)
    assert optim.warmup_epochs == 5


def test_a_linear_probe_is_heads_and_labels():
    probe = FINETUNE_SCHEDULES["linear-probe"](digits().replace(init={"weights": "x"}))
    assert (probe.optim.trainable, probe.loss.kind) == ("heads", "none")
    assert (probe.views.mixup_alpha, probe.views.cutmix_alpha) == (0, 0)


def test_the_network_of_the_weights_is_taken_over():
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
def test_what_needs_a_start_says_so(section, fields, problem):
    with raises(ConfigError, problem):
        validate(digits().replace(**{section: fields}))


# the command


@pytest.fixture
def command(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = run_command("finetune", [str(word) for word in arguments], "finetune_deit.py")
        return code, capsys.readouterr()

    return run


def test_without_a_recipe_the_runs_own_goes_on(runs, tmp_path, command):
    taught = ("--teacher.source", runs / "teacher16", "--optim.epochs", "1")
    code, said = command("--from", runs / "student", "--resolution", "16", *taught)
    assert code == 0, said.err
    config = load_config(tmp_path / "checkpoints" / "student-finetuned" / "config.json")
    before = load_config(runs / "student" / "config.json")
    assert isinstance(config, Config)
    assert config.student == before.replace(student={"image_size": 16}).student
    assert config.optim.epochs == 1
    assert config.optim.lr == before.optim.lr


def test_the_normalisation_of_the_start_is_taken_over(runs, tmp_path):
    facts = json.loads((runs / "student" / "best" / "model.json").read_text())
    train(finer(runs), tmp_path / "run")
    saved = load_config(tmp_path / "run" / "config.json")
    assert saved.views.mean == tuple(facts["mean"])
    assert saved.views.std == tuple(facts["std"])
    model = json.loads((tmp_path / "run" / "best" / "model.json").read_text())
    assert (model["mean"], model["std"]) == (facts["mean"], facts["std"])


def test_a_file_needs_a_recipe_and_takes_its_network_from_the_weights(runs, tmp_path, command):
    file = tmp_path / "weights.safetensors"  # without the facts that lie beside it in a run
    shutil.copy(runs / "student" / "best" / "model.safetensors", file)
    code, said = command("--from", file)
    assert code == 2
    assert f"--from {file} RECIPE" in said.err
    words = ("digits", "--from", file, "--loss", "none", "--dry-run")
    code, said = command(*words)
    assert code == 0, said.err
    _, notes = said.out.split(f" {file}\n")
    assert re.match(r" +10 classes\b", notes)  # it names none: those of the data
    shape = "--student.embed_dim", "32", "--student.num_heads", "2"
    code, said = command(*words, *shape)
    assert code == 4
    assert f"init.weights {file}" in said.err
    assert re.search(r"blocks\.0\.attn\.proj\.bias: \(16,\) .*\(32,\)", said.err)
    assert re.search(r"\b11\b", said.err.splitlines()[-1])  # as many differ that are not shown


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
def test_bad_input_is_refused_before_anything_is_written(name, runs, tmp_path, command):
    words, expected, named = BAD[name]
    code, said = command(*(runs / "student" if w == "STUDENT" else w for w in words))
    assert (code, [one for one in named if one not in said.err]) == (expected, []), said.err
    assert not any(tmp_path.iterdir())


def test_a_bare_file_keeps_the_recipes_attention_heads(runs, tmp_path, command):
    """Its width is the recipe's, and how many heads it has only the recipe can know."""
    alone = tmp_path / "weights.safetensors"
    shutil.copy(runs / "student" / "best" / "model.safetensors", alone)
    shape = ("--student.embed_dim", "16", "--student.num_heads", "2")
    words = ("digits", "--from", alone, "--loss", "none", "--out", "run")
    code, said = command(*words, *shape, "--optim.epochs", "1", "--optim.warmup_epochs", "0")
    assert code == 0, said.err
    assert load_config(tmp_path / "run" / "config.json").student.num_heads == 2
    notes = json.loads((tmp_path / "run" / "init.json").read_text())["notes"]
    (told,) = [note for note in notes if "--student.num_heads" in note]
    assert re.search(r"\b2\b", told)
    assert told in said.out


@pytest.mark.fault("A9", "A25", "B8")
def test_the_command_goes_on_without_its_start(runs, tmp_path, command):
    start = tmp_path / "start"
    shutil.copytree(runs / "student", start)
    words = ("--from", start, "--resolution", "16", "--loss", "none", "--out", "run")
    quick = ("--optim.epochs", "1", "--optim.warmup_epochs", "0")
    assert command(*words, *quick)[0] == 0
    shutil.rmtree(start)
    trained = tree(tmp_path / "run")
    code, said = command(*words, *quick, "--resume")
    assert code == 0, said.err
    assert tree(tmp_path / "run") == trained
    other = ("--from", start, "--resolution", "24", "--out", "run", "--resume")
    code, said = command(*other)
    assert code == 2
    assert re.search(r"--resume: .*\b16 px\b.*\b24\b.*--resolution", said.err)
    differing = {
        "--schedule deit": (*words, "--schedule", "deit"),
        "RECIPE digits": ("--from", start, "digits", "--out", "run"),
    }
    for named, more in differing.items():
        code, said = command(*more, *quick, "--resume")
        assert code == 2
        assert named in said.err
    code, said = command("--from", runs / "student", "--out", "run", "--resume")
    assert code == 2
    assert all(word in said.err for word in (f"--from {start}", str(runs / "student")))


@pytest.mark.fault("B7")
def test_class_counts_that_differ_are_refused(runs, tmp_path, command):
    file = tmp_path / "weights.safetensors"
    shutil.copy(runs / "student" / "best" / "model.safetensors", file)
    words = ("digits", "--from", file, "--loss", "none", "--data.classes", "1,2,3")
    code, said = command(*words)
    assert code == 4
    assert re.search(r"\b10\b.*\b3\b.*--init\.head new\b", said.err)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("heads", ["zero", "new"])
def test_heads_of_a_run_that_began_with_others_are_its_own_by_now(runs, tmp_path, heads):
    """What the run did with the heads it was given is not done to those it has learnt."""
    shutil.copytree(runs / "student", tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["init"] = {**config["init"], "head": heads, "weights": str(runs / "student")}
    file.write_text(json.dumps(config))
    words = ["--from", str(tmp_path / "run")]
    assert parse_finetune(words, "deit finetune").config.init.head == "keep"
    asked = parse_finetune([*words, "--init.head", heads], "deit finetune")
    assert asked.config.init.head == heads


def test_a_value_that_is_called_as_a_recipe_is_no_recipe(runs):
    words = ["--from", str(runs / "student"), "--data.source", "digits"]
    assert parse_finetune(words, "deit finetune").config.data.source == "digits"


@pytest.mark.parametrize(
    "tuning", [name for name in FINETUNE_SCHEDULES if name not in DATA_SIZED_SCHEDULES]
)
def test_a_schedule_in_few_epochs_warms_up_in_proportion(runs, tuning):
    words = ["--from", str(runs / "student"), "--schedule", tuning]
    usual = parse_finetune(words, "deit finetune").config.optim
    few = parse_finetune([*words, "--optim.epochs", "5", "--optim.epochs=1"], "deit finetune")
    optim = few.config.optim
    assert optim.epochs == 1
    assert optim.warmup_epochs == pytest.approx(usual.warmup_epochs / usual.epochs)
    words += ["--optim.epochs", "2", "--optim.warmup_epochs", "1.5"]
    assert parse_finetune(words, "deit finetune").config.optim.warmup_epochs == 1.5
