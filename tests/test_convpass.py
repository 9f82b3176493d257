"""Convpass adapters: what they compute, that they begin as nothing, and are saved alone."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import conv2d

from deit import checkpoint, faults, journal
from deit.cli import run_command
from deit.config import Config, StudentConfig, derive
from deit.errors import CheckpointError, ConfigError, Stopped
from deit.evaluation import evaluate, student_at
from deit.export import export
from deit.landscape_options import Asked
from deit.landscape_places import places_of, surface_of, view_of
from deit.models import start
from deit.models.attention import rollout, token_cosines
from deit.models.base import BASE, Base, base_of, read_base
from deit.models.convpass import Convpass, ConvpassBlock, adapters_of
from deit.models.layers import depths_of, hold_still, trained_in
from deit.models.linear import available, use_onednn
from deit.models.masks import MASKS, read_masks
from deit.models.networks import create_network
from deit.models.saved import load_student, save_weights
from deit.models.start import find_start, saved_weights
from deit.models.student import Student
from deit.models.teachers import load_teacher
from deit.models.weights import digest_of
from deit.presets import OBJECTIVES
from deit.recipes import digits, digits_teacher
from deit.run import parts_of, train
from deit.seats import members
from deit.tuning import TUNING, begin_from
from deit.typed_json import read_typed
from deit.validation import load, validate

pytest.importorskip("sklearn")
PLACES = {"convpass": ("adapter1", "adapter2"), "convpass_attention": ("adapter1",)}
"""The adapters of a block by student.adapters."""
TINY = StudentConfig(
    name="deit_micro", image_size=12, patch_size=4, embed_dim=16, depth=2, num_heads=2
)
STUDENTS = {
    "distilled": TINY,
    "plain": replace(TINY, name="vit_micro"),
    "two distillation tokens": replace(TINY, distillation_tokens=2),
    "pruned": replace(TINY, block_heads=(1, 2), block_hidden=(5, 9)),
    "scaled": replace(TINY, initialisation="scaled"),
}


def network_of(student: StudentConfig, **fields) -> nn.Module:
    torch.manual_seed(3)
    return create_network(replace(student, **fields), 5)


def randomised(network: nn.Module) -> nn.Module:
    """With adapters as if trained, every tensor of them."""
    torch.manual_seed(4)
    for adapter in adapters_of(network).values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    return network


def images(side: int = 12, number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(5))


# The forward pass


def by_hand(adapter: Convpass, tokens: torch.Tensor, prefix: int, side: int) -> torch.Tensor:
    def gelu(x):
        return x / (1 + torch.exp(-1.702 * x))

    hidden = gelu(tokens @ adapter.down.weight.T + adapter.down.bias).transpose(1, 2)
    images = [hidden[:, :, place, None, None] for place in range(prefix)]
    images.append(hidden[:, :, prefix:].reshape(*hidden.shape[:2], side, side))
    kernel, bias = adapter.convolution.weight, adapter.convolution.bias
    mixed = [conv2d(image, kernel, bias, padding=1).flatten(2) for image in images]
    found = gelu(torch.cat(mixed, dim=2)).transpose(1, 2)
    return adapter.scale * (found @ adapter.up.weight.T + adapter.up.bias)


@pytest.mark.parametrize("prefix", [0, 1, 2, 4])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_the_forward_pass_by_hand(prefix, side):
    adapter = Convpass(7, 3, scale=0.3, prefix=prefix, drop_path=0.0).double().eval()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(2, prefix + side**2, 7, dtype=torch.float64)
    expected = by_hand(adapter, tokens, prefix, side)
    torch.testing.assert_close(adapter(tokens), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adapters", PLACES)
def test_a_block_by_hand(adapters):
    """Adapters see the normed tokens that attention and MLP see, and are added beside them."""
    network = randomised(network_of(TINY, adapters=adapters, adapter_scale=0.7)).double().eval()
    block = network.blocks[1]
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    normed = block.norm1(x)
    after = x + block.attn(normed) + by_hand(block.adapter1, normed, 2, 3)
    normed = block.norm2(after)
    expected = after + block.mlp(normed)
    if adapters == "convpass":
        expected = expected + by_hand(block.adapter2, normed, 2, 3)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_tokens_before_the_patches_mix_with_none():
    adapter = Convpass(6, 4, scale=1.0, prefix=3, drop_path=0.0).eval()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(1, 3 + 16, 6)
    before = adapter(tokens)
    for place in range(19):
        moved = tokens.clone()
        moved[:, place] += 1
        changed = (adapter(moved) != before).any(dim=2)[0].nonzero().flatten().tolist()
        row, column = divmod(place - 3, 4)
        near = [
            3 + 4 * r + c
            for r in range(max(row - 1, 0), min(row + 2, 4))
            for c in range(max(column - 1, 0), min(column + 2, 4))
        ]
        assert changed == ([place] if place < 3 else near)


def test_patches_that_are_no_square_are_refused():
    adapter = Convpass(4, 2, scale=1.0, prefix=1, drop_path=0.0)
    with pytest.raises(ConfigError, match=r"student\.adapters: convolve a square .* 8 are none"):
        adapter(torch.randn(1, 9, 4))


# How they begin


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("adapters", PLACES)
@pytest.mark.parametrize("training", [False, True])
def test_untrained_they_change_no_bit(name, adapters, training):
    plain, adapted = (network_of(STUDENTS[name], adapters=one) for one in ("none", adapters))
    ours, theirs = adapted.state_dict(), plain.state_dict()
    assert [one for one in ours if "adapter" not in one] == list(theirs)
    assert all(torch.equal(ours[one], value) for one, value in theirs.items())
    answers = [one.train(training).forward_features(images()) for one in (plain, adapted)]
    assert torch.equal(*answers)
    randomised(adapted)
    assert not torch.equal(answers[0], adapted.forward_features(images()))


@pytest.mark.parametrize("adapters", PLACES)
def test_where_they_are_and_how_they_begin(adapters):
    network = network_of(TINY, adapters=adapters, adapter_width=5, adapter_scale=4.0)
    places = [f"blocks.{block}.{one}" for block in range(2) for one in PLACES[adapters]]
    assert list(adapters_of(network)) == places
    for adapter in adapters_of(network).values():
        assert adapter.scale == 4.0
        assert adapter.dropout.p == 0.1
        assert adapter.down.weight.abs().max() <= (6 / (16 + 5)) ** 0.5
        assert adapter.down.weight.std().item() == pytest.approx((2 / (16 + 5)) ** 0.5, rel=0.25)
        kernel = torch.zeros(5, 5, 3, 3)
        kernel[range(5), range(5), 1, 1] = 1
        assert torch.equal(adapter.convolution.weight, kernel)
        for zero in (adapter.up.weight, adapter.up.bias, adapter.down.bias):
            assert not zero.any()
        assert not adapter.convolution.bias.any()
    one, other = (adapters_of(network)[place].down.weight for place in places[:2])
    assert not torch.equal(one, other)


@pytest.mark.parametrize("adapters", PLACES)
@pytest.mark.parametrize(("depth", "width", "hidden"), [(12, 768, 8), (3, 48, 5)])
def test_the_number_of_their_parameters(adapters, depth, width, hidden):
    student = StudentConfig(name="vit_base", image_size=32, embed_dim=width, depth=depth)
    with torch.device("meta"):
        network = create_network(replace(student, adapters=adapters, adapter_width=hidden), 10)
    found = sum(one.numel() for part in adapters_of(network).values() for one in part.parameters())
    of_block = len(PLACES[adapters])
    assert found == of_block * depth * ((2 * hidden + 1) * width + 9 * hidden**2 + 2 * hidden)
    if adapters == "convpass" and depth == 12:
        assert found == 327_552  # of ViT-B in the paper: 0.33 M


# Beside everything else that is done to a ViT


def test_gradients_reach_adapters_and_heads_alone():
    network = network_of(TINY, adapters="convpass")
    hold_still(network, "adapters")
    student = Student(randomised(network), mean=(0.5,) * 3, std=(0.5,) * 3)
    student.still = True
    outputs = student.train()(images())
    (outputs.class_logits.sum() + outputs.distillation_logits.square().sum()).backward()
    for name, parameter in network.named_parameters():
        moved = ".adapter" in name or name.startswith("head")
        assert (parameter.grad is not None and bool(parameter.grad.any())) == moved, name


def test_what_is_held_still_is_in_evaluation_mode_and_adapters_are_not():
    network = network_of(TINY, adapters="convpass", drop_path=0.3, dropout=0.2)
    student = Student(network, mean=(0.5,) * 3, std=(0.5,) * 3)
    student.still = True
    for trained in ("adapters", "heads"):
        hold_still(network, trained)
        student.train()
        for name, module in network.named_modules():
            assert module.training == (trained == "adapters" and ".adapter" in name), name
        student.eval()
        assert not any(module.training for module in student.modules())
    assert trained_in(network, "heads") == {
        f"{head}.{leaf}" for head in ("head", "head_dist") for leaf in ("weight", "bias")
    }


def test_with_all_trained_a_network_holds_still_what_it_does():
    network = network_of(TINY, adapters="convpass")
    network.pos_embed.requires_grad_(False)
    hold_still(network, "all")
    frozen = [name for name, one in network.named_parameters() if not one.requires_grad]
    assert frozen == ["pos_embed"]


@pytest.mark.parametrize("trained", ["adapters", "attention"])
def test_a_network_without_such_a_part(trained):
    convnet = create_network(StudentConfig(name="small_convnet", image_size=8), 5)
    with pytest.raises(ConfigError, match=f"optim.trained = '{trained}': this network has none"):
        hold_still(convnet, trained)


def test_each_branch_is_dropped_for_itself():
    network = randomised(network_of(TINY, depth=5, adapters="convpass", drop_path=0.8))
    rates = [getattr(block.adapter1.drop_path, "drop_prob", 0) for block in network.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    block = network.train().blocks[4]
    block.adapter2.eval(), block.drop_path2.eval(), block.adapter1.dropout.eval()
    tokens = torch.randn(1, 11, 16).expand(64, -1, -1)
    seen = block(tokens)
    assert len({one.sum().item() for one in seen}) == 4  # of attention and adapter either is there


def test_dropout_lies_between_the_last_two_layers():
    adapter = Convpass(6, 4, scale=1.0, prefix=0, drop_path=0.0).train()
    nn.init.ones_(adapter.up.weight)
    tokens = torch.ones(200, 1, 6)
    values = adapter(tokens)[:, 0]
    assert torch.equal(values[:, 0], values[:, 5])  # all outputs of a token hear the same channels
    assert len(values[:, 0].unique()) > 1


def test_a_copy_and_a_compiled_graph_answer_the_same():
    network = randomised(network_of(TINY, adapters="convpass")).eval()
    expected = network(images())
    assert torch.equal(copy.deepcopy(network)(images()), expected)
    whole = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(images()), expected)


def test_blocks_computed_again_give_the_same_gradients():
    network = randomised(network_of(TINY, adapters="convpass", drop_path=0.3)).train()
    hold_still(network, "adapters")
    found = []
    for again in (False, True):
        network.set_grad_checkpointing(again)
        torch.manual_seed(9)
        network.zero_grad()
        network.forward_features(images()).square().sum().backward()
        found.append({name: one.grad for name, one in network.named_parameters()})
    kept = [name for name, one in found[0].items() if one is not None]
    assert len(kept) == 4 * 6
    assert all(torch.equal(found[0][name], found[1][name]) for name in kept)


@pytest.mark.skipif(not available(), reason="no oneDNN in this torch")
def test_linear_layers_by_onednn_answer_the_same():
    network = randomised(network_of(TINY, adapters="convpass")).eval()
    other = copy.deepcopy(network)
    use_onednn(other)
    assert type(other.blocks[0].adapter1.down) is not nn.Linear
    torch.testing.assert_close(other(images()), network(images()), rtol=1e-4, atol=1e-5)


def test_what_looks_into_blocks_still_does():
    plain, adapted = (network_of(TINY, adapters=one).eval() for one in ("none", "convpass"))
    assert all(isinstance(block, ConvpassBlock) for block in adapted.blocks)
    assert torch.equal(rollout(plain, images()).maps, rollout(adapted, images()).maps)
    assert torch.equal(token_cosines(plain, images()), token_cosines(adapted, images()))
    depths = depths_of(adapted)
    assert depths["blocks.1.adapter2.up.weight"] == depths["blocks.1.attn.qkv.weight"]


# The configuration

REFUSED = {
    "a ConvNet": (
        {"student": {"name": "small_convnet", "adapters": "convpass"}},
        r"student\.adapters = 'convpass': only deit_\* and vit_\* take it",
    ),
    "width without adapters": (
        {"student": {"adapter_width": 4}},
        "adapter_width = 4: has no effect, student.adapters is 'none'",
    ),
    "scale without adapters": (
        {"student": {"adapter_scale": 1.0}},
        "adapter_scale = 1.0: has no effect, student.adapters is 'none'",
    ),
    "nothing to train": (
        {"optim": {"trained": "adapters"}, "start": {"source": "x"}},
        "optim.trained = 'adapters': there are none; give student.adapters convpass",
    ),
    "on random weights": (
        {"optim": {"trained": "adapters"}, "student": {"adapters": "convpass"}},
        "would leave the rest of the student at random weights",
    ),
    "masks of a file": (
        {
            "optim": {"trained": "adapters"},
            "student": {"adapters": "convpass"},
            "start": {"source": "x", "masks": "m.safetensors"},
        },
        r"start\.masks = 'm\.safetensors': would change weights",
    ),
    "no masks": (
        {
            "optim": {"trained": "adapters"},
            "student": {"adapters": "convpass"},
            "start": {"source": "x", "masks": "none"},
        },
        r"start\.masks = 'none': would change weights .* use keep",
    ),
    "blocks that share": (
        {"student": {"adapters": "convpass", "share": 2}},
        r"adapters = 'convpass': not for blocks that share .* start from a network whose blocks",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name):
    sections, told = REFUSED[name]
    with pytest.raises(ConfigError, match=told):
        validate(derive(digits(), **sections))


@pytest.mark.parametrize(
    ("leaf", "value"), [("adapter_width", 0), ("adapter_scale", 0), ("adapters", "lora")]
)
def test_impossible_values(leaf, value):
    with pytest.raises(ConfigError, match=f"student.{leaf}"):
        validate(derive(digits(), student={"adapters": "convpass", leaf: value}))


def test_the_papers_schedule():
    own = {"algorithm": "sgd", "momentum": 0.5, "accumulate": 2, "clip_norm": 1.0}
    before = derive(digits(), start={"source": "x"}, optim=own)
    tuned = validate(TUNING["convpass"](before))
    optim, student = tuned.optim, tuned.student
    assert (student.adapters, student.adapter_width, student.adapter_scale) == ("convpass", 8, 0.1)
    assert (optim.trained, optim.algorithm) == ("adapters", "adamw")
    assert (optim.lr, optim.lr_reference_batch, optim.min_lr) == (1e-3, None, 1e-5)
    assert optim.weight_decay == 1e-4
    assert (optim.batch_size, optim.accumulate, optim.clip_norm) == (32, 2, 1.0)
    assert optim.epochs == round(before.optim.epochs / 3)
    assert optim.warmup_epochs == pytest.approx(optim.epochs / 10)
    assert (tuned.loss, tuned.views, tuned.teacher) == (before.loss, before.views, before.teacher)
    one = derive(before, student={"adapters": "convpass_attention", "adapter_width": 3})
    assert TUNING["convpass"](one).student == one.student


def test_adapters_of_the_start_are_taken_over_and_others_stay():
    theirs = replace(TINY, adapters="convpass_attention", adapter_width=3, adapter_scale=10.0)
    own = derive(digits(), student={"adapters": "convpass"})
    found = begin_from(own, "x", theirs).student
    fields = (found.adapters, found.adapter_width, found.adapter_scale)
    assert fields == ("convpass_attention", 3, 10.0)
    assert begin_from(own, "x", TINY).student.adapters == "convpass"


# A run

SMALL = {"depth": 3, "embed_dim": 96, "num_heads": 3, "drop_path": 0.1}
EPOCHS = 2
QUICK = {"epochs": EPOCHS, "batch_size": 64, "warmup_epochs": 1, "ema_epochs": 0.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher, a student (its start), and adapters trained on it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("convpass")
    teacher = derive(digits_teacher(), optim={"epochs": 3}, data={"train_fraction": 0.2})
    train(teacher, folder / "teacher")
    train(base_config(folder), folder / "base")
    train(config_of(folder), folder / "adapted")
    return folder


def base_config(folder: Path) -> Config:
    return derive(
        digits(),
        data={"train_fraction": 0.2},
        student=SMALL,
        teacher={"source": (str(folder / "teacher"),), "allow_weak": True},
        optim=QUICK,
        run={"linear": "torch"},
    )


def config_of(folder: Path, **more: dict) -> Config:
    """Adapters on the student of the folder, taught."""
    config = TUNING["convpass"](derive(base_config(folder), start={"source": str(folder / "base")}))
    return derive(config, **{**more, "optim": {**QUICK, "lr": 5e-3, **more.get("optim", {})}})


def folders_of(run: Path) -> list[Path]:
    return [run / "best", *(path for _, path in checkpoint.found(run))]


def test_checkpoints_hold_adapters_and_heads_alone(place):
    network = load_student(place / "adapted" / "best")[0].network
    own = trained_in(network, "adapters")
    assert len(own) == 3 * 2 * 6 + 4
    whole = (place / "base" / "best" / "model.safetensors").stat().st_size
    for folder in folders_of(place / "adapted"):
        assert set(load_file(folder / "model.safetensors")) == own
        assert (folder / "model.safetensors").stat().st_size < whole / 15
        assert BASE in json.loads((folder / "manifest.json").read_text())["files"]
        assert not (folder / MASKS).exists()
    for folder in folders_of(place / "adapted")[1:]:
        assert set(load_file(folder / "average.safetensors")) == own
        moments = load_file(folder / "optimizer.safetensors")
        assert {name.partition("/")[2] for name in moments} == own
        for name, value in load_file(folder / "model.safetensors").items():
            assert value.any(), name  # of what began as zero as well


def test_what_they_belong_to_is_told(place):
    weights = load_file(place / "base" / "best" / "model.safetensors")
    expected = Base(str(place / "base"), "../base", digest_of(weights), "deit")
    assert all(read_base(folder) == expected for folder in folders_of(place / "adapted"))
    assert read_base(place / "base" / "best") is None
    assert not (place / "base" / "best" / BASE).exists()
    notes = json.loads((place / "adapted" / "start.json").read_text())
    assert notes["weights"] == expected.weights
    assert notes["notes"] == ["6 new adapters, which add nothing until they are trained"]


def test_a_saved_student_is_base_and_adapters_together(place):
    before = load_file(place / "base" / "best" / "model.safetensors")
    for name in ("best", *(path.name for path in folders_of(place / "adapted")[1:])):
        folder = place / "adapted" / name
        own = load_file(folder / "model.safetensors")
        found = load_student(folder)[0].network.state_dict()
        for key, value in found.items():
            assert torch.equal(value, own[key] if key in own else before[key]), key
        assert not torch.equal(found["head.weight"], before["head.weight"])
    best = load_student(place / "adapted" / "best")[0]
    hits = evaluate(place / "adapted")["heads"]["fused"]["top1"]
    assert hits > evaluate(place / "base")["heads"]["fused"]["top1"] - 0.1
    (member,) = members(derive(digits(), teacher={"source": (str(place / "adapted"),)}).teacher)
    names = tuple(map(str, range(10)))
    teacher = load_teacher(member, names, image_size=8)
    views = torch.rand(4, 3, 8, 8)
    heads = best.eval()(views)
    mean = (heads.class_logits.softmax(1) + heads.distillation_logits[:, 0].softmax(1)) / 2
    assert torch.equal(teacher(views).argmax(1), mean.argmax(1))


def test_a_run_trains_adapters_on_a_base_in_evaluation_mode(place):
    network = parts_of(config_of(place)).student.train().network
    training = {name for name, module in network.named_modules() if module.training}
    assert training == {name for name, _ in network.named_modules() if ".adapter" in name}


def test_a_run_begins_with_the_answers_of_its_base(place):
    began = parts_of(config_of(place)).student.eval()(images(8))
    before = load_student(place / "base" / "best")[0].eval()(images(8))
    assert torch.equal(began.class_logits, before.class_logits)
    assert torch.equal(began.distillation_logits, before.distillation_logits)


def test_old_facts_still_load(place, tmp_path):
    shutil.copytree(place / "base" / "best", tmp_path / "best")
    (tmp_path / "best" / "manifest.json").unlink()
    path = tmp_path / "best" / "model.json"
    facts = json.loads(path.read_text())
    for name in ("adapters", "adapter_width", "adapter_scale"):
        del facts["student"][name]
    path.write_text(json.dumps(facts))
    assert load_student(tmp_path / "best")[1] == load_student(place / "base" / "best")[1]


@pytest.mark.parametrize("fault", ["update:2:term", "update:5:term", "metrics:1:term"])
def test_it_resumes_to_the_bit(place, tmp_path, fault, monkeypatch):
    faults.arm(fault)
    with pytest.raises(Stopped):
        train(config_of(place), tmp_path / "run")
    faults.arm(None)
    looked_for = []
    find = start.find_base
    monkeypatch.setattr(start, "find_base", lambda *at: looked_for.append(at) or find(*at))
    train(config_of(place), tmp_path / "run", resume=True)
    assert len(looked_for) == 1  # of all files of the checkpoint: it is read and its digest taken
    ours, theirs = (checkpoint.newest(out) for out in (tmp_path / "run", place / "adapted"))
    for name in ("model", "average", "optimizer"):
        file = f"{name}.safetensors"
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    chains = [journal.read(out / journal.CHAIN) for out in (tmp_path / "run", place / "adapted")]
    assert chains[0] == chains[1]
    weights, moved = load_file(theirs / "model.safetensors"), tmp_path / "run" / "best"
    assert (moved / BASE).is_file()
    assert all(value.isfinite().all() for value in weights.values())


def moved(place: Path, to: Path, *names: str) -> None:
    for name in names:
        shutil.copytree(place / name, to / name)


def test_a_base_that_is_gone_or_another_is_refused(place, tmp_path):
    place = _copied(place, tmp_path)
    run, before = place / "adapted", place / "base" / "best"
    shutil.copytree(before, tmp_path / "kept")
    weights = load_file(before / "model.safetensors")
    weights["norm.bias"][3] += 1e-6
    (before / "manifest.json").unlink()
    save_weights(before / "model.safetensors", weights)
    for asked in (lambda: load_student(run / "best"), lambda: find_start(str(run))):
        with pytest.raises(CheckpointError, match="base holds other weights now") as told:
            asked()
        assert "\n" not in str(told.value)
        assert str(run / "best") in str(told.value)
    shutil.rmtree(place / "base")
    with pytest.raises(CheckpointError, match="base is not there any more, nor beside") as told:
        load_student(run / "best")
    assert "\n" not in str(told.value)
    with pytest.raises(CheckpointError, match="what they belong to is missing"):
        evaluate(run)
    shutil.copytree(tmp_path / "kept", place / "base" / "best")
    load_student(run / "best")


def _copied(place: Path, to: Path) -> Path:
    """Start and adapters in another folder, whose adapters know that place alone."""
    moved(place, to / "there", "base", "adapted")
    for folder in folders_of(to / "there" / "adapted"):
        base = json.loads((folder / BASE).read_text())
        (folder / BASE).write_text(json.dumps({**base, "source": str(to / "there" / "base")}))
        (folder / "manifest.json").unlink()
    return to / "there"


def test_moved_together_they_find_each_other(place, tmp_path, monkeypatch):
    there = _copied(place, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    there.rename(tmp_path / "elsewhere" / "now")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "elsewhere/now/adapted/best", Path("elsewhere/now/adapted/best")):
        found = load_student(path)[0].network.state_dict()
        expected = load_student(place / "adapted" / "best")[0].network.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    monkeypatch.chdir(tmp_path / "elsewhere/now/adapted/best")
    load_student(Path("."))


def test_moved_alone_they_find_where_it_was(place, tmp_path):
    moved(place, tmp_path / "deep" / "er", "adapted")
    load_student(tmp_path / "deep" / "er" / "adapted" / "best")


@pytest.mark.parametrize("damaged", [False, True])
def test_beside_it_another_one_may_lie(place, tmp_path, damaged):
    """That is passed over for the one at the path in full."""
    moved(place, tmp_path, "adapted", "teacher")
    (tmp_path / "teacher").rename(tmp_path / "base")
    if damaged:
        (tmp_path / "base" / "best" / "model.safetensors").write_bytes(b"cut off")
    load_student(tmp_path / "adapted" / "best")


def test_where_a_base_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    expected = Base(str(tmp_path / "base"), "../../base", "ab", "timm")
    assert base_of("base", "ab", "timm", out=Path("runs/one")) == expected
    named = Base("deit_tiny", None, "ab", "deit")
    assert base_of("deit_tiny", "ab", "deit", out=Path("x")) == named


def test_a_file_without_some_of_the_adapters_is_refused(place, tmp_path):
    there = _copied(place, tmp_path) / "adapted" / "best"
    weights = load_file(there / "model.safetensors")
    del weights["blocks.1.adapter2.up.bias"], weights["head_dist.weight"]
    save_weights(there / "model.safetensors", weights)
    with pytest.raises(CheckpointError) as told:
        load_student(there)
    for name in ("blocks.1.adapter2.up.bias", "head_dist.weight"):
        assert f"missing: {name}" in str(told.value)


def test_at_another_resolution_with_other_classes_and_tokens(place, tmp_path):
    """The base is fitted once more as it was when they were trained, and adapters with it."""
    config = config_of(
        place,
        data={"classes": ("1", "3", "7"), "image_size": 16},
        student={"image_size": 16},
        start={"heads": "new", "kernel": "timm"},
        teacher={"source": ()},
        loss=OBJECTIVES["none"],
    )
    train(config, tmp_path / "run")
    student, facts = load_student(tmp_path / "run" / "best")
    parts = parts_of(config)
    began = parts.student.network.state_dict()
    for name, value in student.network.state_dict().items():
        own = name in trained_in(student.network, "adapters")
        assert torch.equal(value, began[name]) != own, name
    assert facts.class_names == ("1", "3", "7")
    assert read_base(tmp_path / "run" / "best").kernel == "timm"
    larger, _ = student_at(place / "adapted" / "best", 16)
    assert larger.eval()(images(16)).class_logits.shape == (3, 10)


def test_adapters_upon_adapters(place, tmp_path):
    """Trained on, they begin as they were; what they belong to then is the run before."""
    start = str(place / "adapted")
    still = {"lr": 1e-12, "min_lr": 0, "warmup_lr": 0, "weight_decay": 0}
    config = begin_from(config_of(place), start, find_start(start).student)
    train(derive(config, optim=still), tmp_path / "on")
    assert read_base(tmp_path / "on" / "best").source == start
    ours, theirs = (load_student(run / "best")[0] for run in (tmp_path / "on", place / "adapted"))
    for name, value in theirs.network.state_dict().items():
        torch.testing.assert_close(ours.network.state_dict()[name], value, atol=1e-8, rtol=0)


def test_trained_adapters_keep_their_scale(place):
    """It leaves no trace in their shapes; before they are trained, any will do."""
    start, told = (
        {"source": str(place / "adapted")},
        r"scale 0\.1, .* --student\.adapter_scale 0\.1$",
    )
    for trained in ("adapters", "all"):
        other = {"student": {"adapter_scale": 0.01}, "optim": {"trained": trained}}
        with pytest.raises(CheckpointError, match=told):
            parts_of(config_of(place, start=start, **other))
    parts_of(config_of(place, start=start))
    parts_of(config_of(place, student={"adapter_scale": 0.01}))


def test_trained_with_all_the_rest_everything_is_saved(place, tmp_path):
    config = begin_from(config_of(place), str(place / "adapted"), None)
    config = derive(config, optim={"trained": "all", "epochs": 1, "warmup_epochs": 0})
    train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "best" / BASE).exists()
    weights = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert {name for name in weights if "adapter" in name}
    assert set(weights) == set(load_student(place / "adapted" / "best")[0].network.state_dict())


def test_a_pruned_base_stays_pruned(place, tmp_path):
    weights = load_file(place / "base" / "best" / "model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    masks = {name: torch.rand(weights[name].shape) > 0.5}
    save_weights(tmp_path / "m.safetensors", masks)
    start = {"source": str(place / "base"), "masks": str(tmp_path / "m.safetensors")}
    train(derive(base_config(place), start=start), tmp_path / "pruned")
    config = config_of(place, start={"source": str(tmp_path / "pruned")})
    train(config, tmp_path / "run")
    found = find_start(str(tmp_path / "run"))
    assert not found.weights[name][~masks[name]].any()
    assert torch.equal(found.masks[name], read_masks(tmp_path / "m.safetensors")[name])
    for kind in ("best", "last"):  # a landscape moves along what is kept alone
        (one,) = places_of([tmp_path / "run"], Asked(checkpoint=kind))
        assert torch.equal(one.masks()[name], masks[name])
    view = view_of([one], Asked(images=8), root=None, device=torch.device("cpu"))
    sizes = [surface_of(one, view, masked=masked).size for masked in (False, True)]
    assert sizes[0] - sizes[1] == (~masks[name]).sum()
    (plain,) = places_of([place / "adapted"], Asked())
    assert plain.masks() == {}


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_two_processes_train_and_save_the_same_part(place, zygote, tmp_path, shard):
    """Divided or not; and go on, where only the base can say what the rest was."""
    words = ["finetune", "--from", place / "base", "--tuning", "convpass", "--objective", "none"]
    words += ["--optim.epochs", "2", "--optim.ema_epochs", "1", "--run.shard", shard]
    words += ["--run.timeout", "30", "--out", tmp_path / "run"]
    two = {"processes": 2, "of_node": 2, "cwd": tmp_path}
    done = zygote.together(*words, DEIT_FAULT="metrics:1:term", **two)
    assert [one.code for one in done] == [143, 143], done[0].err + done[1].err
    done = zygote.together(*words, "--resume", **two)
    assert [one.code for one in done] == [0, 0], done[0].err + done[1].err
    folder, before = checkpoint.newest(tmp_path / "run"), find_start(str(place / "base")).weights
    network = load_student(folder)[0].network
    own = trained_in(network, "adapters")
    for file in ("model", "average"):
        assert set(load_file(folder / f"{file}.safetensors")) == own
    for name, value in network.state_dict().items():
        assert name in own or torch.equal(value, before[name]), name
    moments = load_file(folder / "optimizer.safetensors")
    assert {name.partition("/")[2] for name in moments} == own


@pytest.mark.parametrize("form", ["timm", "transformers"])
def test_formats_without_adapters_say_so(place, tmp_path, form):
    pytest.importorskip("transformers")
    told = r"student\.adapters = 'convpass': timm and transformers have none"
    with pytest.raises(ConfigError, match=told) as error:
        export(place / "adapted", tmp_path / "out", name=form)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_graphs_take_them_along(place, tmp_path, form):
    """`export` holds every answer against the original itself."""
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    out = export(place / "adapted", tmp_path / "out", name=form)
    assert (out / f"model.{form}").is_file()


@pytest.mark.parametrize("objective", ["none", "deit-hard"])
def test_the_command(place, tmp_path, objective, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--from", str(place / "base"), "--tuning", "convpass", "--objective", objective]
    words += ["--student.adapters", "convpass_attention", "--optim.epochs", "1", "--out", "run"]
    assert run_command("finetune", words, "finetune_deit.py") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "3 new adapters, which add nothing until they are trained" in said
    assert "trained   adapters only: 8,612 parameters" in said
    config = load(tmp_path / "run" / "config.json")
    assert (config.optim.trained, config.student.adapters) == ("adapters", "convpass_attention")
    assert read_typed(tmp_path / "run" / "best" / BASE, Base).weights
    weights = saved_weights(tmp_path / "run" / "best", load_student(tmp_path / "run" / "best")[1])
    assert len(weights) > len(load_file(tmp_path / "run" / "best" / "model.safetensors"))
    assert run_command("finetune", [*words, "--resume"], "finetune_deit.py") == 0
    assert "already complete" in capsys.readouterr().out
