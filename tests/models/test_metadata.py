"""The metadata next to the weights of a student: base.json."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deit.config.sections.student import StudentConfig
from deit.core.errors import CheckpointError
from deit.models.load_weights import load_weights_from
from deit.models.metadata import BASE, AdapterBase, ModelInfo, base_of, save_base
from deit.models.parameters import trainable_parameters
from deit.models.registry import create_network
from deit.models.saved_student import load_student, save_weights, write_student
from deit.models.weight_files import digest_of
from tests.helpers.errors import raises


@pytest.fixture
def adapted(tmp_path):
    """Return the folder of saved adapters; the folder of their base is ../../base/best."""
    student = StudentConfig("deit_micro", image_size=8, depth=1, embed_dim=16, num_heads=2)
    info = ModelInfo(student, ("cat", "dog"), (0.5,) * 3, (0.25,) * 3, 1.0)
    base, folder = tmp_path / "base" / "best", tmp_path / "run" / "best"
    for path in (base, folder):
        path.mkdir(parents=True)
    write_student(base, create_network(student, 2).state_dict(), info)
    student = replace(student, adapters="convpass")
    network = create_network(student, 2)
    names = trainable_parameters(network, "adapters")
    trained = {name: value for name, value in network.state_dict().items() if name in names}
    write_student(folder, trained, replace(info, student=student))
    digest = digest_of(load_weights_from(str(base)).weights)
    save_base(folder, base_of(str(base.parent), digest, "deit", out=folder.parent))
    return folder


def test_base_of_source_has_absolute_and_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    expected = AdapterBase(str(tmp_path / "base"), "../../base", "ab", "timm")
    assert base_of("base", "ab", "timm", out=Path("runs/one")) == expected
    named = AdapterBase("deit_tiny", None, "ab", "deit")
    assert base_of("deit_tiny", "ab", "deit", out=Path("x")) == named


@pytest.mark.parametrize("read", [load_student, lambda folder: load_weights_from(str(folder))])
def test_base_of_other_weights_raises(read, adapted):
    file = adapted / "model.safetensors"
    complete = load_student(adapted)[0].network.state_dict()
    assert len(load_file(file)) < len(complete)
    save_weights(file, {**load_file(file), "blocks.0.norm1.weight": torch.zeros(16)})
    with raises(CheckpointError, file, "blocks.0.norm1.weight"):
        read(adapted)
    save_weights(file, complete)
    with raises(CheckpointError, file, "remove the base.json"):
        read(adapted)
    save_base(adapted, base_of(str(adapted.parent), "ab", "deit", out=adapted.parent))
    with raises(CheckpointError, adapted, "was not found"):
        read(adapted)
    without_adapters = adapted.parents[1] / "base" / "best"
    shutil.copy(adapted / BASE, without_adapters / BASE)
    with raises(CheckpointError, without_adapters / BASE, "remove"):
        read(without_adapters)
