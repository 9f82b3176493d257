"""Every parameter of the Python interface: a wrong value raises one of our errors, for Python."""

import inspect
import re
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

import deit
from deit.core.console import quiet
from deit.core.errors import NO_VALUE
from tests.helpers.errors import raises

NAMES = ("ant", "bee", "cat")
IMAGES = torch.zeros(48, 3, 8, 8, dtype=torch.uint8)
LABELS = torch.arange(48) % 3
LOGITS = torch.zeros(2, 3)
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}
SMALL = {"image_size": 8, "patch_size": 2, "depth": 1, "embed_dim": 16, "num_heads": 2}
VALUES = (None, 3, 1.5, "x", Path("missing"), [], [3], {"a": 1}, object())
CONFIG = deit.recipe("digits", loss="none", optim={"batch_size": 5000})  # more than the images


class MeanColor(nn.Module):
    def forward(self, images):
        return images.mean(dim=(2, 3))


def make_loader():
    return deit.TrainLoader.from_arrays(IMAGES, LABELS, batch_size=16, class_names=NAMES)


def make_student():
    return deit.build_student("deit_micro", 3, **PLAIN, **SMALL)


def make_teacher():
    return deit.load_teacher(MeanColor(), NAMES, **PLAIN)


CALLS = {
    "recipe": (deit.recipe, {"name": "digits"}),
    "list_recipes": (deit.list_recipes, {}),
    # What would train or evaluate finds no run, too few images, or no such study.
    "train": (deit.train, {"config": CONFIG, "out": "file"}),
    "dry_run": (deit.dry_run, {"config": CONFIG, "out": "file"}),
    "finetune": (deit.finetune, {"source": "gone", "out": "file"}),
    "compare": (deit.compare, {"config": "digits", "out": "file", "study": "none"}),
    "sweep": (deit.sweep, {"spec": {"grid": {"optim.lr": ["high"]}}, "out": "file"}),
    "SweepResult": (deit.SweepResult, {"path": "gone"}),
    "Run": (deit.Run, {"path": "gone"}),
    "load_run": (deit.load_run, {"path": "gone"}),
    "evaluate": (deit.evaluate, {"run": "gone"}),
    "export": (deit.export, {"run": "gone", "format": "timm"}),
    "quantize": (deit.quantize, {"run": "gone"}),
    "report": (deit.report, {"paths": "gone", "out": "file"}),
    "view_sheet": (deit.view_sheet, {"config": CONFIG}),
    "evaluation_batches": (deit.evaluation_batches, {"source": "digits"}),
    "load_splits": (deit.load_splits, {"config": CONFIG.data}),
    "from_config": (deit.TrainLoader.from_config, {"config": "digits"}),
    "from_folder": (
        deit.TrainLoader.from_folder, {"root": "gone", "image_size": 8, "batch_size": 4}
    ),
    "from_arrays": (
        deit.TrainLoader.from_arrays, {"images": IMAGES, "labels": LABELS, "batch_size": 16}
    ),
    "TrainLoader": (deit.TrainLoader, {
        "images": deit.InMemoryImages(IMAGES, LABELS), "num_classes": 3, "seed": 0,
        "views": deit.ViewsConfig(), "optim": deit.OptimConfig(batch_size=16), "student_size": 8,
        "channel_stats": deit.ChannelStats((0.5,) * 3, (0.2,) * 3),
    }),
    "epoch": (make_loader().epoch, {"epoch": 0}),
    "order": (make_loader().order, {"epoch": 0}),
    "set_micro_batches": (
        make_loader().set_micro_batches, {"optim": deit.OptimConfig(batch_size=16)}
    ),
    "make_views": (
        deit.make_views, {"images": IMAGES[:2], "seed": 0, "epoch": 0, "sample_ids": [0, 1]}
    ),
    "load_teacher": (deit.load_teacher, {"source": MeanColor(), "class_names": NAMES, **PLAIN}),
    "TeacherEnsemble": (deit.TeacherEnsemble, {"teachers": [make_teacher()]}),
    "TeacherEnsemble()": (deit.TeacherEnsemble([make_teacher()]), {"batch": None}),
    "Teacher()": (make_teacher().forward, {"images": None}),
    "DistillationLoss": (deit.DistillationLoss, {}),
    "DistillationLoss()": (
        deit.DistillationLoss("soft").forward,
        {"outputs": (LOGITS, LOGITS), "targets": torch.tensor([0, 1]), "teacher": LOGITS},
    ),
    "distillation_loss": (
        deit.distillation_loss,
        {"outputs": (LOGITS, LOGITS), "targets": torch.tensor([0, 1]), "teacher": LOGITS},
    ),
    "TargetStore.open": (deit.TargetStore.open, {"path": "gone"}),
    "write_targets": (
        deit.write_targets,
        {"source": make_loader(), "out": "file", "teacher": make_teacher(), "epochs": 1},
    ),
    "build_student": (deit.build_student, {"student": "deit_micro", "num_classes": 3, **PLAIN}),
    "load_student": (deit.load_student, {"folder": "gone"}),
    "save_student": (
        deit.save_student, {"student": make_student(), "folder": "file", "class_names": NAMES}
    ),
    "Student": (deit.Student, {"network": MeanColor(), **PLAIN}),
    "Student()": (make_student().forward, {"images": None}),
    "logits_by_head": (deit.logits_by_head, {"outputs": None}),
}  # fmt: skip
SIGNATURES = {name: list(inspect.signature(call).parameters) for name, (call, _) in CALLS.items()}
PARAMETERS = [
    (name, parameter)
    for name, parameters in SIGNATURES.items()
    for parameter in parameters
    if parameter not in ("options", "sections", "verbose", "command")
]


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_wrong_values_raise_our_errors(name, parameter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    call, arguments = CALLS[name]
    for value in VALUES:
        message = ""
        try:
            with quiet():
                call(**{**arguments, parameter: value})
        except deit.errors.DeitError as error:
            message = str(error)
        # An option may be named in parentheses, and a command in backticks.
        text = re.sub(r"`[^`]*`|\([^()]*\)", "", message)
        assert not re.search(r"(^|\s)--[a-z]", text), f"{value!r}: {message}"


def test_every_public_function_is_tried():
    functions = {name for name in deit.__all__ if inspect.isfunction(getattr(deit, name))}
    assert functions - CALLS.keys() == {"doctor"}  # has no parameters


@pytest.mark.parametrize(
    ("name", "parameter", "value", "hint"),
    [
        ("evaluate", "run", 3, "str or Path; got int"),
        ("evaluate", "device", 3, "str or None"),
        ("load_splits", "config", "digits", "DataConfig; got str"),
        ("list_recipes", "pattern", 3, "str"),
        ("view_sheet", "config", 3, "Config; got int"),
        ("make_views", "seed", "x", "integer; got str"),
        ("train", "resume", "no", "True or False; got str"),
        ("from_arrays", "views", 3, "ViewsConfig, dict or None"),
        ("save_student", "class_names", "ab", "list of str; got str"),
        ("write_targets", "part", 1, "(integer, integer)"),
    ],
)
def test_message_names_parameter_and_type(name, parameter, value, hint):
    call, arguments = CALLS[name]
    with raises(deit.errors.ConfigError, parameter, hint) as caught:
        call(**{**arguments, parameter: value})
    (problem,) = caught.value.problems
    assert problem.field == parameter
    assert problem.value in (value, NO_VALUE)


def test_all_wrong_types_are_named():
    with raises(deit.errors.ConfigError) as caught:
        deit.evaluate(3, split=None, batch_size="x")
    assert [problem.field for problem in caught.value.problems] == ["run", "split", "batch_size"]


def test_checked_functions_keep_their_signatures():
    assert typing.get_type_hints(deit.evaluate)["split"] is str
    with pytest.raises(TypeError, match="splitt"):
        deit.evaluate("gone", splitt="test")
