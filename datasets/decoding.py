"""Decode images of any format to upright RGB by fixed rules; ambiguous images raise an error."""

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
    JpegImagePlugin.JpegImageFile,  # also detects MPO
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
"""Formats whose libraries this build of Pillow includes."""

FORMATS = tuple(plugin.format for plugin in _PLUGINS if plugin.format in _KNOWN & Image.OPEN.keys())
"""Pillow's names of the supported formats; no other decoder of Pillow is used."""

EXTENSIONS = frozenset(ending for ending, name in Image.EXTENSION.items() if name in _KNOWN)
"""Suffixes of image files, in lower case: those that Pillow registers for these formats. The format
of a file is detected from its content."""

MAX_PIXELS = 1024**3 // 4 // 3
"""Larger images are rejected as decompression bombs (Pillow's limit)."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class DecodedImage(NamedTuple):
    """A decoded, upright RGB image, with the format and mode of its file.

    format: Pillow's name, such as JPEG. mode: Pillow's mode of the stored pixels: RGB, L (gray), P
    (palette), CMYK, I;16, ...
    """

    image: Image.Image
    format: str
    mode: str


def open_image(encoded: bytes, name: str) -> Image.Image:
    """Decode an image to upright RGB. Raises DataError as `decode_image` does."""
    return decode_image(encoded, name).image


def decode_image(encoded: bytes, name: str) -> DecodedImage:
    """Decode an image by fixed rules. Thread-safe.

    - Of an MPO file of a camera, the first image is used. Other files with several images
      (animations, pages) are rejected.
    - Transparent pixels become black, whatever their color.
    - CMYK is read as in Adobe's JPEG files (inverted).
    - 16-bit gray PNG is rescaled to 8 bits; 16-bit color PNG keeps the high byte. Other images
      with more than 8 bits per channel are rejected.
    - The EXIF orientation is applied; damaged EXIF data is ignored.

    name: of the image, for messages. Raises DataError, with the name, for an image that is
    damaged, not in one of FORMATS, too large (MAX_PIXELS), or rejected by these rules.
    """
    try:
        with _without_warnings(), Image.open(BytesIO(encoded), formats=FORMATS) as image:
            _check(image, name)
            image.load()
            decoded = DecodedImage(_upright(_rgb(image), image), image.format, image.mode)
    except (DataError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        formats = ", ".join(FORMATS[:-1]) + f" or {FORMATS[-1]}"
        reason = f"{len(encoded)} bytes that are no {formats}" if encoded else "the file is empty"
        raise DataError(f"{name}: not a readable image ({reason})") from None
    except Exception as error:  # decoders raise errors of any type for damaged bytes
        reason = re.sub(r"[\s.]*(\n.*)?$", "", str(error), flags=re.S) or type(error).__name__
        raise DataError(f"{name}: not a readable image ({reason})") from None
    return decoded


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image as upright RGB, by the rules of `decode_image`.

    >>> to_upright_rgb(Image.new("RGBA", (2, 1), (255, 0, 0, 0))).getpixel((0, 0))  # transparent
    (0, 0, 0)
    """
    return _upright(_rgb(image), image)


def _check(image: ImageFile.ImageFile, name: str) -> None:
    """Raise DataError for an ambiguous or too large image, before its pixels are decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} = {width * height} pixels are more than {MAX_PIXELS}, "
            "as in a decompression bomb; make the image smaller"
        )
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise DataError(
            f"{name}: {image.format} with {image.n_frames} images (an animation or pages); save "
            "the one to use as a separate file"
        )
    deep = image.mode.startswith(("I", "F")) and (image.format, image.mode) != ("PNG", "I;16")
    if image.format == "TIFF":
        deep |= max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8
    if deep:
        raise DataError(
            f"{name}: {image.format} with more than 8 bits per channel (mode {image.mode}), whose "
            "white level is unknown; convert it to 8 bits first"
        )


_BITS_PER_SAMPLE = 258


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":
        values = np.asarray(image).astype(np.uint32)
        if (hidden := image.info.get("transparency")) is not None:
            values[values == hidden] = 0
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Return `rgb`, turned by the EXIF orientation of `image`."""
    try:
        turn = _ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise  # not caused by the EXIF data
    except Exception:  # damaged EXIF data
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


class _WarningFilter:
    """Count the threads within `_without_warnings`; `warnings` itself is not thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_threads = 0


_FILTER = _WarningFilter()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings: `_check` handles their causes, or they do not affect pixels."""
    with _FILTER.lock:
        if _FILTER.num_threads == 0:
            _FILTER.filters = warnings.catch_warnings()
            _FILTER.filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _FILTER.num_threads += 1
    try:
        yield
    finally:
        with _FILTER.lock:
            _FILTER.num_threads -= 1
            if _FILTER.num_threads == 0:
                _FILTER.filters.__exit__(None, None, None)


def decode_square(encoded: bytes, name: str, size: int) -> Tensor:
    """Decode an image to uint8 [3, size, size]: shorter side resized (bicubic), center cropped.

    Raises DataError as `decode_image` does.
    """
    return center_square(open_image(encoded, name), size)


def center_square(image: Image.Image, size: int) -> Tensor:
    """Convert RGB to uint8 [3, size, size]: shorter side resized (bicubic), center cropped."""
    shorter = min(image.size)
    if max(image.size) > 8 * shorter:  # crop a long strip before resizing it
        image = transforms.center_crop(
            image, [min(side, 4 * shorter) for side in (image.height, image.width)]
        )
    square = transforms.resize(image, size, transforms.InterpolationMode.BICUBIC)
    square = transforms.center_crop(square, [size, size])
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def decode_all(images: EncodedImages, size: int, title: str) -> InMemoryImages:
    """Decode a whole split into memory, in threads: uint8 [images, 3, size, size].

    title: of the progress bar. Raises DataError for an unreadable image.
    """
    pixels = torch.empty((len(images.labels), 3, size, size), dtype=torch.uint8)

    def decode(index: int) -> None:
        pixels[index] = decode_square(images.read(index), images.name(index), size)

    for _ in map_threads(decode, range(len(pixels)), title):
        pass
    return InMemoryImages(pixels, images.labels)


_WINDOW = 1024


def map_threads(
    work: Callable[[Item], Result], items: Sequence[Item], title: str
) -> Iterator[Result]:
    """Yield work(item) for each item, in order, computed in threads, with a progress bar."""
    with thread_pool() as pool:

        def results() -> Iterator[Result]:
            for first in range(0, len(items), _WINDOW):  # a million pending futures use gigabytes
                yield from pool.map(work, items[first : first + _WINDOW])

        yield from progress(results(), total=len(items), title=title)
