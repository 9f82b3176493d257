"""Linear layers by oneDNN: the same outputs, gradients and names as PyTorch's."""

import copy
import shutil

import pytest
import torch
from torch import nn

from deit.config.sections.run import RunConfig
from deit.config.sections.student import StudentConfig
from deit.core import hardware, run_folder, run_log
from deit.core.errors import SystemFault
from deit.distill.build import build_accelerator
from deit.evaluation.evaluate import evaluate
from deit.models import onednn_linear
from deit.models.onednn_linear import OneDNNLinear, resolve_linear_backend, use_onednn
from deit.models.registry import create_network
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.small_runs import two_epochs

pytestmark = pytest.mark.skipif(not onednn_linear.available(), reason="no oneDNN in this PyTorch")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 17), (17, 5), (8, 8), (1, 3)])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (4, 1, 2)])
def test_onednn_values_and_gradients_match_torch(shape, inputs, outputs, bias):
    """Compared with torch in float64, to the precision of float32."""
    torch.manual_seed(0)
    actual = nn.Linear(inputs, outputs, bias=bias)
    second = copy.deepcopy(actual).double()
    use_onednn(actual)
    assert type(actual) is OneDNNLinear
    own_rows = torch.randn(*shape, inputs, requires_grad=True)
    other = own_rows.detach().double().requires_grad_()
    out, expected = actual(own_rows), second(other)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    seed = torch.randn_like(out)
    out.backward(seed)
    expected.backward(seed.double())
    pairs = [(own_rows, other), *zip(actual.parameters(), second.parameters())]
    for item, reference in pairs:
        assert torch.allclose(item.grad.double(), reference.grad, atol=1e-4)
        assert item.grad.is_contiguous()


def test_onednn_with_unusual_strides_matches_torch():
    layer, plain = nn.Linear(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    use_onednn(layer)
    images = torch.randn(6, 5, 3).permute(1, 2, 0)
    spread = torch.randn(3, 12)[:, ::2]
    for inputs in (images, spread, torch.randn(1, 6).expand(4, 6), torch.randn(0, 6)):
        assert torch.allclose(layer(inputs), plain(inputs), atol=1e-6)
        layer(inputs).sum().backward()
        plain(inputs).sum().backward()
    assert torch.allclose(layer.weight.grad, plain.weight.grad, atol=1e-5)


def test_onednn_computes_required_gradients_only():
    layer = nn.Linear(3, 2).requires_grad_(False)
    use_onednn(layer)
    inputs = torch.randn(4, 3, requires_grad=True)
    layer(inputs).sum().backward()
    assert inputs.grad is not None
    assert layer.weight.grad is None
    layer.bias.requires_grad_(True)
    layer(torch.randn(4, 3)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_onednn_other_dtypes_use_torch(kind):
    layer = nn.Linear(3, 2).to(kind)
    use_onednn(layer)
    inputs = torch.randn(4, 3).to(kind)
    assert torch.equal(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))


def test_onednn_under_autocast_uses_torch():
    layer = nn.Linear(3, 2)
    use_onednn(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 3)).dtype == torch.bfloat16


def test_use_onednn_keeps_names_and_outputs():
    torch.manual_seed(0)
    plain = create_network(StudentConfig(name="deit_micro", depth=2, embed_dim=24), 10).eval()
    actual = copy.deepcopy(plain)
    use_onednn(actual)
    assert list(actual.state_dict()) == list(plain.state_dict())
    assert sum(type(layer) is OneDNNLinear for layer in actual.modules()) == 2 * 4 + 2
    images = torch.rand(3, 3, 32, 32)
    for item, other in zip(actual.forward_features(images), plain.forward_features(images)):
        assert torch.allclose(item, other, atol=1e-5)
    copied = copy.deepcopy(actual)
    assert torch.equal(copied.forward_features(images), actual.forward_features(images))


def test_onednn_product_is_deterministic():
    """Bit-exact resume depends on it."""
    layer = nn.Linear(96, 288)
    use_onednn(layer)
    inputs = torch.randn(128 * 66, 96)
    result = []
    for _ in range(2):
        layer.zero_grad()
        out = layer(inputs)
        out.sum().backward()
        result.append((out.detach(), layer.weight.grad.clone()))
    assert all(torch.equal(item, other) for item, other in zip(*result))


@pytest.mark.parametrize(
    ("vendor", "capability", "run", "expected"),
    [
        ("AuthenticAMD", "AVX512", {}, "onednn"),
        ("AuthenticAMD", "AVX2", {}, "torch"),
        ("GenuineIntel", "AVX512", {}, "torch"),
        ("", "DEFAULT", {}, "torch"),
        ("AuthenticAMD", "AVX512", {"precision": "bf16"}, "torch"),
        ("AuthenticAMD", "AVX512", {"compile": "default"}, "torch"),
        ("AuthenticAMD", "AVX512", {"linear_backend": "torch"}, "torch"),
        ("GenuineIntel", "AVX512", {"linear_backend": "onednn"}, "onednn"),
    ],
)
def test_auto_is_onednn_in_fp32_on_amd_with_avx512(vendor, capability, run, expected, monkeypatch):
    monkeypatch.setattr(onednn_linear, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    config = RunConfig(device="cpu", **run)
    assert resolve_linear_backend(config, build_accelerator(config)) == expected
    if expected == "onednn":
        monkeypatch.setattr(onednn_linear, "available", lambda: False)
        if config.linear_backend == "auto":
            assert resolve_linear_backend(config, build_accelerator(config)) == "torch"
        else:
            with raises(SystemFault, "run.linear_backend"):
                resolve_linear_backend(config, build_accelerator(config))


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "expected"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", "x86_64", "AuthenticAMD"),
        ("processor\t: 0\nBogoMIPS\t: 50\n", "", ""),
        (None, "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD", "AuthenticAMD"),
        (None, "arm", "arm"),
    ],
)
def test_cpu_vendor_is_read_from_cpuinfo(cpuinfo, processor, expected, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(hardware, "_CPUINFO", file)
    monkeypatch.setattr(hardware.platform, "processor", lambda: processor)
    assert hardware.cpu_vendor() == expected


def test_run_with_onednn_trains_resumes_and_evaluates(tmp_path, capsys):
    """Compared with the same run by torch: losses are equal up to rounding, also after resuming."""
    small = two_epochs(run={"save_every_steps": 1, "num_checkpoints": 50, "device": "cpu"})
    for way in ("torch", "onednn"):
        train(small.replace(run={"linear_backend": way}), tmp_path / way)
        assert ("oneDNN" in capsys.readouterr().out) == (way == "onednn")
    actual, expected = (
        run_log.read(tmp_path / way / run_log.METRICS) for way in ("onednn", "torch")
    )
    for item, other in zip(actual, expected, strict=True):
        assert item["train"]["loss"] == pytest.approx(other["train"]["loss"], abs=1e-4)
    chain = (tmp_path / "onednn" / run_log.HASH_CHAIN).read_bytes()
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "onednn", stopped)
    (stopped / run_folder.RESULT).unlink()
    for _, later in run_folder.list_checkpoints(stopped)[:-3]:
        shutil.rmtree(later)
    train(small.replace(run={"linear_backend": "onednn"}), stopped, resume=True)
    assert (stopped / run_log.HASH_CHAIN).read_bytes() == chain
    result = [
        evaluate(tmp_path / way).metrics["heads"]["class"]["top1"] for way in ("torch", "onednn")
    ]
    assert result[0] == pytest.approx(result[1], abs=0.01)


def test_use_onednn_without_onednn_keeps_layers(monkeypatch):
    """A run that was trained with it can be evaluated on another machine."""
    monkeypatch.setattr(onednn_linear, "available", lambda: False)
    network = nn.Sequential(nn.Linear(4, 4))
    use_onednn(network)
    assert type(network[0]) is nn.Linear
