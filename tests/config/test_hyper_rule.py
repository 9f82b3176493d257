"""BiT's HyperRule: the numbers of the paper, and timm's BiT networks with heads of zeros."""

import json
import re

import pytest
import timm
import torch
from torch import nn

from deit.cli.finetune_args import parse_finetune
from deit.config.finetune_schedules import (
    DATA_SIZED_SCHEDULES,
    FINETUNE_SCHEDULES,
    RULES,
    hyper_rule,
)
from deit.config.recipes import RECIPES
from deit.config.recipes.cifar import cifar10_teacher
from deit.config.recipes.handwriting import digits
from deit.config.validation import validate
from deit.core.errors import ConfigError
from deit.models.adapt_weights import adapt_weights
from deit.models.load_weights import load_weights_from
from deit.models.parameters import classifier_names, freeze_except
from deit.models.registry import create_network
from deit.models.saved_student import save_weights
from deit.models.surgery.pruning_masks import prunable
from tests.helpers.errors import raises

CIFAR = cifar10_teacher()


@pytest.mark.parametrize(
    ("images", "steps", "warmup", "milestones", "mixup"),
    [
        (1_000, 500, 100, (200, 300, 400), 0.0),
        (19_999, 500, 100, (200, 300, 400), 0.0),
        (20_000, 10_000, 500, (3_000, 6_000, 9_000), 0.1),
        (499_999, 10_000, 500, (3_000, 6_000, 9_000), 0.1),
        (500_000, 20_000, 500, (6_000, 12_000, 18_000), 0.1),
        (1_281_167, 20_000, 500, (6_000, 12_000, 18_000), 0.1),
    ],
)
def test_schedule_is_that_of_the_paper(images, steps, warmup, milestones, mixup):
    config = validate(hyper_rule(CIFAR, images=images))
    optim, steps_per_epoch = config.optim, images // 512
    assert optim.epochs * steps_per_epoch == pytest.approx(steps, abs=steps_per_epoch / 2)
    assert optim.warmup_epochs * steps_per_epoch == pytest.approx(warmup)
    assert [fraction * steps for fraction in optim.lr_milestones] == pytest.approx(milestones)
    assert (config.views.mixup_alpha, config.views.cutmix_alpha) == (mixup, 0)
    assert (optim.name, optim.momentum, optim.weight_decay) == ("sgd", 0.9, 0)
    assert (optim.peak_lr, optim.batch_size) == (pytest.approx(0.003), 512)


def test_rules_cover_every_number_of_images():
    assert [rule.below for rule in RULES] == [20_000, 500_000, float("inf")]


@pytest.mark.parametrize(("images", "batch"), [(500, 256), (130, 128), (3, 2), (1, 1)])
def test_batch_size_is_halved_for_few_images(images, batch):
    optim = validate(hyper_rule(CIFAR, images=images)).optim
    assert optim.batch_size == batch
    assert optim.peak_lr == pytest.approx(0.003 * batch / 512)


OTHER_SCHEDULES = {
    "moments of AdamW": {"optim": {"beta1": 0.8, "beta2": 0.95}},
    "another decay": {"optim": {"layer_decay": 0.5, "independent_weight_decay": True}},
    "accumulation for another batch size": {"optim": {"batch_size": 999, "grad_accum_steps": 3}},
    "a warm-up of the distillation term": {
        "loss": {"kind": "soft", "head": "class", "distillation_warmup_epochs": 50.0},
        "teacher": {"source": ("x",)},
    },
}


@pytest.mark.parametrize("name", OTHER_SCHEDULES)
@pytest.mark.parametrize("images", [1, 1_000, 400_000])
def test_fields_of_another_schedule_are_reset(name, images):
    """No field of the recipe's schedule remains."""
    before = CIFAR.replace(student={"name": "vit_tiny"}, **OTHER_SCHEDULES[name])
    config = validate(hyper_rule(before, images=images))
    assert config.optim == hyper_rule(CIFAR, images=images).optim
    assert 2 * config.loss.distillation_warmup_epochs <= max(config.optim.epochs, 2)


@pytest.mark.parametrize(
    ("side", "input_side", "crop_pct", "stored_side"),
    [
        (32, 128, 128 / 160, 32),
        (95, 128, 128 / 160, 95),
        (96, 480, 480 / 512, 512),
        (256, 480, 0.9375, 512),
    ],
)
def test_resolution_depends_on_the_image_size(side, input_side, crop_pct, stored_side):
    config = hyper_rule(CIFAR.replace(data={"image_size": side}), images=1000)
    assert (config.student.image_size, config.data.image_size) == (input_side, stored_side)
    assert (config.views.crop, config.views.crop_pct) == ("random", pytest.approx(crop_pct))
    assert (config.views.flip, config.views.auto_augment, config.views.eval_crop_pct) == (
        0.5,
        "none",
        1,
    )


def test_heads_are_zero_only_with_pretrained_weights():
    assert hyper_rule(CIFAR, images=9).init.head == "keep"
    config = CIFAR.replace(init={"weights": "x"})
    assert hyper_rule(config, images=9).init.head == "zero"


@pytest.mark.parametrize("name", DATA_SIZED_SCHEDULES)
@pytest.mark.parametrize("recipe", ["digits", "digits-teacher", "cifar10", "tiny-imagenet"])
def test_data_sized_schedules_are_valid_for_recipes(name, recipe):
    config = RECIPES[recipe]().replace(init={"weights": "somewhere"})
    assert validate(DATA_SIZED_SCHEDULES[name](config, images=1000)).init.weights == "somewhere"
    assert name not in FINETUNE_SCHEDULES


def test_bit_recipe_uses_the_network_and_the_rule():
    config = validate(RECIPES["cifar10-bit-teacher"]())
    assert config.student.name == "timm:resnetv2_50x1_bit"
    assert config.optim.epochs == round(10_000 / (45_000 // 512)) == 115
    assert config.init.head == "zero"


# timm's BiT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a random BiT network for five classes in timm's format."""
    folder = tmp_path_factory.mktemp("bit")
    torch.manual_seed(0)
    network = timm.create_model("resnetv2_50x1_bit", num_classes=5)
    with torch.no_grad():
        for head in heads_of_network(network):
            head.weight.normal_()
    save_weights(folder / "model.safetensors", network.state_dict())
    about = {"architecture": "resnetv2_50x1_bit", "num_classes": 5}
    about["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def heads_of_network(network: nn.Module) -> list[nn.Module]:
    return [network.get_submodule(name) for name in classifier_names(network)]


def test_convolutional_head_of_bit_is_recognized(folder):
    network = create_network(RECIPES["cifar10-bit-teacher"]().student, 10)
    assert classifier_names(network) == ("head.fc",)
    assert "head.fc.weight" not in prunable(network)
    freeze_except(network, "heads")
    trainable = [name for name, value in network.named_parameters() if value.requires_grad]
    assert trainable == ["head.fc.weight", "head.fc.bias"]


@pytest.mark.parametrize("heads", ["zero", "new"])
def test_transfer_loads_all_weights_except_the_heads(folder, heads):
    config = RECIPES["cifar10-bit-teacher"]().replace(init={"weights": str(folder), "head": heads})
    network = create_network(config.student, 10)
    loaded = load_weights_from(str(folder))
    assert loaded.mean == (0.5, 0.5, 0.5)
    adapted = adapt_weights(loaded, network, tuple(map(str, range(10))), config.init)
    for name, value in adapted.weights.items():
        if name.startswith("head.fc"):
            assert value.shape[0] == 10
            if heads == "zero":
                assert not value.any()
            else:
                assert torch.equal(value, network.state_dict()[name])
        else:
            assert torch.equal(value, loaded.weights[name]), name
    assert any(re.search(r"\b10 classes\b", note) for note in adapted.notes)


def test_schedule_uses_the_number_of_training_images(folder):
    arguments = ["--from", str(folder), "digits-teacher", "--schedule", "bit"]
    arguments += ["--student.name", "timm:resnetv2_50x1_bit"]
    config = parse_finetune(arguments, "deit finetune").config
    assert config.student.image_size == 128
    assert config.optim.batch_size == 512
    # digits has 1,294 training images: two steps per epoch.
    assert (config.optim.epochs, config.optim.warmup_epochs) == (250, 50)
    assert config.data == digits().data


def test_data_options_apply_before_the_rule(folder):
    arguments = ["--from", str(folder), "digits-teacher", "--schedule", "bit"]
    arguments += ["--student.name", "timm:resnetv2_50x1_bit", "--data.train_fraction", "0.2"]
    config = parse_finetune(arguments, "deit finetune").config
    assert config.data.train_fraction == 0.2
    assert config.optim.batch_size == 256  # of 259 images
    assert config.optim.epochs == 500
    with raises(ConfigError, "resolution = 32", "schedule bit"):
        parse_finetune([*arguments, "--resolution", "32"], "deit finetune")


def test_min_lr_with_milestones_raises():
    config = hyper_rule(CIFAR, images=9).replace(optim={"min_lr": 1e-3})
    with raises(ConfigError, "optim.min_lr"):
        validate(config)


OPTIONS = {
    "momentum": (("--optim.momentum", "0.5"), ("optim", "momentum", 0.5)),
    "side of the crop": (("--views.crop_pct", "0.9"), ("views", "crop_pct", 0.9)),
    "warm-up": (("--optim.warmup_epochs", "30"), ("optim", "warmup_epochs", 30.0)),
    "data with =": (("--data.train_fraction=0.2",), ("optim", "batch_size", 256)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_override_the_rule(name, folder):
    options, (section, leaf, value) = OPTIONS[name]
    arguments = ["--from", str(folder), "digits-teacher", "--schedule", "bit"]
    arguments += ["--student.name", "timm:resnetv2_50x1_bit", *options]
    config = parse_finetune(arguments, "deit finetune").config
    assert getattr(getattr(config, section), leaf) == value
    assert (config.optim.name, config.views.crop) == ("sgd", "random")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--data.train_fraction", "2"), ["data.train_fraction = '2'"]),
        (("--data.reader", "tar"), ["data.reader = 'tar'", "data.source"]),
        (("--data.source", "digit"), ["data.source = 'digit'", "digits?"]),
        (("--optim.lr", "-1"), ["optim.lr = '-1'"]),
        (("--optim.beta2", "0.5"), ["optim.beta2 = 0.5", "optim.name"]),
        (("--opt.lr", "1"), ["opt.lr"]),
    ],
)
def test_invalid_options_next_to_the_rule_are_reported(options, names, folder):
    arguments = ["--from", str(folder), "digits-teacher", "--schedule", "bit", *options]
    with raises(ConfigError, *names) as error:
        parse_finetune(arguments, "deit finetune")
    (problem,) = error.value.problems
    assert problem.field.removeprefix("--") == options[0].removeprefix("--")
