"""Encoded bytes to upright RGB pictures, by one rule for every format; doubtful ones refused."""

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor
from torchvision.transforms import functional as transforms

from deit.core.console import progress
from deit.core.errors import DataError
from deit.core.hardware import thread_pool
from deit.datasets.images import EncodedImages, InMemoryImages

try:
    from PIL import AvifImagePlugin
except ImportError:  # before Pillow 11.3
    AvifImagePlugin = None

_PLUGINS = (
    JpegImagePlugin.JpegImageFile,  # and MPO, which it recognises
    MpoImagePlugin.MpoImageFile,
    PngImagePlugin.PngImageFile,
    BmpImagePlugin.BmpImageFile,
    PpmImagePlugin.PpmImageFile,
    TiffImagePlugin.TiffImageFile,
    WebPImagePlugin.WebPImageFile,
    GifImagePlugin.GifImageFile,
    *([AvifImagePlugin.AvifImageFile] if AvifImagePlugin else []),
)

_KNOWN = {plugin.format for plugin in _PLUGINS} & set(Image.EXTENSION.values())
"""Without the formats whose library this Pillow was built without."""

FORMATS = tuple(plugin.format for plugin in _PLUGINS if plugin.format in _KNOWN & Image.OPEN.keys())
"""Pillow's names of the formats that are read; no other decoder ever sees the bytes."""

EXTENSIONS = frozenset(ending for ending, name in Image.EXTENSION.items() if name in _KNOWN)
"""How names of image files end, in lower case: what Pillow registers for these formats. What a file
holds, its content tells."""

MAX_PIXELS = 1024**3 // 4 // 3
"""Larger pictures are taken for decompression bombs (the number is Pillow's)."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Picture(NamedTuple):
    """A decoded image: upright, RGB; and what it was in its file.

    mode: Pillow's word for the stored pixels: RGB, L (grey), P (palette), CMYK, I;16, ...
    """

    image: Image.Image
    format: str
    mode: str


def open_image(encoded: bytes, name: str) -> Image.Image:
    """An encoded image as an upright RGB picture. Raises DataError as `read_picture` does."""
    return read_picture(encoded, name).image


def read_picture(encoded: bytes, name: str) -> Picture:
    """Decode an image by rule; any number of threads may.

    The first picture of a camera's MPO is taken; other files with several pictures are refused.
    Transparent parts become black, whatever colour lies under them. CMYK is read as JPEG files
    store it (Adobe's inverted way). 16-bit grey PNG is rescaled to 8 bits; 16-bit colour PNG keeps
    the high byte; other pictures of more than 8 bits are refused. EXIF orientation is applied; a
    picture whose EXIF is broken is shown as it lies.
    name: what messages call the image. Raises DataError with that name.
    """
    try:
        with _quietly(), Image.open(BytesIO(encoded), formats=FORMATS) as image:
            _check(image, name)
            image.load()
            picture = Picture(_upright(_rgb(image), image), image.format, image.mode)
    except (DataError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS[:-1]) + f" or {FORMATS[-1]}"
        found = f"{len(encoded)} bytes that are no {known}" if encoded else "the file is empty"
        raise DataError(f"{name}: not a readable image ({found})") from None
    except Exception as error:  # of damaged bytes, decoders raise whatever they stumble over
        reason = re.sub(r"[\s.]*(\n.*)?$", "", str(error), flags=re.S) or type(error).__name__
        raise DataError(f"{name}: not a readable image ({reason})") from None
    return picture


def _check(image: ImageFile.ImageFile, name: str) -> None:
    """Refuse what has no one right reading, before any pixel is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} = {width * height} pixels are more than {MAX_PIXELS}: "
            "refused as a decompression bomb; make the picture smaller"
        )
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise DataError(
            f"{name}: {image.format} with {image.n_frames} pictures (animated, or pages); save the "
            "one that counts as a file of its own"
        )
    deep = image.mode.startswith(("I", "F")) and (image.format, image.mode) != ("PNG", "I;16")
    if image.format == "TIFF":
        deep |= max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8
    if deep:
        raise DataError(
            f"{name}: {image.format} with more than 8 bits a channel (mode {image.mode}); nothing "
            "says which value is white: convert it first"
        )


_BITS_PER_SAMPLE = 258


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":
        values = np.asarray(image).astype(np.uint32)
        if (hidden := image.info.get("transparency")) is not None:
            values[values == hidden] = 0
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        black = Image.new("RGBA", image.size, "black")
        return Image.alpha_composite(black, coloured).convert("RGB")
    return image.convert("RGB")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise  # it says nothing of the EXIF
    except Exception:  # broken EXIF: nobody knows better than the pixels
        turn = None
    return picture if turn is None else picture.transpose(turn)


class _Silence:
    """Pillow's warnings are off while any thread is inside; `warnings` itself is for one thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0


_SILENCE = _Silence()


@contextmanager
def _quietly() -> Iterator[None]:
    """Ignore what Pillow warns of: it is refused here, or does not touch the pixels."""
    with _SILENCE.lock:
        if _SILENCE.inside == 0:
            _SILENCE.filters = warnings.catch_warnings()
            _SILENCE.filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _SILENCE.inside += 1
    try:
        yield
    finally:
        with _SILENCE.lock:
            _SILENCE.inside -= 1
            if _SILENCE.inside == 0:
                _SILENCE.filters.__exit__(None, None, None)


def decode_square(encoded: bytes, name: str, size: int) -> Tensor:
    """An image as uint8 [3, size, size]: shorter side to size, bicubic, the centre cut square.

    Raises DataError as `read_picture` does.
    """
    return square_of(open_image(encoded, name), size)


def square_of(picture: Image.Image, size: int) -> Tensor:
    """An RGB picture as uint8 [3, size, size]: shorter side to size, the centre cut square."""
    shorter = min(picture.size)
    if max(picture.size) > 8 * shorter:  # of a long strip, only what reaches the square is resized
        picture = transforms.center_crop(
            picture, [min(side, 4 * shorter) for side in (picture.height, picture.width)]
        )
    square = transforms.resize(picture, size, transforms.InterpolationMode.BICUBIC)
    square = transforms.center_crop(square, [size, size])
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def decode_all(images: EncodedImages, size: int, title: str) -> InMemoryImages:
    """Decode a whole split into memory, in threads. Raises DataError at an unreadable image.

    title: what the progress bar says.
    """
    pixels = torch.empty((len(images.labels), 3, size, size), dtype=torch.uint8)

    def decode(index: int) -> None:
        pixels[index] = decode_square(images.read(index), images.name(index), size)

    for _ in in_threads(decode, range(len(pixels)), title):
        pass
    return InMemoryImages(pixels, images.labels)


_WINDOW = 1024


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], title: str
) -> Iterator[Result]:
    """The results of the work in the order of the items, with progress; raises what it raises."""
    with thread_pool() as pool:

        def results() -> Iterator[Result]:
            for first in range(0, len(items), _WINDOW):  # a million waiting futures are gigabytes
                yield from pool.map(work, items[first : first + _WINDOW])

        yield from progress(results(), total=len(items), title=title)
