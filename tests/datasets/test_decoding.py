"""Unusual images: each is decoded by the documented rule or raises an error with its name."""

import struct
import threading
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from deit.core.errors import DataError
from deit.datasets.decoding import MAX_PIXELS, decode_image, decode_square, open_image
from tests.helpers.errors import raises


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(mode: str, color: object, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new(mode, size, color)


def palette(transparency: object = None) -> bytes:
    image = plain("P", 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    options = {} if transparency is None else {"transparency": transparency}
    return encode(image, **options)


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(width: int, height: int, *, bits: int = 8, color: int = 0, row: bytes = b"") -> bytes:
    """Return a PNG written by hand: equal rows, or only a header."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * height) if row else b""
    body = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_gray(value: int, **options: object) -> bytes:
    return encode(Image.fromarray(np.full((6, 8), value, dtype=np.uint16)), **options)


def gif(*colors: int) -> bytes:
    frames = [plain("L", color) for color in colors]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


ORANGE = (200, 100, 50)
READ = {
    "RGB": (encode(plain("RGB", ORANGE)), ORANGE),
    "bmp": (encode(plain("RGB", ORANGE), "BMP"), ORANGE),
    "ppm": (encode(plain("RGB", ORANGE), "PPM"), ORANGE),
    "tiff": (encode(plain("RGB", ORANGE), "TIFF"), ORANGE),
    "webp": (encode(plain("RGB", ORANGE), "WEBP", lossless=True), ORANGE),
    "one-frame gif": (gif(77), (77, 77, 77)),
    "grey": (encode(plain("L", 77)), (77, 77, 77)),
    "grey with a clear grey": (encode(plain("L", 77), transparency=77), (0, 0, 0)),
    "grey with alpha": (encode(plain("LA", (200, 51))), (40, 40, 40)),
    "black and white": (encode(plain("1", 1)), (255, 255, 255)),
    "palette": (palette(), ORANGE),
    "palette, one clear": (palette(1), (0, 0, 0)),
    "palette with alphas": (palette(b"\xff\x33"), (40, 20, 10)),
    "hidden color": (encode(plain("RGBA", (*ORANGE, 0))), (0, 0, 0)),
    "opaque alpha": (encode(plain("RGBA", (*ORANGE, 255))), ORANGE),
    "a clear color": (encode(plain("RGB", ORANGE), transparency=ORANGE), (0, 0, 0)),
    "CMYK tiff": (encode(plain("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "CMYK jpeg": (encode(plain("CMYK", (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "white CMYK jpeg": (encode(plain("CMYK", (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
    "16-bit gray, middle": (deep_gray(128 * 257), (128, 128, 128)),
    "16-bit gray, rounded": (deep_gray(128 * 257 + 200), (129, 129, 129)),
    "16-bit gray, white": (deep_gray(65535), (255, 255, 255)),
    "16-bit color": (png(8, 6, bits=16, color=2, row=b"\xc8\xff\x64\x01\x32\x00" * 8), ORANGE),
    "1 x 1": (encode(plain("RGB", ORANGE, (1, 1))), ORANGE),
    "1 x 500": (encode(plain("RGB", ORANGE, (1, 500))), ORANGE),
    "60000 x 1": (encode(plain("RGB", ORANGE, (60000, 1))), ORANGE),
}


@pytest.mark.fault("C5", "C6", "C7", "C9", "C11")
@pytest.mark.parametrize("name", READ)
def test_unusual_image_has_documented_color(name):
    encoded, color = READ[name]
    square = decode_square(encoded, name, 16)
    assert square.shape == (3, 16, 16)
    assert square.dtype == torch.uint8
    assert (square.float() - torch.tensor(color)[:, None, None]).abs().max() <= 1


@pytest.mark.fault("C5")
def test_adobe_cmyk_jpeg_is_inverted():
    """So that the table above tests the inversion and not the same mistake twice."""
    encoded, _ = READ["white CMYK jpeg"]
    assert b"Adobe" in encoded
    with Image.open(BytesIO(encoded)) as image:
        image.tile = [image.tile[0]._replace(args=("CMYK", ""))]
        assert image.getpixel((0, 0)) == (255, 255, 255, 255)


REFUSED = {
    "nothing": (b"", "empty"),
    "text": (b"not a picture", "13 bytes", "JPEG", "WEBP"),
    "html": (b"<!DOCTYPE html><p>404</p>", "25 bytes", "JPEG", "WEBP"),
    "icon": (encode(plain("RGB", ORANGE, (16, 16)), "ICO"), " bytes", "JPEG", "WEBP"),
    "16-bit tiff": (deep_gray(1000, kind="TIFF"), "TIFF", "8 bits", "mode I;16"),
    "float tiff": (encode(plain("F", 0.5), "TIFF"), "TIFF", "8 bits", "mode F"),
    "32-bit tiff": (encode(plain("I", 70000), "TIFF"), "TIFF", "8 bits", "mode I"),
    "16-bit pgm": (b"P5 2 2 65535\n" + bytes(8), "PPM", "8 bits", "mode I"),
    "animated gif": (gif(10, 200, 30), "GIF", " 3 "),
    "animated webp": (
        encode(plain("RGB", "red"), "WEBP", save_all=True, append_images=[plain("RGB", "blue")]),
        *("WEBP", " 2 "),
    ),
    "animated png": (
        encode(plain("RGB", "red"), save_all=True, append_images=[plain("RGB", "blue")]),
        *("PNG", " 2 "),
    ),
    "pages": (
        encode(plain("RGB", "red"), "TIFF", save_all=True, append_images=[plain("RGB", "blue")]),
        *("TIFF", " 2 "),
    ),
    "bomb": (png(14000, 14000), "196000000"),
    "small bomb, of which Pillow only warns": (png(10000, 10000), "100000000", f"{MAX_PIXELS}"),
    "text bomb": (
        encode(plain("L", 0))[:33]
        + chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2**26)))
        + encode(plain("L", 0))[33:],
        "MAX_TEXT_CHUNK",
    ),
}


@pytest.mark.fault("C2", "C7", "C9", "C10")
@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_image_raises_with_name(name):
    encoded, *names = REFUSED[name]
    with raises(DataError, *names) as caught:
        open_image(encoded, f"some/{name}.jpg")
    assert str(caught.value).startswith(f"some/{name}.jpg: ")
    assert "\n" not in str(caught.value)


def test_max_pixels_is_pillows_limit():
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def noise(size: tuple[int, int] = (40, 24)) -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.fault("C1")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_truncated_image_raises(kind, share):
    encoded = encode(noise(), kind)
    with raises(DataError, "place/cut: "):
        open_image(encoded[: int(len(encoded) * share)], "place/cut")


@pytest.mark.fault("C4")
def test_png_with_flipped_bit_raises():
    encoded = encode(noise())
    for position in range(45, len(encoded) - 20, 97):
        damaged = bytearray(encoded)
        damaged[position] ^= 4
        with raises(DataError, "place/flipped: "):
            open_image(bytes(damaged), "place/flipped")


# The transposition of an upright image that this EXIF orientation reverts.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.fault("C8")
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(kind, orientation):
    blocks = Image.new("RGB", (48, 32), "white")
    blocks.paste("red", (0, 0, 16, 16))
    blocks.paste("blue", (32, 16, 48, 32))
    turn = STORED[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "JPEG":
        options = {"quality": 100, "subsampling": 0}
    stored = encode(blocks if turn is None else blocks.transpose(turn), kind, exif=exif, **options)
    image = open_image(stored, "turned")
    assert image.size == (48, 32)
    difference = np.asarray(image).astype(int) - np.asarray(blocks)
    assert np.abs(difference).max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    "broken",
    [
        b"Exif\0\0",
        b"Exif\0\0MM",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07\0\0\0\x01\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff\xff\xff\xff\x06\0\0\0",
        b"Exif\0\0" + bytes(range(200)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_ignored(kind, broken):
    size = open_image(encode(plain("RGB", ORANGE), kind, exif=broken), "broken").size
    assert size == (8, 6)


def test_mpo_decodes_first_image():
    pair = [plain("RGB", ORANGE), plain("RGB", "blue")]
    encoded = encode(pair[0], "MPO", save_all=True, append_images=pair[1:])
    image = decode_image(encoded, "phone.jpg")
    assert image.format == "MPO"
    assert np.abs(np.asarray(image.image).astype(int) - ORANGE).max() <= 2


def test_pillow_warnings_are_suppressed_in_all_threads_only_while_decoding():
    """Warnings are errors in these tests, and a remaining filter would hide others."""
    before = list(warnings.filters)
    odd = encode(plain("RGB", ORANGE), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0")
    raised: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                open_image(odd, "odd")
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    assert warnings.filters == before
    with pytest.raises(UserWarning, match="loud"):
        warnings.warn("loud", stacklevel=1)


def test_decoded_image_has_format_and_mode_of_file():
    assert decode_image(encode(plain("CMYK", 0), "JPEG"), "x")[1:] == ("JPEG", "CMYK")
    assert decode_image(palette(), "x")[1:] == ("PNG", "P")


def test_center_square_is_center_of_resized_shorter_side():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    square = decode_square(encode(image), "wide", 20)
    assert (square[2] == 255).all()
    tall = decode_square(encode(image.rotate(90, expand=True)), "tall", 10)
    assert (tall[2, :, 1:-1][1:-1] == 255).all()
