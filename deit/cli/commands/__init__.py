"""The commands of `deit`: each parses its options and calls a function of the library."""

from collections.abc import Callable

from deit.cli.commands.compress import prune, quantize, variants
from deit.cli.commands.data import check_data, show_views, targets
from deit.cli.commands.experiments import compare, report, sweep
from deit.cli.commands.inspect import evaluate, export, predict
from deit.cli.commands.lottery import loss_landscape, lottery
from deit.cli.commands.train import finetune, profile, recipes, train

# torch and everything that needs it are imported inside the commands, so that --help and errors in
# the arguments are printed at once.

Command = Callable[[list[str], str], None]
"""A command: (arguments, program). program: the name of the command in messages."""

COMMAND_GROUPS: dict[str, dict[str, Command]] = {
    "Train": {
        "train": train,
        "finetune": finetune,
        "profile": profile,
        "recipes": recipes,
    },
    "Inspect a run": {
        "evaluate": evaluate,
        "predict": predict,
        "report": report,
        "loss-landscape": loss_landscape,
    },
    "Train many runs": {
        "compare": compare,
        "sweep": sweep,
        "lottery": lottery,
    },
    "Export and compress a run": {
        "export": export,
        "quantize": quantize,
        "prune": prune,
        "variants": variants,
    },
    "Prepare data and targets": {
        "check-data": check_data,
        "show-views": show_views,
        "targets": targets,
    },
}
"""The commands as `deit --help` groups them."""

COMMANDS: dict[str, Command] = {
    name: command for group in COMMAND_GROUPS.values() for name, command in group.items()
}
