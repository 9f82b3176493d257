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
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # what is not obeyed comes again
    with GracefulStop(Accelerator(cpu=True)) as entered:
        yield entered
    parent_process.clear_pending_stop()
    signal.signal(signal.SIGTERM, before)


def test_an_update_in_its_middle_is_finished_while_its_images_come(interruption, monkeypatch):
    """However many micro-batches are left: it is the update of the checkpoint."""

    now, between = [0.0], interruption_module._DATA_TIMEOUT_S / 2
    monkeypatch.setattr(interruption_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow():
        for number in range(100):
            now[0] += between
            os.kill(os.getpid(), signal.SIGALRM)  # as the timer does, again and again
            yield number

    seen = []
    for number in interruption.micro_batches(slow(), per_step=8):
        seen.append(number)
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    assert seen == list(range(8))


def test_an_update_whose_images_never_come_is_given_up(interruption):
    def lost():
        yield 0
        time.sleep(1000)

    seen = []

    def learn():
        for number in interruption.micro_batches(lost(), per_step=8):
            seen.append(number)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedBySignal):
        learn()
    assert seen == [0]


def test_a_stop_that_comes_while_processes_agree_to_save_is_kept(interruption, monkeypatch):
    def agree(said, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    monkeypatch.setattr(interruption, "_is_distributed", True)
    monkeypatch.setattr("torch.distributed.all_reduce", agree)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert interruption.pending_signal(now=True) == signal.SIGUSR1
    assert interruption.received == signal.SIGTERM
    assert interruption.pending_signal(now=True) == signal.SIGTERM
