"""Thousands of damaged images: each decodes to the right shape or raises with its name."""

import random
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from deit.core.errors import DataError
from deit.datasets.decoding import decode_square
from tests.helpers.images import mutate

MUTATIONS = 5000
KINDS = {
    "jpeg": ("RGB", {"format": "JPEG", "quality": 80}),
    "progressive jpeg": ("RGB", {"format": "JPEG", "progressive": True}),
    "cmyk jpeg": ("CMYK", {"format": "JPEG"}),
    "png": ("RGB", {"format": "PNG"}),
    "palette png": ("P", {"format": "PNG"}),
    "16 bit png": ("I;16", {"format": "PNG"}),
    "png with alpha": ("RGBA", {"format": "PNG"}),
    "gif": ("P", {"format": "GIF"}),
    "webp": ("RGB", {"format": "WEBP"}),
    "bmp": ("RGB", {"format": "BMP"}),
    "ppm": ("RGB", {"format": "PPM"}),
    "tiff": ("RGB", {"format": "TIFF", "compression": "tiff_lzw"}),
}


def encoded_image(kind: str) -> bytes:
    mode, settings = KINDS[kind]
    noise = np.random.default_rng(0).integers(0, 256, (21, 30, 3), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(noise).convert(mode)
    file = BytesIO()
    image.save(file, **settings)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_image_decodes_or_raises_in_time(kind, tmp_path):
    mode, whole = random.Random(kind), encoded_image(kind)
    assert decode_square(whole, "whole", 16).shape == (3, 16, 16)
    file, refused, slowest = tmp_path / "picture", 0, 0.0
    count = -(-MUTATIONS // len(KINDS))
    for index in range(count):
        file.write_bytes(whole)
        for _ in range(mode.choice((1, 1, 1, 5, 40))):
            if file.is_file() and file.stat().st_size:
                mutate(file, mode)
        content = file.read_bytes() if file.is_file() else b""
        started = time.process_time()  # of this process: what else is busy does not count
        output = ""
        try:
            pixels = decode_square(content, f"picture {index}", 16)
        except DataError as error:
            output = str(error)
        if output:
            assert output.startswith(f"picture {index}: ")
            assert "\n" not in output
            refused += 1
        else:
            assert (pixels.shape, pixels.dtype) == ((3, 16, 16), torch.uint8)
        slowest = max(slowest, time.process_time() - started)
    assert 0 < refused < count
    assert slowest < 5


@pytest.mark.fault("C11")
def test_images_of_one_pixel_or_line_can_be_trained_on(tmp_path, command_server):
    for label in "ab":
        folder = tmp_path / "pictures" / label
        folder.mkdir(parents=True)
        for index, size in enumerate(((1, 1), (1, 60), (60, 1), (2, 3), (9, 9), (30, 20)) * 2):
            Image.new("RGB", size, (200 * (label == "a"), index, 90)).save(folder / f"{index}.png")
    arguments = ("--loss", "none", "--student.name", "vit_micro", "--student.depth", "1")
    arguments += (
        "--student.image_size",
        "16",
        "--student.patch_size",
        "4",
        "--optim.batch_size",
        "8",
    )
    arguments += ("--optim.epochs", "1", "--optim.warmup_epochs", "0", "--data.image_size", "18")
    for storage in ("memory", "files"):
        more = ("--data.storage", storage, "--augmentation", "deit", "--views.aug_repeats", "1")
        done = command_server.run(
            *("train", "folder", "--data.root", tmp_path / "pictures", *arguments, *more),
            *("--out", tmp_path / storage),
        )
        assert done.code == 0, done.err
