"""The text of `deit --help`: the commands by purpose, with an example for each."""

from deit.cli.commands import COMMAND_GROUPS, COMMANDS


def overview() -> str:
    """Return the text of `deit --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: deit COMMAND [OPTIONS]",
        "",
        "Train vision transformers on small datasets by distillation.",
    ]
    for purpose, group in COMMAND_GROUPS.items():
        lines += ["", f"{purpose}, for example: deit {group.example}"]
        lines += [f"  {name:<{width}}  {COMMANDS[name].summary}" for name in group.commands]
    lines += [
        "",
        "deit COMMAND --help shows the most used options of a command, --help-all all of them.",
        "Every command takes --debug, which prints the traceback of an error.",
        "Tutorials, guides and results: README.md and docs/ of the source.",
    ]
    return "\n".join(lines)
