"""Turn errors that stop a run into errors of ours, which say what is kept and how to resume."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deit.core.accelerator import is_peer_failure
from deit.core.errors import (
    DeitError,
    PeerError,
    StoppedBySignal,
    SystemFault,
    WorkerLost,
    compiler_failure,
    is_out_of_memory,
)
from deit.core.sharding import is_sharded
from deit.training.memory import (
    fits,
    grad_accum_advice,
    joined_by_or,
    less_memory_advice,
    micro_batch_sizes,
)
from deit.training.state import TrainingRun


@contextmanager
def translate_errors(run: TrainingRun, asked: Callable[[], int]) -> Iterator[None]:
    """Turn what stops a run in its middle into an error of deit.core.errors that says what is kept
    and what to do.

    asked: the signal that this process was asked to stop by, 0 for none. What goes wrong after it
    is no other mishap: the other processes were asked as well, and may have ended first.
    """
    try:
        yield
    except StoppedBySignal as stop:
        raise StoppedBySignal(stop.signum, f"{stop}; {_kept(run)}") from None
    except WorkerLost as error:
        raise SystemFault(f"{error}; {_kept(run)}") from None
    except DeitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
            raise _memory_fault(run) from None
        if run.accelerator.num_processes > 1 and is_peer_failure(error):
            if number := asked():
                stop = StoppedBySignal(number)
                raise StoppedBySignal(number, f"{stop}; {_kept(run)}") from None
            raise PeerError(
                f"another process of the run is gone, or did not answer within "
                f"{run.config.run.timeout_s:g} s; {_kept(run)}"
            ) from None
        if (failure := compiler_failure(error)) is not None:
            raise SystemFault(f"{failure}; without --run.compile {_kept(run)}") from error
        raise


def _kept(run: TrainingRun) -> str:
    return f"the same command with --resume goes on with {run.out}"


def _memory_fault(run: TrainingRun) -> SystemFault:
    optim, block = run.config.optim, run.loader.block
    student = run.accelerator.unwrap_model(run.student)
    tried = (
        [] if is_sharded(student) else micro_batch_sizes(run)
    )  # which computes with all processes
    fitting = next((number for number in tried if fits(run, number)), None)
    told = f"out of memory with {block} images at once"
    if fitting is None and is_sharded(student):
        cut = [grad_accum_advice(run, number) for number in micro_batch_sizes(run)[:1]]
        return SystemFault(
            f"{told}, which is not tried smaller in a student that is divided (run.sharding): try "
            f"{joined_by_or(cut + less_memory_advice(run))}; {_kept(run)}"
        )
    if fitting is None:
        too = f", and with {tried[-1]}" if tried else ""
        return SystemFault(
            f"{told}{too}: try {joined_by_or(less_memory_advice(run))}; {_kept(run)}"
        )
    return SystemFault(
        f"{told}; {fitting} fit (without a teacher beside them): {grad_accum_advice(run, fitting)} "
        f"makes micro-batches of that size and keeps the batch of {optim.batch_size}; "
        f"{_kept(run)}"
    )
