"""Compare and sweep from Python: many runs, and their results as one object."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from deit.api.run import Run
from deit.config.arguments import checks_types
from deit.config.command_choices import RETRIES, TOP_POINTS, check_path
from deit.config.recipes import recipe
from deit.config.schema import Config
from deit.core.console import obeys_verbose
from deit.core.errors import ConfigError, did_you_mean
from deit.experiments import sweep as sweep_module
from deit.experiments.sweep_grid import study_sweep
from deit.experiments.sweep_plots import finished_rows
from deit.experiments.sweep_spec import Sweep
from deit.experiments.sweep_tables import cells, columns, read_results
from deit.viz import html
from deit.viz.plots import comparison_figure
from deit.viz.tables import markdown_table


class SweepResult:
    """The results of a comparison or a sweep. A notebook shows the table.

    path: its folder. data: the content of results.json.
    """

    @checks_types
    def __init__(self, path: str | PathLike) -> None:
        """Read the results in a folder. Raises CheckpointError if there are none."""
        self.path = Path(check_path("path", path))
        self.data: dict[str, Any] = read_results(self.path)

    def __repr__(self) -> str:
        return f"SweepResult({str(self.path)!r}):\n{self.table()}"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.text(name)}</th>" for name in columns(self.data))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.text(cell)}</td>" for cell in row) + "</tr>"
            for row in cells(self.data)
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def table(self) -> str:
        """Return the results as a Markdown table: test top-1 in %, mean +- sample standard
        deviation (n - 1)."""
        return markdown_table(columns(self.data), cells(self.data))

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """By name of the arm or point, teachers included: `top1`, a dict by head for each seed, in
        [0, 1]; and other metrics, one value per seed (docs/guides/sweeps.md)."""
        return self.data["rows"]

    @property
    def best(self) -> list[str]:
        """The names of the best points on the validation split, the best first."""
        return self.data["best"]

    def runs(self, name: str) -> list[Run]:
        """Return the runs of an arm or point, one per seed. Raises ConfigError for another name."""
        if name not in self.rows:
            raise ConfigError(f"name = {name!r}: no such row{did_you_mean(name, self.rows)}")
        return [Run(self._locate(Path(folder))) for folder in self.rows[name]["folders"]]

    def _locate(self, folder: Path) -> Path:
        """Return where a run is now: the results may have been moved with their runs."""
        candidates = (folder, self.path / folder.parent.name / folder.name, self.path / folder.name)
        return next((path for path in candidates if path.is_dir()), folder)

    def figure(self) -> Any:
        """Return a matplotlib figure of the points with a finished run.

        Raises SystemFault if matplotlib is missing.
        """
        return comparison_figure(finished_rows(self.data))


@checks_types
def compare(
    config: Config | str | PathLike,
    out: str | PathLike,
    *,
    study: str = "teacher",
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    parallel: int = 1,
    retries: int = RETRIES,
    verbose: bool = True,
    command: str = "",
) -> SweepResult:
    """Train the students of a study, each with every seed, and evaluate them on the test split.

    config: a configuration with its teacher, or the name of a recipe; teachers that are recipes are
    trained first. out: the folder of all runs; the same call continues an interrupted comparison.
    study: teacher (with and without it), view-modes, epochs, ensemble, resolution, or a table of
    the DeiT paper. arms: names of the study's students; default: all. parallel: number of runs in
    parallel. retries: of a run after a transient failure.
    Raises ConfigError for an unknown study or arm, and the errors of `train`.
    """
    name = "" if isinstance(config, Config) else check_path("config", config)
    config = config if isinstance(config, Config) else recipe(config)
    spec = study_sweep(study, recipe=name or "a configuration", arms=arms, seeds=seeds)
    return sweep(
        spec,
        out,
        config=config,
        parallel=parallel,
        retries=retries,
        verbose=verbose,
        command=command,
    )


@checks_types
@obeys_verbose
def sweep(
    spec: Sweep | dict[str, Any] | str | PathLike,
    out: str | PathLike,
    *,
    config: Config | None = None,
    parallel: int = 1,
    retries: int = RETRIES,
    top: int = TOP_POINTS,
    verbose: bool = True,
    command: str = "",
) -> SweepResult:
    """Train and evaluate every point of a sweep for each of its seeds.

    spec: the content of a sweep file as a dict, the path of one, or the name of a built-in sweep
    (docs/guides/sweeps.md). out: the folder; the same call continues an interrupted sweep.
    config: what the runs have in common; default: the recipe of the sweep. parallel: number of runs
    in parallel. retries: after a transient failure. top: number of best points to list.
    Raises the errors of `deit.errors`; one error for all failed runs, after the results of the
    others are written.

    Example:
        >>> result = sweep(
        ...     {"recipe": "digits-teacher", "grid": {"optim.lr": [0.001, 0.003]},
        ...      "set": {"optim.epochs": 1, "optim.warmup_epochs": 0, "data.train_fraction": 0.1}},
        ...     "checkpoints/lr", verbose=False)
        >>> list(result.rows), len(result.runs("lr 0.001"))
        (['lr 0.001', 'lr 0.003'], 1)
    """
    spec = spec if isinstance(spec, Sweep | dict) else check_path("spec", spec)
    out = check_path("out", out)
    sweep_module.sweep(
        spec,
        out,
        config=config,
        parallel=parallel,
        retries=retries,
        top=top,
        command=command,
    )
    return SweepResult(out)
