"""Every operation against Pillow on real images, independent of batch, threads and device."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from deit.datasets.operations import CODES, LEVELS, MOVES, FillOptions, apply_operations
from tests.helpers.images import PILLOW, pixels_of, real_images

FILL = (124, 116, 104)
CANVASES = {name: FillOptions(torch.tensor(FILL, dtype=torch.uint8), name) for name in PILLOW}


def moved(matrix):
    def reference(image, argument, mode):
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix(argument, *image.size), mode, fillcolor=FILL
        )

    return reference


REFERENCES = {
    "invert": lambda i, a, mode: ImageOps.invert(i),
    "solarize": lambda i, a, mode: ImageOps.solarize(i, int(a)),
    "solarize_add": lambda i, a, mode: i.point(
        [min(255, level + int(a)) if level < 128 else level for level in range(256)] * 3
    ),
    "posterize": lambda i, a, mode: ImageOps.posterize(i, int(a)),
    "brightness": lambda i, a, mode: ImageEnhance.Brightness(i).enhance(a),
    "contrast": lambda i, a, mode: ImageEnhance.Contrast(i).enhance(a),
    "auto_contrast": lambda i, a, mode: ImageOps.autocontrast(i),
    "equalize": lambda i, a, mode: ImageOps.equalize(i),
    "color": lambda i, a, mode: ImageEnhance.Color(i).enhance(a),
    "grayscale": lambda i, a, mode: i.convert("L").convert("RGB"),
    "sharpness": lambda i, a, mode: ImageEnhance.Sharpness(i).enhance(a),
    "gaussian_blur": lambda i, a, mode: i.filter(ImageFilter.GaussianBlur(a)),
    "shear_x": moved(lambda a, w, h: (1, a, 0, 0, 1, 0)),
    "shear_y": moved(lambda a, w, h: (1, 0, 0, a, 1, 0)),
    "translate_x": moved(lambda a, w, h: (1, 0, a * w, 0, 1, 0)),
    "translate_y": moved(lambda a, w, h: (1, 0, 0, 0, 1, a * h)),
    "rotate": lambda i, a, mode: i.rotate(a, mode, fillcolor=FILL),
}
ARGUMENTS = {
    "solarize": (0, 26, 128, 256),
    "solarize_add": (0, 99, 110),
    "posterize": (1, 2, 4, 8),
    "shear_x": (-0.3, 0.27),
    "shear_y": (-0.3, 0.27),
    "translate_x": (-0.43, 0.405, 0.01),
    "translate_y": (-0.43, 0.405, 0.01),
    "rotate": (-30.0, 27.0, 3.3),
}


def done(name, pixels, argument, interpolation="bicubic"):
    count = len(pixels)
    arguments = torch.full((count,), float(argument))
    codes = torch.full((count,), CODES[name])
    return apply_operations(pixels, codes, arguments, CANVASES[interpolation])


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("name", [name for name in CODES if name != "identity"])
def test_operations_equal_pillow(name, interpolation):
    images = real_images()
    before = pixels_of(images)
    for argument in ARGUMENTS.get(name, (0.1, 0.19, 1.0, 1.81, 1.9)):
        argument = float(np.float32(argument))  # ours are single precision
        result = done(name, before, argument, interpolation).int()
        mode = PILLOW[interpolation]
        expected = pixels_of([REFERENCES[name](i, argument, mode) for i in images]).int()
        difference = (result - expected).abs()
        if name in MOVES:  # Pillow calculates in double precision and cuts off
            assert difference.max() <= 1, argument
            assert (difference > 0).double().mean() < 0.12, argument
        elif name == "gaussian_blur":  # Pillow's is three box filters, ours is the Gaussian
            assert difference.double().mean() < 1.5, argument
        else:
            assert difference.max() == 0, argument


def test_gaussian_blur_by_hand():
    ndimage = pytest.importorskip("scipy.ndimage")
    before = pixels_of(real_images())
    for sigma in (0.1, 0.7, 2.0):
        expected = ndimage.gaussian_filter(
            before.double().numpy(), sigma=sigma, axes=(2, 3), mode="nearest", truncate=4
        )
        # Rounded to integers after each direction.
        assert np.abs(done("gaussian_blur", before, sigma).numpy() - expected).max() < 1.01


@pytest.mark.parametrize("argument", [0, 0.4, 1])
def test_posterize_never_leaves_black(argument):
    before = pixels_of(real_images())
    assert torch.equal(done("posterize", before, argument), done("posterize", before, 1))
    assert done("posterize", before, argument).max() == 128


@pytest.mark.parametrize("side", [6, 28])
def test_contrast_rounds_mean_half_up(side):
    # Half of the pixels are brighter by one: the mean is exactly halfway.
    pixels = torch.full((1, 3, side, side), 100, dtype=torch.uint8)
    pixels[..., : side // 2] = 101
    assert done("contrast", pixels, 0).unique().tolist() == [101]
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    assert np.array(ImageEnhance.Contrast(image).enhance(0)).max() == 101


def test_constant_images_have_no_division_by_zero():
    flat = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    for name in ("auto_contrast", "equalize"):
        assert torch.equal(done(name, flat, 0), flat)


def test_tiny_images_support_every_operation():
    for shape in ((1, 3, 1, 1), (1, 3, 2, 5)):
        tiny = torch.randint(256, shape, dtype=torch.uint8)
        for name in CODES:
            assert done(name, tiny, 1).shape == shape


def mixed_batch():
    pixels = pixels_of(real_images())
    pixels = torch.cat([pixels, pixels.flip(0), pixels.flip(3)])
    codes = torch.arange(len(pixels)) % len(CODES)
    return pixels, codes, torch.linspace(0.1, 1.9, len(pixels))


@pytest.mark.parametrize("interpolation", PILLOW)
def test_operations_do_not_depend_on_batch(interpolation):
    pixels, codes, arguments = mixed_batch()
    canvas = CANVASES[interpolation]
    combined = apply_operations(pixels, codes, arguments, canvas)
    for size in (1, 5, 16):
        parts = [
            apply_operations(*part, canvas)
            for part in zip(*(values.split(size) for values in (pixels, codes, arguments)))
        ]
        assert torch.equal(torch.cat(parts), combined), size
    torch.set_num_threads(1)
    assert torch.equal(apply_operations(pixels, codes, arguments, canvas), combined)


def test_operations_do_not_change_input():
    pixels, codes, arguments = mixed_batch()
    before = pixels.clone()
    result = apply_operations(pixels, codes, arguments, CANVASES["bicubic"])
    assert torch.equal(pixels, before)
    assert torch.equal(result[codes == 0], pixels[codes == 0])


def test_every_operation_has_one_code_and_kind():
    names = [*LEVELS, *MOVES]
    assert sorted(names) == sorted(set(names))
    assert sorted(CODES.values()) == list(range(len(names) + 1))
    assert CODES["identity"] == 0
