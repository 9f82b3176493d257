"""Addresses given instead of files and folders raise, with a remedy."""

import pytest

from deit.cli import run_command
from deit.config.schema import Config
from deit.config.validation import validate
from deit.core.errors import CheckpointError, ConfigError, ConfigProblem, NotFoundError
from deit.core.user_code import address_hint
from deit.models.load_weights import load_weights_from
from deit.models.teacher_sources import resolve_source
from tests.helpers.errors import raises


@pytest.mark.parametrize(
    ("value", "instead"),
    [
        ("https://host/teacher.pth", "curl -LO https://host/teacher.pth"),
        ("s3://bucket/images", ""),
        ("gs://bucket/images", ""),
        ("file:///data/images", " /data/images"),
        ("hf-hub:timm/resnet18.a1_in1k", "hf download timm/resnet18.a1_in1k --local-dir DIR"),
        ("hf_hub:timm/resnet18", "hf download timm/resnet18 "),
        ("hf://timm/resnet18@main", "hf download timm/resnet18 "),
        ("https://huggingface.co/timm/resnet18", "hf download timm/resnet18 "),
        ("https://huggingface.co/timm/resnet18/resolve/main/w.bin", "curl -LO https://hugg"),
        ("local-dir:checkpoints/mine", " checkpoints/mine"),
    ],
)
def test_address_hint_of_addresses(value, instead):
    hint = address_hint(value)
    assert hint
    assert instead in hint
    assert ("curl" in hint) == ("curl" in instead)


@pytest.mark.parametrize(
    "value",
    [
        "digits",
        "mine.py:teacher",
        "/data/x.py:f",
        "C:\\data",
        "C:/data",
        "a/b:c/d",
        "timm:resnet18",
    ],
)
def test_address_hint_of_paths_and_names_is_none(value):
    assert address_hint(value) is None


COMMANDS = {
    "train": ["digits", "--teacher.source", "https://host/t.pth"],
    "train ": ["digits", "--data.root=s3://bucket/images"],
    "train  ": ["digits", "--out", "gs://bucket/run"],
    "finetune": ["digits", "--from", "file:///data/w.pth"],
    "evaluate": ["s3://bucket/run"],
    "evaluate ": ["run", "--data.root", "s3://bucket/images"],
    "predict": ["run", "https://host/cat.png"],
    "export": ["https://host/run", "--format", "onnx"],
    "report": ["https://host/run"],
    "check-data": ["s3://bucket/images"],
    "targets": ["verify", "s3://bucket/store"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_all_commands_reject_addresses(command, capsys):
    name, arguments = command.strip(), COMMANDS[command]
    assert run_command(name, arguments, f"deit {name}") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("deit: error: ")
    address = next(word.rpartition("=")[2] for word in arguments if ":/" in word)
    assert f"{address}: {address_hint(address)}" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "field", ["data.root", "data.exclude_list", "init.pruning_masks", "teacher.target_stores"]
)
def test_config_with_addresses_raises(field):
    section, leaf = field.split(".")
    address = "s3://bucket/x"
    value = (address,) if leaf == "targets" else address
    with raises(ConfigError, field, f"'{address}'") as refused:
        validate(Config().replace(**{section: {leaf: value}}))
    assert ConfigProblem(field, address, address_hint(address)) in refused.value.problems


def test_hub_repository_is_loaded_by_timm(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = "hf-hub:timm/test_vit.r160_in1k"
    validate(Config().replace(teacher={"source": (source,)}, init={"weights": source}))
    assert resolve_source(source) == "timm"
    with raises(CheckpointError, source, "hf download timm/test_vit.r160_in1k "):
        load_weights_from(source)
    with raises(NotFoundError, "teacher.source", "curl -LO https://host/teacher.pth"):
        resolve_source("https://host/teacher.pth")
