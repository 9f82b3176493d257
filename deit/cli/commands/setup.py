"""Commands about the installation: completion of the command line in a shell."""

from collections.abc import Callable

from deit.cli.parser import Parser
from deit.core.console import info

SHELLS = ("bash", "zsh", "fish")
"""Shells for which there is a completion script."""


def _completion_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s SHELL",
        description="Print a script that completes commands, options, names and paths of deit with "
        "the Tab key. The script starts no Python; write it again after an update of deit.\n\n"
        "bash: deit completion bash > ~/.local/share/bash-completion/completions/deit, or load it "
        "in ~/.bashrc: source ~/.deit-completion.bash\n\n"
        "zsh: deit completion zsh > ~/.zsh/_deit, with fpath=(~/.zsh $fpath) before compinit in "
        "~/.zshrc\n\n"
        "fish: deit completion fish > ~/.config/fish/completions/deit.fish",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS) + ".")
    return parser


def completion(arguments: list[str], program: str) -> None:
    """Print the completion script of a shell."""
    options = _completion_parser(program).parse_args(arguments)
    from deit.cli.completion import completion_script

    info(completion_script(options.shell).rstrip())


PARSERS: dict[str, Callable[[str], Parser]] = {"completion": _completion_parser}
"""The parsers of all options, by the words that select the command."""
