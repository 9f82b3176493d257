"""Weights of other projects: read, recognized or rejected."""

import json
import re
import shutil
from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import save_file

from deit.config.recipes.handwriting import digits
from deit.config.sections.init import InitConfig
from deit.config.sections.student import SIZES, StudentConfig
from deit.core.errors import CheckpointError, ConfigError
from deit.distill.student_init import init_student
from deit.models.adapt_weights import LoadedWeights
from deit.models.load_weights import infer_student_config, load_weights_from
from deit.models.parameters import classifier_names, freeze_except
from deit.models.pos_embed import resize_positions
from deit.models.registry import create_network
from deit.models.saved_student import ModelInfo, student_from_info, write_student
from deit.training.optimizer import read_tensors
from tests.helpers.errors import raises
from tests.helpers.weight_files import NAMES, load_adapted, loaded_weights, network, section


def test_timm_networks_without_prefix_positions_adapt():
    settings = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3}
    name = "deit3_small_patch16_224"  # no_embed_class
    before = timm.create_model(name, **settings, num_classes=5)
    after = timm.create_model(name, **{**settings, "img_size": 64}, num_classes=5)
    notes = load_adapted(loaded_weights(before), after)
    assert re.search(r"4 x 4\D+8 x 8", notes[0])
    expected = resize_positions(before.pos_embed, prefix=0, side=8, kernel="deit").positions
    assert torch.equal(after.pos_embed, expected)


# origins


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["deit", "vit"])
def test_student_config_is_inferred_from_shapes(kind, size):
    request = StudentConfig(name=f"{kind}_{size}", image_size=32, patch_size=8)
    result = infer_student_config(create_network(request, 5).state_dict())
    assert result == request


def test_student_config_of_other_shapes_is_none():
    odd = section(embed_dim=80, num_heads=5, num_distillation_tokens=2, patch_size=8)
    built = create_network(odd, 5)
    result = infer_student_config(built.state_dict(), heads=5)
    assert create_network(result, 5).state_dict().keys() == built.state_dict().keys()
    assert (result.embed_dim, result.num_heads, result.patch_size) == (80, 5, 8)
    assert infer_student_config(network("small_convnet", depth=None).state_dict()) is None
    deit3 = timm.create_model("deit3_small_patch16_224", depth=1)
    assert infer_student_config(deit3.state_dict()) is None


def saved(folder, seed=0, **fields):
    model_info = ModelInfo(section(**fields), NAMES, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), 1.0)
    torch.manual_seed(seed)
    student = student_from_info(model_info)
    folder.mkdir(parents=True)
    write_student(folder, student.network.state_dict(), model_info)
    return student.eval()


FORMS = {
    "official.pth": lambda weights: {"model": weights},
    "timm.pth.tar": lambda weights: {"state_dict": weights, "epoch": 3},
    "average.pth": lambda weights: {"state_dict": {}, "state_dict_ema": weights},
    "wrapped.pth": lambda weights: {"model": {f"module.{n}": v for n, v in weights.items()}},
    "compiled.pt": lambda weights: {f"_orig_mod.{n}": v for n, v in weights.items()},
    "bare.bin": lambda weights: weights,
}


@pytest.mark.parametrize("name", FORMS)
def test_load_from_weight_file_of_every_format(name, tmp_path):
    student = saved(tmp_path / "run" / "best")
    torch.save(FORMS[name](student.network.state_dict()), tmp_path / name)
    result = load_weights_from(str(tmp_path / name))
    assert result.student == section()
    assert result.class_names is None
    after = network(seed=1)
    (note,) = load_adapted(result, after)  # the classes are taken as they come
    assert re.findall(r"\d+", note) == ["5"]
    assert torch.equal(after.head_dist.weight, student.network.head_dist.weight)


def test_load_from_run_checkpoint_and_safetensors(tmp_path):
    student = saved(tmp_path / "run" / "best")
    for source in ("run", "run/best"):
        result = load_weights_from(str(tmp_path / source))
        assert (result.student, result.class_names) == (section(), NAMES)
        assert (result.mean, result.std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    result = load_weights_from(str(tmp_path / "run" / "best" / "model.safetensors"))
    assert result.student == section()
    assert torch.equal(result.weights["cls_token"], student.network.cls_token)


def test_load_from_timm_folder(tmp_path):
    settings = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 60, "num_heads": 5}
    name = "deit_tiny_distilled_patch16_224"
    expected = timm.create_model(name, num_classes=5, **settings)
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    about = {
        "architecture": name,
        "num_classes": 5,
        "model_args": settings,
        "label_names": list(NAMES),
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "num_classes": 5},
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    result = load_weights_from(str(tmp_path))
    assert result.class_names == NAMES
    assert (result.mean, result.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (result.student.num_heads, result.student.embed_dim, result.student.depth) == (5, 60, 2)
    after = create_network(result.student, 5)
    assert load_adapted(result, after) == ()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(after.eval()(images), expected.eval()(images))


def test_load_from_file_uses_model_json_next_to_it(tmp_path):
    student = saved(tmp_path / "run" / "best", embed_dim=48, num_heads=4)
    result = load_weights_from(str(tmp_path / "run" / "best" / "model.safetensors"))
    assert (result.student.num_heads, result.heads_known) == (4, True)
    save_file(student.network.state_dict(), tmp_path / "alone.safetensors")
    assert not load_weights_from(str(tmp_path / "alone.safetensors")).heads_known


def test_load_from_trainer_checkpoint_ignores_other_values(tmp_path):
    student = saved(tmp_path / "run" / "best")
    content = {"model": student.network.state_dict(), "args": Namespace(lr=1.0), "epoch": 3}
    torch.save(content, tmp_path / "official.pth")
    result = load_weights_from(str(tmp_path / "official.pth"))
    assert result.student == section()


@pytest.mark.fault("B9")
def test_load_removes_prefixes_in_any_order(tmp_path):
    student = saved(tmp_path / "run" / "best")
    for prefix in ("_orig_mod.module.", "module._orig_mod.", "module.module."):
        weights = {f"{prefix}{name}": value for name, value in student.network.state_dict().items()}
        torch.save(weights, tmp_path / "wrapped.pth")
        assert load_weights_from(str(tmp_path / "wrapped.pth")).student == section()


def test_backbone_without_heads_needs_new_heads():
    weights = {n: v for n, v in network("vit_micro").state_dict().items() if "head" not in n}
    result = LoadedWeights(weights, "a backbone", None, None, None, None)
    after = network(seed=1)
    with raises(CheckpointError, "--init.head"):
        load_adapted(result, after)
    notes = load_adapted(result, after, InitConfig(weights="here", head="new"))
    assert re.findall(r"\d+", notes[-1]) == ["5", "0"]
    assert torch.equal(after.dist_token, weights["cls_token"])


def timm_folder(folder, weights, **about):
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    name = "deit_tiny_distilled_patch16_224"
    (folder / "config.json").write_text(json.dumps({"architecture": name, **about}))
    return str(folder)


BAD_FOLDERS = {
    "a file to load": {"model_args": {"checkpoint_path": "evil.pth"}},
    "another function": {"model_args": {"act_layer": "relu"}},
    "no settings": {"model_args": [1, 2]},
    "a text of classes": {"label_names": "abcde"},
    "one class twice": {"label_names": list("aabcd")},
    "a colour of text": {"pretrained_cfg": {"mean": "abc"}},
    "no configuration": {"pretrained_cfg": "x"},
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_inconsistent_folder_raises(name, tmp_path):
    """The files and code that it names are neither loaded nor run."""
    torch.save(Runs(), tmp_path / "evil.pth")
    source = timm_folder(tmp_path / "folder", network().state_dict(), **BAD_FOLDERS[name])
    with raises(CheckpointError, source) as refused:
        load_weights_from(source)
    assert "\n" not in str(refused.value)


@pytest.mark.fault("B11")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cls_token", torch.tensor(1.0)),
        ("pos_embed", torch.zeros(3)),
        ("head.weight", torch.tensor(1.0)),
        ("norm.weight", torch.full((96,), float("nan"))),
    ],
)
def test_nonfinite_tensors_raise(name, value, tmp_path):
    save_file({**network().state_dict(), name: value}, tmp_path / "w.safetensors")
    config = digits().replace(student=section(), init={"weights": "here"})
    model_info = ModelInfo(section(), NAMES, (0.5,) * 3, (0.5,) * 3, 1.0)

    def whole():
        result = load_weights_from(str(tmp_path / "w.safetensors"))
        init_student(network(seed=1), result, config.init, model_info)

    with pytest.raises(CheckpointError):
        whole()


class Runs:
    def __reduce__(self):
        return (print, ("code ran",))


def test_invalid_source_raises_in_one_line(tmp_path, capsys):
    saved(tmp_path / "run" / "best")
    torch.save({"model": Runs()}, tmp_path / "code.pth")
    whole = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"x": torch.zeros(4000)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "run", broken)
    (broken / "best" / "model.json").write_text("{")
    expected = {
        "code.pth": ("print",),
        "cut.safetensors": ("header",),
        "cut.pth": (),
        "empty": ("best/model.safetensors", "config.json"),
        "other": ("other/config.json", "architecture"),
        "broken": ("broken/best/model.json",),
        "nowhere": ("timm",),
    }
    for name, names in expected.items():
        with raises(CheckpointError, tmp_path / name, *names) as refused:
            load_weights_from(str(tmp_path / name))
        assert "\n" not in str(refused.value)
        assert refused.value.exit_code == 4
    assert "code ran" not in capsys.readouterr().out


# what is trained


def test_freeze_except_heads():
    built = network()
    freeze_except(built, "heads")
    free = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert free == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_freeze_except_attention_and_heads():
    built = network()
    freeze_except(built, "attention")
    free = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    attention = {f"blocks.0.attn.{p}.{k}" for p in ("qkv", "proj") for k in ("weight", "bias")}
    heads = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert free == attention | heads
    with raises(ConfigError, "optim.trainable", "'attention'", "heads"):
        freeze_except(network("small_convnet", depth=None), "attention")


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit_micro", ("head", "head_dist")),
        ("vit_micro", ("head",)),
        ("small_convnet", ("head",)),
        ("rednet_micro", ("head",)),
        ("regnety_002_small_stem", ("head.fc",)),
        ("timm:resnet10t", ("fc",)),
    ],
)
def test_classifier_names_of_networks(name, heads):
    built = create_network(StudentConfig(name=name, image_size=32), 7)
    assert classifier_names(built) == heads
    assert all(built.get_submodule(head).out_features == 7 for head in heads)


def test_classifier_names_of_several_distillation_heads():
    assert classifier_names(network(num_distillation_tokens=2)) == (
        "head",
        "head_dist.0",
        "head_dist.1",
    )


def test_frozen_backbone_stays_in_evaluation_mode():
    model_info = ModelInfo(section(drop_path=0.5), NAMES, (0.5,) * 3, (0.2,) * 3, 1.0)
    student = student_from_info(model_info)
    assert student.train().network.training
    student.frozen_backbone = True
    assert not student.train().network.training
    images = torch.rand(8, 3, 16, 16)
    item, other = student(images), student(images)  # no drop path
    assert torch.equal(item.class_logits, other.class_logits)


def test_missing_blocks_raise_immediately(tmp_path):
    weights = network("deit_micro").state_dict()
    weights["blocks.99999999.norm1.weight"] = weights["blocks.0.norm1.weight"].clone()
    save_file(weights, tmp_path / "w.safetensors")
    with raises(CheckpointError, tmp_path / "w.safetensors", 99999999):
        load_weights_from(str(tmp_path / "w.safetensors"))


def test_duplicate_name_raises(tmp_path):
    weights = network("deit_micro").state_dict()
    weights["module.head.weight"] = torch.zeros_like(weights["head.weight"])
    save_file(weights, tmp_path / "w.safetensors")
    with raises(CheckpointError, tmp_path / "w.safetensors", " head.weight", "module.head.weight"):
        load_weights_from(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_values_raise(kind, tmp_path):
    weights = network("deit_micro").state_dict()
    value = weights["head.weight"]
    weights["head.weight"] = value.to_sparse() if kind == "sparse" else value.to("meta")
    torch.save(weights, tmp_path / "w.pth")
    with raises(CheckpointError, tmp_path / "w.pth", "head.weight"):
        load_weights_from(str(tmp_path / "w.pth"))


def test_empty_file_raises(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"")
    with raises(CheckpointError, tmp_path / "w.pth") as refused:
        load_weights_from(str(tmp_path / "w.pth"))
    assert "empty" in str(refused.value).replace(str(tmp_path), "")


def test_other_number_of_attention_heads_raises():
    trained = section(embed_dim=48, num_heads=4)
    built = network(embed_dim=48, num_heads=4)
    result = LoadedWeights(built.state_dict(), "a run", trained, NAMES, (0.5,) * 3, (0.5,) * 3)
    config = digits().replace(student={"image_size": 16}, init={"weights": "a run"})
    config = config.replace(student=section(embed_dim=48, num_heads=2))
    model_info = ModelInfo(config.student, NAMES, (0.5,) * 3, (0.5,) * 3, 1.0)
    with raises(CheckpointError, "a run", "--student.num_heads 4"):
        init_student(network(embed_dim=48, num_heads=2), result, config.init, model_info)


def test_unknown_normalization_is_logged():
    built = network()
    config = digits().replace(student=section(), init={"weights": "w.pth"})
    model_info = ModelInfo(config.student, NAMES, (0.1, 0.2, 0.3), (0.4,) * 3, 1.0)
    notes = init_student(built, loaded_weights(built), config.init, model_info)["notes"]
    assert any("--views.mean" in note and "0.1,0.2,0.3" in note for note in notes)


def header(text: bytes, size: int | None = None) -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text


HOSTILE = {
    "a header of 2**63 bytes": header(b"{}", 2**63),
    "a header beyond the file": header(b"{}", 10**6),
    "no JSON": header(b"{[}"),
    "overlapping": header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    + bytes(12),
    "with a hole": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}'
    )
    + bytes(12),
    "a shape too large": header(
        b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}'
    )
    + bytes(4),
    "nothing": b"",
}


@pytest.mark.fault("B14")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors_header_raises(name, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(HOSTILE[name])
    with raises(CheckpointError, path):
        load_weights_from(str(path))
    with raises(CheckpointError, path):
        read_tensors(path)
