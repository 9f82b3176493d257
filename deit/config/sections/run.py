"""The section `run`: where and how a run computes, saves and logs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from deit.config.field_types import (
    STRICT,
    Compile,
    Count,
    Counts,
    LinearBackend,
    OptionalCount,
    Seconds,
    Trackers,
)


@dataclass(frozen=True)
class RunConfig:
    """Seed, hardware, evaluation and checkpoint intervals."""

    __pydantic_config__ = STRICT
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, order of the images, views, drop path and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA device if there is one, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: the value of `accelerate launch --mixed_precision`, else fp32."""
    linear_backend: LinearBackend = "auto"
    """Implementation of the student's linear layers on a CPU in fp32: torch, or oneDNN called
    directly. auto: oneDNN on AMD processors with AVX-512, which MKL does not use there."""
    compile: Compile = "none"
    """Mode of torch.compile for student and teachers. none: eager; default: fused kernels;
    reduce-overhead: also CUDA graphs, for small batches; max-autotune: kernels chosen by
    benchmarks."""
    activation_checkpointing: bool = False
    """Recompute the activations of the student's blocks in the backward pass. The results are
    bit-identical; it saves most of their memory for about a third more compute."""
    sharding: Literal["none", "fsdp", "hsdp"] = "none"
    """Shard the student, its gradients, AdamW's state and the EMA over all processes (fsdp) or the
    processes of each node (hsdp), for students that do not fit one GPU."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: processes exchange gradients rounded to bfloat16, which halves the traffic."""
    eval_every_epochs: Count = 1
    """Epochs between evaluations on the validation split; the last epoch is always evaluated."""
    eval_batch_size: Count = 256
    """Images per batch and process in evaluations."""
    save_every_steps: OptionalCount = None
    """Steps between checkpoints, in addition to one at the end of each epoch. Default: only at the
    end of each epoch."""
    num_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Number of latest checkpoints to keep; at least 2, in case one gets damaged."""
    keep_steps: Counts = ()
    """Steps whose checkpoints are also kept, for example to rewind to them."""
    auto_micro_batch: bool = False
    """Before the first step, double optim.grad_accum_steps until a micro-batch fits the memory. The
    batch size stays the same."""
    max_nonfinite_steps: Count = 10
    """Largest number of consecutive steps that may be skipped because the loss or a gradient is not
    finite; one more stops the run."""
    trackers: Trackers = ()
    """Trackers that log metrics in addition to the run folder: tensorboard, wandb, mlflow, trackio;
    several separated by commas."""
    timeout_s: Seconds = 300.0
    """Time [s] after which a process that does not respond counts as lost."""
