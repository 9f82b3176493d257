"""Fixtures of every test: one thread, a fixed seed, no network, fast commands."""

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

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # ignored in background jobs, and child processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # for fixtures of wider scope, which are set up before those of a test


def pytest_report_header() -> str:
    """Return the versions and the processor, as docs/reference/versions.md records them."""
    versions = {
        package.metadata["Name"].lower(): package.version for package in metadata.distributions()
    }
    named = [f"{name} {versions[name]}" for name in _NAMED if name in versions]
    return ", ".join([f"Python {platform.python_version()}", *named, cpu_name()])


@pytest.fixture(autouse=True, scope="session")
def _short_timings() -> Iterator[None]:
    with short_timings():
        yield


@pytest.fixture(autouse=True)
def _deterministic_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)

    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX:  # the workers of a DataLoader pass file descriptors by it
            raise AssertionError(f"a test opened a network connection: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def command_server():
    """Return a server that starts commands without the seconds that imports take."""
    return shared_server()


@pytest.fixture
def fork_runs(command_server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the runs that this process starts in parallel forks of the command server as well."""
    monkeypatch.setattr(
        "deit.experiments.parallel_runs.subprocess", forked_runs(command_server.socket)
    )
