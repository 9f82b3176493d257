"""Which runs of a sweep share a store of answers, and what a run is known by."""

import pytest

from deit.config.presets import LOSS_PRESETS, VIEW_MODES
from deit.config.recipes.handwriting import digits, digits_ensemble
from deit.experiments.runner import RunSpec
from deit.experiments.shared_targets import (
    content_hash,
    plan_shared_stores,
    result_fields,
    teacher_query_key,
)


def taught(tmp_path, *configs, content=None):
    """The stores that are written and, for each run, the names of those it is taught by."""
    runs = [RunSpec(str(place), one, tmp_path / str(place)) for place, one in enumerate(configs)]
    stores, told = plan_shared_stores(runs, tmp_path / "targets", content=content)
    names = [store.path.name for store in stores]
    by_run = [
        [names.index(target.rpartition("/")[2]) for target in run.config.teacher.target_stores]
        for run in told
    ]
    return stores, by_run


def test_what_asks_the_same_shares_and_what_stands_alone_asks_itself(tmp_path):
    warm = digits().replace(loss={"temperature": 9.0}, optim={"lr": 1.0, "epochs": 90})
    plain = digits().replace(loss=LOSS_PRESETS["none"])
    cut = digits().replace(views={"crop_padding": 2})
    seeded = digits().replace(run={"seed": 1})
    stores, by_run = taught(tmp_path, digits(), warm, plain, cut, seeded)
    assert by_run == [[0], [0], [], [], []]
    (store,) = stores
    assert (store.epochs, store.content, store.teacher_index) == (90, "full", None)
    assert store.config.optim.epochs == 90


def test_hard_labels_are_stored_as_such_unless_one_needs_more(tmp_path):
    hard = digits().replace(loss=LOSS_PRESETS["deit-hard"])
    other = hard.replace(optim={"lr": 1.0})
    assert [store.content for store in taught(tmp_path, hard, other)[0]] == ["hard"]
    assert [store.content for store in taught(tmp_path, hard, other, digits())[0]] == ["full"]
    asked = taught(tmp_path, hard, other, content="top-3")[0]
    assert [store.content for store in asked] == ["top-3"]


def test_each_of_several_teachers_has_a_store_of_its_own(tmp_path):
    two = digits_ensemble()
    stores, by_run = taught(tmp_path, two, two.replace(optim={"lr": 1.0}))
    assert [store.teacher_index for store in stores] == [1, 2]
    assert by_run == [[0, 1], [0, 1]]


def test_crops_cannot_be_asked_in_training_so_one_alone_has_a_store(tmp_path):
    views = VIEW_MODES["fix/ic_ens"].fields(vars(digits().views))
    _, by_run = taught(tmp_path, digits().replace(views=views), digits())
    assert by_run == [[0], []]


@pytest.mark.parametrize("mode", ["fix/ic_ens", "fix/rs", "fix/cc"])
def test_a_view_that_is_always_the_same_is_asked_once(mode, tmp_path):
    views = VIEW_MODES[mode].fields(vars(digits().views))
    one = digits().replace(views=views)
    stores, _ = taught(tmp_path, one, one.replace(optim={"lr": 1.0}))
    assert [store.epochs for store in stores] == [1]


def test_stores_that_are_named_are_taken_as_they_are(tmp_path):
    named = digits().replace(teacher={"target_stores": ("mine",)})
    runs = [RunSpec(str(place), named, tmp_path / str(place)) for place in range(2)]
    stores, told = plan_shared_stores(runs, tmp_path, content=None)
    assert (stores, [run.config for run in told]) == ([], [named, named])


def test_a_store_is_written_where_one_run_allows_a_weak_teacher(tmp_path):
    weak = digits().replace(teacher={"allow_near_chance": True})
    strict = digits().replace(optim={"epochs": 90})
    runs = [RunSpec(name, one, tmp_path / name) for name, one in (("w", weak), ("s", strict))]
    (store,), told = plan_shared_stores(runs, tmp_path / "targets", content=None)
    assert store.config.teacher.allow_near_chance
    assert [run.config.teacher.allow_near_chance for run in told] == [True, False]


def test_a_question_is_the_same_only_where_the_answers_are():
    base = teacher_query_key(digits())
    same = (
        digits().replace(loss={"temperature": 2.0}, optim={"epochs": 5, "batch_size": 8}),
        digits().replace(student={"depth": 1}, run={"device": "cpu"}),
        digits().replace(views={"seed": 0}),
    )
    assert all(teacher_query_key(one) == base for one in same)
    other = (
        digits().replace(views={"rotation": 1.0}),
        digits().replace(views={"seed": 3}),
        digits().replace(data={"unseen_classes": ("3",)}),
        digits().replace(teacher={"source": ("another",)}),
        digits().replace(student={"image_size": 16}),
        digits().replace(run={"precision": "bf16"}),
    )
    assert all(teacher_query_key(one) != base for one in other)
    repeated = digits().replace(views={"aug_repeats": 3})
    smaller = repeated.replace(optim={"batch_size": 8})
    assert teacher_query_key(repeated) != teacher_query_key(smaller)


def test_a_run_is_known_by_what_decides_its_result():
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
    assert len({base, *(content_hash(result_fields(one)) for one in changed)}) == 4
