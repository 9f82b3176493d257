"""Experiments called from Python with plain values, without a command line."""

import pytest

from deit.cli.run_args import parse_run
from deit.config.recipes.handwriting import digits
from deit.core.errors import ConfigError
from deit.experiments.lottery import lottery
from deit.experiments.sweep import sweep
from deit.experiments.sweep_grid import differing, study_sweep, with_fields, with_overrides
from deit.experiments.sweep_spec import sweep_from_dict
from tests.helpers.errors import raises

pytest.importorskip("sklearn")

GRID = {"grid": {"optim.lr": (1e-3, 2e-3)}, "seeds": (0, 1)}


def test_sweep_from_dict_equals_the_same_in_lists():
    sweep_ = sweep_from_dict(GRID, name="lr")
    assert sweep_ == sweep_from_dict(
        {"grid": {"optim": {"lr": [1e-3, 2e-3]}}, "seeds": [0, 1]}, name="lr"
    )
    assert (sweep_.name, sweep_.seeds) == ("lr", (0, 1))
    with raises(ConfigError, "sweep lr", "grids", "grid?"):
        sweep_from_dict({"grids": {}}, name="lr")


@pytest.mark.parametrize("spec", [GRID, "teacher", study_sweep("teacher", seeds=[0, 1])])
def test_sweep_dry_run_lists_the_runs(spec, tmp_path, capsys):
    options = {"config": digits(), "overrides": {"optim.epochs": 3, "optim.warmup_epochs": 1}}
    assert sweep(spec, str(tmp_path / "out"), **options, dry_run=True) == {}
    seeds = 3 if spec == "teacher" else 2
    assert f"{2 * seeds} runs, 0 of them finished" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_sweep_override_of_a_varied_field_raises(tmp_path):
    with raises(ConfigError, "optim.lr", "varies in the sweep"):
        sweep(GRID, tmp_path / "out", config=digits(), overrides={"optim.lr": 0.1}, dry_run=True)
    with raises(ConfigError, "optim.epoch", "optim.epochs?"):
        sweep(GRID, tmp_path / "out", overrides={"optim.epoch": 2}, dry_run=True)


def test_sweep_of_file_with_code_as_teacher_raises(tmp_path):
    file = tmp_path / "s.json"
    file.write_text('{"runs": {"a": {"teacher.source": "mine.py:teacher"}}}')
    with raises(ConfigError, "mine.py:teacher", "Python code"):
        sweep(file, tmp_path / "out", dry_run=True)


def test_with_overrides_of_a_command_line_gives_its_configuration():
    arguments = ("--optim.epochs", "3", "--loss", "none", "--run.eval_batch_size", "7")
    run = parse_run(["digits", *arguments], program="deit", live_teacher=False)
    base = with_fields(digits(), {"optim.lr": 0.5}, where="test")
    expected = run.config.replace(optim={"lr": 0.5})
    assert with_overrides(base, differing(base, expected)) == expected
    assert with_overrides(base, {}) is base


def test_lottery_dry_run_needs_a_configuration_and_a_folder_only(tmp_path, capsys):
    config = digits().replace(optim={"epochs": 2, "warmup_epochs": 1})
    assert lottery(config, str(tmp_path / "out"), dry_run=True) == {}
    # Dense, and 7 rounds of 4 kinds; pruned once, round 1 is that of the ticket.
    assert "runs      28 of 2 epochs" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
