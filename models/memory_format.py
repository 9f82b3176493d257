"""How images lie in memory for a network's convolutions: what computes faster, by measuring."""

import time
from typing import Literal

import torch
from torch import Tensor, nn

MemoryFormat = Literal["contiguous", "channels_last"]
LAYOUTS: dict[MemoryFormat, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
_FASTER = 1.15  # from this ratio on channels last: a busy moment makes as much of equal ones
_WORTH_S = 5e-3  # an answer that is shorter is not worth a choice
_TRIES = 7
_LONGEST_S = 2.0
_PIXELS, _PIXELS_OF_A_CPU = 2**23, 2**19  # of the images shown, at most


def set_memory_format(network: nn.Module, layout: MemoryFormat) -> None:
    """Have the weights of a network's convolutions lie so; its images should lie likewise."""
    network.to(memory_format=LAYOUTS[layout])


def to_memory_format(images: Tensor, layout: MemoryFormat) -> Tensor:
    """Images [batch, channels, height, width] in this layout; the same values."""
    return images.contiguous(memory_format=LAYOUTS[layout])


@torch.inference_mode()
def fastest_memory_format(network: nn.Module, images: Tensor) -> MemoryFormat:
    """In which layout a network answers such images clearly faster, here and now; left in that one.

    Neither always is: with channels last a RegNetY takes from 0.7 to 2.5 times as long, by device,
    library and number of images. Some two seconds, or three answers of each. images: [batch,
    channels, height, width]; of many the first.
    """
    pixels = _PIXELS_OF_A_CPU if images.device.type == "cpu" else _PIXELS
    images = images[: max(pixels // images[0, 0].numel(), 1)]
    best = dict.fromkeys(LAYOUTS, float("inf"))
    try:
        _measure(network, images, best)
    except RuntimeError:  # it takes images in one layout only, or memory for fewer
        best["channels_last"] = float("inf")
    faster = best["contiguous"] > max(_FASTER * best["channels_last"], _WORTH_S)
    chosen: MemoryFormat = "channels_last" if faster else "contiguous"
    set_memory_format(network, chosen)
    return chosen


def _measure(network: nn.Module, images: Tensor, best: dict[MemoryFormat, float]) -> None:
    """Note the shortest time [s] of an answer in each layout."""
    begun = time.perf_counter()
    for attempt in range(_TRIES + 1):
        if attempt > 2 and time.perf_counter() - begun > _LONGEST_S:
            return
        for layout in LAYOUTS:
            set_memory_format(network, layout)
            took = _seconds(network, to_memory_format(images, layout))
            if attempt:  # the first of each plans and allocates
                best[layout] = min(best[layout], took)


def _seconds(network: nn.Module, images: Tensor) -> float:
    on_gpu = images.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(images.device)
    started = time.perf_counter()
    network(images)
    if on_gpu:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - started
