"""Every command of `deit` by name; their options lie in this folder, what they do elsewhere."""

from collections.abc import Callable

from deit.commands.data import scan, targets, views
from deit.commands.lottery import landscape, tickets
from deit.commands.measuring import evaluate, export, predict
from deit.commands.smaller import ladder, prune, quantize
from deit.commands.studies import compare, report, sweep
from deit.commands.training import finetune, profile, recipes, train

# torch and what needs it are imported inside the commands: --help and every mistake in the
# arguments answer at once.

COMMANDS: dict[str, Callable[[list[str], str], None]] = {
    "train": train,
    "finetune": finetune,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "compare": compare,
    "sweep": sweep,
    "quantize": quantize,
    "prune": prune,
    "tickets": tickets,
    "landscape": landscape,
    "ladder": ladder,
    "report": report,
    "scan": scan,
    "views": views,
    "targets": targets,
    "profile": profile,
    "recipes": recipes,
}
"""Every command by name: (its arguments, the program's name for messages)."""
