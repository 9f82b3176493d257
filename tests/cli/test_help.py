"""The help of `deit`, its commands and the root scripts; the lists of recipes and commands."""

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deit
from deit.cli.commands import COMMAND_GROUPS, COMMANDS, parsers
from deit.cli.common_options import COMMON
from deit.cli.grammar import SHARED, option_of
from deit.config.recipes import RECIPES
from deit.config.validation import field_names
from deit.experiments.studies import STUDIES
from tests.helpers.commands import COMMANDS_WITH_CONFIG, tree
from tests.helpers.processes import ROOT


@pytest.fixture(scope="module")
def all_parsers():
    return parsers()


TRAIN, EVALUATE = "train_deit.py", "evaluate_deit.py"


@pytest.mark.parametrize("command", [(TRAIN,), (TRAIN, "cifar10"), ("deit", "train", "folder")])
def test_help_shows_every_field_and_its_default(run, command):
    done = run(*command, "--help-all")
    assert (done.returncode, done.stderr) == (0, "")
    _, *options = re.split(r"\n  --", done.stdout)
    switches = ("resume", "dry-run", "print-config")
    for name in ("out", "loss", "augmentation", "view-mode", *switches, *field_names()):
        texts = [text for text in options if re.match(rf"{re.escape(name)}[,\s]", text)]
        assert len(texts) == 1, name
        assert name in switches or re.search(r"default[:,]\s+\S", texts[0], re.IGNORECASE), name


@pytest.mark.parametrize("command", COMMANDS_WITH_CONFIG)
def test_help_lists_own_options_first_and_no_excluded_option(run, command, tmp_path):
    own_options, excluded = (names.split() for names in COMMANDS_WITH_CONFIG[command])
    done = run("deit", *command.split(), "--help-all")
    assert (done.returncode, done.stderr) == (0, "")
    first = done.stdout.partition("data options")[0]
    listed = re.findall(r"^  --([\w.-]+)", first, re.MULTILINE)
    shared = [option_of(name)[2:] for name in SHARED]
    shared = [name for name in shared if name not in own_options and name not in excluded]
    assert listed == [*own_options, *shared]
    for option in re.split(r"\n  --", first)[1:]:
        assert len(option.split()) > 4, f"has no help: {option}"
    assert "RECIPE" in first.partition("[OPTIONS]")[0] or command == "prune"


def test_help_names_every_study(run):
    study_help = run("deit", "compare", "--help").stdout.partition("--arms")[0]
    study_help = " ".join(study_help.split())
    assert [name for name in STUDIES if f" {name} (" not in study_help] == []


@pytest.mark.parametrize("arguments", [(EVALUATE, "--help"), ("deit", "--help"), ("deit", "help")])
def test_help_of_other_programs_prints_usage(run, arguments):
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout


def test_help_command_prints_help_of_a_command(run):
    assert run("deit", "help", "show-views").stdout == run("deit", "show-views", "--help").stdout
    for word in ("help", "--version"):
        assert run("deit", "help", word).stdout == run("deit", "--help").stdout
    unknown = run("deit", "help", "shw-views")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert re.search(r"'shw-views'.*\bshow-views\?", unknown.stderr)


def test_missing_command_is_an_error_that_prints_help(run):
    """The list of commands then goes to standard error."""
    without_command, with_help = run("deit"), run("deit", "--help")
    assert (without_command.returncode, without_command.stdout) == (2, "")
    assert without_command.stderr == with_help.stdout


def test_help_lists_every_command(run):
    listed = re.findall(r"^  ([\w-]+) +[A-Z].*\.$", run("deit", "--help").stdout, re.MULTILINE)
    assert listed == list(COMMANDS)


def test_overview_fits_a_screen_and_has_an_example_for_each_group(run):
    lines = run("deit", "--help").stdout.splitlines()
    assert len(lines) <= 42
    assert max(map(len, lines)) <= 100
    examples = [line.partition(", for example: deit ")[2] for line in lines]
    assert [text for text in examples if text] == [g.example for g in COMMAND_GROUPS.values()]
    for group in COMMAND_GROUPS.values():
        assert group.example.split()[0] in group.commands


@pytest.mark.parametrize("arguments", [["--help"], ["help"], ["--version"], ["trian"], []])
def test_overview_and_unknown_commands_import_no_package(arguments):
    """Imports would make them slow."""
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import deit.cli\n"
        f"sys.argv[1:] = {arguments}\n"
        "deit.cli.main()\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(names - sys.stdlib_module_names), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    imported = set(ast.literal_eval(done.stderr.splitlines()[-1]))
    # rich imports attr if it is installed.
    assert imported - {"deit"} <= ({"rich", "attr"} if arguments == ["trian"] else set())


@pytest.mark.parametrize("command", COMMON)
def test_help_shows_ten_options_and_the_rest_with_help_all(command, all_parsers, run):
    parser = all_parsers[command]
    assert len(set(COMMON[command].options)) == 10
    short = run("deit", *command.split(), "--help")
    assert (short.returncode, short.stderr) == (0, "")
    assert len(short.stdout.splitlines()) <= 50
    assert max(map(len, short.stdout.splitlines())) <= 100
    listed = re.findall(r"^  --([\w.-]+)", short.stdout, re.MULTILINE)
    assert listed == list(COMMON[command].options)
    assert f"--help-all lists all {len(parser.options)} options." in short.stdout
    full = run("deit", *command.split(), "--help-all").stdout
    assert re.findall(r"^  (--[\w.-]+)", full, re.MULTILINE) == list(parser.options)


@pytest.mark.parametrize("command", sorted(set(parsers()) - set(COMMON)))
def test_help_of_a_command_with_few_options_shows_all(command, all_parsers, run):
    assert len(all_parsers[command].options) <= 10
    short = run("deit", *command.split(), "--help")
    assert (short.returncode, short.stderr) == (0, "")
    assert short.stdout == run("deit", *command.split(), "--help-all").stdout
    assert len(short.stdout.splitlines()) <= 50


@pytest.mark.parametrize("script", ["train", "finetune", "evaluate"])
def test_help_of_a_root_script_is_that_of_its_command(script, run):
    for option in ("--help", "--help-all"):
        text = run(f"{script}_deit.py", option).stdout
        text = text.replace(f"python {script}_deit.py", f"deit {script}")
        of_command = run("deit", script, option).stdout
        # The names have different lengths, so lines break elsewhere.
        same_name = text.replace(f"{script}_deit.py", f"deit {script}")
        assert same_name.split() == of_command.split()


EXAMPLES = [group.example for group in COMMAND_GROUPS.values()]
EXAMPLES += [f"{name} {text}" for name, common in COMMON.items() for text in common.examples]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_of_a_help_text_is_a_valid_command_line(example, all_parsers, run, tmp_path):
    command = next(name for name in all_parsers if f"{example} ".startswith(f"{name} "))
    arguments = example.removeprefix(command).split()
    parser = all_parsers[command]
    _, unknown = parser.parse_known_args(arguments)
    if command not in COMMANDS_WITH_CONFIG:
        assert unknown == []
        return
    first = [] if arguments[0].startswith("-") else arguments[:1]
    assert unknown == first
    if first == ["heat.yaml"]:
        (tmp_path / "heat.yaml").write_text("recipe: digits\ngrid:\n  optim.lr: [0.001, 0.002]\n")
    if "--print-config" in parser.options and command not in ("finetune", "prune"):
        done = run("deit", *example.split(), "--print-config")
        assert (done.returncode, done.stderr) == (0, "")


def test_help_of_option_is_the_same_in_every_command(run):
    commands = [name for name in COMMANDS if name not in ("targets", "recipes", "doctor")]
    helps: dict[str, set[str]] = {}
    for command in commands:
        text = run("deit", command, "--help-all").stdout.partition("\n\ndata options")[0]
        for option in re.split(r"\n  --", text)[1:]:
            name, text = re.match(r"(\S+)(.*?)(?:\n\n|\Z)", option, re.DOTALL).groups()
            text = re.sub(r"\(default: .*\)", "", " ".join(text.split()))
            helps.setdefault(name, set()).add(text.strip())
    for name in ("checkpoint", "data.root", "json", "parallel", "seeds", "retries", "loss"):
        assert len(helps[name]) == 1, helps[name]


def test_recipes_are_listed_with_a_line_each(run, tmp_path):
    done = run("deit", "recipes")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[:-2]] == list(RECIPES)
    assert max(map(len, lines)) <= 100
    assert all(len(line.split()) > 4 for line in lines[:-2])
    mnist = run("deit", "recipes", "mnist*").stdout.splitlines()
    assert mnist[:-2] == [line for line in lines if line.startswith("mnist")]
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["digits-ensemble", "imagenet-384", "folder"])
def test_recipe_is_shown_with_its_settings(run, name):
    config, text = RECIPES[name](), run("deit", "recipes", name).stdout
    assert max(map(len, text.splitlines())) <= 100
    assert " ".join(RECIPES[name].__doc__.split()) in " ".join(text.split())
    rows = dict(re.findall(r"^  (\w+) +(.*)$", text, re.MULTILINE))
    assert list(rows) == ["data", "student", "teacher", "loss", "training"]
    assert rows["student"] == f"{config.student.name}, {config.student.image_size} px"
    assert all(source in rows["teacher"] for source in config.teacher.source)
    assert f"{config.optim.epochs} epochs" in rows["training"]
    commands = re.findall(r"^deit .*$", text, re.MULTILINE)
    assert commands[-1].startswith(f"deit train {name} --print-config")
    if name == "digits-ensemble":
        teachers = [Path(source).name for source in config.teacher.source]
        assert commands[:-2] == [f"deit train {teacher}" for teacher in teachers]
    assert ("finetune" in commands[-2]) == (name == "imagenet-384")


@pytest.mark.parametrize(("name", "fragment"), [("digts", "digits?"), ("nothing*", "nothing*")])
def test_unknown_recipe_is_refused_by_recipes(name, fragment, refused):
    refused(2, (fragment,), "deit", "recipes", name)


def test_version_is_printed(run, tmp_path):
    version = run("deit", "--version")
    assert (version.returncode, version.stdout) == (0, f"deit {deit.__version__}\n")
    assert tree(tmp_path) == {}


TAKES_A_RUN = ("evaluate", "export", "quantize", "prune", "loss-landscape")


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_names_run_folders_as_the_documentation_does(example):
    """Runs are in checkpoints/, so that the examples of the commands fit together."""
    command, *arguments = example.split()
    options = ("--from",) if command == "show-views" else ("--from", "--out")
    folders = [value for option, value in itertools.pairwise(arguments) if option in options]
    folders += arguments[:1] if command in TAKES_A_RUN else []
    for folder in folders:
        assert folder.startswith(("checkpoints/", "deit_")), example
