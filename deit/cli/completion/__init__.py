"""Scripts that let bash, zsh and fish complete `deit`, written from the commands' parsers.

A script holds all commands, options and names, so that no Tab starts Python.
"""

from deit.cli.completion.bash import bash_script
from deit.cli.completion.command_lines import command_lines
from deit.cli.completion.fish import fish_script
from deit.cli.completion.zsh import zsh_script

SCRIPTS = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}
"""The functions that write a script, by shell."""


def completion_script(shell: str) -> str:
    """Return the script of a shell, a name of SCRIPTS."""
    return SCRIPTS[shell](command_lines())
