"""Free memory, memory per image, and runs that do not fit."""

import re

import psutil
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from deit.config.recipes.handwriting import digits
from deit.core import host_memory
from deit.core.errors import SystemFault
from deit.core.host_memory import (
    bytes_per_image,
    cgroup_headroom,
    check_inference_memory,
    free_memory,
)
from deit.training import memory
from deit.training.train import train
from tests.helpers.errors import raises

CPU = torch.device("cpu")


class Counted(nn.Module):
    """Keeps 8 numbers per image for the backward pass: the outputs of the ReLU.

    Its input is freed, and the pixels existed before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(48)
        self.first = nn.Linear(48, 8)
        self.second = nn.Linear(8, 5)
        self.plain = False

    def forward(self, images):
        flat = images.flatten(1)
        return self.second(self.first(flat if self.plain else self.norm(flat)).relu())


def test_bytes_per_image_is_exact():
    network = Counted()
    network.plain = True
    # the outputs of the ReLU and of the network
    assert bytes_per_image(network, network, 4, CPU, training=True) == 4 * (8 + 5)
    # the output of the first layer is freed after the ReLU
    assert bytes_per_image(network, network, 4, CPU, training=False) == 4 * (8 + 8)


def test_measuring_restores_the_network():
    network = Counted().eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    assert (
        bytes_per_image(network, network, 4, CPU, training=True) > 0
    )  # one image, and a batch norm
    assert not network.training
    assert not network.norm.training
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])
    assert all(parameter.grad is None for parameter in network.parameters())


def test_unmeasurable_network_passes_the_check():
    network = nn.Linear(3, 2)  # takes no images
    assert bytes_per_image(network, network, 4, CPU, training=True) is None
    check_inference_memory(network, network, 4, Accelerator(cpu=True), 2**40)


def group(folder, names, values):
    folder.mkdir(parents=True)
    for name, value in zip(names, values):
        (folder / name).write_text(f"{value}\n")


def test_cgroup_headroom(tmp_path):
    v2 = ("memory.max", "memory.current", "memory.stat")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    root, process = tmp_path / "cgroup", tmp_path / "self"
    group(root / "job" / "step", v2, ("max", 10, "inactive_file 5"))
    for name, value in zip(v2, (1000, 300, "anon 1\ninactive_file 50")):
        (root / "job" / name).write_text(f"{value}\n")
    process.mkdir()
    (process / "cgroup").write_text("0::/job/step\n")
    assert cgroup_headroom(root, process) == [750]
    group(root / "memory" / "docker", v1, (2**63 - 4096, 10, ""))
    (process / "cgroup").write_text("12:cpu,cpuacct:/docker\n9:memory:/docker\n0::/\n")
    assert cgroup_headroom(root, process) == []  # no limit
    (root / "memory" / "docker" / v1[0]).write_text("500")
    (root / "memory" / "docker" / "memory.stat").write_text("total_inactive_file 7\n")
    assert cgroup_headroom(root, process) == [497]
    (process / "cgroup").write_text("0::/../../elsewhere\n")
    assert cgroup_headroom(root, process) == []
    assert cgroup_headroom(root, tmp_path / "nowhere") == []


def test_free_memory_is_divided_by_the_processes_of_a_host(monkeypatch):
    monkeypatch.setattr(host_memory, "cgroup_headroom", lambda: [1000])
    assert free_memory(CPU) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == 250
    monkeypatch.setattr(host_memory, "cgroup_headroom", list)
    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total + psutil.swap_memory().total


SMALL = {"name": "deit_micro", "embed_dim": 24, "depth": 1, "image_size": 16}


def small(**run):
    config = digits().replace(student=SMALL, teacher={"source": ()}, loss={"kind": "none"})
    config = config.replace(optim={"batch_size": 512, "grad_accum_steps": 1}, run=run)
    return config.replace(loss=type(config.loss)(kind="none"))


@pytest.mark.fault("E3")
def test_run_that_does_not_fit_raises_with_a_batch_size_that_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 20 * 2**20)
    with raises(SystemFault, "512 images", "0.0 GiB", "--run.auto_micro_batch") as refused:
        train(small(), tmp_path / "run", dry_run=True)
    accumulate = int(re.search(r"--optim\.grad_accum_steps (\d+)", str(refused.value))[1])
    assert accumulate > 1
    fits = small().replace(optim={"grad_accum_steps": accumulate})
    train(fits, tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run").exists()


def test_auto_micro_batch_starts_with_a_size_that_can_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: 20 * 2**20)
    train(small(auto_micro_batch=True), tmp_path / "run", dry_run=True)
    output = capsys.readouterr().out
    line = r"^memory .*\b512 images\b.*\boptim\.grad_accum_steps \d+"
    assert re.search(line, output, re.MULTILINE)


def test_error_if_no_micro_batch_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**10)
    with raises(SystemFault, "512 images", "--run.activation_checkpointing") as refused:
        train(small(), tmp_path / "run", dry_run=True)
    assert "--optim.grad_accum_steps" not in str(refused.value)


def test_inference_batch_that_does_not_fit_raises(monkeypatch):
    network = Counted()
    monkeypatch.setattr(host_memory, "free_memory", lambda device: 4 * 48 * 1000)
    accelerator = Accelerator(cpu=True)
    check_inference_memory(network, network, 4, accelerator, 100)
    with raises(SystemFault, "run.eval_batch_size"):
        check_inference_memory(network, network, 4, accelerator, 4000)


class OneOfTwo(Accelerator):
    """One of two processes; the other reports other measurements."""

    def __init__(self, *other: float) -> None:
        super().__init__(cpu=True)
        self.other = other

    def gather(self, tensor):
        return torch.cat([tensor, torch.tensor([self.other])])


def test_all_processes_raise_if_one_lacks_memory():
    """Otherwise the other processes would wait for it."""
    network = Counted()
    check_inference_memory(network, network, 4, OneOfTwo(192, 2**20), 4000)
    with raises(SystemFault, "run.eval_batch_size"):
        check_inference_memory(network, network, 4, OneOfTwo(384, 2**20), 4000)
