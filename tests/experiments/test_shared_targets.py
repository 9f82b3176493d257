"""Runs of a sweep that share a target store, and the hashes that identify runs."""

import pytest

from deit.config.presets import LOSS_PRESETS, VIEW_MODES
from deit.config.recipes.handwriting import digits, digits_ensemble
from deit.experiments.parallel_runs import RunSpec
from deit.experiments.shared_targets import (
    content_hash,
    plan_shared_stores,
    result_fields,
    teacher_query_key,
)


def planned_stores(tmp_path, *configs, content=None):
    """Return the stores to write and, for each run, the indices of its stores."""
    runs = [
        RunSpec(str(index), config, tmp_path / str(index)) for index, config in enumerate(configs)
    ]
    stores, runs_with_stores = plan_shared_stores(runs, tmp_path / "targets", content=content)
    names = [store.path.name for store in stores]
    by_run = [
        [names.index(target.rpartition("/")[2]) for target in run.config.teacher.target_stores]
        for run in runs_with_stores
    ]
    return stores, by_run


def test_runs_with_equal_teacher_outputs_share_a_store(tmp_path):
    warm = digits().replace(loss={"temperature": 9.0}, optim={"lr": 1.0, "epochs": 90})
    labels_only = digits().replace(loss=LOSS_PRESETS["none"])
    cropped = digits().replace(views={"crop_padding": 2})
    seeded = digits().replace(run={"seed": 1})
    stores, by_run = planned_stores(tmp_path, digits(), warm, labels_only, cropped, seeded)
    assert by_run == [[0], [0], [], [], []]
    (store,) = stores
    assert (store.epochs, store.content, store.teacher_index) == (90, "full", None)
    assert store.config.optim.epochs == 90


def test_store_content_is_hard_unless_a_loss_needs_more(tmp_path):
    hard = digits().replace(loss=LOSS_PRESETS["deit-hard"])
    other = hard.replace(optim={"lr": 1.0})
    assert [store.content for store in planned_stores(tmp_path, hard, other)[0]] == ["hard"]
    assert [store.content for store in planned_stores(tmp_path, hard, other, digits())[0]] == [
        "full"
    ]
    stores = planned_stores(tmp_path, hard, other, content="top-3")[0]
    assert [store.content for store in stores] == ["top-3"]


def test_each_of_several_teachers_has_its_own_store(tmp_path):
    two = digits_ensemble()
    stores, by_run = planned_stores(tmp_path, two, two.replace(optim={"lr": 1.0}))
    assert [store.teacher_index for store in stores] == [1, 2]
    assert by_run == [[0, 1], [0, 1]]


def test_single_run_with_crops_has_a_store(tmp_path):
    views = VIEW_MODES["fix/ic_ens"].fields(vars(digits().views))
    _, by_run = planned_stores(tmp_path, digits().replace(views=views), digits())
    assert by_run == [[0], []]


@pytest.mark.parametrize("mode", ["fix/ic_ens", "fix/rs", "fix/cc"])
def test_store_of_fixed_view_has_one_epoch(mode, tmp_path):
    views = VIEW_MODES[mode].fields(vars(digits().views))
    config = digits().replace(views=views)
    stores, _ = planned_stores(tmp_path, config, config.replace(optim={"lr": 1.0}))
    assert [store.epochs for store in stores] == [1]


def test_runs_with_named_stores_share_no_store(tmp_path):
    named = digits().replace(teacher={"target_stores": ("mine",)})
    runs = [RunSpec(str(index), named, tmp_path / str(index)) for index in range(2)]
    stores, planned = plan_shared_stores(runs, tmp_path, content=None)
    assert (stores, [run.config for run in planned]) == ([], [named, named])


def test_store_allows_a_weak_teacher_if_one_run_does(tmp_path):
    weak = digits().replace(teacher={"allow_near_chance": True})
    strict = digits().replace(optim={"epochs": 90})
    runs = [RunSpec(name, config, tmp_path / name) for name, config in (("w", weak), ("s", strict))]
    (store,), planned = plan_shared_stores(runs, tmp_path / "targets", content=None)
    assert store.config.teacher.allow_near_chance
    assert [run.config.teacher.allow_near_chance for run in planned] == [True, False]


def test_teacher_query_key_is_equal_only_for_equal_outputs():
    base = teacher_query_key(digits())
    same = (
        digits().replace(loss={"temperature": 2.0}, optim={"epochs": 5, "batch_size": 8}),
        digits().replace(student={"depth": 1}, run={"device": "cpu"}),
        digits().replace(views={"seed": 0}),
    )
    assert all(teacher_query_key(config) == base for config in same)
    other = (
        digits().replace(views={"rotation": 1.0}),
        digits().replace(views={"seed": 3}),
        digits().replace(data={"unseen_classes": ("3",)}),
        digits().replace(teacher={"source": ("another",)}),
        digits().replace(student={"image_size": 16}),
        digits().replace(run={"precision": "bf16"}),
    )
    assert all(teacher_query_key(config) != base for config in other)
    repeated = digits().replace(views={"aug_repeats": 3})
    smaller = repeated.replace(optim={"batch_size": 8})
    assert teacher_query_key(repeated) != teacher_query_key(smaller)


def test_content_hash_depends_on_result_fields_only():
    base = content_hash(result_fields(digits()))
    assert base == content_hash(dict(reversed(result_fields(digits()).items())))
    moved = digits().replace(
        data={"root": "/elsewhere"}, run={"device": "cpu", "save_every_steps": 3}
    )
    assert content_hash(result_fields(moved)) == base
    changed = (
        digits().replace(run={"seed": 1}),
        digits().replace(optim={"lr": 2e-3}),
        digits().replace(teacher={"source": ("another",)}),
    )
    assert len({base, *(content_hash(result_fields(config)) for config in changed)}) == 4
