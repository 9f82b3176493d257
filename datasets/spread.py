"""Some images of a split, spread evenly over its classes."""

import torch
from torch import Tensor

from deit.keys import Keys, random_words


def stratified_indices(labels: Tensor, number: int, *, seed: int, stream: str) -> Tensor:
    """The rows of so many images, or of all where there are fewer: int64, rising, the same for a
    seed and stream.

    labels: int64 [images]. Of each class as many as of every other, or one more, as far as it has
    them; which ones is drawn.
    """
    drawn = random_words(Keys(seed, 0, torch.arange(len(labels))), stream, 1).squeeze(1)
    order = drawn.argsort(stable=True)
    turn = torch.empty_like(labels)
    for label in labels.unique():
        members = order[labels[order] == label]
        turn[members] = torch.arange(len(members))
    return order[turn[order].argsort(stable=True)][:number].sort().values
