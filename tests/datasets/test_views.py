"""Views against torchvision and hand arithmetic, and complete views bit by bit."""

import math
import random

import numpy as np
import pytest
import torch
from torchvision.transforms import functional

from deit.config.field_types import Crop, ErasingFill
from deit.config.presets import AUGMENTATIONS
from deit.config.recipes.handwriting import digits
from deit.config.sections.views import ViewsConfig
from deit.core.rng import Keys
from deit.datasets.views import (
    ChannelStats,
    apply_erasing,
    apply_flip,
    apply_padded_crop,
    apply_views,
    box_bitmask,
    evaluation_views,
    sample_erasing,
    sample_flip,
    sample_padded_crop,
    sample_resized_crop,
    sample_views,
    to_unit_float,
)
from tests.helpers.images import pixels_of, real_images

KEYS = Keys(0, 0, torch.arange(4000))
IMAGES = torch.randint(256, (12, 3, 24, 20), dtype=torch.uint8)
CHANNEL_STATS = ChannelStats((0.5, 0.4, 0.3), (0.2, 0.15, 0.1))


def everything(**changes):
    """Return the views of the digits recipe with every augmentation of a preset enabled."""
    fields = {**AUGMENTATIONS["deit"], "rotation": 10, "color_jitter": 0.2, **changes}
    return digits().replace(views={**fields, "flip": 0.5}).views


def seen(pixels, keys, views, size):
    drawn = sample_views(keys, views, height=pixels.shape[-2], width=pixels.shape[-1], size=size)
    return apply_views(pixels, drawn, views, size=size, channel_stats=CHANNEL_STATS)


def test_padded_crop_equals_pad_and_crop():
    offsets = sample_padded_crop(Keys(0, 0, torch.arange(12)), 3)
    cropped = apply_padded_crop(IMAGES, offsets, 3)
    for image, (top, left), result in zip(IMAGES, offsets.tolist(), cropped):
        expected = functional.crop(functional.pad(image, [3, 3, 3, 3]), top, left, 24, 20)
        assert torch.equal(result, expected)


def test_padded_crop_offsets_are_uniform():
    counts = torch.bincount(sample_padded_crop(KEYS, 2).flatten(), minlength=5)
    assert len(counts) == 5
    assert (counts - 1600).abs().max() < 5 * 1600**0.5


def test_resized_crop_boxes_have_configured_area_and_aspect():
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
    assert boxes.tolist() == [[5, 0, 10, 20]] * 3


def test_boxes_do_not_depend_on_other_images():
    heights = torch.tensor([50, 400, 33, 224], dtype=torch.float64)
    widths = torch.tensor([70, 300, 330, 224], dtype=torch.float64)
    settings = {"scale": (0.08, 1.0), "ratio": (0.75, 4 / 3)}
    as_batch = sample_resized_crop(Keys(3, 1, torch.arange(4)), heights, widths, **settings)
    for index in range(4):
        key = Keys(3, 1, torch.tensor([index]))
        single = sample_resized_crop(key, int(heights[index]), int(widths[index]), **settings)
        assert torch.equal(as_batch[index], single[0])


def test_flip_equals_torchvision_with_its_probability():
    flipped = sample_flip(KEYS, 0.3)
    assert flipped.double().mean() == pytest.approx(0.3, abs=0.04)
    some = torch.tensor([True, False] * 6)
    result = apply_flip(IMAGES, some)
    assert torch.equal(result[0], functional.hflip(IMAGES[0]))
    assert torch.equal(result[1], IMAGES[1])


def test_erased_boxes_have_configured_probability_area_and_aspect():
    boxes, _ = sample_erasing(KEYS, ViewsConfig(erasing_prob=0.25), 64)
    top, left, height, width = boxes.double().unbind(dim=1)
    erased = height > 0
    assert erased.double().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(erased, width > 0)
    area = (height * width / 64**2)[erased]
    assert area.min() > 0.018
    assert area.max() < 0.34
    # Uniform in (0.02, 1/3), a little less where long boxes do not fit.
    assert area.mean() == pytest.approx(0.175, abs=0.012)
    assert (top + height <= 64).all()
    assert (left + width <= 64).all()
    assert (height < 64).all()
    assert (width < 64).all()


@pytest.mark.parametrize("fill", ErasingFill.__args__)
def test_erasing_fills_the_box_only(fill):
    images = torch.full((400, 3, 32, 32), 9, dtype=torch.uint8)
    keys, views = Keys(0, 0, torch.arange(400)), ViewsConfig(erasing_prob=0.5, erasing_mode=fill)
    boxes, seeds = sample_erasing(keys, views, 32)
    result = apply_erasing(images, boxes, seeds, mode=fill, channel_stats=CHANNEL_STATS)
    inside = box_bitmask(boxes, 32, 32) == 255
    assert (result.permute(0, 2, 3, 1)[~inside] == 9).all()
    filled = result.permute(0, 2, 3, 1)[inside].double() / 255
    if fill == "mean":
        assert filled.unique(dim=0).tolist() == [[128 / 255, 102 / 255, 76 / 255]]
        return
    for channel, (mean, std) in enumerate(zip(*CHANNEL_STATS)):
        values = filled[:, channel]
        # Cut off at black and white, 2.5 deviations away or more.
        assert values.mean() == pytest.approx(mean, abs=0.02)
        assert values.std() == pytest.approx(std, abs=0.05)
    neighbors = torch.corrcoef(torch.stack([filled[:-1, 0], filled[1:, 0]]))[0, 1]
    between_channels = torch.corrcoef(filled[:, :2].T)[0, 1]
    assert abs(neighbors) < 0.02
    assert abs(between_channels) < 0.02


def test_evaluation_view_is_resize_and_center_crop():
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(evaluation_views(pixels, size=32, crop_pct=1.0), to_unit_float(pixels))
    assert torch.equal(
        evaluation_views(pixels, size=24, crop_pct=0.75), to_unit_float(pixels[..., 4:28, 4:28])
    )
    half = evaluation_views(pixels, size=16, crop_pct=1.0)
    expected = functional.resize(pixels, [16, 16], functional.InterpolationMode.BICUBIC)
    assert (half * 255 - expected).abs().max() < 3


def test_to_unit_float_is_value_over_255():
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_unit_float(levels).max() == 1
    assert to_unit_float(levels).min() == 0
    assert (to_unit_float(levels).double() - levels.double() / 255).abs().max() < 2**-23


@pytest.mark.parametrize("crop", Crop.__args__)
@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_view_is_function_of_seed_epoch_sample_and_repeat(preset, crop):
    fields = {**AUGMENTATIONS[preset], "crop": crop, "rotation": 10}
    views = digits().replace(views=fields).views
    pixels = pixels_of([image.resize((40, 40)) for image in real_images()]).repeat(2, 1, 1, 1)
    samples = torch.arange(24)

    def of(seed=0, epoch=0, repeat=0, some=samples):
        keys = Keys(seed, epoch, some, torch.full_like(some, repeat))
        return seen(pixels[some], keys, views, 32)

    whole = of()
    assert whole.dtype == torch.uint8
    assert whole.shape == (24, 3, 32, 32)
    assert torch.equal(whole, of())
    for size in (1, 7, 16):
        assert torch.equal(torch.cat([of(some=some) for some in samples.split(size)]), whole)
    torch.set_num_threads(1)
    some = torch.tensor([20, 3, 17])
    assert torch.equal(whole[some], of(some=some))
    for other in (of(epoch=1), of(seed=1), of(repeat=1)):
        changed = (whole != other).flatten(1).any(dim=1).double().mean()
        assert changed > 0.8


def test_views_can_be_larger_or_smaller_than_their_source():
    views = ViewsConfig(crop="padded", crop_padding=1)
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    for size in (4, 8, 20):
        assert seen(pixels, Keys(0, 0, torch.arange(4)), views, size).shape == (4, 3, size, size)


def test_views_sampled_ahead_equal_views_sampled_per_batch():
    views = everything(crop="random_resized")
    pixels = pixels_of([image.resize((32, 32)) for image in real_images()])
    ahead = sample_views(Keys(0, 0, torch.arange(12)), views, height=32, width=32, size=32)
    for first in range(0, 12, 4):
        rows = slice(first, first + 4)
        parts = seen(pixels[rows], Keys(0, 0, torch.arange(12)[rows]), views, 32)
        drawn = ahead.select(rows)
        assert torch.equal(
            parts, apply_views(pixels[rows], drawn, views, size=32, channel_stats=CHANNEL_STATS)
        )


def test_views_do_not_use_global_random_state(monkeypatch):
    from deit.datasets.mixing import sample_mix

    def refuse(*args, **kwargs):
        raise AssertionError("a global random state was read")

    for name in ("random", "uniform", "gauss", "randint", "choice", "shuffle", "sample"):
        monkeypatch.setattr(random, name, refuse)
    for name in ("random", "rand", "randn", "randint", "choice", "normal", "uniform", "beta"):
        monkeypatch.setattr(np.random, name, refuse)
    drawing = ("rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal")
    for name in (*drawing, "rand_like", "randn_like", "randint_like"):
        monkeypatch.setattr(torch, name, refuse)
    for name in ("random_", "uniform_", "normal_", "bernoulli_", "exponential_", "log_normal_"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    states = torch.get_rng_state(), random.getstate()
    pixels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    keys = Keys(0, 0, torch.arange(4))
    for preset in AUGMENTATIONS.values():
        for crop in Crop.__args__:
            views = everything(**preset, crop=crop)
            seen(pixels, keys, views, 16)
    sample_mix(Keys(0, 0, torch.arange(2)), views=everything(), size=16)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
