"""Mixup and cutmix by hand: pixels, labels, corrected weights, and the same box at two sizes."""

import pytest
import torch

from deit.config.sections.views import ViewsConfig
from deit.core.rng import Keys
from deit.datasets.mixing import Mix, mix_images, mix_targets, sample_mix

BOTH = ViewsConfig(mixup_alpha=0.8, cutmix_alpha=1.0)


def mix(lam, cut, box):
    return Mix(torch.tensor([lam]).double(), torch.tensor([cut]), torch.tensor([box]), 4)


def test_mixup_by_hand_keeps_input():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    originals = images.clone(), targets.clone()
    parameters = mix(0.7, False, [0, 0, 0, 0])
    mixed, labels = mix_images(images, parameters), mix_targets(targets, parameters)
    assert torch.allclose(mixed[0], torch.full((3, 4, 4), 0.3))
    assert torch.allclose(mixed[1], torch.full((3, 4, 4), 0.7))
    assert torch.allclose(labels, torch.tensor([[0.7, 0.3], [0.3, 0.7]]))
    assert torch.equal(images, originals[0])
    assert torch.equal(targets, originals[1])


def test_cutmix_by_hand():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    parameters = mix(14 / 16, True, [1, 0, 2, 2])
    mixed = mix_images(images, parameters)
    expected = torch.zeros(4, 4)
    expected[1, :2] = 1
    assert torch.equal(mixed[0, 0], expected)
    assert torch.equal(mixed[1, 0], 1 - expected)
    assert torch.allclose(mix_targets(targets, parameters)[0], torch.tensor([14 / 16, 2 / 16]))


def test_cutmix_box_is_scaled_to_teacher_size():
    small = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    large = torch.stack([torch.zeros(3, 12, 12), torch.ones(3, 12, 12)])
    parameters = mix(14 / 16, True, [1, 0, 2, 2])
    enlarged = mix_images(small, parameters).repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    assert torch.equal(mix_images(large, parameters), enlarged)


def test_unmixed_pair_is_unchanged():
    images, targets = torch.rand(2, 3, 4, 4), torch.eye(2)
    for cut in (True, False):
        parameters = mix(1.0, cut, [0, 0, 4, 4])
        assert torch.equal(mix_images(images, parameters), images)
        assert torch.equal(mix_targets(targets, parameters), targets)


def test_mix_weights_have_beta_distribution_and_match_box_area():
    result = sample_mix(Keys(0, 0, torch.arange(20_000)), views=BOTH, size=16)
    assert result.is_cutmix.double().mean() == pytest.approx(0.5, abs=0.02)
    top, left, bottom, right = result.boxes.unbind(dim=1)
    area = 1 - ((bottom - top) * (right - left)).double() / 256
    assert torch.equal(result.lam[result.is_cutmix], area[result.is_cutmix])
    stats = pytest.importorskip("scipy.stats")
    blended = result.lam[~result.is_cutmix].numpy()
    assert stats.kstest(blended, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_cutmix_target_matches_pixel_share():
    count = 64
    parameters = sample_mix(
        Keys(4, 0, torch.arange(count)), views=ViewsConfig(cutmix_alpha=1.0), size=16
    )
    images = torch.zeros(2 * count, 3, 16, 16)
    images[1::2] = 1
    inputs = mix_images(images, parameters).mean(dim=(1, 2, 3))
    targets = mix_targets(torch.eye(2).repeat(count, 1), parameters)
    assert torch.allclose(inputs, targets[:, 1], atol=1e-6)


def test_mix_probability_and_switch_are_used():
    pairs = Keys(0, 0, torch.arange(4000))
    rare = ViewsConfig(mixup_alpha=0.8, mixup_prob=0.25)
    result = sample_mix(pairs, views=rare, size=8)
    assert (result.lam < 1).double().mean() == pytest.approx(0.25, abs=0.03)
    assert not result.is_cutmix.any()
    only_cut = ViewsConfig(cutmix_alpha=1.0)
    assert sample_mix(pairs, views=only_cut, size=8).is_cutmix.all()


def test_mix_does_not_depend_on_batch():
    images = torch.rand(32, 3, 8, 8)
    parameters = sample_mix(Keys(0, 0, torch.arange(16)), views=BOTH, size=8)
    combined = mix_images(images, parameters)
    for size in (1, 3):
        parts = [
            mix_images(
                images[2 * first : 2 * (first + size)],
                parameters.select(slice(first, first + size)),
            )
            for first in range(0, 16, size)
        ]
        assert torch.equal(torch.cat(parts), combined)
