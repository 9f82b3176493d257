"""The sentence about the two arms of a study, against arithmetic by hand."""

import re

import pytest

from deit.experiments.arm_difference import difference_line

TEACHER = {"values": {}, "seeds": [0], "top1": [{"class": 0.97, "fused": None}], "teacher": True}


def arm(*percent, seeds=None, heads="both"):
    """Return the row of an arm with a final top-1 in % for each seed."""
    fused = heads == "both"
    top1 = [
        {"class": 0.1 if fused else value / 100, "fused": value / 100 if fused else None}
        for value in percent
    ]
    seeds = list(range(len(percent))) if seeds is None else seeds
    return {"values": {"run": "an arm"}, "seeds": seeds, "top1": top1, "teacher": False}


def line(study="teacher", **rows):
    """Return the sentence about these arms, which share a teacher."""
    rows = {"teacher": TEACHER, **rows}
    return difference_line({"study": study, "split": "test", "num_samples": 359, "rows": rows})


def test_difference_line_of_arms_that_differ():
    # Means 92 and 83; deviations 2 and sqrt((9 + 1 + 4) / 2) = 2.65; differences 10, 8 and 9.
    assert line(distilled=arm(90, 92, 94), undistilled=arm(80, 84, 85)) == (
        "with the teacher 92.0 +- 2.0 %, without the teacher 83.0 +- 2.6 % (test top-1, 359 "
        "images, 3 seeds): the teacher is worth 9.0 points (+- 1.0 from seed to seed), more than "
        "the spread of the seeds"
    )


def test_difference_line_of_a_teacher_that_costs_accuracy():
    assert line(distilled=arm(80, 84, 85), undistilled=arm(90, 92, 94)).endswith(
        ": the teacher costs 9.0 points (+- 1.0 from seed to seed), more than the spread of the "
        "seeds"
    )


@pytest.mark.parametrize("distilled", [arm(90, 92, 94), arm(86, 88, 90)], ids=["above", "below"])
def test_difference_line_of_overlapping_intervals_names_no_winner(distilled):
    # Deviations 2 and 1: the means differ by 2 points, and would have to by more than 3.
    text = line(distilled=distilled, undistilled=arm(89, 90, 91))
    points = "2.0 points (+- 1.0 from seed to seed)"
    assert text.endswith(f": no difference beyond the spread of the seeds: {points}")
    assert not re.search("worth|costs|ahead|more than", text)


@pytest.mark.parametrize("same", [(90, 90), (90, 92)], ids=["no spread", "some spread"])
def test_difference_line_of_equal_arms(same):
    text = line(distilled=arm(*same), undistilled=arm(*same))
    assert text.endswith(
        "no difference beyond the spread of the seeds: 0.0 points (+- 0.0 from seed to seed)"
    )


def test_difference_line_decides_by_the_sum_of_both_deviations():
    low = arm(10, 20, 30)  # 20 +- 10
    assert "no difference" in line(distilled=arm(29.9, 39.9, 49.9), undistilled=low)
    assert "is worth" in line(distilled=arm(30.1, 40.1, 50.1), undistilled=low)


@pytest.mark.parametrize("names", [("hard", "token"), ("token", "hard")])
def test_difference_line_of_other_arms_names_the_better_one(names):
    arms = {"hard": arm(80, 81), "token": arm(90, 93)}
    text = line("table-3", **{name: arms[name] for name in names})
    assert text.endswith(
        ": token is ahead by 11.0 points (+- 1.4 from seed to seed), more than the spread of the "
        "seeds"
    )
    assert "hard 80.5 +- 0.7 %" in text
    assert "token 91.5 +- 2.1 %" in text


def test_difference_line_takes_the_only_head_of_a_student_without_the_token():
    arms = {"hard": arm(80, 82, heads="class"), "token": arm(90, 92)}
    assert line("table-3", **arms).startswith("hard 81.0 +- 1.4 %, token 91.0 +- 1.4 % (")


def test_difference_line_compares_the_seeds_that_both_arms_finished():
    distilled = arm(1, 94, 90, 92, seeds=[7, 2, 0, 1])
    undistilled = arm(80, 84, 85, 2, seeds=[0, 1, 2, 9])
    assert line(distilled=distilled, undistilled=undistilled) == line(
        distilled=arm(90, 92, 94), undistilled=arm(80, 84, 85)
    )


NOTHING_TO_COMPARE = {
    "one seed": {"distilled": arm(90), "undistilled": arm(80)},
    "one common seed": {
        "distilled": arm(90, 91),
        "undistilled": arm(80, 81, seeds=[1, 2]),
    },
    "no finished run": {"distilled": arm(90, 91), "undistilled": arm()},
    "one arm": {"distilled": arm(90, 91)},
    "three arms": {"a": arm(90, 91), "b": arm(80, 81), "c": arm(70, 71)},
    "no study": {"study": None, "a": arm(90, 91), "b": arm(80, 81)},
}


@pytest.mark.parametrize("rows", NOTHING_TO_COMPARE.values(), ids=NOTHING_TO_COMPARE)
def test_difference_line_is_empty_without_two_arms_and_two_seeds(rows):
    assert line(**rows) == ""
