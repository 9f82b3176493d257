"""Samples of the policies: timm's magnitudes, frequencies, and independent random streams."""

import random

import pytest
import torch
from timm.data import auto_augment as timm
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from deit.config.field_types import Policy
from deit.config.sections.views import ViewsConfig
from deit.core.rng import Keys
from deit.datasets.operations import CODES
from deit.datasets.policies import (
    AUTOAUGMENT,
    POLICIES,
    RANDAUGMENT,
    sample_autoaugment,
    sample_color_jitter,
    sample_policy,
    sample_randaugment,
    sample_rotation,
    sample_three_augment,
)

KEYS = Keys(0, 0, torch.arange(30_000))
TIMM = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


def test_policies_match_configured_names():
    assert {"none", *POLICIES} == set(Policy.__args__)


def test_randaugment_has_operations_of_timm():
    assert [TIMM[name] for name in RANDAUGMENT] == timm._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("name", RANDAUGMENT)
@pytest.mark.parametrize("magnitude", [0.0, 3.3, 5.0, 9.0, 9.7, 10.0])
def test_randaugment_magnitudes_equal_timm(name, magnitude, monkeypatch):
    level = torch.tensor([magnitude / 10], dtype=torch.float64)
    scale = timm.LEVEL_TO_ARG[TIMM[name]]
    for draw, sign in ((0.4, 1.0), (0.6, -1.0)):
        monkeypatch.setattr(random, "random", lambda draw=draw: draw)
        expected = 0.0 if scale is None else scale(magnitude, {"translate_pct": 0.45})[0]
        if name == "posterize":
            expected = max(expected, 1)  # theirs arrives at 0 bits: black
        result = RANDAUGMENT[name](level, torch.tensor([sign], dtype=torch.float64))
        assert result.item() == pytest.approx(expected, abs=1e-9)


def test_randaugment_samples_operations_uniformly_with_its_probability():
    codes, arguments = sample_randaugment(KEYS, ViewsConfig(auto_augment="randaugment"))
    assert codes.shape == arguments.shape == (30_000, 2)
    for layer in range(2):
        counts = torch.bincount(codes[:, layer], minlength=len(CODES))
        assert counts[0] / 30_000 == pytest.approx(0.5, abs=0.015)
        assert sum(counts[CODES[name]] for name in RANDAUGMENT) + counts[0] == 30_000
        for name in RANDAUGMENT:
            assert abs(counts[CODES[name]].item() - 1000) < 5 * 1000**0.5, name
    # The layers do not know of each other.
    both = ((codes[:, 0] > 0) & (codes[:, 1] > 0)).double().mean()
    assert both == pytest.approx(0.25, abs=0.015)


def test_randaugment_magnitudes_are_normal_and_clipped():
    codes, arguments = sample_randaugment(KEYS, ViewsConfig(auto_augment="randaugment"))
    angles = arguments[codes == CODES["rotate"]]
    assert angles.abs().max() <= 30
    assert (angles > 0).double().mean() == pytest.approx(0.5, abs=0.06)
    inner = angles.abs()[angles.abs() < 29.9]  # of N(27, 1.5), less what is cut off at 30
    assert inner.mean() == pytest.approx(26.9, abs=0.2)
    assert (angles.abs() > 29.999).double().mean() == pytest.approx(0.023, abs=0.012)
    fixed = ViewsConfig(
        auto_augment="randaugment",
        randaugment_magnitude=4,
        randaugment_magnitude_std=0,
        randaugment_prob=1,
    )
    codes, arguments = sample_randaugment(KEYS, fixed)
    assert (codes > 0).all()
    assert arguments[codes == CODES["rotate"]].abs().unique().tolist() == [12]


def test_three_augment_samples_one_of_three():
    codes, arguments = sample_three_augment(KEYS, ViewsConfig(auto_augment="three_augment"))
    for name in ("grayscale", "solarize", "gaussian_blur"):
        assert (codes == CODES[name]).double().mean() == pytest.approx(1 / 3, abs=0.015)
    assert (arguments[codes == CODES["solarize"]] == 128).all()
    sigmas = arguments[codes == CODES["gaussian_blur"]]
    assert 0.1 <= sigmas.min() < 0.11
    assert 1.99 < sigmas.max() <= 2


def test_color_jitter_varies_three_factors_in_every_order():
    codes, shares = sample_color_jitter(KEYS, 0.3)
    orders = {tuple(row) for row in codes.tolist()}
    assert len(orders) == 6
    assert all(
        set(row) == {CODES["brightness"], CODES["contrast"], CODES["color"]} for row in orders
    )
    assert 0.7 <= shares.min() < 0.701
    assert 1.299 < shares.max() <= 1.3
    contrast = shares[codes == CODES["contrast"]]
    assert contrast.mean() == pytest.approx(1, abs=0.01)


def test_rotation_covers_its_range():
    codes, angles = sample_rotation(KEYS, 15)
    assert (codes == CODES["rotate"]).all()
    assert angles.abs().max() <= 15
    assert angles.min() < -14.9
    assert angles.max() > 14.9
    assert angles.mean().abs() < 0.7


def test_adding_an_augmentation_keeps_random_numbers_of_others():
    randaugment_only = sample_policy(KEYS, ViewsConfig(auto_augment="randaugment"))
    with_others = sample_policy(
        KEYS, ViewsConfig(auto_augment="randaugment", rotation=5, color_jitter=0.2)
    )
    assert torch.equal(with_others[0][:, 1:3], randaugment_only[0])
    assert torch.equal(with_others[1][:, 1:3], randaugment_only[1])
    nothing = sample_policy(KEYS, ViewsConfig())
    assert nothing[0].shape == nothing[1].shape == (30_000, 0)


TORCHVISION = {
    "AutoContrast": "auto_contrast",
    "Equalize": "equalize",
    "Invert": "invert",
    "Rotate": "rotate",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "Color": "color",
    "Contrast": "contrast",
    "Sharpness": "sharpness",
    "ShearX": "shear_x",
}


def test_autoaugment_sub_policies_equal_torchvision():
    expected = AutoAugment(AutoAugmentPolicy.IMAGENET).policies
    for actual, reference in zip(AUTOAUGMENT, expected, strict=True):
        for (name, chance, level), (other, probability, magnitude) in zip(actual, reference):
            assert (name, chance) == (TORCHVISION[other], probability)
            assert magnitude in (None, level)  # of what takes no magnitude they keep none


def test_autoaugment_samples_sub_policies_uniformly_with_torchvision_magnitudes():
    codes, arguments = sample_autoaugment(KEYS, ViewsConfig(auto_augment="autoaugment"))
    reference = AutoAugment(AutoAugmentPolicy.IMAGENET)
    space = reference._augmentation_space(10, (32, 32))
    expected: dict[tuple[int, float], float] = {}
    for item in reference.policies:
        for name, probability, level in item:
            magnitudes, signed = space[name]
            value = magnitudes[level].item() if level is not None else 0.0
            around = 1.0 if name in ("Color", "Contrast", "Sharpness") else 0.0
            for sign in (1, -1) if signed else (1, 1):
                key = CODES[TORCHVISION[name]], round(around + sign * value, 3)
                expected[key] = expected.get(key, 0.0) + probability / 50
    result: dict[tuple[int, float], float] = {}
    for code, argument in zip(codes.flatten().tolist(), arguments.flatten().tolist()):
        if code:
            key = code, round(argument, 3)
            result[key] = result.get(key, 0.0) + 1 / len(codes)
    assert result.keys() == expected.keys()
    for key, share in expected.items():
        spread = (share / len(codes)) ** 0.5  # of a count, about
        assert abs(result[key] - share) < 5 * spread, key
    # The two operations of an image are of one sub-policy, and neither hangs on the other.
    pairs = set(map(tuple, codes.tolist()))
    allowed = {
        (first, second)
        for item in AUTOAUGMENT
        for first in (0, CODES[item[0][0]])
        for second in (0, CODES[item[1][0]])
    }
    assert pairs <= allowed
