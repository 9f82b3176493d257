"""The memory format of a teacher: chosen by a rule, without effect on its logits."""

import re

import pytest
import torch
from torch import nn

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.sections.loss import LossConfig
from deit.config.sections.student import StudentConfig
from deit.core.errors import DataError, StoppedBySignal
from deit.core.types import Batch, StudentOutput, TeacherOutput
from deit.datasets.splits import load_splits
from deit.distill.build import build_accelerator, build_teachers
from deit.distill.losses import distillation_loss
from deit.distill.teacher_ensemble import OnlineTeacher
from deit.distill.verify_targets import verify_targets
from deit.distill.write_targets import write_targets
from deit.models.memory_format import MEMORY_FORMATS, default_memory_format
from deit.models.registry import create_network
from deit.models.teachers import LoadedNetwork, Teacher
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.trained import trained

LAST = torch.channels_last


class RecordingNetwork(nn.Module):
    """A convolution that records the memory format of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.seen = []

    def forward(self, images):
        self.seen.append((images.is_contiguous(memory_format=LAST), torch.is_inference(images)))
        return self.convolution(images).mean((2, 3))


def teacher_of(network):
    size, channels = 8, (0.5, 0.5, 0.5)
    return Teacher(LoadedNetwork(network, "noting", size, channels, channels, None))


@pytest.mark.parametrize(
    ("name", "device_type", "mixed_precision", "expected"),
    [
        ("small_convnet", "cpu", False, "channels_last"),
        ("small_convnet", "cuda", True, "channels_last"),
        ("small_convnet", "cuda", False, "contiguous"),
        ("vit_micro", "cpu", False, "contiguous"),
        ("vit_micro", "cuda", True, "contiguous"),
    ],
)
def test_auto_is_channels_last_for_convnets(name, device_type, mixed_precision, expected):
    network = create_network(StudentConfig(name=name, image_size=16), 10)
    chosen = default_memory_format(network, device_type, mixed_precision=mixed_precision)
    assert chosen == expected


@pytest.mark.parametrize("requested", ["auto", "contiguous", "channels_last"])
def test_teacher_uses_configured_format(requested, teacher):
    config = configuration(teacher).replace(teacher={"memory_format": (requested,)})
    (built,) = build_teachers(
        config.teacher,
        load_splits(config.data).class_names,
        config.student.image_size,
        build_accelerator(config.run),
    )
    expected = "channels_last" if requested == "auto" else requested  # on a CPU
    assert built.memory_format == expected
    weight = next(
        parameter
        for parameter in built.network.parameters()
        if parameter.ndim == 4 and parameter.shape[1] > 1
    )
    assert weight.is_contiguous(memory_format=LAST) == (expected == "channels_last")


@pytest.mark.parametrize("name", ["small_convnet", "regnety_002_small_stem", "rednet_micro"])
def test_teacher_logits_are_equal_in_every_format(name):
    network = create_network(StudentConfig(name=name, image_size=16), 10)
    teacher, images = teacher_of(network), torch.rand(4, 3, 16, 16)
    before, known = teacher(images), teacher.fingerprint()
    for item in MEMORY_FORMATS:
        teacher.set_memory_format(item)
        assert torch.allclose(teacher(images), before, atol=1e-4), item
        assert teacher.fingerprint() == known


def test_online_teacher_runs_in_inference_mode_and_logits_are_usable_in_training():
    network = RecordingNetwork()
    teacher = teacher_of(network)
    teacher.set_memory_format("channels_last")
    online_teacher = OnlineTeacher(teacher, build_accelerator(digits().run))
    images = torch.rand(4, 3, 8, 8)
    batch = Batch(images, images, torch.eye(4), torch.arange(4), 0, torch.arange(4))
    labels, logits = online_teacher(batch)
    assert network.seen == [(True, True)]
    assert not logits.is_inference()
    assert not labels.is_inference()
    student = torch.randn(4, 4, requires_grad=True)
    outputs = TeacherOutput(labels[:, None], logits[:, None])
    soft = LossConfig(kind="soft", head="class")
    loss = distillation_loss(StudentOutput(student), batch.targets, outputs, soft, epoch=0.0)
    loss["loss"].backward()
    assert student.grad.isfinite().all()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    return str(trained(digits_teacher().replace(optim={"epochs": 3}), folder))


def configuration(teacher, **sections):
    config = digits().replace(
        data={"train_fraction": 0.3},  # two blocks of a store
        student={"depth": 1, "embed_dim": 16, "num_heads": 2},
        optim={"epochs": 2, "warmup_epochs": 1},
        run={"eval_every_epochs": 2},
        teacher={"source": (teacher,)},
        loss=LOSS_PRESETS["deit-hard"],
    )
    return config.replace(**sections)


def stop(*arguments):
    raise StoppedBySignal(15)


def test_resume_with_other_format_continues_and_logs_it(teacher, tmp_path, monkeypatch, capsys):
    config = configuration(teacher).replace(teacher={"memory_format": ("contiguous",)})
    with monkeypatch.context() as patch:
        patch.setattr("deit.training.epochs.finish_epoch", stop)
        with pytest.raises(StoppedBySignal):
            train(config, tmp_path / "run")
    other = config.replace(teacher={"memory_format": ("channels_last",)})
    train(other, tmp_path / "run", resume=True)
    output = capsys.readouterr().err
    assert re.search(r"teacher\.memory_format\b.*\bcontiguous\b.*\bchannels_last\b", output)


def test_formats_of_other_number_of_teachers_raise(teacher, tmp_path):
    out = tmp_path / "store"
    write_targets(configuration(teacher), out)
    with raises(DataError, "teacher.target_stores", out, "teacher.2.weights"):
        verify_targets(out, root=None, teacher=f"{teacher},{teacher}", num_queries=8)
