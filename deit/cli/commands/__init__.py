"""The commands of `deit` as `deit --help` lists them.

A command's module is imported when the command is called, so that `deit --help` takes no longer
than Python itself. torch and everything that needs it are imported inside the commands, so that
their --help and errors in the arguments are printed at once.
"""

import difflib
import typing
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

if typing.TYPE_CHECKING:
    from deit.cli.parser import Parser


class Command(NamedTuple):
    """A command, called with its arguments and its name in messages.

    module: the module of this folder in which it is.
    function: the function that runs it.
    summary: one sentence for `deit --help`.
    """

    module: str
    function: str
    summary: str

    def __call__(self, arguments: list[str], program: str) -> None:
        """Run the command. program: its name in messages."""
        getattr(import_module(f"{__name__}.{self.module}"), self.function)(arguments, program)


class Group(NamedTuple):
    """Commands for one purpose, each with its module and its summary.

    example: the arguments of one command, after `deit`.
    """

    example: str
    commands: dict[str, tuple[str, str]]


COMMAND_GROUPS = {
    "Train one network": Group(
        "train digits --out checkpoints/digits --optim.epochs 20",
        {
            "train": ("train", "Train a student or a teacher by a recipe."),
            "finetune": ("train", "Train on from a run or from pretrained weights."),
            "profile": ("train", "Measure the time of each part of a training step."),
            "recipes": ("train", "List the recipes, or show one of them."),
        },
    ),
    "Use and inspect a run": Group(
        "evaluate checkpoints/digits --json digits.json",
        {
            "evaluate": ("inspect", "Measure accuracy, calibration, cost and speed of runs."),
            "predict": ("inspect", "Classify images; draw attention maps."),
            "report": ("experiments", "Write an HTML report with charts and tables."),
            "loss-landscape": ("lottery", "Measure the loss around the weights of runs."),
        },
    ),
    "Train and compare many runs": Group(
        "compare digits --seeds 0,1,2 --parallel 2",
        {
            "compare": ("experiments", "Train with and without the teacher, or another study."),
            "sweep": ("experiments", "Train every run of a grid or a search."),
            "lottery": ("lottery", "Find lottery tickets by pruning in rounds."),
        },
    ),
    "Export and compress a run": Group(
        "export checkpoints/digits --format onnx",
        {
            "export": ("inspect", "Write timm, transformers, ONNX or PyTorch files; verify them."),
            "quantize": ("compress", "Write int8 weights and activations for a CPU."),
            "prune": ("compress", "Remove attention heads and MLP units; train the rest again."),
            "variants": ("compress", "Compare a run with its exports and smaller variants."),
        },
    ),
    "Prepare images and targets": Group(
        "check-data photos",
        {
            "check-data": ("data", "Decode every image; list unreadable ones and duplicates."),
            "show-views": ("data", "Draw the augmented views that student and teacher see."),
            "targets": ("data", "Store a teacher's outputs for every view, or verify them."),
        },
    ),
    "Set up": Group(
        "doctor",
        {
            "doctor": ("setup", "Check this machine and the installation; run a self-test."),
            "completion": ("setup", "Print a script for completion in bash, zsh or fish."),
        },
    ),
}
"""The commands by purpose."""

COMMANDS: dict[str, Command] = {
    name: Command(module, name.replace("-", "_"), summary)
    for group in COMMAND_GROUPS.values()
    for name, (module, summary) in group.commands.items()
}

_OTHER_NAMES = {
    **dict.fromkeys(("fit", "distill", "run", "pretrain"), "train"),
    **dict.fromkeys(("fine-tune", "transfer", "tune"), "finetune"),
    **dict.fromkeys(("benchmark", "profiler", "time"), "profile"),
    **dict.fromkeys(("list", "models", "configs"), "recipes"),
    **dict.fromkeys(("test", "val", "validate", "eval"), "evaluate"),
    **dict.fromkeys(("infer", "inference", "classify", "attention"), "predict"),
    **dict.fromkeys(("plot", "html", "show"), "report"),
    **dict.fromkeys(("landscape", "hessian"), "loss-landscape"),
    **dict.fromkeys(("search", "grid", "hpo"), "sweep"),
    **dict.fromkeys(("tickets", "imp"), "lottery"),
    **dict.fromkeys(("convert", "save", "onnx"), "export"),
    **dict.fromkeys(("int8", "ptq"), "quantize"),
    **dict.fromkeys(("compress", "slim"), "prune"),
    **dict.fromkeys(("data", "scan", "verify-data"), "check-data"),
    **dict.fromkeys(("views", "augmentations"), "show-views"),
    **dict.fromkeys(("store", "write-targets", "write", "verify"), "targets"),
    **dict.fromkeys(("check", "checks", "env", "info", "diagnose", "version"), "doctor"),
    **dict.fromkeys(("autocomplete", "completions"), "completion"),
}
"""Commands by the names that other programs and users have for them."""


def suggest_command(name: str) -> str:
    """Return `; did you mean X?` for the command that a wrong name means, or an empty text.

    >>> suggest_command("eval")
    '; did you mean evaluate?'
    """
    known = {command: command for command in COMMANDS} | _OTHER_NAMES
    name = name.lower().replace("_", "-")
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {known[close[0]]}?" if close else ""


def parsers() -> dict[str, "Parser"]:
    """Return the parsers of all options of all commands, by the words that select a command.

    `targets` has two, `targets write` and `targets verify`.

    >>> parsers()["targets verify"].prog
    'deit targets verify'
    """
    modules = dict.fromkeys(command.module for command in COMMANDS.values())
    makers: dict[str, Callable[[str], Parser]] = {}
    for module in modules:
        makers |= import_module(f"{__name__}.{module}").PARSERS
    return {name: makers[name](f"deit {name}") for name in sorted(makers, key=_position)}


def _position(name: str) -> int:
    """Return the place of a command in `deit --help`."""
    return list(COMMANDS).index(name.split()[0])
