"""The completion script for zsh."""

from collections.abc import Iterable, Mapping

from deit.cli.completion.command_lines import (
    TOP_OPTIONS,
    CommandLine,
    Option,
    Values,
    actions_of,
    fill,
    own_options,
    shared_fields,
    summaries,
)

_TEMPLATE = """\
#compdef deit
# Completion of deit for zsh, written by `deit completion zsh`.

_deit() {
    local curcontext="$curcontext" state line
    typeset -A opt_args
    local -a commands fields
    commands=(
@COMMANDS@
    )
    fields=(
@FIELDS@
    )
    _arguments -C @TOP@ '1:command:->command' '*::argument:->arguments' && return
    case $state in
        command) _describe 'command' commands ;;
        arguments)
            case $words[1] in
@CASES@
            esac
            ;;
    esac
}

if [[ $funcstack[1] == _deit ]]; then
    _deit "$@"
else
    compdef _deit deit
fi
"""


def zsh_script(lines: Mapping[str, CommandLine]) -> str:
    """Return the script for zsh."""
    actions, fields = actions_of(lines), shared_fields(lines)
    cases = []
    for name in summaries(lines):
        cases.append(f"{_PAD}{name})")
        if name in actions:
            cases += _action_case(name, actions[name], lines, fields)
        else:
            cases += _arguments_call(lines[name], fields, f"{_PAD}    ")
        cases.append(f"{_PAD}    ;;")
    commands = (quoted(f"{name}:{text}") for name, text in summaries(lines).items())
    return fill(
        _TEMPLATE,
        {
            "COMMANDS": _lines(commands, " " * 8),
            "FIELDS": _lines((_option(name, option) for name, option in fields.items()), " " * 8),
            "TOP": " ".join(map(quoted, TOP_OPTIONS)),
            "CASES": "\n".join(cases),
        },
    )


_PAD = " " * 16  # of the branches in _TEMPLATE


def _action_case(
    name: str,
    actions: Iterable[str],
    lines: Mapping[str, CommandLine],
    fields: Mapping[str, Option],
) -> list[str]:
    """Return the branch of a command that is followed by an action, as `targets write`."""
    choice = quoted(f"1:action:({' '.join(actions)})")
    branch = [
        f"{_PAD}    _arguments -C {choice} '*::argument:->action' && return",
        f"{_PAD}    case $state:$words[1] in",
    ]
    for action in actions:
        branch.append(f"{_PAD}        action:{action})")
        branch += _arguments_call(lines[f"{name} {action}"], fields, f"{_PAD}            ")
        branch.append(f"{_PAD}            ;;")
    return [*branch, f"{_PAD}    esac"]


def _arguments_call(line: CommandLine, fields: Mapping[str, Option], pad: str) -> list[str]:
    """Return the call that completes the options and arguments of a command."""
    options, has_fields = own_options(line, fields)
    items = [_option(name, option) for name, option in options.items()]
    items += ["$fields"] if has_fields else []
    for index, values in enumerate(line.arguments, start=1):
        last = line.more and index == len(line.arguments)
        items.append(quoted(f"{'*' if last else index}:argument:{_action(values)}"))
    *before, end = items
    return [f"{pad}_arguments \\", *(f"{pad}    {item} \\" for item in before), f"{pad}    {end}"]


def _option(name: str, option: Option) -> str:
    """Return the specification of an option for `_arguments`."""
    text = option.help
    for character in "\\[]:":
        text = text.replace(character, f"\\{character}")
    if option.values is None:
        return quoted(f"{name}[{text}]")
    equals = "=" if name.startswith("--") else ""
    return quoted(f"{name}{equals}[{text}]:value:{_action(option.values)}")


def _action(values: Values) -> str:
    """Return the action of `_arguments` that proposes values."""
    names = " ".join(values.names)
    paths = {"": "", "file": "_files", "folder": "_files -/"}[values.paths]
    if not names:
        return paths or " "
    if values.many:
        return f"{{_sequence compadd - {names}{'; ' + paths if paths else ''}}}"
    return f"{{compadd - {names}; {paths}}}" if paths else f"({names})"


def _lines(items: Iterable[str], pad: str) -> str:
    return "\n".join(f"{pad}{item}" for item in items)


def quoted(text: str) -> str:
    """Return text as one word of zsh."""
    return "'" + text.replace("'", "'\\''") + "'"
