"""What a student starts from: positions resized, tokens put in and left out, heads by name."""

import json
import re
import shutil
from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from deit.config.recipes.handwriting import digits
from deit.config.student_section import SIZES, InitConfig, StudentConfig
from deit.core.errors import CheckpointError, ConfigError
from deit.core.types import logits_by_head
from deit.distill.student_init import init_student
from deit.models.adapt_weights import LoadedWeights, adapt_weights
from deit.models.load_weights import infer_student_config, load_weights_from
from deit.models.networks import create_network
from deit.models.parameters import classifier_names, freeze_except
from deit.models.pos_embed import resize_positions
from deit.models.saved import ModelInfo, build_student, save_student
from deit.models.weight_files import load_weights
from deit.training.optimizer import read_tensors
from tests.helpers.errors import raises

KEEP = InitConfig(weights="here")
NAMES = tuple("abcde")


def section(name="deit_micro", **fields):
    return StudentConfig(name=name, **{"depth": 1, "image_size": 16, **fields})


def network(name="deit_micro", classes=5, seed=0, **fields):
    torch.manual_seed(seed)
    built = create_network(section(name, **fields), classes)
    for parameter in built.parameters():  # the heads' biases and more begin at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return built.eval()


def found_in(built, names=NAMES):
    return LoadedWeights(built.state_dict(), "a network", None, names, None, None)


def fitted(found, built, start=KEEP, names=NAMES):
    result = adapt_weights(found, built, names, start)
    load_weights(built, result.weights, origin="here")
    return result.notes


# positions


@pytest.mark.parametrize("prefix", [0, 1, 2, 4])
@pytest.mark.parametrize("side", [3, 6, 9])
def test_resizing_keeps_the_prefix_to_the_bit(prefix, side):
    positions = torch.randn(1, prefix + 16, 8)
    found = resize_positions(positions, prefix=prefix, side=side, kernel="deit")
    assert found.positions.shape == (1, prefix + side**2, 8)
    assert torch.equal(found.positions[:, :prefix], positions[:, :prefix])
    assert found.sides == (4, side)
    before, after = (p[:, prefix:].norm(dim=-1).mean().item() for p in (positions, found.positions))
    assert found.norms == pytest.approx((before, after))


def test_the_same_size_is_left_to_the_bit():
    positions = torch.randn(1, 18, 8)
    assert torch.equal(
        resize_positions(positions, prefix=2, side=4, kernel="deit").positions, positions
    )


@pytest.mark.parametrize("side", [3, 7, 12])
def test_timms_kernel_is_timms(side):
    positions = torch.randn(1, 18, 8)
    ours = resize_positions(positions, prefix=2, side=side, kernel="timm").positions
    theirs = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=2)
    assert torch.equal(ours, theirs)
    other = resize_positions(positions, prefix=2, side=side, kernel="deit").positions
    assert not torch.allclose(ours, other, atol=1e-2)


def test_deits_kernel_is_the_cubic_convolution_by_hand():
    """Keys' kernel with a = -0.75 at the centres of the new pixels, edges repeated."""

    def weight(distance, a=-0.75):
        d = abs(distance)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    before, after = 4, 6
    matrix = torch.zeros(after, before)
    for new in range(after):
        centre = (new + 0.5) * before / after - 0.5
        first = int(torch.tensor(centre).floor())
        for place in range(first - 1, first + 3):
            matrix[new, min(max(place, 0), before - 1)] += weight(centre - place)
    grid = torch.randn(before, before)
    expected = matrix @ grid @ matrix.T
    positions = grid.reshape(1, before**2, 1)
    found = resize_positions(positions, prefix=0, side=after, kernel="deit").positions
    torch.testing.assert_close(found.reshape(after, after), expected, atol=1e-5, rtol=0)


def test_a_constant_stays_and_a_wrong_prefix_is_refused():
    positions = torch.ones(1, 18, 3)
    found = resize_positions(positions, prefix=2, side=5, kernel="deit")
    torch.testing.assert_close(found.positions, torch.ones(1, 27, 3))
    for prefix in (1, 3, 18):
        with raises(CheckpointError, "pos_embed", 18):
            resize_positions(positions, prefix=prefix, side=5, kernel="deit")


# fitting


def test_the_same_network_is_taken_over_to_the_bit():
    before, after = network(seed=0), network(seed=1)
    assert fitted(found_in(before), after) == ()
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value)


@pytest.mark.parametrize("kernel", ["deit", "timm"])
def test_another_resolution_resizes_the_positions_and_nothing_else(kernel):
    before, after = network(seed=0), network(seed=1, image_size=24)
    notes = fitted(found_in(before), after, InitConfig(weights="here", pos_embed_resize=kernel))
    assert len(notes) == 1
    assert re.search(rf"4 x 4\D+6 x 6.*{kernel}", notes[0])
    theirs = after.state_dict()
    for name, value in before.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(theirs[name], value)
    assert torch.equal(theirs["pos_embed"][:, :2], before.pos_embed[:, :2])
    expected = resize_positions(before.pos_embed, prefix=2, side=6, kernel=kernel).positions
    assert torch.equal(theirs["pos_embed"], expected)


def test_a_plain_vit_becomes_a_distilled_student_and_back():
    plain, student, again = network("vit_micro"), network(seed=1), network("vit_micro", seed=2)
    (note,) = fitted(found_in(plain), student)
    assert "1 distillation token" in note
    assert torch.equal(student.dist_token, plain.cls_token)
    assert torch.equal(student.pos_embed[:, 0], plain.pos_embed[:, 0])
    assert torch.equal(student.pos_embed[:, 1], plain.pos_embed[:, 0])
    assert torch.equal(student.pos_embed[:, 2:], plain.pos_embed[:, 1:])
    assert torch.equal(student.head_dist.weight, plain.head.weight)
    # Two equal tokens at one place: both heads answer the same.
    tokens = student.forward_features(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1])
    (note,) = fitted(found_in(student), again)
    assert "1 distillation token" in note
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(plain(images), again(images))


@pytest.mark.parametrize(("tokens", "into"), [(1, 3), (3, 1), (2, 3), (3, 2)])
def test_distillation_tokens_of_another_number(tokens, into):
    before = network(num_distillation_tokens=tokens)
    after = network(num_distillation_tokens=into, seed=1)
    fitted(found_in(before), after)
    kept = min(tokens, into)
    assert torch.equal(after.dist_token[:, :kept], before.dist_token[:, :kept])
    assert torch.equal(after.pos_embed[:, : 1 + kept], before.pos_embed[:, : 1 + kept])
    assert torch.equal(after.pos_embed[:, 1 + into :], before.pos_embed[:, 1 + tokens :])
    for added in range(kept, into):
        assert torch.equal(after.dist_token[:, added], before.cls_token[:, 0])

    def heads(built):
        return [built.state_dict()[f"{name}.weight"] for name in classifier_names(built)]

    for ours, theirs in zip(heads(after)[: 1 + kept], heads(before)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["deit_micro", "vit_micro", "small_convnet", "rednet_micro"])
def test_class_rows_are_found_by_name(name):
    size = {} if "_micro" in name and name != "rednet_micro" else {"depth": None}
    before = network(name, classes=5, **size)
    after = network(name, classes=3, seed=1, **size)
    (note,) = fitted(found_in(before), after, names=("e", "a", "c"))
    assert re.findall(r"\d+", note) == ["3", "5"]
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(after(images), before(images)[:, [4, 0, 2]])


@pytest.mark.fault("B7")
def test_other_classes_are_refused_unless_new_heads_are_asked_for():
    before, after = network(classes=5), network(classes=3, seed=1)
    with raises(CheckpointError, "'x'", "--init.head"):
        fitted(found_in(before), after, names=("a", "b", "x"))
    with raises(CheckpointError, "--init.head") as refused:
        fitted(found_in(before, names=None), after, names=("a", "b", "c"))
    assert re.findall(r"\d+", str(refused.value)) == ["5", "3"]
    random = {
        name: after.state_dict()[f"{name}.weight"].clone() for name in classifier_names(after)
    }
    new = InitConfig(weights="here", head="new")
    (note,) = fitted(found_in(before), after, new, names=("a", "b", "x"))
    assert re.findall(r"\d+", note) == ["3", "5", "2"]
    for name, value in random.items():
        assert torch.equal(after.state_dict()[f"{name}.weight"], value)
    assert torch.equal(after.blocks[0].mlp.fc1.weight, before.blocks[0].mlp.fc1.weight)


def test_nameless_classes_of_the_same_number_are_taken_and_told():
    (note,) = fitted(found_in(network(), names=None), network(seed=1))
    assert re.findall(r"\d+", note) == ["5"]


@pytest.mark.fault("B6")
def test_what_does_not_fit_is_listed_before_anything_is_copied():
    after = network(seed=1, embed_dim=48, num_heads=3)
    before = {name: value.clone() for name, value in after.state_dict().items()}
    with raises(CheckpointError, "here", "cls_token", (1, 1, 96), (1, 1, 48), 11) as refused:
        fitted(found_in(network()), after)
    assert len(str(refused.value).splitlines()) == 12  # ten differences and how many more
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.items())


@pytest.mark.fault("B6")
@pytest.mark.parametrize("other", ["small_convnet", "rednet_micro"])
def test_another_kind_of_network_is_refused(other):
    after = network(other, depth=None, seed=1)
    with raises(CheckpointError, "here", next(iter(after.state_dict()))):
        fitted(found_in(network()), after)


def test_half_precision_weights_are_taken_in_the_networks_precision():
    before, after = network().half(), network(seed=1)
    fitted(found_in(before), after)
    assert after.cls_token.dtype == torch.float32
    assert torch.equal(after.cls_token, before.cls_token.float())


def test_timms_networks_without_positions_for_their_tokens():
    settings = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3}
    name = "deit3_small_patch16_224"  # no_embed_class
    before = timm.create_model(name, **settings, num_classes=5)
    after = timm.create_model(name, **{**settings, "img_size": 64}, num_classes=5)
    notes = fitted(found_in(before), after)
    assert re.search(r"4 x 4\D+8 x 8", notes[0])
    expected = resize_positions(before.pos_embed, prefix=0, side=8, kernel="deit").positions
    assert torch.equal(after.pos_embed, expected)


# origins


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["deit", "vit"])
def test_the_network_is_read_from_the_shapes(kind, size):
    wanted = StudentConfig(name=f"{kind}_{size}", image_size=32, patch_size=8)
    found = infer_student_config(create_network(wanted, 5).state_dict())
    assert found == wanted


def test_other_shapes_are_told_apart():
    odd = section(embed_dim=80, num_heads=5, num_distillation_tokens=2, patch_size=8)
    built = create_network(odd, 5)
    found = infer_student_config(built.state_dict(), heads=5)
    assert create_network(found, 5).state_dict().keys() == built.state_dict().keys()
    assert (found.embed_dim, found.num_heads, found.patch_size) == (80, 5, 8)
    assert infer_student_config(network("small_convnet", depth=None).state_dict()) is None
    deit3 = timm.create_model("deit3_small_patch16_224", depth=1)
    assert infer_student_config(deit3.state_dict()) is None


def saved(folder, seed=0, **fields):
    facts = ModelInfo(section(**fields), NAMES, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), 1.0)
    torch.manual_seed(seed)
    student = build_student(facts)
    folder.mkdir(parents=True)
    save_student(folder, student.network.state_dict(), facts)
    return student.eval()


def answers(student, images):
    with torch.no_grad():
        return logits_by_head(student(images))


FORMS = {
    "official.pth": lambda weights: {"model": weights},
    "timm.pth.tar": lambda weights: {"state_dict": weights, "epoch": 3},
    "average.pth": lambda weights: {"state_dict": {}, "state_dict_ema": weights},
    "wrapped.pth": lambda weights: {"model": {f"module.{n}": v for n, v in weights.items()}},
    "compiled.pt": lambda weights: {f"_orig_mod.{n}": v for n, v in weights.items()},
    "bare.bin": lambda weights: weights,
}


@pytest.mark.parametrize("name", FORMS)
def test_weight_files_of_every_form(name, tmp_path):
    student = saved(tmp_path / "run" / "best")
    torch.save(FORMS[name](student.network.state_dict()), tmp_path / name)
    found = load_weights_from(str(tmp_path / name))
    assert found.student == section()
    assert found.class_names is None
    after = network(seed=1)
    (note,) = fitted(found, after)  # the classes are taken as they come
    assert re.findall(r"\d+", note) == ["5"]
    assert torch.equal(after.head_dist.weight, student.network.head_dist.weight)


def test_a_run_a_checkpoint_and_a_safetensors_file(tmp_path):
    student = saved(tmp_path / "run" / "best")
    for source in ("run", "run/best"):
        found = load_weights_from(str(tmp_path / source))
        assert (found.student, found.class_names) == (section(), NAMES)
        assert (found.mean, found.std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    found = load_weights_from(str(tmp_path / "run" / "best" / "model.safetensors"))
    assert found.student == section()
    assert torch.equal(found.weights["cls_token"], student.network.cls_token)


def test_a_timm_folder(tmp_path):
    settings = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 60, "num_heads": 5}
    name = "deit_tiny_distilled_patch16_224"
    theirs = timm.create_model(name, num_classes=5, **settings)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    about = {
        "architecture": name,
        "num_classes": 5,
        "model_args": settings,
        "label_names": list(NAMES),
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "num_classes": 5},
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    found = load_weights_from(str(tmp_path))
    assert found.class_names == NAMES
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (found.student.num_heads, found.student.embed_dim, found.student.depth) == (5, 60, 2)
    after = create_network(found.student, 5)
    assert fitted(found, after) == ()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(after.eval()(images), theirs.eval()(images))


def test_the_numbers_beside_a_file_are_believed(tmp_path):
    student = saved(tmp_path / "run" / "best", embed_dim=48, num_heads=4)
    found = load_weights_from(str(tmp_path / "run" / "best" / "model.safetensors"))
    assert (found.student.num_heads, found.heads_known) == (4, True)
    save_file(student.network.state_dict(), tmp_path / "alone.safetensors")
    assert not load_weights_from(str(tmp_path / "alone.safetensors")).heads_known


def test_what_training_scripts_save_beside_the_weights_does_no_harm(tmp_path):
    student = saved(tmp_path / "run" / "best")
    content = {"model": student.network.state_dict(), "args": Namespace(lr=1.0), "epoch": 3}
    torch.save(content, tmp_path / "official.pth")
    found = load_weights_from(str(tmp_path / "official.pth"))
    assert found.student == section()


@pytest.mark.fault("B9")
def test_prefixes_in_any_order(tmp_path):
    student = saved(tmp_path / "run" / "best")
    for prefix in ("_orig_mod.module.", "module._orig_mod.", "module.module."):
        weights = {f"{prefix}{name}": value for name, value in student.network.state_dict().items()}
        torch.save(weights, tmp_path / "wrapped.pth")
        assert load_weights_from(str(tmp_path / "wrapped.pth")).student == section()


def test_a_backbone_without_heads_gets_new_ones_if_asked():
    weights = {n: v for n, v in network("vit_micro").state_dict().items() if "head" not in n}
    found = LoadedWeights(weights, "a backbone", None, None, None, None)
    after = network(seed=1)
    with raises(CheckpointError, "--init.head"):
        fitted(found, after)
    notes = fitted(found, after, InitConfig(weights="here", head="new"))
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
def test_a_foreign_folder_is_refused_not_believed(name, tmp_path):
    """What it names is neither loaded nor run; torch.load of the file would fail loudly."""
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
def test_damaged_tensors_are_refused(name, value, tmp_path):
    save_file({**network().state_dict(), name: value}, tmp_path / "w.safetensors")
    config = digits().replace(student=section(), init={"weights": "here"})
    facts = ModelInfo(section(), NAMES, (0.5,) * 3, (0.5,) * 3, 1.0)

    def whole():
        found = load_weights_from(str(tmp_path / "w.safetensors"))
        init_student(network(seed=1), found, config, facts)

    with pytest.raises(CheckpointError):
        whole()


class Runs:
    def __reduce__(self):
        return (print, ("code ran",))


def test_bad_starts_are_refused_in_one_line(tmp_path, capsys):
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


def test_holding_still_all_but_the_heads():
    built = network()
    freeze_except(built, "heads")
    free = {name for name, one in built.named_parameters() if one.requires_grad}
    assert free == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_holding_still_all_but_attention_and_heads():
    built = network()
    freeze_except(built, "attention")
    free = {name for name, one in built.named_parameters() if one.requires_grad}
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
def test_heads_by_name(name, heads):
    built = create_network(StudentConfig(name=name, image_size=32), 7)
    assert classifier_names(built) == heads
    assert all(built.get_submodule(head).out_features == 7 for head in heads)


def test_several_distillation_heads_by_name():
    assert classifier_names(network(num_distillation_tokens=2)) == (
        "head",
        "head_dist.0",
        "head_dist.1",
    )


def test_a_still_student_stays_in_evaluation_mode():
    facts = ModelInfo(section(drop_path=0.5), NAMES, (0.5,) * 3, (0.2,) * 3, 1.0)
    student = build_student(facts)
    assert student.train().network.training
    student.frozen_backbone = True
    assert not student.train().network.training
    images = torch.rand(8, 3, 16, 16)
    one, other = student(images), student(images)  # no drop path
    assert torch.equal(one.class_logits, other.class_logits)


def test_a_block_far_beyond_the_others_is_refused_at_once(tmp_path):
    weights = network("deit_micro").state_dict()
    weights["blocks.99999999.norm1.weight"] = weights["blocks.0.norm1.weight"].clone()
    save_file(weights, tmp_path / "w.safetensors")
    with raises(CheckpointError, tmp_path / "w.safetensors", 99999999):
        load_weights_from(str(tmp_path / "w.safetensors"))


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    weights = network("deit_micro").state_dict()
    weights["module.head.weight"] = torch.zeros_like(weights["head.weight"])
    save_file(weights, tmp_path / "w.safetensors")
    with raises(CheckpointError, tmp_path / "w.safetensors", " head.weight", "module.head.weight"):
        load_weights_from(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_plain_numbers_are_refused(kind, tmp_path):
    weights = network("deit_micro").state_dict()
    value = weights["head.weight"]
    weights["head.weight"] = value.to_sparse() if kind == "sparse" else value.to("meta")
    torch.save(weights, tmp_path / "w.pth")
    with raises(CheckpointError, tmp_path / "w.pth", "head.weight"):
        load_weights_from(str(tmp_path / "w.pth"))


def test_an_empty_file_is_called_so(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"")
    with raises(CheckpointError, tmp_path / "w.pth") as refused:
        load_weights_from(str(tmp_path / "w.pth"))
    assert "empty" in str(refused.value).replace(str(tmp_path), "")


def test_another_number_of_attention_heads_is_refused():
    own = section(embed_dim=48, num_heads=4)
    built = network(embed_dim=48, num_heads=4)
    found = LoadedWeights(built.state_dict(), "a run", own, NAMES, (0.5,) * 3, (0.5,) * 3)
    config = digits().replace(student={"image_size": 16}, init={"weights": "a run"})
    config = config.replace(student=section(embed_dim=48, num_heads=2))
    facts = ModelInfo(config.student, NAMES, (0.5,) * 3, (0.5,) * 3, 1.0)
    with raises(CheckpointError, "a run", "--student.num_heads 4"):
        init_student(network(embed_dim=48, num_heads=2), found, config, facts)


def test_a_normalisation_that_is_not_told_is_named():
    built = network()
    config = digits().replace(student=section(), init={"weights": "w.pth"})
    facts = ModelInfo(config.student, NAMES, (0.1, 0.2, 0.3), (0.4,) * 3, 1.0)
    notes = init_student(built, found_in(built), config, facts)["notes"]
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
def test_hostile_headers_of_safetensors_are_refused(name, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(HOSTILE[name])
    with raises(CheckpointError, path):
        load_weights_from(str(path))
    with raises(CheckpointError, path):
        read_tensors(path)
