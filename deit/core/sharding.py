"""Sharding of a student among processes (torch's fully_shard), and gathering of its tensors."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deit.core.errors import SystemFault

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

# Imported inside the functions: it takes half a second, and most commands do not shard.


def shard_degree(sharding: str, num_processes: int) -> int:
    """Return the number of shards of a student for run.sharding: 1 for none or a single process.

    Raises SystemFault for hsdp if the launcher does not set the processes per node.
    """
    if sharding == "none" or num_processes == 1:
        return 1
    if sharding == "fsdp":
        return num_processes
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if per_node < 2 or num_processes % per_node:
        raise SystemFault(
            f"run.sharding = 'hsdp': needs two or more processes per node, the same number on "
            f"each; the launcher sets {per_node} of {num_processes} (LOCAL_WORLD_SIZE; torchrun "
            "--nproc_per_node); use run.sharding fsdp"
        )
    return per_node


def device_mesh(
    num_shards: int, num_processes: int, device: torch.device, timeout_s: float
) -> "DeviceMesh":
    """Return the mesh of all processes: [processes], or [nodes, shards] if there are fewer shards.

    With the second, each node holds the whole student once. Every process must call it.
    """
    from torch.distributed import DeviceMesh, new_subgroups_by_enumeration

    if num_shards == num_processes:
        return DeviceMesh.from_group(torch.distributed.group.WORLD, device.type)
    nodes = torch.arange(num_processes).view(-1, num_shards)
    # Created here, because the groups that a mesh creates ignore the timeout.
    timeout = timedelta(seconds=timeout_s)
    groups = [
        new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)[0]
        for ranks in (nodes.T, nodes)
    ]
    names = ("copies", "parts")
    return DeviceMesh.from_group(groups, device.type, mesh=nodes, mesh_dim_names=names)


def shard_model(model: nn.Module, mesh: "DeviceMesh", *, compressed: bool = False) -> None:
    """Shard the weights of `model` in place, so that each process keeps its part.

    A block (of `model.network.blocks`, as in timm's transformers) is gathered while it computes its
    forward and its backward pass; all other weights are gathered for the whole step. Gradients are
    means over the processes, sharded as the weights; with `compressed` they are reduced in
    bfloat16.

    Call it before building an optimizer. The weights must be equal in all processes; they may be
    on the CPU and are moved to the mesh's device block by block.
    Source: Zhao et al. 2023, "PyTorch FSDP"; Rajbhandari et al. 2020, "ZeRO", stage 3.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if compressed else None)
    for block in getattr(model.network, "blocks", ()):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a module was sharded by `shard_model`, itself or as a block."""
    return hasattr(model, "unshard")


def _is_dtensor(value: Tensor) -> bool:
    return hasattr(value, "full_tensor")


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Gather all weights in every process, and copy the buffers of process 0, within the block.

    Each process can then run the model alone, as often as it needs. Every process must enter it.
    No effect on a model that is not sharded.
    """
    modules = [module for module in model.modules() if is_sharded(module)]
    if modules:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def full_tensors(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Return the tensors, with sharded ones gathered on the CPU one at a time.

    keep: whether this process keeps the result; otherwise it only takes part and returns {}.
    Every process must call it.
    """
    gathered = {}
    for name, value in tensors.items():
        if _is_dtensor(value):
            value = value.full_tensor()
            value = value.cpu() if keep else value
        if keep:
            gathered[name] = value
    return gathered


def full_value(value: Tensor) -> Tensor:
    """Return a scalar that was computed from sharded tensors, equal in all processes."""
    return value.full_tensor() if _is_dtensor(value) else value


def local_tensor(value: Tensor) -> Tensor:
    """Return this process's part of a tensor, without a copy."""
    return value.to_local() if _is_dtensor(value) else value


def shard_like(value: Tensor, reference: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, sharded and placed as `reference` is."""
    if not _is_dtensor(reference):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(reference.device)
    # All processes have the same value, so nothing is sent (src_data_rank=None).
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
