"""Cost of networks: arithmetic by hand, by papers and by other counters; memory; speed."""

import copy
import re
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deit.config.sections.student import StudentConfig
from deit.models import cost as cost_module
from deit.models.cost import cost_of, macs_of_image
from deit.models.memory_format import set_memory_format
from deit.models.onednn_linear import available, use_onednn
from deit.models.rednet import DEPTHS, RedNet
from deit.models.registry import create_network
from deit.models.student import Student
from deit.models.surgery.pruning_masks import all_ones, apply, prunable
from deit.models.surgery.token_merging import with_merging

FVCORE = {
    "resnet18": (224, 1_814_073_344),
    "resnet50": (224, 4_089_184_256),
    "resnext50_32x4d": (224, 4_230_479_872),
    "convnext_tiny": (224, 4_455_531_264),
    "mobilenetv3_large_100": (224, 216_589_760),
    "efficientnet_b0": (224, 385_814_752),
    "mixer_b16_224": (224, 12_601_767_936),
    "swin_tiny_patch4_window7_224": (224, 4_490_566_656),
    "vit_small_patch16_224": (224, 4_598_882_304),
    "deit_tiny_distilled_patch16_224": (224, 1_261_003_776),
    "xcit_nano_12_p16_224": (224, 550_952_448),
    "pit_ti_distilled_224": (224, 704_967_680),
    "test_vit3": (160, 94_051_200),
}
"""Side [px] and multiply-accumulates of networks of timm 1.0.31, as fvcore 0.1.5.post20221221
counts their operators conv, linear, matmul, bmm and einsum, attention not fused. As in the papers:
ResNeXt-50 (32 x 4d) 4.2 (Xie et al. 2017), ConvNeXt-T 4.5 (Liu et al. 2022), MobileNetV3 0.219
(Howard et al. 2019), EfficientNet-B0 0.39 (Tan and Le 2019), Swin-T 4.5 (Liu et al. 2021), ViT-S
4.6 and DeiT-Ti 1.3 (Touvron et al. 2021)."""


@pytest.mark.parametrize("name", FVCORE)
def test_macs_of_timm_networks_match_second_counter(name, capsys):
    side, expected = FVCORE[name]
    with torch.device("meta"):  # nothing is computed
        network = timm.create_model(name).eval()
        assert macs_of_image(network, torch.empty(1, 3, side, side)) == expected
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("depth", "published"), [("26", 1.7), ("50", 2.7)])
def test_macs_of_rednets_match_paper(depth, published):
    """Li et al. 2021, Table 3, to one decimal; they also count normalization."""
    network = RedNet(1000, depths=DEPTHS[depth]).eval()
    gmacs = macs_of_image(network, torch.rand(1, 3, 224, 224)) / 1e9
    assert published - 0.06 < gmacs < published


def test_macs_of_vit_by_hand():
    """Patch embedding, and in each block qkv, attention, projection and MLP."""
    student = StudentConfig(name="deit_micro", image_size=32, patch_size=8, depth=3)
    network = create_network(student, 10)
    width, tokens = 96, 18
    block = tokens * 3 * width**2 + 2 * tokens**2 * width + tokens * width**2
    block += 2 * tokens * 4 * width**2
    macs = 16 * 3 * 64 * width + 3 * block + 2 * width * 10
    cost = cost_of(network, side=32, batch=4)
    assert cost.gmacs == macs / 1e9
    assert cost.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert cost.spread[0] <= cost.images_per_s <= cost.spread[1]


# A second counter: torch's, which counts operations and decomposes attention.

SMALL = StudentConfig(name="deit_micro", image_size=16, patch_size=4, embed_dim=24, depth=2)
STUDENTS = {
    "deit": SMALL,
    "vit": replace(SMALL, name="vit_micro"),
    "tokens": replace(SMALL, num_distillation_tokens=3),
    "slim": replace(SMALL, heads_per_block=(2, 1), mlp_hidden_per_block=(32, 3)),
    "share": replace(SMALL, shared_block_size=2),
    "convpass": replace(SMALL, adapters="convpass"),
    "rounding": replace(SMALL, qat="int8"),
    "share, convpass and rounding": replace(
        SMALL, shared_block_size=2, adapters="convpass_attention", qat="int8"
    ),
    "dense": StudentConfig(name="dense", image_size=16),
    "convnet": StudentConfig(name="small_convnet", image_size=16),
    "regnety": StudentConfig(name="regnety_002_small_stem", image_size=16),
    "timm": StudentConfig(name="timm:test_convnext", image_size=64),
}


def _masked(network: nn.Module) -> None:
    apply({name: ~mask for name, mask in all_ones(prunable(network)).items()}, network)


VARIANTS = {
    "as it is": lambda network: None,
    "masked": _masked,
    "channels last": lambda network: set_memory_format(network, "channels_last"),
    "attention by products": lambda network: [
        setattr(module, "fused_attn", False) for module in network.modules()
    ],
}
if available():
    VARIANTS["oneDNN"] = use_onednn


def counted_by_torch(network: nn.Module, image: torch.Tensor) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        network(image)
    return counted.get_total_flops() // 2


@pytest.mark.parametrize("name", STUDENTS)
def test_macs_of_students_match_second_counter(name, capsys):
    student = STUDENTS[name]
    built = Student(create_network(student, 5), mean=(0.5,) * 3, std=(0.5,) * 3)
    built.eval().requires_grad_(False)
    image = torch.rand(1, 3, student.image_size, student.image_size)
    expected = counted_by_torch(built, image)
    for way in VARIANTS:
        other = copy.deepcopy(built)
        VARIANTS[way](other.network)
        assert macs_of_image(other, image) == expected > 0, way
    assert not capsys.readouterr().err


@pytest.mark.parametrize("numbers", [0, 3, (4, 0)])
def test_macs_with_token_merging_match_second_counter(numbers, capsys):
    network = create_network(SMALL, 5).eval().requires_grad_(False)
    merging = with_merging(network, numbers)
    image = torch.rand(1, 3, 16, 16)
    assert macs_of_image(merging, image) == counted_by_torch(merging, image)
    assert not capsys.readouterr().err


class Layer(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 8))
        self.of = of

    def forward(self, images):
        return self.of(images[0, 0], self.weight)  # 8 x 8 both


@pytest.mark.parametrize(
    ("of", "macs"),
    [
        (lambda a, b: a @ b, 8**3),
        (lambda a, b: a @ b[0], 8**2),
        (lambda a, b: a[0] @ b[0], 8),
        (lambda a, b: torch.einsum("i j, k j -> i k", a, b), 8**3),
        (lambda a, b: torch.einsum("i j, i j -> i", a, b), 8**2),
        (lambda a, b: torch.addmm(a, a, b), 8**3),
        (lambda a, b: torch.baddbmm(a[None], a[None], b[None]), 8**3),
        (lambda a, b: nn.functional.linear(a, b[:3]), 8 * 8 * 3),
        (lambda a, b: nn.functional.conv1d(a[None], b[:, :4, None], groups=2), 8 * 8 * 4),
        (lambda a, b: nn.functional.conv_transpose1d(a[None], b[:, :3, None]), 8 * 8 * 3),
        (lambda a, b: nn.functional.scaled_dot_product_attention(a[:5], b, b[:, :6]), 5 * 8 * 14),
        (lambda a, b: a * b + b, 0),
        (lambda a, b: torch.cat([a, b]), 0),
    ],
)
def test_macs_of_operations_by_hand(of, macs, capsys):
    assert macs_of_image(Layer(of), torch.rand(1, 3, 8, 8)) == macs
    assert not capsys.readouterr().err


def test_macs_of_fused_torch_layers_are_counted():
    """The fast path of an encoder layer, and recurrent layers."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    tokens = 8
    expected = 4 * tokens * 8**2 + 2 * tokens**2 * 8 + 2 * tokens * 8 * 16
    assert macs_of_image(nn.Sequential(nn.Flatten(0, 1), encoder), torch.rand(1, 3, 8, 8)) == (
        3 * expected
    )
    assert torch.backends.mha.get_fastpath_enabled()
    lstm = nn.LSTM(8, 4, num_layers=2, bidirectional=True, batch_first=True)
    expected = 24 * 2 * 2 * 4 * 4 * (8 + 4)  # steps, layers, directions, gates, units, inputs
    assert macs_of_image(nn.Sequential(nn.Flatten(0, 1), lstm), torch.rand(1, 3, 8, 8)) == expected


def test_unknown_products_are_warned_about(capsys):
    """Products of another library or a later version of PyTorch are not missed silently."""
    operators = torch.library.Library("deit_test", "FRAGMENT")
    operators.define("mixed(Tensor a, Tensor b) -> Tensor")
    operators.impl("mixed", lambda a, b: a.clone(), "CPU")
    layer = Layer(lambda a, b: torch.ops.deit_test.mixed(a @ b, b))
    assert macs_of_image(layer, torch.rand(1, 3, 8, 8)) == 8**3
    assert re.fullmatch(
        r"deit: warning: .*\bLayer\b.*\bdeit_test::mixed\b.*\n", capsys.readouterr().err
    )


# memory and speed


def test_memory_is_weights_plus_peak_activations():
    class Chain(nn.Module):
        """Allocates tensors of the input's size, at most two at the same time, for any depth."""

        def __init__(self, depth):
            super().__init__()
            self.depth = depth
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, images):
            for _ in range(self.depth):
                images = images + 1
            return images

    size = 2 * 3 * 16 * 16 * 4
    for depth in (2, 9):
        cost = cost_of(Chain(depth), side=16, batch=2)
        assert cost.memory_mb * 1e6 == pytest.approx(4000 + 2 * size, abs=1)


def test_rate_measures_the_network_only(monkeypatch):
    """With a clock that only advances within the network."""
    clock = [0.0]
    monkeypatch.setattr(cost_module.time, "perf_counter", lambda: clock[0])

    class Sleeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images):
            clock[0] += 0.02
            return images

    cost = cost_of(Sleeper(), side=4, batch=8)
    assert cost.images_per_s == pytest.approx(400)
    assert cost.spread == pytest.approx((400, 400))
