"""The page of commands: usage and options of each, from the parsers that read them."""

import argparse
import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from unittest import mock

from deit.cli.commands import COMMAND_GROUPS, COMMANDS
from deit.cli.common_options import COMMON, HELP_OPTIONS
from deit.cli.parser import Parser
from deit.config.schema import Config
from scripts.documentation.markdown import code, escaped, text_table

_INTRODUCTION = """\
`deit COMMAND --help` prints the options that are used most, `--help-all` all of them. `python
train_deit.py`, `evaluate_deit.py` and `finetune_deit.py` are `deit train`, `deit evaluate` and
`deit finetune`. Every command also takes `--debug`, which prints the traceback of an error.
[Exit codes](exit-codes.md) are the same for all commands.
"""
_SETTINGS = "Also takes every [setting](settings.md) of a configuration, as `--section.field`.\n"


class _Captured(Exception):
    """Carries the parser whose help was requested."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def commands_page() -> str:
    """Return the page as Markdown."""
    parts = [f"# Commands\n\n{_INTRODUCTION}"]
    for title, group in COMMAND_GROUPS.items():
        parts.append(f"## {title}\n")
        for name in group.commands:
            parts.append(f"### deit {name}\n\n{escaped(COMMANDS[name].summary)}\n")
            for path, parser in parsers_of(name):
                command = " ".join(path)
                heading = f"#### deit {command}\n\n" if len(path) > 1 else ""
                parts.append(heading + _parser_section(parser) + _examples(command))
    return "\n".join(parts)


def _examples(command: str) -> str:
    """Return the examples of a command's help as Markdown, if it has some."""
    if command not in COMMON:
        return ""
    lines = "".join(f"deit {command} {text}\n" for text in COMMON[command].examples)
    return f"\nFor example:\n\n```\n{lines}```\n"


def parsers_of(name: str) -> Iterator[tuple[list[str], argparse.ArgumentParser]]:
    """Yield the words and the parser of a command, or of each of its sub-commands.

    Sub-commands are those that the command's own help lists in its usage.
    """
    output = _help_of(name, [])
    if isinstance(output, argparse.ArgumentParser):
        yield [name], output
        return
    for word in dict.fromkeys(re.findall(rf"deit {name} ([a-z-]+)\b(?! --)", output)):
        parser = _help_of(name, [word])
        assert isinstance(parser, argparse.ArgumentParser), (name, word)
        yield [name, word], parser


def _help_of(name: str, subcommand: list[str]) -> argparse.ArgumentParser | str:
    """Return the parser that prints the help of a command, or the help that it prints itself."""

    def capture(parser: argparse.ArgumentParser) -> str:
        raise _Captured(parser)

    output = io.StringIO()
    with mock.patch.object(Parser, "format_help", capture), contextlib.redirect_stdout(output):
        try:
            COMMANDS[name]([*subcommand, "--help-all"], f"deit {name}")
        except _Captured as captured:
            return captured.parser
        except SystemExit:
            pass
    return output.getvalue()


def _parser_section(parser: argparse.ArgumentParser) -> str:
    """Return usage, description and options of a parser as Markdown."""
    formatter = parser._get_formatter()
    usage = " ".join(parser.format_usage().split()).removeprefix("usage: ").replace(" [-h]", "")
    description = _description(parser.description or "")
    parts = [f"```\n{usage}\n```\n", description]
    sections = {f"{section.name} options" for section in dataclasses.fields(Config)}
    has_settings = False
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and not HELP_OPTIONS & {*action.option_strings}
        ]
        if group.title in sections:
            has_settings = True
        elif actions:
            rows = [
                (
                    code(formatter._format_action_invocation(action)),
                    escaped(" ".join(formatter._expand_help(action).split())),
                )
                for action in actions
            ]
            kind = "argument" if group.title == "positional arguments" else "option"
            parts.append(text_table((kind, "meaning"), rows) + "\n")
    return "\n".join([*filter(None, parts), *([_SETTINGS] if has_settings else [])])


def _description(text: str) -> str:
    """Return a description as Markdown, without the paragraph on the recipe of the example."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    plain = [
        escaped(paragraph) for paragraph in paragraphs if "Defaults of fields" not in paragraph
    ]
    return "\n\n".join(plain) + "\n"
