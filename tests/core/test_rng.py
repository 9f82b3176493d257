"""Counter-based random numbers: published vectors, distributions, independence of the batch."""

import random
import zlib

import numpy as np
import pytest
import torch

from deit.core.rng import Keys, beta, normal, permutation, philox, random_words, step_seed, uniform

# Known-answer tests of Philox4x32-10 from the Random123 distribution (kat_vectors).
VECTORS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        0xFFFFFFFFFFFFFFFF,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_matches_the_published_vectors(counter, key, expected):
    values = philox(tuple(torch.tensor([value]) for value in counter), key)
    assert tuple(int(value) for value in values) == expected


def test_random_words_are_philox_of_the_key():
    values = random_words(Keys(7, 3, torch.tensor([11])), "flip", 6)[0].tolist()
    stream = zlib.crc32(b"flip")
    by_hand = []
    for block in range(2):
        counter = tuple(torch.tensor([value]) for value in (11, 3, stream, block))
        by_hand += [int(word) for word in philox(counter, 7)]
    assert values == by_hand[:6]


def test_repeats_give_different_numbers_and_repeat_0_is_the_default():
    samples = torch.arange(50)
    plain = random_words(Keys(7, 3, samples), "crop", 9)
    first, second = (
        random_words(Keys(7, 3, samples, torch.full((50,), r)), "crop", 9) for r in (0, 1)
    )
    assert torch.equal(plain, first)
    assert len(set(plain.flatten().tolist()) & set(second.flatten().tolist())) == 0
    mixed = random_words(Keys(7, 3, samples, samples % 2), "crop", 9)
    assert torch.equal(mixed[::2], first[::2])
    assert torch.equal(mixed[1::2], second[1::2])


def test_normal_distribution():
    stats = pytest.importorskip("scipy.stats")
    draws = normal(Keys(0, 0, torch.arange(10_000)), "x", 2)
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3


def test_numbers_do_not_depend_on_the_position_in_the_batch():
    samples = torch.randperm(1000)
    at_once = uniform(Keys(1, 2, samples), "crop", 5)
    in_parts = torch.cat(
        [uniform(Keys(1, 2, samples[i : i + 7]), "crop", 5) for i in range(0, 1000, 7)]
    )
    assert torch.equal(at_once, in_parts)
    assert torch.equal(at_once, uniform(Keys(1, 2, torch.arange(1000)), "crop", 5)[samples])


@pytest.mark.parametrize("change", ["seed", "epoch", "stream", "sample"])
def test_each_part_of_the_key_changes_the_numbers(change):
    before = random_words(Keys(1, 1, torch.arange(100)), "a", 4)
    after = {
        "seed": lambda: random_words(Keys(2, 1, torch.arange(100)), "a", 4),
        "epoch": lambda: random_words(Keys(1, 2, torch.arange(100)), "a", 4),
        "stream": lambda: random_words(Keys(1, 1, torch.arange(100)), "b", 4),
        "sample": lambda: random_words(Keys(1, 1, torch.arange(100, 200)), "a", 4),
    }[change]()
    assert (before == after).float().mean() < 0.01


def test_global_random_state_is_not_used(monkeypatch):
    def refuse(*args, **settings):
        raise AssertionError("global random state was read")

    for module, name in (
        (random, "random"),
        (np.random, "random"),
        (torch, "rand"),
        (torch, "randn"),
    ):
        monkeypatch.setattr(module, name, refuse)
    before = torch.get_rng_state()
    beta(Keys(0, 0, torch.arange(10)), "mix", 0.8)
    permutation(0, 0, 10)
    assert torch.equal(before, torch.get_rng_state())


def test_uniform_distribution():
    stats = pytest.importorskip("scipy.stats")
    draws = uniform(Keys(5, 0, torch.arange(20_000)), "u", 4)
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(np.corrcoef(draws.T.numpy()) - np.eye(4)).max() < 0.03


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_beta_distribution(alpha):
    stats = pytest.importorskip("scipy.stats")
    draws = beta(Keys(5, 0, torch.arange(50_000)), "b", alpha).numpy()
    assert stats.kstest(draws, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_beta_with_tiny_alpha_is_0_or_1_equally_often():
    draws = beta(Keys(5, 0, torch.arange(4000)), "b", 1e-3)
    assert draws.isfinite().all()
    assert ((draws < 0.01) | (draws > 0.99)).double().mean() > 0.97
    assert abs(draws.mean() - 0.5) < 0.05


@pytest.mark.parametrize("size", [1, 2, 255, 1797])
def test_permutation_contains_each_sample_once_and_changes_with_the_epoch(size):
    first, second = permutation(3, 0, size), permutation(3, 1, size)
    assert torch.equal(first.sort().values, torch.arange(size))
    assert torch.equal(first, permutation(3, 0, size))
    if size > 10:
        assert not torch.equal(first, second)


def test_permutation_positions_are_uniform():
    positions = torch.stack([permutation(0, epoch, 10).argsort() for epoch in range(4000)])
    counts = torch.nn.functional.one_hot(positions, 10).sum(dim=0).double()
    chi_squared = ((counts - 400) ** 2 / 400).sum()
    assert chi_squared < 81 + 5 * (2 * 81) ** 0.5  # 81 degrees of freedom, five deviations


def test_step_seeds_differ_between_steps_and_micro_steps():
    seeds = {step_seed(0, step, part) for step in range(50) for part in range(4)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
