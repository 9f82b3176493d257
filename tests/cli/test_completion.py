"""The completion scripts offer what the parsers of the commands accept, in the shells themselves.

The shells run without a search path, so they can start neither Python nor any other program.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deit.cli.commands import COMMANDS, parsers
from deit.cli.completion import SCRIPTS, completion_script
from deit.config.presets import PRESETS
from deit.config.recipes import RECIPES
from tests.helpers.odd_input.options import field_choices
from tests.helpers.processes import ROOT

PARSERS = parsers()


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SCRIPTS:
        (folder / shell).write_text(completion_script(shell))
    return folder


def option_names(command: str) -> set[str]:
    """Return all options of a command, as the help describes them."""
    actions = PARSERS[command]._actions
    return {name for action in actions for name in action.option_strings} | {"--debug"}


def choices_of(action: argparse.Action) -> tuple[str, ...]:
    """Return the fixed values of an option, from its parser or the type of its field."""
    if action.choices is not None:
        return tuple(map(str, action.choices))
    if action.dest in PRESETS:
        return tuple(PRESETS[action.dest].names)
    return field_choices().get(action.dest, ())


def options_with_choices(command: str) -> dict[str, tuple[str, ...]]:
    """Return the options of a command that take one of some names."""
    options = PARSERS[command].options
    choices = {name: choices_of(action) for name, action in options.items() if action.nargs != 0}
    return {name: names for name, names in choices.items() if names}


def bash(script: Path, lines: list[str], folder: Path = ROOT) -> list[set[str]]:
    """Return what bash proposes for the last word of each command line."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    code = [f'PATH= ; source "{script}"']
    for line in lines:
        *first, last = line.split(" ")
        given = " ".join(f'"{word}"' for word in [*first, last])
        code.append(f"COMP_WORDS=({given}); COMP_CWORD={len(first)}; _deit")
        code.append("printf '%s\\n' \"${COMPREPLY[@]}\"; echo '=='")
    return _run("bash", "\n".join(code), folder)


def fish(script: Path, lines: list[str], folder: Path = ROOT) -> list[set[str]]:
    """Return what fish proposes for each command line, without the descriptions."""
    if shutil.which("fish") is None:
        pytest.skip("needs fish")
    code = [f"source {script}"]
    for line in lines:
        code.append(f"complete -C '{line}' | string replace -r '\\t.*' ''; echo '=='")
    return _run("fish", "\n".join(code), folder)


def zsh(script: Path, lines: list[str], folder: Path = ROOT) -> list[set[str]]:
    """Return the options that zsh's script gives to `_arguments`; for an option that a command line
    ends with, the names in its specification."""
    if shutil.which("zsh") is None:
        pytest.skip("needs zsh")
    stub = (
        "_arguments() {\n"
        "  if [[ ${@[-1]} == '*::argument:->arguments' ]]; then state=arguments; return 1; fi\n"
        "  if [[ ${@[-1]} == '*::argument:->action' ]]; then\n"
        "    words=(${words[2,-1]}); state=action; return 1\n"
        "  fi\n"
        '  print -rl -- "$@"\n'
        "}\n"
        "compdef() { }\n"
    )
    code, ends = [stub, f"source {script}"], []
    for line in lines:
        _, command, *rest = line.split(" ")
        ends.append(rest[-2] if rest[-1] == "" and rest[-2:-1] else "")
        code.append(f"words=({command} {' '.join(rest)}); _deit; echo '=='")
    results = []
    for printed, option in zip(_run("zsh", "\n".join(code), folder), ends):
        specifications = {}
        for text in printed:
            match = re.match(r"(--?[\w.-]+)=?\[.*\](?::value:(.*))?$", text)
            if match:
                specifications[match[1]] = match[2] or ""
        action = re.sub(r".*compadd -|;.*|[(){}]", "", specifications.get(option, ""))
        results.append(set(action.split()) if option else set(specifications))
    return results


def _run(shell: str, code: str, folder: Path) -> list[set[str]]:
    command = [shutil.which(shell), *{"zsh": ["-f"], "fish": ["--no-config"]}.get(shell, []), "-c"]
    done = subprocess.run([*command, code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    replies = done.stdout.split("==\n")[:-1]
    return [set(reply.splitlines()) - {""} for reply in replies]


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_script_is_valid_syntax(shell, scripts):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    done = subprocess.run([shell, "-n", scripts / shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", PARSERS)
@pytest.mark.parametrize("shell", SHELLS)
def test_shell_proposes_all_options_and_their_choices(shell, command, scripts):
    choices = options_with_choices(command)
    lines = [f"deit {command} -", *(f"deit {command} {name} " for name in choices)]
    options, *proposed = SHELLS[shell](scripts / shell, lines)
    if shell == "fish":
        (long,) = SHELLS[shell](scripts / shell, [f"deit {command} --"])
        options = options | long
    assert options == option_names(command)
    for (name, names), given in zip(choices.items(), proposed):
        assert given >= set(names), name
        assert given - set(names) <= {"none"}, name


@pytest.mark.parametrize("shell", SCRIPTS)
def test_script_names_every_command_option_and_choice(shell, scripts):
    """Also where the shell is not installed."""
    text = (scripts / shell).read_text()
    expected = {*COMMANDS, *RECIPES, "write", "verify", "help"}
    for command in PARSERS:
        expected |= {name.lstrip("-") for name in option_names(command)}
        for names in options_with_choices(command).values():
            expected |= set(names)
    missing = [name for name in expected if not re.search(rf"(?<![\w]){re.escape(name)}\b", text)]
    assert missing == []


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_shell_proposes_commands_recipes_folders_and_parts_of_lists(shell, scripts, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "weights.pth").touch()
    lines = {
        "deit tra": {"train"},
        "deit targets ": {"write", "verify"},
        "deit train mnist-h": {"mnist-held-out"},
        "deit targets write mnist-h": {"mnist-held-out"},
        "deit sweep table-2": {"table-2"},
        "deit evaluate ": {"photos"},
        "deit predict photos w": {"weights.pth"},
        "deit train digits --data.root ": {"photos"},
        "deit finetune --from w": {"weights.pth"},
        "deit finetune digits --init.weights w": {"weights.pth"},
        "deit train digits --optim.lr ": set(),
        "deit train digits --run.dev": {"--run.device"},
        "deit loss-landscape photos --measure lines,cur": {"lines,curvature"},
        "deit help vari": {"variants"},
        "deit completion z": {"zsh"},
    }
    proposed = SHELLS[shell](scripts / shell, list(lines), tmp_path)
    proposed = [{text.rstrip("/") for text in reply} for reply in proposed]
    assert dict(zip(lines, proposed)) == lines


def test_bash_completes_a_value_after_an_equals_sign(scripts):
    """Bash makes three words of it."""
    lines = ["deit train digits --loss = us", "deit train digits --run.device ="]
    assert bash(scripts / "bash", lines) == [{"usi"}, {"auto", "cpu", "cuda"}]


def test_completion_command_prints_the_script(tmp_path):
    command = [sys.executable, "-m", "deit", "completion"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "bash"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == completion_script("bash")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "fragment"), [(["tcsh"], "'tcsh'"), ([], "SHELL")])
def test_completion_of_an_unknown_shell_is_refused(arguments, fragment, refused):
    refused(2, (fragment, "deit completion --help"), "deit", "completion", *arguments)
