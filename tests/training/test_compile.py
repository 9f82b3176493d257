"""Compiled networks: the same results and names, exact resume, errors without a compiler."""

import copy
import errno
import shutil

import pytest
import torch

from deit.config.recipes.handwriting import digits, digits_teacher
from deit.core import fault_injection, run_log
from deit.core.accelerator import compile_module, uses_cuda_graphs
from deit.core.errors import StoppedBySignal, SystemFault
from deit.models import onednn_linear
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import assert_same_end, stop_at
from tests.helpers.trained import trained

pytest.importorskip("sklearn")


@pytest.fixture
def traced_networks(monkeypatch):
    """Trace networks without a compiler, which takes seconds; yield those that were traced."""
    networks = []

    def trace(network, mode):
        networks.append((type(network).__name__, mode))
        network.compile(backend="eager")

    for name in (
        "deit.training.build.compile_module",
        "deit.distill.teacher_ensemble.compile_module",
    ):
        monkeypatch.setattr(name, trace)
    yield networks
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("compile") / "teacher"
    trained(digits_teacher().replace(optim={"epochs": 3}), out)
    return digits().replace(
        data={"train_fraction": 0.25},  # 324 images, five batches
        student={"depth": 2, "embed_dim": 16, "num_heads": 2, "drop_path": 0.3},
        teacher={"source": (str(out),)},
        optim={"epochs": 2, "batch_size": 64, "warmup_epochs": 1, "ema_epochs": 1.0},
        run={"eval_every_epochs": 1, "linear_backend": "torch", "device": "cpu"},
    )


def rows(out):
    return [row["train"] | row["validation"] for row in run_log.read(out / "metrics.jsonl")]


def test_compiled_run_matches_the_eager_run(config, traced_networks, tmp_path):
    train(config, tmp_path / "eager")
    assert traced_networks == []
    train(config.replace(run={"compile": "default"}), tmp_path / "traced")
    assert traced_networks == [("Student", "default"), ("Teacher", "default")]
    for eager, compiled in zip(rows(tmp_path / "eager"), rows(tmp_path / "traced"), strict=True):
        assert eager == pytest.approx(compiled, abs=1e-4)


def test_compiled_network_keeps_its_names_and_can_be_copied():
    layer = torch.nn.Linear(3, 2)
    names = list(layer.state_dict())
    compile_module(layer, "default")
    assert list(layer.state_dict()) == names
    assert copy.deepcopy(layer)(torch.zeros(1, 3)).shape == (1, 2)


@pytest.mark.parametrize(
    ("mode", "graphs"),
    [("none", False), ("default", False), ("reduce-overhead", True), ("max-autotune", True)],
)
def test_uses_cuda_graphs_by_compile_mode(mode, graphs):
    assert uses_cuda_graphs(mode) is graphs


def test_compiled_student_does_not_use_onednn_linear(config, tmp_path, monkeypatch):
    for name in (
        "deit.training.build.compile_module",
        "deit.distill.teacher_ensemble.compile_module",
    ):
        monkeypatch.setattr(name, lambda network, mode: None)  # not needed here
    monkeypatch.setattr(onednn_linear, "cpu_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    onednn_students = []
    monkeypatch.setattr(
        "deit.training.build.use_onednn", lambda student: onednn_students.append(student)
    )
    fault_injection.install_faults("step:1:term")
    for mode in ("default", "none"):
        auto_config = config.replace(run={"linear_backend": "auto", "compile": mode})
        with pytest.raises(StoppedBySignal):
            train(auto_config, tmp_path / mode)
        assert len(onednn_students) == (mode == "none")
        fault_injection.install_faults("step:1:term")
    fault_injection.install_faults(None)


def test_missing_compiler_is_reported_and_the_run_can_resume(config, tmp_path, monkeypatch):
    def fail_to_compile(graph, examples):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "g++")

    for name in (
        "deit.training.build.compile_module",
        "deit.distill.teacher_ensemble.compile_module",
    ):
        monkeypatch.setattr(name, lambda network, mode: network.compile(backend=fail_to_compile))
    try:
        with raises(SystemFault, "torch.compile", "'g++'", "--run.compile", "--resume"):
            train(config.replace(run={"compile": "default"}), tmp_path / "run")
    finally:
        torch._dynamo.reset()
    result = train(config, tmp_path / "run", resume=True)
    assert result["epochs"] == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_resumed_compiled_run_is_bit_identical(config, tmp_path):
    config = config.replace(run={"compile": "default"})
    train(config, tmp_path / "uninterrupted")
    stop_at(config, tmp_path / "run", "step:7:term")
    torch._dynamo.reset()
    train(config, tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "uninterrupted")
