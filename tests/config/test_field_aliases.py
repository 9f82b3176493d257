"""Wrong names of fields and options lead to the right one."""

import pytest

from deit.cli.commands import parsers
from deit.cli.grammar import SHARED, option_of
from deit.config.field_aliases import ALIASES, closest_name
from deit.config.validation import config_from_dict, field_names
from deit.core.errors import ConfigError

OPTIONS = [*field_names(), *(option_of(name)[2:] for name in SHARED)]
PARSERS = parsers()


@pytest.mark.parametrize("alias", ALIASES)
def test_alias_leads_to_existing_fields_and_is_no_field(alias):
    assert alias not in field_names()
    assert ALIASES[alias]
    assert set(ALIASES[alias]) <= set(OPTIONS)
    assert closest_name(alias.replace("_", "-").upper(), OPTIONS) == ALIASES[alias][0]


@pytest.mark.parametrize("field", field_names())
def test_field_without_its_section_or_in_a_wrong_one_leads_to_a_field_of_that_name(field):
    section, leaf = field.split(".")
    of_leaf = closest_name(leaf, OPTIONS)
    assert of_leaf == ALIASES.get(leaf, [of_leaf])[0]
    assert leaf in ALIASES or of_leaf.replace("-", "_").endswith(leaf)
    assert closest_name(field.replace("_", "-"), OPTIONS) == field
    other = "run" if section != "run" else "optim"
    if f"{other}.{leaf}" not in OPTIONS:
        assert closest_name(f"{other}.{leaf}", OPTIONS) == of_leaf


@pytest.mark.parametrize("field", field_names())
def test_field_with_a_missing_letter_leads_to_it(field):
    section, leaf = field.split(".")
    if len(leaf) > 4:
        shortened = f"{section}.{leaf[:2]}{leaf[3:]}"
        assert closest_name(shortened, OPTIONS) == field


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("optim.wd", "optim.weight_decay"),
        ("epochs", "optim.epochs"),
        ("num-epochs", "optim.epochs"),
        ("teacher-path", "teacher.source"),
        ("teacher.model", "teacher.source"),
        ("student.model", "student.name"),
        ("T", "loss.temperature"),
        ("data-path", "data.root"),
        ("no-amp", "run.precision"),
        ("rezume", "resume"),
        ("optim.learning_rat", "optim.lr"),
        ("data.num_worker", "data.num_workers"),
        ("xyzzy", None),
    ],
)
def test_closest_name_of_a_field(name, field):
    assert closest_name(name, OPTIONS) == field


@pytest.mark.parametrize(
    ("command", "name", "option"),
    [
        ("evaluate", "batch-size", "run.eval_batch_size"),
        ("evaluate", "device", "run.device"),
        ("evaluate", "data-path", "data.root"),
        ("report", "output", "out"),
        ("targets write", "epoch", "epochs"),
        ("compare", "seed", "seeds"),
        ("loss-landscape", "seeds", "seed"),
        ("predict", "topk", "top-k"),
    ],
)
def test_closest_name_of_an_option_of_a_command(command, name, option):
    known = [name[2:] for name in PARSERS[command].options]
    assert closest_name(name, known) == option


def test_configuration_with_a_name_of_another_program_names_the_field():
    with pytest.raises(ConfigError, match=r"optim.learning_rate: .*did you mean optim\.lr\?"):
        config_from_dict({"optim": {"learning_rate": 0.1}})
