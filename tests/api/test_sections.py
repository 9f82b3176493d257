"""Sections of a configuration that are made in Python are validated where they are used."""

import pytest
import torch

import deit
from tests.helpers.errors import raises

IMAGES, LABELS = torch.zeros(48, 3, 8, 8, dtype=torch.uint8), torch.arange(48) % 3
ConfigError = deit.errors.ConfigError

INVALID_VIEWS = [
    ({"crop": "random_resizd"}, "views.crop"),
    ({"flip": 7}, "views.flip"),
    ({"erasing_prob": 5}, "views.erasing_prob"),
    ({"teacher_view": "x"}, "views.teacher_view"),
    ({"auto_augment": "zz"}, "views.auto_augment"),
    ({"aug_repeats": 0}, "views.aug_repeats"),
    ({"mixup_alpha": -1.0}, "views.mixup_alpha"),
    ({"std": (0.0, 0.0, 0.0)}, "views.std"),
]
USES_OF_VIEWS = {
    "make_views": lambda views: deit.make_views(IMAGES, views, seed=0, epoch=0, sample_ids=LABELS),
    "from_arrays": lambda views: deit.TrainLoader.from_arrays(
        IMAGES, LABELS, batch_size=16, views=views
    ),
    "from_config": lambda views: deit.TrainLoader.from_config(deit.Config(views=views)),
}


@pytest.mark.parametrize("use", USES_OF_VIEWS.values(), ids=USES_OF_VIEWS)
@pytest.mark.parametrize(("fields", "name"), INVALID_VIEWS)
def test_wrong_fields_of_views_raise(use, fields, name):
    with raises(ConfigError, name) as caught:
        use(deit.ViewsConfig(**fields))
    assert name in [problem.field for problem in caught.value.problems]


@pytest.mark.parametrize("use", USES_OF_VIEWS.values(), ids=USES_OF_VIEWS)
def test_views_of_another_type_raise(use):
    with raises(ConfigError, "views = 3", "ViewsConfig"):
        use(3)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kind": "sfot"}, "loss.kind"),
        ({"kind": "soft", "head": "clas"}, "loss.head"),
        ({"kind": "soft", "temperature": -3}, "loss.temperature"),
        ({"kind": "soft", "temperature": [3]}, "loss.temperature"),
        ({"label_smoothing": 1.0}, "loss.label_smoothing"),
        ({"distillation_weight": -1}, "loss.distillation_weight"),
    ],
)
def test_wrong_fields_of_a_loss_raise(options, name):
    heads = (torch.zeros(3, 3), torch.zeros(3, 3))
    calls = (
        lambda: deit.DistillationLoss(**options),
        lambda: deit.distillation_loss(
            heads, torch.arange(3), torch.zeros(3, 3), deit.LossConfig(**options)
        ),
    )
    for call in calls:
        with raises(ConfigError, name) as caught:
            call()
        assert [problem.field for problem in caught.value.problems] == [name]


def test_all_sections_of_a_loader_are_in_one_error():
    config = deit.recipe("digits").replace(views={"flip": 7}, optim={"batch_size": 0})
    with raises(ConfigError, "views.flip", "optim.batch_size") as caught:
        deit.TrainLoader.from_config(config)
    assert len(caught.value.problems) == 2


def test_values_are_converted_as_in_a_recipe():
    as_text = deit.LossConfig("soft", temperature="3")
    heads = torch.rand(4, 5), torch.rand(4, 5)
    targets, teacher = torch.arange(4), torch.rand(4, 5)
    first, second = (
        deit.distillation_loss(heads, targets, teacher, loss)["loss"]
        for loss in (as_text, deit.LossConfig("soft", temperature=3.0))
    )
    assert torch.equal(first, second)
