"""Counter-based random numbers: each is a function of (seed, stream, epoch, sample, repeat).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64
tensor operations. The numbers are the same on every device, in any order, at any batch size and
number of processes. Resuming needs no saved state.
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BLOCK_BITS = 16  # low bits of the counter's last word; the high bits hold the repeat


@contextmanager
def unchanged_generators() -> Iterator[None]:
    """Restore the state of torch's global generators after the block. It is also a decorator.

    Building a network draws its initial weights, also if they are then replaced by saved ones.

    >>> before = torch.get_rng_state()
    >>> with unchanged_generators():
    ...     _ = torch.rand(1)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    # Restoring those of the GPUs would initialize CUDA.
    num_gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    with torch.random.fork_rng(range(num_gpus)):
        yield


class Keys(NamedTuple):
    """The keys of the random numbers of a batch; each sample gets a row of numbers.

    seed: integer in [0, 2**64).
    epoch: integer in [0, 2**32).
    samples: int64 [B], each in [0, 2**32).
    repeats: int64 [B], each in [0, 2**16): the index of the view of a sample. Default: all 0.

    The numbers of a sample do not depend on the other samples of the batch:

    >>> batch = Keys(seed=0, epoch=3, samples=torch.tensor([7, 42]))
    >>> alone = Keys(seed=0, epoch=3, samples=torch.tensor([42]))
    >>> torch.equal(uniform(batch, "crop", 4)[1], uniform(alone, "crop", 4)[0])
    True
    >>> random_words(alone, "crop", 2).tolist()
    [[602942979, 614813068]]
    """

    seed: int
    epoch: int
    samples: Tensor
    repeats: Tensor | None = None


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Return four 32-bit words for each counter, as four int64 tensors with values in [0, 2**32).

    counter: four int64 tensors of one shape, with values in [0, 2**32).
    seed: the 64-bit key.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, so both halves of the 32 x 32 bit product are exact.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(keys: Keys, stream: str, count: int) -> Tensor:
    """Return random words, int64 [B, count], uniform over [0, 2**32).

    stream: the name of the consumer. Streams are independent: a new augmentation does not change
    the numbers of the others.
    """
    blocks = -(-count // 4)
    samples = keys.samples.unsqueeze(1).expand(-1, blocks)
    block = torch.arange(blocks, device=samples.device).expand_as(samples)
    if keys.repeats is not None:
        block = block + (keys.repeats << _BLOCK_BITS).unsqueeze(1)
    epoch = torch.full_like(samples, keys.epoch)
    stream_id = torch.full_like(samples, zlib.crc32(stream.encode()))
    values = philox((samples, epoch, stream_id, block), keys.seed)
    return torch.stack(values, dim=-1).flatten(1)[:, :count]


def uniform(keys: Keys, stream: str, count: int) -> Tensor:
    """Return numbers uniform over [0, 1) in steps of 2**-32, float64 [B, count]."""
    return random_words(keys, stream, count).double() * 2.0**-32


def normal(keys: Keys, stream: str, count: int) -> Tensor:
    """Return standard normal variates, float64 [B, count] (Box and Muller 1958)."""
    draws = 1 - uniform(keys, stream, 2 * count)  # in (0, 1]
    radius = torch.sqrt(-2 * torch.log(draws[:, :count]))
    return radius * torch.cos(2 * math.pi * draws[:, count:])


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """Return a random permutation of range(size) for an epoch, int64 [size] on the CPU.

    Sorts by 63 random bits; ties are broken by index.
    """
    keys = Keys(seed, epoch, torch.arange(size))
    high, low = random_words(keys, "order", 2).unbind(dim=1)
    return torch.argsort(((high >> 1) << 32) | low, stable=True)


_BETA_ATTEMPTS = 12


def _log_gamma(keys: Keys, stream: str, shape: float) -> Tensor:
    """Return logarithms of Gamma(shape) variates, float64 [B] (Marsaglia and Tsang, ACM TOMS 26,
    2000).

    The number of attempts is fixed, so that it is a tensor operation. Each attempt is accepted with
    a probability above 0.95, so all 12 are rejected less than once in 10**15 draws; then the last
    one is used.
    """
    boosted = shape + 1 if shape < 1 else shape  # the method needs a shape of at least 1
    d = boosted - 1 / 3
    c = 1 / math.sqrt(9 * d)
    draws = 1 - uniform(keys, stream, 3 * _BETA_ATTEMPTS + 1)  # in (0, 1]
    u1, u2, u3 = draws[:, :-1].reshape(-1, _BETA_ATTEMPTS, 3).unbind(dim=2)
    normal = torch.sqrt(-2 * torch.log(u1)) * torch.cos(2 * math.pi * u2)  # Box-Muller
    v = (1 + c * normal) ** 3
    log_v = torch.log(v.clamp_min(1e-300))
    accepted = (v > 0) & (torch.log(u3) < 0.5 * normal**2 + d * (1 - v + log_v))
    first = torch.where(accepted.any(dim=1), accepted.int().argmax(dim=1), _BETA_ATTEMPTS - 1)
    log_variate = math.log(d) + log_v.gather(1, first.unsqueeze(1)).squeeze(1)
    return log_variate + torch.log(draws[:, -1]) / shape if shape < 1 else log_variate


def beta(keys: Keys, stream: str, alpha: float) -> Tensor:
    """Return Beta(alpha, alpha) variates in [0, 1], float64 [B]; alpha must be positive.

    Computed from the logarithms of two gamma variates, which underflow themselves for small alpha.
    """
    first = _log_gamma(keys, f"{stream}/first", alpha)
    second = _log_gamma(keys, f"{stream}/second", alpha)
    return torch.sigmoid(first - second)


def derived_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed for a named purpose, independent of those for other names.

    >>> derived_seed(0, "teacher")
    4615293652292204298
    """
    high, low = random_words(Keys(seed, 0, torch.tensor([0])), f"seed/{name}", 2)[0].tolist()
    return ((high >> 1) << 32) | low


def step_seed(seed: int, step: int, micro_step: int) -> int:
    """Return a 63-bit seed for torch's own random numbers in a step (drop path, dropout).

    micro_step: differs between the processes and micro-batches of a step.
    """
    keys = Keys(seed, micro_step, torch.tensor([step]))
    high, low = random_words(keys, "step", 2)[0].tolist()
    return ((high >> 1) << 32) | low
