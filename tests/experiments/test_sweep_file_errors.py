"""Errors of sweep files: each with its file and field, and all of a file together."""

import pytest

from deit.config.recipes.handwriting import digits
from deit.core.errors import ConfigError
from deit.experiments.sweep_grid import points_of
from tests.helpers.errors import raises
from tests.helpers.sweeps import read

BAD = {
    "not yaml": ("grid: [", ("YAML", "line 1")),
    "no mapping": ("- 1", ("docs/guides/sweeps.md",)),
    "nothing": ("recipe: digits", ("grid", "runs", "study", "search")),
    "unknown key": ("gird: {optim.lr: [1]}", ("gird", "grid")),
    "unknown field": ("grid: {optim.ler: [1]}", ("grid", "optim.ler", "optim.lr")),
    "unknown section": ("grid: {optin: {lr: [1]}}", ("grid", "optin", "optim.")),
    "twice": ("grid: {optim.lr: [1], optim.lr: [2]}", ("YAML", "'optim.lr'")),
    "nested twice": ("set: {optim.lr: 1, optim: {lr: 2}}", ("set", "optim.lr")),
    "no list": ("grid: {optim.lr: 1.5}", ("grid", "optim.lr", "1.5")),
    "empty list": ("grid: {optim.lr: []}", ("grid", "optim.lr", "[]")),
    "same value": ("grid: {optim.lr: [0.1, 0.1]}", ("grid", "optim.lr", "0.1")),
    "no name": ("grid: {[1]: [2]}", ("YAML", "[1]")),
    "both": ("{study: teacher, runs: {a: {}}}", ("runs", "study")),
    "arms alone": ("{grid: {optim.lr: [1]}, arms: [a]}", ("arms", "study")),
    "arms": ("{study: teacher, arms: [1]}", ("arms", "[1]")),
    "unknown study": ("study: techer", ("study", "techer", "teacher")),
    "seeds": ("{study: teacher, seeds: [0, 0]}", ("seeds", "[0, 0]")),
    "seed": ("{study: teacher, seeds: [-1]}", ("seeds", "[-1]")),
    "a number of seeds": ("{study: teacher, seeds: 3}", ("seeds", "[3]", "[0, 1, 2]")),
    "words": ("{study: teacher, share_targets: maybe}", ("share_targets", "'maybe'")),
    "recipe": ("{study: teacher, recipe: 3.5}", ("recipe", "3.5")),
    "run": ("runs: {slow: {optim.ler: 1}}", ("runs", "slow", "optim.ler", "optim.lr")),
    "its seed": ("grid: {run.seed: [0, 1]}", ("grid", "run.seed", "seeds")),
    "same run": ("runs: [{optim.lr: 1}, {optim.lr: 1}]", ("runs", "'lr 1'")),
    "runs": ("runs: 3.5", ("runs", "3.5")),
    "fields": ("set: 3.5", ("set", "3.5")),
    "search": ("search: 3", ("search", "fields", "low", "high")),
    "searched": ("search: {fields: {optim.ler: [1, 2]}}", ("search", "optim.ler", "optim.lr")),
    "one value": ("search: {fields: {optim.lr: [1]}}", ("search", "optim.lr", "[1]")),
    "span": ("search: {fields: {optim.lr: {low: 2.5, high: 1.5}}}", ("optim.lr", "2.5", "1.5")),
    "log": (
        "search: {fields: {optim.lr: {low: -0.5, high: 1, log: true}}}",
        ("optim.lr", "-0.5", "log"),
    ),
    "ends": ("search: {fields: {optim.lr: {low: a, high: 1}}}", ("optim.lr", "low", "'a'")),
    "low alone": ("search: {fields: {optim.lr: {low: 1}}}", ("optim.lr", "high", "log: true")),
    "text span": (
        "search: {fields: {views.auto_augment: {low: 1, high: 2}}}",
        ("views.auto_augment", "low"),
    ),
    "preset span": ("search: {fields: {loss: {low: 1, high: 2}}}", ("loss",)),
    "trials": ("search: {trials: 0.5, fields: {optim.lr: [1, 2]}}", ("trials", "0.5")),
    "no trials": ("search: {trials: 0, fields: {optim.lr: [1, 2]}}", ("trials",)),
    "search key": ("search: {tirals: 3, fields: {optim.lr: [1, 2]}}", ("tirals", "trials")),
    "a tag without a value": ("grid: {optim.lr: [!!float '']}", ("YAML",)),
    "a tag that is no truth": ("grid: {optim.lr: [!!bool zz]}", ("YAML", "'zz'")),
    "a tag that is no time": ("grid: {optim.lr: [!!timestamp zz]}", ("YAML",)),
    "itself": ("grid: {optim.lr: &a [*a]}", ("100,000",)),
    "endless": (
        "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)).replace(
            "*a0", "1"
        ),
        ("100,000",),
    ),
    "large": (f"{{study: teacher, seeds: [0x{'f' * 5000}]}}", ("2^63",)),
    "high": (f"search: {{fields: {{optim.epochs: {{low: 1, high: 1{'0' * 400}}}}}}}", ("2^63",)),
    "with a grid": ("{search: {fields: {optim.lr: [1, 2]}}, study: teacher}", ("search", "study")),
}


@pytest.mark.fault("E11")
@pytest.mark.parametrize(("text", "names"), BAD.values(), ids=BAD)
def test_read_sweep_error_is_one_line_with_the_file_and_field(text, names, tmp_path):
    with raises(ConfigError, tmp_path / "s.yaml", *names) as refused:
        read(tmp_path, text)
    assert "\n" not in str(refused.value)


MULTIPLE = {
    "top level": ("{recipee: digits, seeds: 3, set: {optim.lr: 1}}", ("recipee", "seeds")),
    "grid": ("grid: {optim.lrr: [1], loss.temperatur: [1]}", ("optim.lrr", "loss.temperatur")),
    "values": ("grid: {optim.lr: 1, loss.temperature: [2, 2]}", ("optim.lr", "temperature")),
    "runs": ("runs: {a: {optim.lrr: 1}, b: {loss.temperatur: 1}}", ("a: optim.lrr", "b: loss")),
    "search": (
        "search: {fields: {optim.lr: {low: 2, high: 1}, loss.kind: [soft]}}",
        ("optim.lr", "loss.kind"),
    ),
    "sections": (
        "{set: {optim.lrr: 1}, grid: {loss.temperatur: [1]}, seeds: [0, 0]}",
        ("set: optim.lrr", "grid: loss.temperatur", "seeds"),
    ),
}


@pytest.mark.fault("E11")
@pytest.mark.parametrize(("text", "names"), MULTIPLE.values(), ids=MULTIPLE)
def test_read_sweep_reports_all_errors_of_a_file(text, names, tmp_path):
    with raises(ConfigError, *names) as refused:
        read(tmp_path, text)
    lines = str(refused.value).splitlines()
    assert len(lines) == len(names)
    assert all(line.startswith(f"{tmp_path / 's.yaml'}: ") for line in lines)


def test_points_of_reports_all_invalid_runs(tmp_path):
    runs = "{a: {optim.lr: -1}, b: {loss.temperature: -3}, c: {loss: deit-hart}, d: {}}"
    with raises(ConfigError, "s, a: ", "s, b: ", "s, c: loss") as refused:
        points_of(read(tmp_path, f"runs: {runs}"), digits())
    assert {problem.field for problem in refused.value.problems} >= {"optim.lr", "loss.temperature"}


IMPOSSIBLE = {
    "value": ("grid: {optim.lr: [1e-3, -1]}", ("lr -1", "optim.lr")),
    "together": (
        "grid: {student.patch_size: [2, 3]}",
        ("patch size 3", "student.patch_size", "student.image_size"),
    ),
    "preset": ("runs: {slow: {loss: deit-hart}}", ("slow", "loss", "deit-hart")),
    "preset list": ("grid: {loss: [[deit-hard]]}", ("loss", "['deit-hard']")),
    "twice over": (
        "{grid: {optim.lr: [1, 2]}, runs: {slow: {optim.lr: 3}}}",
        ("slow", "optim.lr", "grid"),
    ),
}


@pytest.mark.parametrize(("text", "names"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_points_of_invalid_point_is_named(text, names, tmp_path):
    sweep = read(tmp_path, text)
    with raises(ConfigError, *names):
        points_of(sweep, digits())


@pytest.mark.fault("E11")
def test_points_of_reports_all_invalid_points(tmp_path):
    grid = "{optim.lr: [1.0e-3, -1], loss.temperature: [1, -3]}"
    with raises(ConfigError, "lr -1, temperature 1", "lr 0.001, temperature -3") as refused:
        points_of(read(tmp_path, f"grid: {grid}"), digits())
    problems = [(problem.field, problem.value) for problem in refused.value.problems]
    assert sorted(problems) == [("loss.temperature", -3)] * 2 + [("optim.lr", -1)] * 2
