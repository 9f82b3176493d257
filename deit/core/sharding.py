"""A student divided among processes (torch's fully_shard), and its tensors put together again."""

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

# The imports inside the functions take half a second, and most commands divide nothing.


def shard_degree(among: str, processes: int) -> int:
    """Into how many parts run.sharding divides a student: 1 for none, and for one process.

    Raises SystemFault where nodes are asked for and the launcher does not say what they are.
    """
    if among == "none" or processes == 1:
        return 1
    if among == "fsdp":
        return processes
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if of_node < 2 or processes % of_node:
        raise SystemFault(
            f"run.sharding = 'hsdp': needs several processes on each node, as many on all; the "
            f"launcher says {of_node} of {processes} (LOCAL_WORLD_SIZE; torchrun "
            "--nproc_per_node); use run.sharding fsdp"
        )
    return of_node


def device_mesh(parts: int, processes: int, device: torch.device, timeout_s: float) -> "DeviceMesh":
    """The processes as torch's sharding wants them: [processes], or with fewer parts [nodes,
    parts], where each node holds everything once. All processes ask together."""
    from torch.distributed import DeviceMesh, new_subgroups_by_enumeration

    if parts == processes:
        return DeviceMesh.from_group(torch.distributed.group.WORLD, device.type)
    nodes = torch.arange(processes).view(-1, parts)
    # Made here, because a mesh makes groups that wait for a lost process as long as they like.
    timeout = timedelta(seconds=timeout_s)
    groups = [
        new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)[0]
        for ranks in (nodes.T, nodes)
    ]
    names = ("copies", "parts")
    return DeviceMesh.from_group(groups, device.type, mesh=nodes, mesh_dim_names=names)


def shard_model(model: nn.Module, mesh: "DeviceMesh", *, compressed: bool = False) -> None:
    """Leave each process its part of the weights of `model`, in place: a block (of model.network,
    named `blocks` as in timm's transformers) is whole for as long as it computes, forward and
    again backward; what is in no block, for the whole update.

    Gradients come out as means over the processes, each with its own part; compressed: exchanged
    in bfloat16. To be called before an optimizer is built; the weights must be the same in all
    processes, and may lie on the CPU: block by block they come to the mesh's device. Source: Zhao
    et al. 2023, "PyTorch FSDP"; Rajbhandari et al. 2020, "ZeRO", stage 3.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if compressed else None)
    for block in getattr(model.network, "blocks", ()):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Whether `divide` was called on a model, or it is a part that is gathered for itself."""
    return hasattr(model, "unshard")


def _in_parts(value: Tensor) -> bool:
    return hasattr(value, "full_tensor")  # a DTensor


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """The whole weights in every process while this lasts, and the first one's statistics of batch
    norms, so that each computes for itself, as often as it likes; all processes enter together.
    Nothing for a model that is not divided."""
    parts = [module for module in model.modules() if is_sharded(module)]
    if parts:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def full_tensors(tensors: Mapping[str, Tensor], *, wanted: bool = True) -> dict[str, Tensor]:
    """Tensors as one process would have them; those that are divided on the CPU, put together one
    at a time, by all processes together. wanted: whether this process wants them; {} else."""
    found = {}
    for name, value in tensors.items():
        if _in_parts(value):
            value = value.full_tensor()
            value = value.cpu() if wanted else value
        if wanted:
            found[name] = value
    return found


def full_value(value: Tensor) -> Tensor:
    """A number computed of divided tensors, the same in all processes."""
    return value.full_tensor() if _in_parts(value) else value


def local_tensor(value: Tensor) -> Tensor:
    """What this process holds of a tensor: the very memory."""
    return value.to_local() if _in_parts(value) else value


def shard_like(value: Tensor, model: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `model` is divided; on its device."""
    if not _in_parts(model):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(model.device)
    # Every process has read the same: nothing is sent.
    return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)
