"""The layout in memory a teacher computes in: chosen by measuring, kept, and without a say in what
it answers."""

import json
import re

import pytest
import torch
from torch import nn

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.schema import LossConfig
from deit.config.student_section import StudentConfig
from deit.core.errors import CheckpointError, ConfigError, DataError, StoppedBySignal
from deit.core.run_folder import CONFIG, latest_checkpoint
from deit.core.types import Batch, StudentOutput, TeacherOutput
from deit.distill import build
from deit.distill.build import build_accelerator
from deit.distill.losses import distillation_loss
from deit.distill.target_store import MANIFEST, manifest_bytes, open_store, read_manifest
from deit.distill.teacher_ensemble import OnlineTeacher
from deit.distill.verify_targets import verify_targets
from deit.distill.write_targets import write_targets
from deit.models import memory_format
from deit.models.memory_format import LAYOUTS, fastest_memory_format
from deit.models.networks import create_network
from deit.models.teachers import LoadedNetwork, Teacher
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.trained import trained

LAST = torch.channels_last


class Noting(nn.Module):
    """A convolution that notes how its images lay."""

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


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("took", "expected"),
    [
        ({"contiguous": 1.0, "channels_last": 0.5}, "channels_last"),
        ({"contiguous": 1.0, "channels_last": 0.9}, "contiguous"),
        ({"contiguous": 0.5, "channels_last": 1.0}, "contiguous"),
        # Too short to be worth it, whatever the ratio.
        ({"contiguous": 1e-3, "channels_last": 1e-4}, "contiguous"),
    ],
)
def test_the_layout_that_measures_clearly_faster_is_taken(monkeypatch, took, expected):
    """On a clock of our own."""
    network, now = Noting(), [0.0]

    def forward(images):
        assert network.convolution.weight.is_contiguous(memory_format=LAST) == (
            images.is_contiguous(memory_format=LAST)
        )
        last = images.is_contiguous(memory_format=LAST)
        now[0] += took["channels_last" if last else "contiguous"] / 2

    monkeypatch.setattr(network, "forward", forward)
    monkeypatch.setattr(memory_format.time, "perf_counter", lambda: now[0])
    assert fastest_memory_format(network, torch.rand(4, 3, 8, 8)) == expected
    last = network.convolution.weight.is_contiguous(memory_format=LAST)
    assert last == (expected == "channels_last")


@pytest.mark.usefixtures("measured")
def test_a_network_that_takes_one_layout_only_keeps_it():
    class Flat(Noting):
        def forward(self, images):
            return super().forward(images.view(-1).view(images.shape))

    network = Flat()
    assert fastest_memory_format(network, torch.rand(4, 3, 8, 8)) == "contiguous"
    assert network.convolution.weight.is_contiguous()


def test_measuring_shows_no_more_pixels_than_it_must(measured):
    shown = []

    class Counting(Noting):
        def forward(self, images):
            shown.append(len(images))
            return super().forward(images)

    fastest_memory_format(Counting(), torch.rand(64, 3, 256, 256))
    assert set(shown) == {8}  # of 2**16 pixels each, 2**19 in all


@pytest.mark.parametrize("name", ["small_convnet", "regnety_002_small_stem", "rednet_micro"])
def test_a_teacher_answers_the_same_in_every_layout(name):
    network = create_network(StudentConfig(name=name, image_size=16), 10)
    teacher, images = teacher_of(network), torch.rand(4, 3, 16, 16)
    before, known = teacher(images), teacher.fingerprint()
    for one in LAYOUTS:
        teacher.set_memory_format(one)
        assert torch.allclose(teacher(images), before, atol=1e-4), one
        assert teacher.fingerprint() == known


def test_a_voice_asks_in_inference_mode_and_what_it_says_can_be_learnt_from():
    network = Noting()
    teacher = teacher_of(network)
    teacher.set_memory_format("channels_last")
    voice = OnlineTeacher(teacher, build_accelerator(digits().run))
    images = torch.rand(4, 3, 8, 8)
    batch = Batch(images, images, torch.eye(4), torch.arange(4), 0, torch.arange(4))
    labels, logits = voice(batch)
    assert network.seen == [(True, True)]
    assert not logits.is_inference()
    assert not labels.is_inference()
    student = torch.randn(4, 4, requires_grad=True)
    answers = TeacherOutput(labels[:, None], logits[:, None])
    soft = LossConfig(kind="soft", head="class")
    loss = distillation_loss(StudentOutput(student), batch.targets, answers, soft, epoch=0.0)
    loss["total"].backward()
    assert student.grad.isfinite().all()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    place = tmp_path_factory.mktemp("teacher") / "teacher"
    return str(trained(digits_teacher().replace(optim={"epochs": 3}), place))


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


def settled(out):
    return json.loads((out / CONFIG).read_text())["teacher"]["memory_format"]


def test_a_run_measures_once_and_keeps_to_it(teacher, tmp_path, monkeypatch, capsys):
    config = configuration(teacher)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setattr(build, "fastest_memory_format", lambda *arguments: "channels_last")
    train(config, whole)
    assert settled(whole) == ["channels_last"]
    assert "channels_last" in capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr("deit.training.train.finish_epoch", stop)
        with pytest.raises(StoppedBySignal):
            train(config, cut)

    def asked(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(build, "fastest_memory_format", asked)
    train(config, cut, resume=True)
    assert settled(cut) == ["channels_last"]
    weights = [latest_checkpoint(out) / "model.safetensors" for out in (whole, cut)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_in_another_layout_goes_on_and_says_so(teacher, tmp_path, monkeypatch, capsys):
    config = configuration(teacher).replace(teacher={"memory_format": ("contiguous",)})
    with monkeypatch.context() as patch:
        patch.setattr("deit.training.train.finish_epoch", stop)
        with pytest.raises(StoppedBySignal):
            train(config, tmp_path / "run")
    other = config.replace(teacher={"memory_format": ("channels_last",)})
    train(other, tmp_path / "run", resume=True)
    said = capsys.readouterr().err
    assert re.search(r"teacher\.memory_format\b.*\bcontiguous\b.*\bchannels_last\b", said)


def test_a_store_says_how_it_was_asked_and_later_parts_follow(teacher, tmp_path, monkeypatch):
    config, out = configuration(teacher), tmp_path / "store"
    monkeypatch.setattr(build, "fastest_memory_format", lambda *arguments: "channels_last")
    write_targets(config, out, part=(0, 2))
    monkeypatch.setattr(build, "fastest_memory_format", lambda *arguments: "contiguous")
    with raises(ConfigError, "--out", out, "asked.layouts"):
        write_targets(config.replace(teacher={"memory_format": ("contiguous",)}), out, part=(1, 2))
    write_targets(config, out, part=(1, 2))
    assert open_store(out).layouts == ("channels_last",)

    layouts = []
    real = Teacher.set_memory_format
    monkeypatch.setattr(
        Teacher,
        "set_memory_format",
        lambda self, layout: (layouts.append(layout), real(self, layout)),
    )
    verify_targets(out, root=None, teacher=None, num_queries=8)
    assert layouts == ["channels_last"]
    layouts.clear()
    trained = tmp_path / "run"
    train(config.replace(teacher={"target_stores": (str(out),)}), trained)
    assert layouts == ["channels_last"]  # for the check, as it was asked
    assert settled(trained) == ["contiguous"]


def test_a_store_of_contiguous_teachers_does_not_say_so(teacher, tmp_path, monkeypatch):
    """So that it is the same, to the byte, as of releases that knew no other."""
    out = tmp_path / "store"
    monkeypatch.setattr(build, "fastest_memory_format", lambda *arguments: "contiguous")
    write_targets(configuration(teacher), out)
    assert json.loads((out / MANIFEST).read_text())["asked"] == {"precision": "fp32", "block": 256}
    assert open_store(out).layouts == ("contiguous",)


def test_a_manifest_with_an_unknown_layout_is_refused(teacher, tmp_path):
    out = tmp_path / "store"
    write_targets(configuration(teacher), out)
    manifest = read_manifest(out)
    manifest["asked"]["layouts"] = ["sideways"]
    (out / MANIFEST).write_bytes(manifest_bytes(manifest))
    with raises(CheckpointError, out / MANIFEST, "sideways"):
        open_store(out)


def test_a_store_of_another_number_of_teachers_is_refused_by_name(teacher, tmp_path):
    out = tmp_path / "store"
    write_targets(configuration(teacher), out)
    with raises(DataError, "teacher.target_stores", out, "teacher.2.weights"):
        verify_targets(out, root=None, teacher=f"{teacher},{teacher}", num_queries=8)
