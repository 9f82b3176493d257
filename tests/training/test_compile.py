"""Compiled networks: the same numbers and names, and exact resume; what is compiled."""

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
def cuda_graphs_off(monkeypatch):
    """Tracing as it is, without the compiler behind it: seconds instead of half a minute."""
    seen = []

    def traced(network, mode):
        seen.append((type(network).__name__, mode))
        network.compile(backend="eager")

    for name in (
        "deit.training.build.compile_module",
        "deit.distill.teacher_ensemble.compile_module",
    ):
        monkeypatch.setattr(name, traced)
    yield seen
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


def test_compiled_run_matches_the_eager_run(config, cuda_graphs_off, tmp_path):
    train(config, tmp_path / "eager")
    assert cuda_graphs_off == []
    train(config.replace(run={"compile": "default"}), tmp_path / "traced")
    assert cuda_graphs_off == [("Student", "default"), ("Teacher", "default")]
    for eager, compiled in zip(rows(tmp_path / "eager"), rows(tmp_path / "traced"), strict=True):
        assert eager == pytest.approx(compiled, abs=1e-4)


def test_compiled_network_keeps_its_names_and_can_be_copied(config):
    layer = torch.nn.Linear(3, 2)
    names = list(layer.state_dict())
    compile_module(layer, "default")
    assert list(layer.state_dict()) == names
    assert copy.deepcopy(layer)(torch.zeros(1, 3)).shape == (1, 2)


@pytest.mark.parametrize(
    ("mode", "graphs"),
    [("none", False), ("default", False), ("reduce-overhead", True), ("max-autotune", True)],
)
def test_uses_cuda_graphs_by_compile_mode(mode, graphs, config):
    assert uses_cuda_graphs(mode) is graphs


def test_compiled_student_does_not_use_onednn_linear(config, tmp_path, monkeypatch):
    for name in (
        "deit.training.build.compile_module",
        "deit.distill.teacher_ensemble.compile_module",
    ):
        monkeypatch.setattr(name, lambda network, mode: None)  # nothing is computed with it here
    monkeypatch.setattr(onednn_linear, "cpu_vendor", lambda: "AuthenticAMD")
    created = []
    monkeypatch.setattr("deit.training.build.use_onednn", lambda student: created.append(student))
    fault_injection.install_faults("step:1:term")
    for mode in ("default", "none"):
        config_auto = config.replace(run={"linear_backend": "auto", "compile": mode})
        with pytest.raises(StoppedBySignal):
            train(config_auto, tmp_path / mode)
        assert len(created) == (mode == "none")
        fault_injection.install_faults("step:1:term")
    fault_injection.install_faults(None)


def test_missing_compiler_is_reported_and_the_run_can_resume(config, tmp_path, monkeypatch):
    def lacking(graph, examples):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "g++")

    for name in (
        "deit.training.build.compile_module",
        "deit.distill.teacher_ensemble.compile_module",
    ):
        monkeypatch.setattr(name, lambda network, mode: network.compile(backend=lacking))
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
