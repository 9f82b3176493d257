"""Views against torchvision and hand arithmetic, on real digits and on noise."""

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode, functional

from deit.config import ViewsConfig
from deit.datasets.mixing import Mix, apply_mix, sample_mix
from deit.datasets.views import (
    apply_flip,
    apply_padded_crop,
    apply_resized_crop,
    apply_rotation,
    evaluation_views,
    sample_flip,
    sample_padded_crop,
    sample_resized_crop,
    sample_rotation,
    training_views,
)
from deit.keys import Keys

KEYS = Keys(0, 0, torch.arange(4000))
IMAGES = torch.rand(12, 3, 24, 20)
EVERYTHING = ViewsConfig(
    crop="random_resized", flip=0.5, rotation=20, mixup_alpha=0.8, cutmix_alpha=1.0
)


def test_padded_crop_is_pad_and_crop():
    offsets = sample_padded_crop(Keys(0, 0, torch.arange(12)), 3)
    cropped = apply_padded_crop(IMAGES, offsets, 3)
    for image, (top, left), found in zip(IMAGES, offsets.tolist(), cropped):
        expected = functional.crop(functional.pad(image, [3, 3, 3, 3]), top, left, 24, 20)
        assert torch.equal(found, expected)


def test_padded_crop_takes_every_offset_equally_often():
    counts = torch.bincount(sample_padded_crop(KEYS, 2).flatten(), minlength=5)
    assert len(counts) == 5
    assert (counts - 1600).abs().max() < 5 * 1600**0.5


@pytest.mark.parametrize("size", [8, 16, 32])
def test_resized_crop_is_torchvisions_bilinear_with_antialiasing(size):
    boxes = sample_resized_crop(
        Keys(1, 0, torch.arange(12)), 24, 20, scale=(0.1, 1.0), ratio=(0.5, 2.0)
    )
    found = apply_resized_crop(IMAGES, boxes, size)
    for image, (top, left, height, width), one in zip(IMAGES, boxes.tolist(), found):
        expected = functional.resized_crop(
            image,
            top,
            left,
            height,
            width,
            [size, size],
            InterpolationMode.BILINEAR,
            antialias=True,
        )
        assert torch.allclose(one, expected, atol=2e-5)


def test_resized_crop_boxes_have_the_area_and_shape_asked_for():
    boxes = sample_resized_crop(KEYS, 64, 64, scale=(0.2, 0.5), ratio=(0.8, 1.25)).double()
    top, left, height, width = boxes.unbind(dim=1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 64).all()
    assert (left + width <= 64).all()
    area, ratio = height * width / 64**2, width / height
    assert area.min() > 0.19
    assert area.max() < 0.515
    assert area.mean() == pytest.approx(0.35, abs=0.01)
    assert ratio.log().mean().abs() < 0.01
    assert ratio.log().abs().max() < math.log(1.25) + 0.06  # sides are whole pixels


def test_resized_crop_falls_back_to_the_largest_central_box():
    # No box of the whole area and twice as wide as high fits a square.
    boxes = sample_resized_crop(
        Keys(0, 0, torch.arange(3)), 20, 20, scale=(1.0, 1.0), ratio=(2.0, 2.0)
    )
    assert boxes.tolist() == [[0, 0, 20, 20]] * 3 or boxes.tolist() == [[5, 0, 10, 20]] * 3


def test_flip_is_torchvisions_and_has_its_probability():
    flipped = sample_flip(KEYS, 0.3)
    assert flipped.double().mean() == pytest.approx(0.3, abs=0.04)
    some = torch.tensor([True, False] * 6)
    found = apply_flip(IMAGES, some)
    assert torch.equal(found[0], functional.hflip(IMAGES[0]))
    assert torch.equal(found[1], IMAGES[1])


@pytest.mark.parametrize("shape", [(24, 24), (24, 20)])
def test_rotation_is_torchvisions(shape):
    images, angles = torch.rand(6, 3, *shape), torch.linspace(-40, 40, 6)
    found = apply_rotation(images, torch.deg2rad(angles.double()))
    for image, angle, one in zip(images, angles.tolist(), found):
        expected = functional.rotate(image, angle, InterpolationMode.BILINEAR)
        assert torch.allclose(one, expected, atol=1e-4)


def test_rotation_angles_fill_their_range():
    degrees = torch.rad2deg(sample_rotation(KEYS, 15))
    assert degrees.abs().max() <= 15
    assert degrees.min() < -14.9
    assert degrees.max() > 14.9
    assert degrees.mean().abs() < 0.7


def test_evaluation_view_is_resize_and_centre_crop():
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(evaluation_views(pixels, size=32, crop=1.0), pixels.float() / 255)
    assert torch.equal(
        evaluation_views(pixels, size=24, crop=0.75), pixels.float()[..., 4:28, 4:28] / 255
    )
    half = evaluation_views(pixels, size=16, crop=1.0)
    expected = functional.resize(
        pixels.float() / 255, [16, 16], InterpolationMode.BICUBIC, antialias=True
    )
    assert torch.allclose(half, expected.clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("crop", ["none", "padded", "random_resized"])
def test_a_view_is_a_function_of_seed_epoch_and_sample(crop):
    views = ViewsConfig(crop=crop, rotation=10)
    pixels = torch.randint(256, (50, 3, 16, 16), dtype=torch.uint8)
    samples = torch.arange(50)

    def seen(seed=0, epoch=0, some=samples):
        return training_views(pixels[some], Keys(seed, epoch, some), views=views, size=16)

    whole = seen()
    assert whole.min() >= 0
    assert whole.max() <= 1
    some = torch.tensor([30, 3, 17])
    assert torch.allclose(whole[some], seen(some=some), atol=1e-6)
    assert torch.equal(whole, seen())
    assert not torch.allclose(whole, seen(epoch=1), atol=1e-2)
    assert not torch.allclose(whole, seen(seed=1), atol=1e-2)


def test_views_leave_torchs_random_state_alone():
    before = torch.get_rng_state()
    pixels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    training_views(pixels, Keys(0, 0, torch.arange(4)), views=EVERYTHING, size=16)
    sample_mix(Keys(0, 0, torch.arange(2)), views=EVERYTHING, height=16, width=16)
    assert torch.equal(before, torch.get_rng_state())


def mix(own_weight, cut, box):
    return Mix(torch.tensor([own_weight]).double(), torch.tensor([cut]), torch.tensor([box]))


def test_mixup_by_hand_and_in_place_of_nothing():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    originals = images.clone(), targets.clone()
    mixed, labels = apply_mix(images, targets, mix(0.7, False, [0, 0, 0, 0]))
    assert torch.allclose(mixed[0], torch.full((3, 4, 4), 0.3))
    assert torch.allclose(mixed[1], torch.full((3, 4, 4), 0.7))
    assert torch.allclose(labels, torch.tensor([[0.7, 0.3], [0.3, 0.7]]))
    assert torch.equal(images, originals[0])
    assert torch.equal(targets, originals[1])


def test_cutmix_by_hand():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mixed, labels = apply_mix(images, targets, mix(14 / 16, True, [1, 0, 2, 2]))
    expected = torch.zeros(4, 4)
    expected[1, :2] = 1
    assert torch.equal(mixed[0, 0], expected)
    assert torch.equal(mixed[1, 0], 1 - expected)
    assert torch.allclose(labels[0], torch.tensor([14 / 16, 2 / 16]))


def test_an_unmixed_pair_stays_as_it_is():
    images, targets = torch.rand(2, 3, 4, 4), torch.eye(2)
    for cut in (True, False):
        mixed, labels = apply_mix(images, targets, mix(1.0, cut, [0, 0, 4, 4]))
        assert torch.equal(mixed, images)
        assert torch.equal(labels, targets)


def test_mixing_weights_have_their_distributions_and_match_the_area_kept():
    pairs = Keys(0, 0, torch.arange(20_000))
    found = sample_mix(pairs, views=EVERYTHING, height=16, width=16)
    assert found.cut.double().mean() == pytest.approx(0.5, abs=0.02)
    top, left, bottom, right = found.boxes.unbind(dim=1)
    kept = 1 - (bottom - top) * (right - left) / 256
    assert torch.allclose(found.own_weight[found.cut], kept.double()[found.cut])
    stats = pytest.importorskip("scipy.stats")
    blended = found.own_weight[~found.cut].numpy()
    assert stats.kstest(blended, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_mixing_can_be_rarer_and_of_one_kind():
    pairs = Keys(0, 0, torch.arange(4000))
    rare = ViewsConfig(mixup_alpha=0.8, mix_probability=0.25)
    found = sample_mix(pairs, views=rare, height=8, width=8)
    assert (found.own_weight < 1).double().mean() == pytest.approx(0.25, abs=0.03)
    assert not found.cut.any()
    only_cut = ViewsConfig(cutmix_alpha=1.0)
    assert sample_mix(pairs, views=only_cut, height=8, width=8).cut.all()
