"""GracefulStop: where in a training step a signal stops it."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from deit.core import parent_process
from deit.core import signals as interruption_module
from deit.core.errors import StoppedBySignal
from deit.core.signals import GracefulStop

pytest.importorskip("sklearn")


@pytest.fixture
def interruption():
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # gets signals that are not obeyed
    with GracefulStop(Accelerator(cpu=True)) as entered:
        yield entered
    parent_process.clear_pending_stop()
    signal.signal(signal.SIGTERM, before)


def test_started_step_is_finished_if_its_images_arrive(interruption, monkeypatch):
    """However many micro-batches are left: the checkpoint is of this step."""

    now, between = [0.0], interruption_module._DATA_TIMEOUT_S / 2
    monkeypatch.setattr(interruption_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow():
        for index in range(100):
            now[0] += between
            os.kill(os.getpid(), signal.SIGALRM)  # as the timer does repeatedly
            yield index

    seen = []
    for index in interruption.micro_batches(slow(), per_step=8):
        seen.append(index)
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    assert seen == list(range(8))


def test_started_step_is_abandoned_if_its_images_do_not_arrive(interruption):
    def lost():
        yield 0
        time.sleep(1000)

    seen = []

    def learn():
        for index in interruption.micro_batches(lost(), per_step=8):
            seen.append(index)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedBySignal):
        learn()
    assert seen == [0]


def test_stop_during_a_save_request_is_not_lost(interruption, monkeypatch):
    def agree(values, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    monkeypatch.setattr(interruption, "_is_distributed", True)
    monkeypatch.setattr("torch.distributed.all_reduce", agree)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert interruption.pending_signal(now=True) == signal.SIGUSR1
    assert interruption.received == signal.SIGTERM
    assert interruption.pending_signal(now=True) == signal.SIGTERM
