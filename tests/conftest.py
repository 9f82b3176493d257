"""What every test shares: two threads, a fixed generator, no network."""

import socket

import pytest
import torch


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)

    def refuse(*args: object) -> None:
        raise AssertionError(f"a test opened a network connection: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
