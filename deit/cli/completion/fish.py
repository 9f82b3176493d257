"""The completion script for fish."""

from collections.abc import Iterable, Mapping

from deit.cli.completion.command_lines import (
    TOP_OPTIONS,
    CommandLine,
    Values,
    actions_of,
    fill,
    summaries,
)

_HEAD = """\
# Completion of deit for fish, written by `deit completion fish`.

function __deit_command --description 'Whether the command is one of the arguments'
    set -l given (commandline -opc)
    set -l name $given[2]
    if contains -- "$name" @PARENTS@
        set name "$name $given[3]"
    end
    contains -- "$name" $argv
end

function __deit_words --description 'Whether the command line has a number of words so far'
    test (count (commandline -opc)) -eq $argv[1]
end

complete -c deit -f
"""


def fish_script(lines: Mapping[str, CommandLine]) -> str:
    """Return the script for fish."""
    actions = actions_of(lines)
    script = [fill(_HEAD, {"PARENTS": " ".join(actions)})]
    for name, summary in summaries(lines).items():
        script.append(f"{_complete('__deit_words 1')} -a {name} -d {quoted(summary)}")
    script += [f"{_complete('__deit_words 1')} {_flag(name)}" for name in TOP_OPTIONS]
    for name, given in actions.items():
        condition = f"__deit_words 2; and contains -- {name} (commandline -opc)"
        script.append(f"{_complete(condition)} -a {quoted(' '.join(given))}")
    for command, line in lines.items():
        for index, values in enumerate(line.arguments):
            script.append(_argument(command, index, values, line))
    return "\n".join((*script, *_options(lines))) + "\n"


def _complete(condition: str) -> str:
    return f"complete -c deit -n {quoted(condition)}"


def _argument(command: str, index: int, values: Values, line: CommandLine) -> str:
    """Return the line for an argument of a command."""
    first = 1 + len(command.split())
    condition = _is_one_of([command])
    if not (line.more and index == len(line.arguments) - 1):
        condition += f"; and __deit_words {first + index}"
    return f"{_complete(condition)}{_proposals(values)}"


def _options(lines: Mapping[str, CommandLine]) -> list[str]:
    """Return a line for each option; commands with the same option share it."""
    commands_of: dict[str, list[str]] = {}
    for command, line in lines.items():
        for name, option in line.options.items():
            text = f"{_flag(name)} -d {quoted(option.help)}"
            if option.values is not None:  # -r: takes a value; -x: and it is no file
                text += " -r" if option.values.paths == "file" else " -x"
                text += _proposals(option.values)
            commands_of.setdefault(text, []).append(command)
    return [f"{_complete(_is_one_of(commands))} {text}" for text, commands in commands_of.items()]


def _is_one_of(commands: Iterable[str]) -> str:
    """Return the condition that the command line is that of one of some commands."""
    names = (f'"{command}"' if " " in command else command for command in commands)
    return f"__deit_command {' '.join(names)}"


def _flag(name: str) -> str:
    """Return how `complete` names an option: `-l out` for --out, `-s h` for -h."""
    return f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"


def _proposals(values: Values) -> str:
    """Return the options of `complete` that propose values."""
    names = " ".join(values.names)
    parts = [" -F"] if values.paths == "file" else []
    if values.paths == "folder":
        parts.append(" -a '(__fish_complete_directories)'")
    if names:
        parts.append(f" -a '(__fish_append , {names})'" if values.many else f" -a {quoted(names)}")
    return "".join(parts)


def quoted(text: str) -> str:
    """Return text as one word of fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
