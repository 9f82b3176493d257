"""Edge cases of target stores: workers, sizes, moved folders, broken manifests."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from deit.config.presets import LOSS_PRESETS, VIEW_MODES
from deit.config.recipes.handwriting import digits, digits_ensemble, digits_teacher
from deit.config.sections.loss import LossConfig
from deit.config.validation import validate
from deit.core.errors import CheckpointError, ConfigError, DataError
from deit.core.run_folder import latest_checkpoint
from deit.datasets.splits import load_splits
from deit.distill.build import build_accelerator, build_train_loader
from deit.distill.losses import standardize_logits
from deit.distill.run_teachers import RunTeachers
from deit.distill.target_store import (
    MANIFEST,
    SHARDS,
    TARGETS,
    manifest_bytes,
    open_store,
    read_manifest,
)
from deit.distill.verify_targets import verify_targets
from deit.distill.write_targets import _record_format, write_targets
from deit.experiments.studies import STUDIES
from deit.training.progress_log import log_epoch
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.images import write_class_folders
from tests.helpers.json_edits import edits
from tests.helpers.target_stores import (
    check,
    configuration,
    content,
    copied,
    flip_bit,
    quick,
    with_targets,
)
from tests.helpers.trained import trained


@pytest.fixture
def constant_teacher(tmp_path):
    """Return a function that writes a teacher of N classes with constant outputs."""
    file = tmp_path / "constant.py"
    file.write_text(
        "import torch\n"
        "class Constant(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        "        return torch.zeros(len(images), {classes}) + torch.arange({classes})\n"
        "def teacher():\n"
        "    return Constant()\n"
    )

    def write(num_classes):
        text = file.read_text().replace("{classes}", str(num_classes))
        (tmp_path / f"of{num_classes}.py").write_text(text)
        return f"{tmp_path / f'of{num_classes}.py'}:teacher"

    return write


@pytest.mark.parametrize("workers", [0, 1])
def test_store_of_several_teacher_crops_read_by_workers_verifies(
    workers, constant_teacher, tmp_path
):
    """The images fill several blocks, each of which is read with all its crops."""
    images = write_class_folders(tmp_path / "data", images_per_class=24, size=(12, 12))
    config = digits().replace(
        data={"source": "folder", "root": str(images), "storage": "files", "num_workers": workers},
        views=VIEW_MODES["fix/ic_ens"].fields(dataclasses.asdict(digits().views)),
        teacher={"source": (constant_teacher(3),), "allow_near_chance": True},
        loss=LOSS_PRESETS["function-matching"],
        optim={"epochs": 1, "warmup_epochs": 0, "batch_size": 4},
        run={"eval_batch_size": 4},
    )
    config = config.replace(views={"teacher_num_crops": 3})
    write_targets(config, tmp_path / "store")
    opened = open_store(tmp_path / "store")
    assert opened.record_format.rows_per_epoch > 8
    verify_targets(
        tmp_path / "store", root=None, teacher=str(config.teacher.source[0]), num_queries=8
    )


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"temperature": 1.0}, "top-10"),
        ({"temperature": 3.0}, "full"),
        ({"temperature": 1.0, "standardize_logits": True}, "full"),
        ({"kind": "dkd"}, "full"),
        ({"kind": "hard"}, "hard"),
    ],
)
def test_default_record_format_suits_the_loss(loss, expected):
    config = configuration("a").replace(loss={"kind": "soft", **loss})
    loader = SimpleNamespace(rows_per_epoch=500)
    assert _record_format(config, loader, 101, None, None).content == expected
    ensemble = config.replace(teacher={"source": ("a", "b"), "combine": "logits"})
    assert _record_format(ensemble, loader, 101, None, None).content in ("full", "hard")


@pytest.mark.parametrize("records", ["hard", "top-3"])
def test_records_that_the_loss_cannot_use_are_refused(records, teachers, tmp_path):
    config = configuration(teachers[0], loss=LOSS_PRESETS["deit-soft"])
    with raises(ConfigError, "content = ", records):
        write_targets(config, tmp_path / "out", content=records)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def teachers_of_two_sizes(teachers, tmp_path_factory):
    """Return the run folders of two digits teachers, at 8 and at 16 px."""
    larger = digits_teacher().replace(
        student={"image_size": 16},
        data={"image_size": 16, "train_fraction": 0.3},
        optim={"epochs": 3},
    )
    return teachers[0], str(trained(larger, tmp_path_factory.mktemp("sizes") / "16"))


@pytest.mark.parametrize("combine", ["tokens", "probabilities"])
def test_stores_of_teachers_with_two_image_sizes_train_together(
    combine, teachers_of_two_sizes, tmp_path, capsys
):
    config = digits_ensemble().replace(
        data={"image_size": 16, "train_fraction": 0.2},
        student={"depth": 1, "embed_dim": 16, "num_heads": 2},
        teacher={"source": teachers_of_two_sizes, "combine": combine},
        optim={"epochs": 1, "warmup_epochs": 0},
        loss=LOSS_PRESETS["deit-hard" if combine == "tokens" else "deit-soft"],
    )
    if combine != "tokens":
        config = config.replace(student={"num_distillation_tokens": 1})
    stores = []
    for index in (1, 2):
        stores.append(str(tmp_path / f"store{index}"))
        write_targets(config, tmp_path / f"store{index}", teacher_index=index)
        verify_targets(tmp_path / f"store{index}", root=None, teacher=None, num_queries=32)
    assert re.search(r"100\.0 %\D*\b32\b", capsys.readouterr().out)
    train(config, tmp_path / "online")
    online_weights = load_file(latest_checkpoint(tmp_path / "online") / "model.safetensors")
    for name, targets in {"stored": tuple(stores), "half": ("none", stores[1])}.items():
        train(config.replace(teacher={"target_stores": targets}), tmp_path / name)
        for key, value in load_file(
            latest_checkpoint(tmp_path / name) / "model.safetensors"
        ).items():
            if combine == "tokens":  # hard labels: bit-identical training
                assert torch.equal(value, online_weights[key])
            else:
                torch.testing.assert_close(value, online_weights[key], atol=2e-3, rtol=0)
    for invalid in (0, 3):
        with raises(ConfigError, f"teacher_index = {invalid}"):
            write_targets(config, tmp_path / "x", teacher_index=invalid)


def test_standardize_equal_logits_has_a_finite_gradient():
    logits = torch.zeros(3, 5, requires_grad=True)
    (standardize_logits(logits) * torch.randn(3, 5)).sum().backward()
    assert logits.grad.isfinite().all()
    assert torch.equal(standardize_logits(logits), torch.zeros(3, 5))


def test_refused_teacher_leaves_no_store_folder(constant_teacher, teachers, tmp_path):
    with raises(DataError, "of10.py", "teacher.allow_near_chance"):
        write_targets(configuration(constant_teacher(10)), tmp_path / "store")
    assert not (tmp_path / "store").exists()
    write_targets(configuration(teachers[0]), tmp_path / "store", epochs=1)


def test_refused_store_without_shards_advises_to_delete_it(teachers, tmp_path):
    out = tmp_path / "store"
    write_targets(configuration(teachers[0]), out, part=(8, 9))

    def suggests_another_folder():
        with raises(ConfigError, f"out = {out}", "teacher.1.weights") as refused:
            write_targets(configuration(teachers[1]), out)
        return "give another folder" in str(refused.value)

    assert not suggests_another_folder()
    write_targets(configuration(teachers[0]), out, part=(0, 3))
    assert suggests_another_folder()


def test_part_without_shards_is_logged(teachers, tmp_path, capsys):
    assert write_targets(configuration(teachers[0]), tmp_path / "store", part=(6, 7)) is None
    lines = capsys.readouterr().out.splitlines()
    assert {"3", "7"} in [set(re.findall(r"\d+", line)) for line in lines]
    assert not list((tmp_path / "store" / SHARDS).iterdir())


def test_complete_store_is_cleaned_of_leftovers(store, teachers, tmp_path):
    copy = copied(store, tmp_path)
    (copy / SHARDS).mkdir()
    (copy / SHARDS / "000000.bin").write_bytes(b"left")
    (copy / f".{TARGETS}.abc").write_bytes(b"left")
    write_targets(configuration(teachers[0]), copy)
    assert content(copy) == content(store)


def test_store_with_an_invalid_teacher_is_refused_and_missing_one_warns(
    constant_teacher,
    store,
    teachers,
    tmp_path,
    capsys,
):
    three_classes = configuration(constant_teacher(3)).replace(
        teacher={"target_stores": (str(store),)}
    )
    with raises(DataError, "of3.py", "teacher.classes"):
        check(three_classes)
    broken = tmp_path / "broken"
    shutil.copytree(teachers[0], broken)
    weights = broken / "best" / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(b"rubb")
    with raises(CheckpointError, weights, f"{size}"):
        check(configuration(str(broken)).replace(teacher={"target_stores": (str(store),)}))
    missing = configuration("gone/teacher").replace(teacher={"target_stores": (str(store),)})
    capsys.readouterr()
    check(missing)
    assert "gone/teacher" in capsys.readouterr().err


def test_resume_with_a_moved_store_continues(store, teachers, tmp_path):
    config = configuration(teachers[0], optim={"epochs": 2, "warmup_epochs": 1})
    copy = copied(store, tmp_path)
    train(with_targets(config, store), tmp_path / "run")
    train(with_targets(config, copy), tmp_path / "run", resume=True)
    with raises(DataError, tmp_path / "run", "teacher.target_stores"):
        train(config, tmp_path / "run", resume=True)


def test_store_matches_proportional_teacher_weights(teachers, tmp_path):
    config = quick(configuration(teachers[0])).replace(
        teacher={"source": tuple(teachers), "weights": (3.0, 1.0), "combine": "logits"},
    )
    write_targets(config, tmp_path / "store")
    proportional = config.replace(teacher={"weights": (0.3, 0.1)})
    assert check(with_targets(proportional, tmp_path / "store"))


@pytest.mark.fault("E6")
def test_damaged_store_stops_every_process(store, tmp_path):
    copy = copied(store, tmp_path)
    flip_bit(copy / TARGETS, 500)
    config = with_targets(configuration("none"), copy).replace(teacher={"source": ()})
    teachers, splits = RunTeachers(config.teacher, config.loss), load_splits(config.data)
    loader = build_train_loader(
        config, splits, build_accelerator(config.run), teacher_size=teachers.input_size
    )
    teachers.load(splits.class_names, config.student.image_size, build_accelerator(config.run))

    def fake_accelerator(is_main, other_codes):
        return SimpleNamespace(
            is_main_process=is_main,
            device=torch.device("cpu"),
            reduce=lambda value, reduction: value + other_codes,
        )

    with raises(CheckpointError, copy / TARGETS):
        teachers.check(
            splits, fake_accelerator(is_main=True, other_codes=0), loader, config.evaluation
        )
    with raises(CheckpointError, f"teacher.target_stores {copy}") as refused:
        teachers.check(
            splits,
            fake_accelerator(is_main=False, other_codes=-CheckpointError.exit_code),
            loader,
            config.evaluation,
        )
    assert TARGETS not in str(refused.value)  # the main process logs the reason


BROKEN = {
    "no fingerprint": lambda manifest: manifest.pop("fingerprint"),
    "text as fingerprint": lambda manifest: manifest.update(fingerprint="x"),
    "no layout": lambda manifest: manifest.update(record_format={}),
    "no rows": lambda manifest: manifest["record_format"].update(rows_per_epoch=0, epochs=0),
    "text as rows": lambda manifest: manifest["record_format"].update(rows_per_epoch="many"),
    "unknown records": lambda manifest: manifest["record_format"].update(content="soft"),
    "no teacher": lambda manifest: manifest["fingerprint"].update(teacher=None),
    "no format": lambda manifest: [manifest.pop(key) for key in list(manifest) if key != "format"],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_manifest_is_refused_in_one_line(name, store, teachers, tmp_path):
    copy = copied(store, tmp_path)
    manifest = read_manifest(copy)
    BROKEN[name](manifest)
    (copy / MANIFEST).write_bytes(manifest_bytes(manifest))
    for attempt in (
        lambda: open_store(copy),
        lambda: write_targets(configuration(teachers[0]), copy),
        lambda: verify_targets(copy, root=None, teacher=None, num_queries=1),
    ):
        with raises(CheckpointError, "store.json") as refused:
            attempt()
        assert "\n" not in str(refused.value)


def test_edited_manifest_is_refused(store, tmp_path):
    copy = copied(store, tmp_path)
    manifest = json.loads((copy / MANIFEST).read_text())
    open_store(copy)
    edited_manifests = [edited for _, edited in edits(manifest, depth=4)]
    assert len(edited_manifests) > 200
    for edited in edited_manifests:
        (copy / MANIFEST).write_text(json.dumps(edited))
        with pytest.raises(CheckpointError):
            open_store(copy)


def test_store_without_a_targets_file_is_refused(store, tmp_path):
    copy = copied(store, tmp_path)
    (copy / TARGETS).unlink()
    with raises(CheckpointError, copy / TARGETS):
        open_store(copy)


def test_ensemble_study_with_one_combined_store_is_refused():
    config = digits_ensemble().replace(teacher={"target_stores": ("both",), "combine": "logits"})
    with raises(ConfigError, "study ensemble", "--teacher-index 1"):
        STUDIES["ensemble"](config.replace(student={"num_distillation_tokens": 1}))


def test_standardized_logits_with_mean_of_probabilities_are_refused():
    soft = dataclasses.replace(LOSS_PRESETS["deit-soft"], standardize_logits=True)
    config = digits_ensemble().replace(loss=soft)
    assert validate(config)  # one token per teacher
    one_token = config.replace(student={"num_distillation_tokens": 1})
    assert validate(one_token.replace(teacher={"combine": "logits"}))
    with raises(ConfigError, "loss.standardize_logits", "teacher.combine"):
        validate(one_token.replace(teacher={"combine": "probabilities"}))


def test_loss_term_without_weight_is_not_logged(capsys):
    row = {
        "epoch": 1,
        "seconds": 1.0,
        "images_per_s": 1.0,
        "loader": {"share": 0.0},
        "train": {"loss": 1.75, "label_loss": 2.3, "distillation_loss": 1.75},
    }
    log_epoch(row, 1, LOSS_PRESETS["function-matching"])
    assert "2.3" not in capsys.readouterr().out
    log_epoch(row, 1, LossConfig(kind="soft"))
    assert re.search(r"labels\D*2\.300\D*teacher\D*1\.750\b", capsys.readouterr().out)
