"""Resizing against Pillow and torchvision on real images, exact at every batch size."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, functional

from deit.datasets.resizing import resize, resize_boxes
from tests.helpers.images import PILLOW, pixels_of, real_images

BOXES = torch.tensor(
    [[(7 * n) % 20, (5 * n) % 30, 8 + (11 * n) % 21, 5 + (13 * n) % 26] for n in range(12)]
)


@pytest.mark.parametrize("size", [13, 32, 64])
@pytest.mark.parametrize("interpolation", PILLOW)
def test_resize_boxes_equals_pillow(interpolation, size):
    images, mode = real_images(), PILLOW[interpolation]
    result = resize_boxes(pixels_of(images), BOXES, size, interpolation)
    expected = []
    for image, (top, left, height, width) in zip(images, BOXES.tolist()):
        cut = image.crop((left, top, left + width, top + height))
        # One direction after the other: Pillow's own order depends on the sizes.
        expected.append(cut.resize((size, height), mode).resize((size, size), mode))
    difference = (result.int() - pixels_of(expected).int()).abs()
    # Both round to integers twice, and ties not always in the same direction.
    assert difference.max() <= 2
    assert (difference > 0).double().mean() < 0.05


@pytest.mark.parametrize("interpolation", PILLOW)
def test_resize_boxes_matches_torchvision_resized_crop(interpolation):
    images = pixels_of(real_images())
    result = resize_boxes(images, BOXES, 32, interpolation).float()
    mode = InterpolationMode(interpolation)
    for image, box, item in zip(images, BOXES.tolist(), result):
        expected = functional.resized_crop(image.float(), *box, [32, 32], mode, antialias=True)
        difference = (item - expected.clamp(0, 255)).abs()
        # torchvision keeps what overshoots between its two directions, Pillow and we cut it.
        assert difference.max() < (8 if interpolation == "bicubic" else 1.51)
        assert difference.mean() < 0.4


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(("height", "width"), [(24, 30), (96, 120), (31, 77)])
def test_resize_equals_pillow(interpolation, height, width):
    images, mode = real_images(), PILLOW[interpolation]
    result = resize(pixels_of(images), height, width, interpolation)
    expected = [i.resize((width, i.height), mode).resize((width, height), mode) for i in images]
    difference = (result.int() - pixels_of(expected).int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).double().mean() < 0.1


@pytest.mark.parametrize("interpolation", PILLOW)
def test_resize_does_not_depend_on_batch_or_threads(interpolation):
    images = pixels_of(real_images())
    as_batch = resize_boxes(images, BOXES, 40, interpolation)
    one_by_one = [
        resize_boxes(image[None], box[None], 40, interpolation) for image, box in zip(images, BOXES)
    ]
    assert torch.equal(torch.cat(one_by_one), as_batch)
    torch.set_num_threads(1)
    assert torch.equal(resize_boxes(images, BOXES, 40, interpolation), as_batch)
    wide = resize(images, 50, 44, interpolation)
    assert torch.equal(wide, torch.cat([resize(i[None], 50, 44, interpolation) for i in images]))


@pytest.mark.parametrize(("source", "size"), [(12, 9), (12, 20), (200, 16)])
def test_flipped_boxes_equal_flipped_results(source, size):
    # Small sources take their filters from a bank, large ones calculate them.
    pixels = torch.randint(256, (6, 3, source, source), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, source, source], [1, 2, 5, 4], [3, 3, 1, 9]] * 2)
    boxes[5] = torch.tensor([source - 1, source - 1, 1, 1])
    flipped = torch.tensor([True, False, True, False, True, True])
    plain = resize_boxes(pixels, boxes, size, "bicubic")
    result = resize_boxes(pixels, boxes, size, "bicubic", flipped)
    for item, other, mirrored in zip(result, plain, flipped.tolist()):
        assert torch.equal(item, other.flip(-1) if mirrored else other)


def test_resize_ignores_matmul_precision_and_autocast():
    images = pixels_of(real_images())
    plain = resize_boxes(images, BOXES, 40, "bicubic")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(resize_boxes(images, BOXES, 40, "bicubic"), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("target", [24, 32, 72, 224])
def test_filters_do_not_depend_on_last_bit(target, monkeypatch):
    from deit.datasets import resizing

    start, length = torch.arange(60), torch.arange(60) + 3
    plain = resizing._filter(start, length, 224, target, "bicubic")
    rounded = torch.round

    def nudged(weights):
        return rounded(weights * (1 + 2.0**-51))

    monkeypatch.setattr(torch, "round", nudged)
    assert torch.equal(resizing._filter(start, length, 224, target, "bicubic"), plain)


def test_resize_keeps_extremes_and_same_size_is_identity():
    for level in (0, 255):
        flat = torch.full((1, 3, 17, 9), level, dtype=torch.uint8)
        assert torch.equal(resize(flat, 5, 40, "bicubic"), torch.full((1, 3, 5, 40), level))
    image = torch.randint(256, (2, 3, 9, 9), dtype=torch.uint8)
    assert resize(image, 9, 9, "bicubic") is image
    whole = torch.tensor([[0, 0, 9, 9]] * 2)
    assert torch.equal(resize_boxes(image, whole, 9, "bicubic"), image)


def test_filter_sums_are_exact_in_float32():
    from deit.datasets.resizing import _filter

    for source, target in ((64, 7), (9, 50), (256, 224), (500, 32)):
        start, length = torch.tensor([0]), torch.tensor([source])
        for interpolation in PILLOW:
            weights = _filter(start, length, source, target, interpolation)
            assert torch.equal(weights * 2**15, (weights * 2**15).round())
            assert weights.abs().sum(dim=-1).max() * 255 + 0.5 < 2**9


def test_one_pixel_box_is_that_pixel():
    image = torch.randint(256, (1, 3, 6, 6), dtype=torch.uint8)
    result = resize_boxes(image, torch.tensor([[2, 3, 1, 1]]), 4, "bicubic")
    assert torch.equal(result, image[:, :, 2:3, 3:4].expand(1, 3, 4, 4))
