"""Stratified indices: class counts by hand, reproducible for a seed and stream."""

import torch

from deit.datasets.splits import stratified_indices


def rows_of(labels, count, *, seed=0, stream="x"):
    return stratified_indices(labels, count, seed=seed, stream=stream)


def test_stratified_indices_balance_classes():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 40)
    rows = rows_of(labels, 20)
    assert torch.equal(rows, rows.unique())
    assert torch.bincount(labels[rows]).tolist() in ([9, 3, 8], [8, 3, 9])
    many = torch.arange(1000).repeat(2)
    counts = torch.bincount(many[rows_of(many, 128)], minlength=1000)
    assert (counts.max().item(), counts.sum().item()) == (1, 128)


def test_stratified_indices_of_larger_count_are_all():
    labels = torch.tensor([2, 0, 1, 1])
    assert torch.equal(rows_of(labels, 4), torch.arange(4))
    assert torch.equal(rows_of(labels, 99), torch.arange(4))


def test_stratified_indices_depend_on_seed_and_stream_and_are_nested():
    labels = torch.arange(3).repeat(40)
    rows = rows_of(labels, 20)
    assert torch.equal(rows, rows_of(labels, 20))
    assert not torch.equal(rows, rows_of(labels, 20, seed=1))
    assert not torch.equal(rows, rows_of(labels, 20, stream="y"))
    assert set(rows_of(labels, 7).tolist()) < set(rows.tolist())
