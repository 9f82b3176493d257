"""Every command of `deit` by name; their options lie in this folder, what they do elsewhere."""

from collections.abc import Callable

from deit.cli.commands.compress import prune, quantize, variants
from deit.cli.commands.data import check_data, show_views, targets
from deit.cli.commands.experiments import compare, report, sweep
from deit.cli.commands.inspect import evaluate, export, predict
from deit.cli.commands.lottery import loss_landscape, lottery
from deit.cli.commands.train import finetune, profile, recipes, train

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
    "lottery": lottery,
    "loss-landscape": loss_landscape,
    "variants": variants,
    "report": report,
    "check-data": check_data,
    "show-views": show_views,
    "targets": targets,
    "profile": profile,
    "recipes": recipes,
}
"""Every command by name: (its arguments, the program's name for messages)."""
