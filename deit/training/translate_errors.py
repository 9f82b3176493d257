"""Turn errors that stop a run into errors that state what is saved and how to resume."""

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
    less_memory_advice,
    micro_batch_sizes,
)
from deit.training.state import TrainingRun


@contextmanager
def translate_errors(run: TrainingRun, stop_signal: Callable[[], int]) -> Iterator[None]:
    """Turn any error inside the block into one of deit.core.errors with advice on how to continue.

    Errors of the user's callbacks stay as they are.
    stop_signal: returns the signal that this process received, 0 for none. After a signal, a lost
    peer is not an error: it received the signal too and ended first.
    """
    try:
        yield
    except StoppedBySignal as stop:
        raise StoppedBySignal(stop.signum, f"{stop}; {_how_to_resume(run)}") from None
    except WorkerLost as error:
        raise SystemFault(f"{error}; {_how_to_resume(run)}") from None
    except DeitError:
        raise
    except Exception as error:
        if run.in_callback:
            raise
        if is_out_of_memory(error):
            traceback.clear_frames(
                error.__traceback__
            )  # they refer to the tensors that filled the memory
            raise _memory_fault(run) from None
        if run.accelerator.num_processes > 1 and is_peer_failure(error):
            if signum := stop_signal():
                stop = StoppedBySignal(signum)
                raise StoppedBySignal(signum, f"{stop}; {_how_to_resume(run)}") from None
            raise PeerError(
                "another process of the run has ended, or did not respond within "
                f"{run.config.run.timeout_s:g} s; {_how_to_resume(run)}"
            ) from None
        if (failure := compiler_failure(error)) is not None:
            raise SystemFault(f"{failure}; without --run.compile {_how_to_resume(run)}") from error
        raise


def _how_to_resume(run: TrainingRun) -> str:
    return f"the same command with --resume continues {run.out}"


def _memory_fault(run: TrainingRun) -> SystemFault:
    optim, micro_batch = run.config.optim, run.loader.micro_batch_size
    student = run.accelerator.unwrap_model(run.student)
    # A sharded student computes with all processes, so this process cannot try alone.
    sizes = [] if is_sharded(student) else micro_batch_sizes(run)
    fitting = next((size for size in sizes if fits(run, size)), None)
    message = f"out of memory with micro-batches of {micro_batch} images"
    if fitting is None and is_sharded(student):
        smaller = [grad_accum_advice(run, size) for size in micro_batch_sizes(run)[:1]]
        return SystemFault(
            f"{message} of a sharded student (run.sharding): try "
            f"{', or '.join(smaller + less_memory_advice(run))}; {_how_to_resume(run)}"
        )
    if fitting is None:
        smallest = f", and of {sizes[-1]}" if sizes else ""
        return SystemFault(
            f"{message}{smallest}: try {', or '.join(less_memory_advice(run))}; "
            f"{_how_to_resume(run)}"
        )
    return SystemFault(
        f"{message}; {fitting} fit (tried without a teacher): {grad_accum_advice(run, fitting)} "
        f"makes micro-batches of that size and keeps the batch of {optim.batch_size}; "
        f"{_how_to_resume(run)}"
    )
