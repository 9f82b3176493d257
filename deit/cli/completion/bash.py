"""The completion script for bash."""

from collections.abc import Mapping

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
# Completion of deit for bash, written by `deit completion bash`.

_deit() {
    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"
    local command="${COMP_WORDS[1]}" first=2 names="" paths="" many=""
    COMPREPLY=()
    # Bash makes three words of --option=value.
    if [[ $current == = ]]; then
        current=""
    elif [[ $before == = ]]; then
        before="${COMP_WORDS[COMP_CWORD-2]}"
    fi
    case $command in
        @PARENTS@) command="$command ${COMP_WORDS[2]}" first=3 ;;
    esac
    if (( COMP_CWORD == 1 )); then
        names="@COMMANDS@"
    elif (( COMP_CWORD < first )); then
        case ${COMP_WORDS[1]} in
@ACTIONS@
        esac
    else
        case "$command:$before" in
@VALUES@
            *) _deit_argument ;;
        esac
    fi
    local prefix=""
    if [[ -n $many && $current == *,* ]]; then
        prefix="${current%,*}," current="${current##*,}"
    fi
    local IFS=$'\\n'
    COMPREPLY=($(IFS=$' \\n'; compgen -P "$prefix" -W "$names" -- "$current"))
    case $paths in
        file) COMPREPLY+=($(compgen -P "$prefix" -f -- "$current")) ;;
        folder) COMPREPLY+=($(compgen -P "$prefix" -d -- "$current")) ;;
    esac
    if [[ -n $paths ]]; then compopt -o filenames 2> /dev/null; fi
    if [[ -n $many ]]; then compopt -o nospace 2> /dev/null; fi
}

# Set what is proposed where no option waits for its value.
_deit_argument() {
    local index=$((COMP_CWORD - first + 1))
    if [[ $current != -* ]]; then
        case "$command:$index" in
@ARGUMENTS@
        esac
    fi
    local fields="@FIELDS@"
    case $command in
@OPTIONS@
    esac
}

complete -F _deit deit
"""


def bash_script(lines: Mapping[str, CommandLine]) -> str:
    """Return the script for bash."""
    actions, fields = actions_of(lines), shared_fields(lines)
    action_names = {name: f'names="{" ".join(given)}"' for name, given in actions.items()}
    return fill(
        _TEMPLATE,
        {
            "PARENTS": "|".join(actions),
            "COMMANDS": " ".join((*summaries(lines), *TOP_OPTIONS)),
            "ACTIONS": _cases(action_names, 12),
            "VALUES": _cases(_value_cases(lines), 12),
            "ARGUMENTS": _cases(_argument_cases(lines), 12),
            "FIELDS": " ".join(fields),
            "OPTIONS": _cases(_option_cases(lines, fields), 8),
        },
    )


def _cases(cases: Mapping[str, str], indent: int) -> str:
    """Return the branches of a `case`, by pattern."""
    return "\n".join(f"{' ' * indent}{pattern}) {text} ;;" for pattern, text in cases.items())


def _settings(values: Values) -> str:
    """Return assignments that let the script propose values."""
    parts = [f'names="{" ".join(values.names)}"'] if values.names else []
    parts += [f"paths={values.paths}"] if values.paths else []
    parts += ["many=1"] if values.many else []
    return " ".join(parts) or ":"


def _value_cases(lines: Mapping[str, CommandLine]) -> dict[str, str]:
    """Return the settings for `COMMAND:OPTION`; with `*` as the command where all commands agree.

    Options with the same settings share a branch.
    """
    settings: dict[str, dict[str, str]] = {}
    for command, line in lines.items():
        for name, option in line.options.items():
            text = "" if option.values is None else _settings(option.values)
            settings.setdefault(name, {})[command] = text
    patterns: dict[str, list[str]] = {}
    for name, by_command in settings.items():
        if len(set(by_command.values())) == 1:
            by_command = {"*": next(iter(by_command.values()))}
        for command, text in by_command.items():
            if text:
                patterns.setdefault(text, []).append(f"{_quoted(command)}:{name}")
    return {"|".join(given): text for text, given in patterns.items()}


def _quoted(command: str) -> str:
    return f'"{command}"' if " " in command else command


def _argument_cases(lines: Mapping[str, CommandLine]) -> dict[str, str]:
    """Return the settings for `COMMAND:INDEX`, the index of an argument from 1."""
    cases = {}
    for command, line in lines.items():
        for index, values in enumerate(line.arguments, start=1):
            last = line.more and index == len(line.arguments)
            index_pattern = "*" if last else index
            cases[f"{_quoted(command)}:{index_pattern}"] = f"{_settings(values)}; return"
    return cases


def _option_cases(lines: Mapping[str, CommandLine], fields: Mapping[str, Option]) -> dict[str, str]:
    """Return the settings that propose the options of a command."""
    cases = {}
    for command, line in lines.items():
        options, has_fields = own_options(line, fields)
        names = [*options, "$fields"] if has_fields else [*options]
        cases[_quoted(command)] = f'names="{" ".join(names)}"'
    return cases
