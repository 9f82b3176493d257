"""Commands about the installation: its checks, and completion of the command line in a shell."""

import json
import sys
from collections.abc import Callable

from deit.cli.parser import Parser
from deit.core.console import complain, count_noun, info, is_main_process, is_terminal
from deit.core.machine.checks import num_faults

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


def _doctor_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s [OPTIONS]",
        description="Check versions, devices, memory, disks and environment, and test a small "
        "training, without network and in a temporary folder. Each check is ok, a note (a limit) "
        "or a fault (training will not work), with a hint. Exit code 1 if there is a fault.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print the checks as JSON: name, status, detail and hint of each.",
    )
    return parser


def doctor(arguments: list[str], program: str) -> None:
    """Check the machine and the installation; exit with code 1 if there is a fault."""
    options = _doctor_parser(program).parse_args(arguments)
    from deit.api.doctor import run_checks

    checks = []
    for check in run_checks(_announce):
        checks.append(check)
        if not options.json:
            info(f"{check.status:<5}  {check.name:<18} {check.detail}")
            if check.hint:
                info(f"{'':26}{check.hint}")
    faults = num_faults(checks)
    if options.json:
        info(json.dumps([check._asdict() for check in checks], indent=1))
    else:
        notes = sum(check.status == "note" for check in checks)
        info(f"\n{count_noun(faults, 'fault')}, {count_noun(notes, 'note')}")
    if faults:
        raise SystemExit(1)


def _announce(text: str) -> None:
    """Show what takes seconds, on a terminal."""
    if is_terminal(sys.stderr) and is_main_process():
        complain(f"... {text}")


PARSERS: dict[str, Callable[[str], Parser]] = {
    "doctor": _doctor_parser,
    "completion": _completion_parser,
}
"""The parsers of all options, by the words that select the command."""
