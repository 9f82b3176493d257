"""What every test shares: one thread, a fixed generator, no network."""

import platform
import signal
import socket
from collections.abc import Iterator
from importlib import metadata

import pytest
import torch

from deit.core.hardware import cpu_name
from tests.helpers.command_server import forked_runs, shared_server, short_timings

_NAMED = ("torch", "torchvision", "timm", "accelerate", "transformers", "numpy", "pillow")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background; programs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # for fixtures of whole files, which come before that of a test


def pytest_report_header() -> str:
    """The versions and the machine, as docs/versions.md records them."""
    versions = {one.metadata["Name"].lower(): one.version for one in metadata.distributions()}
    named = [f"{name} {versions[name]}" for name in _NAMED if name in versions]
    return ", ".join([f"Python {platform.python_version()}", *named, cpu_name()])


@pytest.fixture(autouse=True, scope="session")
def _short_timings() -> Iterator[None]:
    with short_timings():
        yield


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)

    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX:  # the workers of a DataLoader hand over files by it
            raise AssertionError(f"a test opened a network connection: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def command_server():
    """Starts commands without the seconds of their imports."""
    return shared_server()


@pytest.fixture
def fork_runs(command_server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs beside each other that the test's own process starts come without these seconds too."""
    monkeypatch.setattr("deit.experiments.runner.subprocess", forked_runs(command_server.socket))
