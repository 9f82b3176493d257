"""Target stores of another configuration, teacher or view are refused with what differs."""

import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from deit.config.presets import LOSS_PRESETS, VIEW_MODES
from deit.config.recipes.handwriting import digits
from deit.config.schema import to_dict
from deit.config.sections.student import StudentConfig
from deit.core.errors import DataError
from deit.core.rng import permutation
from deit.distill.target_store import MANIFEST, manifest_bytes, open_store, read_manifest
from deit.distill.verify_targets import verify_targets
from deit.distill.write_targets import write_targets
from deit.models.teachers import Teacher
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.target_stores import (
    ROWS_PER_EPOCH,
    VIEW_LIBRARIES,
    assert_differs,
    check,
    configuration,
    copied,
    forge,
    line_about,
    numbers_in,
    quick,
    with_targets,
)

pytest.importorskip("sklearn")

FOREIGN = {
    "seed": ({"run": {"seed": 4}}, "seed", "0", "4"),
    "interpolation": (
        {"views": {"interpolation": "bilinear"}},
        *("views.interpolation", "'bicubic'", "'bilinear'"),
    ),
    "rotation": ({"views": {"rotation": 3.0}}, "views.rotation", "7.5", "3.0"),
    "mixing": ({"views": {"mixup_alpha": 0.2}}, "views.mixup_alpha", "0.8", "0.2"),
    "repeats": ({"views": {"aug_repeats": 2}}, "batch_size", "None", "32"),
    "data": ({"data": {"train_fraction": 0.5}}, "images", "324", "649"),
    "classes": ({"data": {"classes": ("0", "1", "2")}}, "classes", "", ""),
    "size": ({"student": {"image_size": 4}}, "student_size", "8", "4"),
    "teacher's view": (
        {"views": {"teacher_view": "center", **VIEW_MODES["fix/cc"].fields(
            to_dict(digits())["views"])}},
        *("views.teacher_view", "'same'", "'center'"),
    ),
}  # fmt: skip


@pytest.mark.fault("C15", "D6", "D17")
@pytest.mark.parametrize("name", FOREIGN)
def test_store_of_another_config_is_refused_with_the_differences(name, store, teachers):
    sections, *differing = FOREIGN[name]
    config = with_targets(configuration(teachers[0], **sections), store)
    with raises(DataError, f"teacher.target_stores {store}") as refused:
        check(config)
    assert_differs(refused, *differing)


@pytest.mark.fault("D6")
def test_store_of_another_teacher_is_refused(store, teachers):
    config = with_targets(configuration(teachers[1]), store)
    stored = read_manifest(store)["fingerprint"]["teacher"]["1"]["weights"]
    with raises(
        DataError, f"teacher.target_stores {store}", "teacher.1.weights", stored[:12]
    ) as refused:
        check(config)
    assert len(set(re.findall(r"\b[0-9a-f]{12}\b", str(refused.value)))) == 2  # and the current one


@pytest.mark.fault("D5", "D6")
def test_store_of_another_teacher_normalization_is_refused(store, teachers):
    config = configuration(teachers[0]).replace(teacher={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    with raises(DataError, f"teacher.target_stores {store}", "teacher.1.mean"):
        check(with_targets(config, store))


def test_store_with_shifted_epochs_is_refused(store, teachers, tmp_path):
    copy = copied(store, tmp_path)
    forge(copy, lambda records, checksums: (np.roll(records, 1, 0), np.roll(checksums, 1, 0)))
    with raises(DataError, f"teacher.target_stores {copy}", *VIEW_LIBRARIES) as refused:
        check(with_targets(configuration(teachers[0]), copy))
    numbers = numbers_in(str(refused.value).partition("pillow")[0], copy)
    image = permutation(0, 0, ROWS_PER_EPOCH)[0].item()
    assert sorted(numbers) == ["0", "0", str(image)]  # epoch, row and image
    with raises(DataError, f"teacher.target_stores {copy}", *VIEW_LIBRARIES):
        verify_targets(copy, root=None, teacher="none", num_queries=64)


@pytest.mark.fault("D5")
def test_store_with_a_forged_interpolation_fails_its_view_checksums(store, teachers, tmp_path):
    copy = copied(store, tmp_path)
    manifest = read_manifest(copy)
    manifest["fingerprint"]["views"]["interpolation"] = "bilinear"
    (copy / MANIFEST).write_bytes(manifest_bytes(manifest))
    config = configuration(teachers[0], views={"interpolation": "bilinear"})
    with raises(DataError, f"teacher.target_stores {copy}", *VIEW_LIBRARIES):
        check(with_targets(config, copy))


def test_store_with_wrong_labels_is_refused(store, teachers, tmp_path):
    copy = copied(store, tmp_path)

    def shift_labels(records, checksums):
        records["label"] = (records["label"] + 1) % 10
        return records, checksums

    forge(copy, shift_labels)
    with raises(
        DataError, f"teacher.target_stores {copy}", 428, open_store(copy).inference["precision"]
    ):
        check(with_targets(configuration(teachers[0]), copy))


def test_store_with_labels_in_another_order_is_refused(store, teachers, tmp_path):
    copy = copied(store, tmp_path)
    forge(copy, lambda records, checksums: (np.roll(records, 2, 1), checksums))
    with raises(
        DataError, f"teacher.target_stores {copy}", 428, open_store(copy).inference["precision"]
    ):
        check(with_targets(configuration(teachers[0]), copy))


def test_changed_views_fail_their_checksums_during_training(store, teachers):
    """The views of the loader change after the checks."""
    loader, _, _ = check(with_targets(configuration(teachers[0]), store))
    for _ in loader.epoch(2):
        pass
    loader.student_sampler.seed += 1
    with raises(DataError, f"teacher.target_stores {store}", "epoch 3", *VIEW_LIBRARIES):
        for _ in loader.epoch(3):
            pass


def test_store_with_wrong_probabilities_is_refused(teachers, tmp_path):
    """The labels are right, the scores of the other classes are not."""
    config = quick(configuration(teachers[0], loss=LOSS_PRESETS["deit-soft"]))
    for content in ("full", "top-3"):
        store = tmp_path / content
        at_temperature_1 = config.replace(loss={"temperature": 1.0})
        write_targets(at_temperature_1, store, content=content)
        assert check(with_targets(at_temperature_1, store))

        def halve_scores(records, checksums):
            records["scores"] = np.float16(0.5) * records["scores"]
            return records, checksums

        forge(store, halve_scores)
        with raises(
            DataError, f"teacher.target_stores {store}", open_store(store).inference["precision"]
        ):
            check(with_targets(at_temperature_1, store))


def test_fingerprint_of_equal_weights_in_another_network_differs():
    """The networks differ in a stride, which has no weights."""
    from deit.models.registry import create_network
    from deit.models.teachers import LoadedNetwork

    def fingerprint_of(name):
        torch.manual_seed(0)
        network = create_network(StudentConfig(name=name, image_size=32), 10)
        return Teacher(LoadedNetwork(network, name, 32, (0.0,) * 3, (1.0,) * 3, None)).fingerprint()

    first, second = fingerprint_of("regnety_002_small_stem"), fingerprint_of("timm:regnety_002")
    assert first["weights"] == second["weights"]
    assert first["layers"] != second["layers"]
    assert fingerprint_of("timm:regnety_002") == second


def test_fingerprint_does_not_depend_on_library_versions(monkeypatch):
    """A later PyTorch can print more of a layer, a later timm can add a layer without effect."""
    from deit.models.teachers import LoadedNetwork

    def fingerprint_of(network):
        return Teacher(LoadedNetwork(network, "", 32, (0.0,) * 3, (1.0,) * 3, None)).fingerprint()

    def network(**settings):
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 3, 3, **settings), act=nn.GELU()))

    before = fingerprint_of(network())
    assert fingerprint_of(network(padding=1)) != before
    tanh_gelu = network()
    tanh_gelu.act = nn.GELU(approximate="tanh")
    assert fingerprint_of(tanh_gelu) != before
    monkeypatch.setattr(nn.Conv2d, "extra_repr", lambda self: "words of a later version")
    later = network()
    later.drop = nn.Dropout(0.1)
    assert fingerprint_of(later) == before


def _with_another_label(records):
    """Change one target of 2,268: too few for the recomputed outputs to detect."""
    records["label"][4, 200] = 9 - records["label"][4, 200]
    return records


def test_resume_with_changed_targets_is_refused(teachers, store, tmp_path):
    copy = copied(store, tmp_path)
    config = with_targets(configuration(teachers[0], optim={"epochs": 2}), copy)
    train(config, tmp_path / "run")
    forge(copy, lambda records, checksums: (records, checksums))
    train(config, tmp_path / "run", resume=True)  # the same targets: complete already
    forge(copy, lambda records, checksums: (_with_another_label(records), checksums))
    with raises(DataError, tmp_path / "run", "teacher.target_stores"):
        train(config, tmp_path / "run", resume=True)


def test_store_of_an_unavailable_teacher_is_used_with_a_warning(store, capsys, monkeypatch):
    """The weights of a timm teacher cannot be downloaded, but its targets are stored."""

    def unreachable(name, **settings):
        raise OSError(f"no hub for {name}")

    monkeypatch.setattr("deit.models.teacher_sources.timm.create_model", unreachable)
    config = configuration("resnet18", optim={"epochs": 1, "warmup_epochs": 0})
    assert check(with_targets(config, store))
    captured = capsys.readouterr()
    assert "resnet18" in captured.err
    assert "%" not in line_about(captured.out, store)  # none of its outputs is recomputed
