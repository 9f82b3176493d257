"""The free weights of a network as the coordinates of one vector."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deit.errors import ConfigError
from deit.text import nearest


class ParameterVector:
    """Which coordinate of a vector [size] is which weight of a network.

    Each parameter counts once, however many modules share it, and whatever its requires_grad says;
    of those with a mask the weights where it is True are coordinates, and the others are 0.

    size: how many there are. stretches: where in a vector each parameter lies, by its name.
    parameters: those of the network, by name, in the order of the vector.
    """

    def __init__(self, network: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        """network: all of its parameters float32, or all float64. masks: bool, shaped like the
        parameters they are named after. Raises ConfigError."""
        self.network = network
        self.parameters = dict(network.named_parameters())
        _check_dtypes(self.parameters)
        self._masks = _checked(masks or {}, self.parameters)
        self.size = 0
        self.stretches: dict[str, slice] = {}
        for name, parameter in self.parameters.items():
            free = int(self._masks[name].sum()) if name in self._masks else parameter.numel()
            self.stretches[name] = slice(self.size, self.size + free)
            self.size += free
        if not self.size:
            raise ConfigError("masks: no free weight is left; at least one should be True")

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The free entries of tensors shaped like the parameters, as a new vector [size]."""
        pieces = [
            tensors[name][self._masks[name]] if name in self._masks else tensors[name].flatten()
            for name in self.parameters
        ]
        return torch.cat(pieces)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector [size] as new tensors shaped like the parameters, 0 outside the masks."""
        tensors = {name: torch.zeros_like(own) for name, own in self.parameters.items()}
        self._fill(tensors, vector)
        return tensors

    @torch.no_grad()
    def load(self, point: Tensor) -> None:
        """Write a point [size] into the network."""
        self._fill(self.parameters, point)

    def _fill(self, tensors: Mapping[str, Tensor], vector: Tensor) -> None:
        if vector.shape != (self.size,):
            raise ConfigError(f"a vector {list(vector.shape)}: should be [{self.size}]")
        for name, tensor in tensors.items():
            piece = vector[self.stretches[name]].to(tensor)
            if name in self._masks:
                tensor.masked_scatter_(self._masks[name], piece)
            else:
                tensor.copy_(piece.view_as(tensor))

    def vector_of(self, network: nn.Module) -> Tensor:
        """Where a network of the same make stands: a vector [size].

        Raises ConfigError if parameters differ by name or shape, if a weight outside the masks is
        not 0, or if buffers differ: with ours, its weights would be another network.
        """
        theirs = dict(network.named_parameters())
        if theirs.keys() != self.parameters.keys():
            missing = sorted(theirs.keys() ^ self.parameters.keys())[0]
            raise ConfigError(
                f"{missing}: only one of two networks has it: no point of this surface"
            )
        tensors = {name: theirs[name].detach().to(own) for name, own in self.parameters.items()}
        for name, tensor in tensors.items():
            if tensor.shape != self.parameters[name].shape:
                shapes = f"{list(tensor.shape)}, not {list(self.parameters[name].shape)}"
                raise ConfigError(f"{name}: is {shapes}: no point of this surface")
            outside = int(tensor[~self._masks[name]].count_nonzero()) if name in self._masks else 0
            if outside:
                raise ConfigError(
                    f"{name}: {outside} weights outside the mask are not 0; multiply by the mask"
                )
        self._check_buffers(dict(network.named_buffers()))
        return self.flatten(tensors)

    def _check_buffers(self, theirs: Mapping[str, Tensor]) -> None:
        for name, own in self.network.named_buffers():
            # What is no float counts batches, and changes no answer in evaluation mode.
            if not own.is_floating_point():
                continue
            if name not in theirs or not torch.equal(own, theirs[name].to(own)):
                raise ConfigError(
                    f"{name}: differs between the networks: running statistics of BatchNorm, or "
                    "the normalisation of images; build a surface for each"
                )


def _check_dtypes(parameters: Mapping[str, Tensor]) -> None:
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        kinds = ", ".join(sorted(map(str, dtypes))) or "no kind"
        raise ConfigError(f"parameters of {kinds}: should be all float32, or all float64")


def _checked(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks, each on the device of its parameter."""
    for name, mask in masks.items():
        if name not in parameters:
            raise ConfigError(f"a mask for {name}: no such parameter{nearest(name, parameters)}")
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise ConfigError(
                f"the mask of {name} is {mask.dtype} {list(mask.shape)}: should be "
                f"torch.bool {list(parameters[name].shape)}"
            )
    return {name: mask.to(parameters[name].device) for name, mask in masks.items()}
