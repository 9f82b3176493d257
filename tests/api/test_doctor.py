"""`deit doctor`: its self-test finds wrong results, and it writes nothing and needs no network."""

import json
import socket
from types import SimpleNamespace

import pytest
import torch

from deit.api import doctor as doctor_module
from deit.api import self_test
from deit.api.self_test import (
    device_checks,
    precision_check,
    run_check,
    step_check,
    training_step,
)
from deit.core.errors import SystemFault
from deit.core.machine.checks import fault, ok
from tests.helpers.commands import tree

CPU = torch.device("cpu")


def test_training_step_is_the_same_at_every_call():
    loss, gradient = training_step(CPU, torch.float64)
    again, same = training_step(CPU, torch.float64)
    assert loss == again
    assert torch.equal(gradient, same)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0.01


def test_training_step_keeps_the_random_state():
    before = torch.get_rng_state()
    training_step(CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_right_device_is_ok():
    check = step_check("cpu")
    assert check.status == "ok", check.detail
    assert precision_check("cpu").status == "ok"


@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_device_with_a_wrong_gradient_is_a_fault(monkeypatch, error):
    def inexact(device, dtype):
        loss, gradient = training_step(device, dtype)
        if dtype == torch.float32:
            gradient = gradient * (1 + error)
        return loss, gradient

    monkeypatch.setattr(self_test, "training_step", inexact)
    check = step_check("cpu")
    assert (check.status, "--run.device cpu" in check.hint) == ("fault", True)


def test_precision_with_a_wrong_loss_is_a_note(monkeypatch):
    def inexact(device, dtype):
        loss, gradient = training_step(device, dtype)
        return loss * (2 if torch.is_autocast_enabled("cpu") else 1), gradient

    monkeypatch.setattr(self_test, "training_step", inexact)
    check = precision_check("cpu")
    assert (check.status, "bf16" in check.detail) == ("note", True)


def test_run_is_trained_and_read_back_in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check = run_check("cpu")
    assert check.status == "ok", check.detail
    assert tree(tmp_path) == {}


def test_damaged_weights_of_the_run_are_a_fault(monkeypatch):
    train = self_test.train

    def train_and_damage(config, out, **options):
        train(config, out, **options)
        path = out / "best" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(self_test, "train", train_and_damage)
    check = run_check("cpu")
    assert (check.status, "model.safetensors" in check.detail) == ("fault", True)


def test_other_accuracy_of_the_saved_weights_is_a_fault(monkeypatch):
    monkeypatch.setattr(self_test, "_train_and_evaluate", lambda folder, device: (0.5, 0.25))
    check = run_check("cpu")
    assert (check.status, "0.5000" in check.detail) == ("fault", True)


def test_several_processes_are_not_tested(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_check("cpu").status == "note"


def with_gpu(monkeypatch, free=80 * 2**30, error=None):
    """Let torch report one GPU; its tensors stay on the CPU."""
    zeros = torch.zeros

    def fake_zeros(*shape, device):
        if error is not None:
            raise RuntimeError(error)
        return zeros(*shape)

    properties = SimpleNamespace(name="Fake GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, 96 * 2**30))
    monkeypatch.setattr(torch, "zeros", fake_zeros)


@pytest.mark.parametrize(
    ("options", "status", "fragment"),
    [
        ({}, "ok", "Fake GPU, compute capability 9.0, 85.9 GB free of 103 GB"),
        ({"free": 2**29}, "note", "537 MB free of 103 GB"),
        ({"error": "CUDA error: no kernel image\nmore"}, "fault", "CUDA error: no kernel image"),
    ],
)
def test_gpu(monkeypatch, options, status, fragment):
    with_gpu(monkeypatch, **options)
    checks = {check.name: check for check in device_checks()}
    check = checks["device cuda:0"]
    assert check.status == status
    assert fragment in check.detail
    assert "more" not in check.detail
    assert bool(check.hint) == (status != "ok")
    assert {"torch build", "threads", "memory"} <= checks.keys()


def test_error_in_a_check_is_a_fault_and_the_others_follow(monkeypatch):
    def fail():
        raise SystemFault("no device file")

    monkeypatch.setattr(doctor_module, "resource_checks", fail)
    monkeypatch.setattr(self_test, "run_check", lambda: ok("run folder", ""))
    checks = {check.name: check for check in doctor_module.doctor()}
    assert checks["resources"].status == "fault"
    assert "no device file" in checks["resources"].detail
    assert {"encoding", "device", "training step", "run folder"} <= checks.keys()


def no_network() -> None:
    """Let no process connect to another machine; called in the process of a command."""

    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    socket.socket.connect = refuse


def plant_fault() -> None:
    """Add a fault to the checks; called in the process of a command."""
    doctor_module.package_checks = lambda: [fault("torch", "missing", "pip install torch")]


def test_command_prints_a_line_for_each_check(tmp_path, command_server):
    done = command_server.run(
        "doctor", cwd=tmp_path, SETUP_FUNCTION="tests.api.test_doctor:no_network"
    )
    assert (done.code, done.err) == (0, "")
    assert tree(tmp_path) == {}
    lines = [line for line in done.out.splitlines() if line.startswith(("ok ", "note", "fault"))]
    names = {line[7:25].strip() for line in lines}
    assert {"python", "torch", "extra export", "disk", "memory", "run folder"} <= names
    assert done.out.splitlines()[-1].startswith("0 faults, ")


def test_command_prints_json_and_its_exit_code_is_1_for_a_fault(tmp_path, command_server):
    done = command_server.run(
        "doctor", "--json", cwd=tmp_path, SETUP_FUNCTION="tests.api.test_doctor:plant_fault"
    )
    assert (done.code, done.err) == (1, "")
    checks = json.loads(done.out)
    assert checks[0] == {
        "name": "torch",
        "status": "fault",
        "detail": "missing",
        "hint": "pip install torch",
    }
    assert all(set(check) == {"name", "status", "detail", "hint"} for check in checks)
    assert {check["status"] for check in checks[1:]} <= {"ok", "note"}
    assert all(bool(check["hint"]) == (check["status"] != "ok") for check in checks)
