"""Training from stored targets matches training with the live teacher."""

import dataclasses
import re

import pytest

from deit.config.presets import LOSS_PRESETS, VIEW_MODES
from deit.config.schema import to_dict
from deit.core.errors import ConfigError, DataError
from deit.distill.target_content import open_stores
from deit.distill.target_store import open_store
from deit.distill.write_targets import write_targets
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.target_stores import (
    EPOCHS,
    assert_differs,
    check,
    configuration,
    latest_weights,
    line_about,
    metric_rows,
    numbers_in,
    quick,
    stores_with,
    with_targets,
)

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def online_run(teachers, tmp_path_factory):
    """Return a run with a live teacher."""
    out = tmp_path_factory.mktemp("online") / "run"
    train(quick(configuration(teachers[0])), out)
    return out


@pytest.mark.parametrize("source", ["with its teacher", "without"])
def test_hard_targets_train_bit_identical_to_the_live_teacher(
    source, online_run, store, teachers, tmp_path, capsys
):
    config = with_targets(quick(configuration(teachers[0])), store)
    if source == "without":
        config = config.replace(teacher={"source": ()})
    capsys.readouterr()
    train(config, tmp_path / "stored")
    output = capsys.readouterr().out
    line = line_about(output, store)
    assert "hard" in line
    assert numbers_in(line, store)[0] == str(EPOCHS)
    assert ("100.0 %" in line) is (source == "with its teacher")  # of the recomputed outputs
    assert latest_weights(tmp_path / "stored") == latest_weights(online_run)
    assert metric_rows(tmp_path / "stored") == metric_rows(online_run)


@pytest.mark.fault("D17")
@pytest.mark.parametrize("mode", VIEW_MODES)
def test_every_view_mode_trains_from_a_store_as_online(mode, teachers, tmp_path):
    few = {"train_fraction": 0.1}
    base = configuration(teachers[0], loss=LOSS_PRESETS["function-matching"], data=few)
    views = {**VIEW_MODES[mode].fields(to_dict(base)["views"]), "crop_scale": (0.5, 1.0)}
    if mode == "fix/ic_ens":
        views["teacher_num_crops"] = 5
    config = quick(base, views=views)
    write_targets(config, tmp_path / "store")
    train(with_targets(config, tmp_path / "store"), tmp_path / "stored")
    stored_rows = metric_rows(tmp_path / "stored")
    layout = open_store(tmp_path / "store").record_format
    assert layout.content == "full"
    assert layout.epochs == (1 if mode.startswith("fix/") else 2)
    if mode != "fix/ic_ens":
        train(config, tmp_path / "online")
        for stored_row, online_row in zip(
            stored_rows, metric_rows(tmp_path / "online"), strict=True
        ):
            assert stored_row["loss"] == pytest.approx(online_row["loss"], abs=2e-3)
            assert stored_row["teacher_top1"] == online_row["teacher_top1"]


def test_fewer_stored_epochs_are_reused_cyclically_and_logged(store, teachers, tmp_path, capsys):
    config = with_targets(configuration(teachers[0], optim={"epochs": 9}), store)
    *_, run_teachers = check(config)
    assert run_teachers.num_stored_epochs == EPOCHS
    capsys.readouterr()
    train(config, tmp_path / "cycled")
    numbers = map(numbers_in, capsys.readouterr().out.splitlines())
    assert {"9", str(EPOCHS)} in map(set, numbers)
    rows = metric_rows(tmp_path / "cycled")
    assert rows[7]["teacher_top1"] == rows[0]["teacher_top1"]
    assert rows[8]["teacher_top1"] == rows[1]["teacher_top1"]


def test_views_seed_lets_runs_of_other_seeds_share_a_store(store, teachers, tmp_path):
    config = with_targets(configuration(teachers[0], run={"seed": 4}, views={"seed": 0}), store)
    train(quick(config), tmp_path / "run")
    assert metric_rows(tmp_path / "run")


def test_hard_records_with_a_loss_of_logits_are_refused(store, teachers):
    config = with_targets(configuration(teachers[0], loss=LOSS_PRESETS["deit-soft"]), store)
    with raises(
        ConfigError, f"teacher.target_stores {store}", "loss.kind", "'soft'", "content full"
    ):
        open_stores(config.teacher, config.loss)
    ensemble = configuration(teachers[0]).replace(
        teacher={"source": tuple(teachers), "target_stores": (str(store), str(store))},
    )
    with raises(ConfigError, f"teacher.target_stores {store}", "teacher.combine", "content full"):
        open_stores(ensemble.teacher, ensemble.loss)


def test_top_k_records_with_a_temperature_are_refused(teachers, tmp_path):
    config = configuration(teachers[0], loss=LOSS_PRESETS["deit-soft"])
    at_temperature_1 = config.replace(loss={"temperature": 1.0})
    write_targets(at_temperature_1, tmp_path / "top", epochs=1, content="top-3")
    where = f"teacher.target_stores {tmp_path / 'top'}"
    with raises(ConfigError, where, "loss.temperature", "content full"):
        stores_with(config, tmp_path / "top")
    assert stores_with(at_temperature_1, tmp_path / "top")


def test_store_of_mean_probabilities_at_another_temperature_is_refused(teachers, tmp_path):
    config = configuration(teachers[0], loss=LOSS_PRESETS["deit-soft"]).replace(
        teacher={"source": tuple(teachers)},
    )
    temperature = f"{config.loss.temperature:g}"
    with raises(ConfigError, f"loss.temperature = {temperature}", "teacher.combine logits"):
        write_targets(config, tmp_path / "mean", epochs=1)
    write_targets(config.replace(loss={"temperature": 1.0}), tmp_path / "mean", epochs=1)
    stored_config = config.replace(
        teacher={"source": (), "target_stores": (str(tmp_path / "mean"),)}
    )
    where = f"teacher.target_stores {tmp_path / 'mean'}"
    with raises(ConfigError, where, f"loss.temperature {temperature}", "teacher.combine logits"):
        open_stores(stored_config.teacher, stored_config.loss)
    assert check(
        stored_config.replace(loss={"temperature": 1.0}, optim={"epochs": 1, "warmup_epochs": 0})
    )


@pytest.mark.parametrize("combine", ["probabilities", "logits", "tokens"])
def test_ensemble_of_stores_trains_as_the_online_ensemble(combine, teachers, tmp_path):
    soft = dataclasses.replace(LOSS_PRESETS["deit-soft"], temperature=2.0)
    config = quick(configuration(teachers[0], loss=soft)).replace(
        student={"num_distillation_tokens": 2 if combine == "tokens" else 1},
        teacher={"source": tuple(teachers), "weights": (0.7, 0.3), "combine": combine},
    )
    stores = []
    for index, teacher in enumerate(teachers):
        one_teacher = config.replace(
            teacher={"source": (teacher,), "weights": (), "combine": "probabilities"},
            student={"num_distillation_tokens": 1},
        )
        write_targets(one_teacher, tmp_path / str(index))
        stores.append(tmp_path / str(index))
    train(config, tmp_path / "online")
    train(with_targets(config, *stores), tmp_path / "stored")
    train(with_targets(config, stores[0], "none"), tmp_path / "half")
    online_rows = metric_rows(tmp_path / "online")
    for name in ("stored", "half"):
        for stored_row, online_row in zip(metric_rows(tmp_path / name), online_rows, strict=True):
            assert stored_row["loss"] == pytest.approx(online_row["loss"], abs=2e-3)
    if combine == "tokens":
        assert {"distillation_loss_1", "distillation_loss_2"} <= online_rows[0].keys()


def test_store_of_combined_outputs_trains_as_the_online_ensemble(teachers, tmp_path, capsys):
    config = quick(configuration(teachers[0], loss=LOSS_PRESETS["deit-soft"])).replace(
        teacher={"source": tuple(teachers), "weights": (2.0, 1.0), "combine": "logits"},
    )
    write_targets(config, tmp_path / "together")
    train(config, tmp_path / "online")
    capsys.readouterr()
    train(with_targets(config, tmp_path / "together"), tmp_path / "stored")
    output = capsys.readouterr().out
    assert re.search(r"100\.0 %\D*\b\d{3}\b", line_about(output, tmp_path / "together"))
    assert re.search(r"(?m)^teachers\b.*\b143\b", output)
    for stored_row, online_row in zip(
        metric_rows(tmp_path / "stored"), metric_rows(tmp_path / "online")
    ):
        assert stored_row["loss"] == pytest.approx(online_row["loss"], abs=2e-3)
    equal_weights = config.replace(teacher={"weights": (1.0, 1.0)})
    with raises(DataError, f"teacher.target_stores {tmp_path / 'together'}") as refused:
        check(with_targets(equal_weights, tmp_path / "together"))
    assert_differs(refused, "weights", "[0.666666667, 0.333333333]", "[0.5, 0.5]")
    reversed_teachers = config.replace(teacher={"source": tuple(reversed(teachers))})
    with raises(DataError, "teacher.1.weights", "teacher.2.weights"):
        check(with_targets(reversed_teachers, tmp_path / "together"))
