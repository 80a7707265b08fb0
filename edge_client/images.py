"""Photos to the model's pixels, exactly as CLIP's own Pillow preprocessing makes them."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from fedmpt.protocol.errors import FedmptError

MAXIMUM_BYTES = 256 << 20
# Pillow's own limit for decompression bombs; it warns above it and refuses twice as many only.
MAXIMUM_PIXELS = 89_478_485
# What cameras, phones and web sites write; Pillow's rarer readers are attack surface (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
WHOLE_PIXELS = 16 << 20  # larger photos are converted colour by colour, in strips, to save memory
STRIP_PIXELS = 1 << 20
ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # EXIF and TIFF tags
TURNS = {  # EXIF orientation → what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = npt.NDArray[np.uint8]


class PhotoError(FedmptError):
    """One photo cannot be used; ``path`` names it and ``reason`` says why."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{_shown(path)}: {reason}")
        self.path = path
        self.reason = reason

    def bare(self) -> PhotoError:
        """The same, to be kept: without the traceback, whose frames hold the file and its pixels."""
        return PhotoError(self.path, self.reason)


class _PixelBudget:
    """How many pixels may be decoded at a time, by all threads: a file of a few kilobytes can hold 89 megapixels."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_budget = _PixelBudget(2 * MAXIMUM_PIXELS)


def load_pixels(path: Path, size: int) -> Pixels:
    """Read a photo file as uint8 RGB ``[size, size, 3]``; see :func:`to_pixels` for how.

    Raises:
        PhotoError: missing, unreadable, empty, too large, truncated, not an image, or of unknown pixel type.
    """
    return decode_pixels(read_photo(path), size, path)


def read_photo(path: Path) -> bytes:
    """The bytes of a photo file, at most ``MAXIMUM_BYTES``.

    Raises:
        PhotoError: missing, not a regular file, a symlink loop, not permitted, empty or too large.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()  # a folder that cannot be looked into says so
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise PhotoError(path, "not a regular file")
        if status.st_size > MAXIMUM_BYTES:
            raise PhotoError(path, f"{status.st_size} bytes, above the limit of {MAXIMUM_BYTES}")
        with path.open("rb") as file:
            data = file.read(MAXIMUM_BYTES + 1)  # the file may have grown since
    except FileNotFoundError:
        windows = (
            "; its name ends in \\r: give the names with Unix line ends" if path.name.endswith("\r") else ""
        )
        raise PhotoError(path, f"no such file{windows}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise PhotoError(path, getattr(error, "strerror", None) or str(error)) from None
    if not data:
        raise PhotoError(path, "empty file")
    return data


def decode_pixels(data: bytes, size: int, path: Path | str) -> Pixels:
    """Decode an encoded photo to uint8 RGB ``[size, size, 3]``; ``path`` only names it in errors.

    The first frame of an animation is taken and the EXIF orientation is applied.

    Raises:
        PhotoError: not an image, truncated, too many pixels, or of unknown pixel type.
    """
    with _explained(path):
        try:
            # No draft mode: JPEG's own downscaling by 2 already differs by up to 5 levels from CLIP's pixels.
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
                raise PhotoError(path, "HEIC, which is not read here; convert it to JPEG") from None
            raise
        with image:
            width, height = image.size
            if width * height > MAXIMUM_PIXELS:
                raise PhotoError(path, _bomb(f"{width}x{height} pixels"))
            with _budget.take(width * height):
                return _pixels(image, size)


def to_pixels(image: Image.Image | Pixels, size: int, path: Path | str = "the image") -> Pixels:
    """Preprocess a Pillow image or an array as CLIP does, up to normalisation: uint8 RGB ``[size, size, 3]``.

    The EXIF orientation is applied, transparency is laid over white, colour is converted by Pillow (CMYK and
    palettes too), 16-bit grey is scaled to 8 bits; then the shorter side is resized to ``size`` (bicubic with
    antialiasing) and the centre cut out. The same as ``transformers.CLIPImageProcessorPil`` of the upright image
    but for 16-bit grey, which that clips to white. ``path`` only names it in errors.

    Raises:
        PhotoError: damaged, of an unknown pixel type, or so elongated that resizing would fill the memory.
    """
    with _explained(path):
        return _pixels(image if isinstance(image, Image.Image) else Image.fromarray(image), size)


@contextlib.contextmanager
def _explained(path: Path | str) -> Iterator[None]:
    try:
        yield
    except PhotoError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PhotoError(path, _bomb("too many pixels")) from None
    except UnidentifiedImageError:
        raise PhotoError(path, f"not an image that can be read ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise PhotoError(path, f"damaged or unsupported ({error or type(error).__name__})") from error


def _pixels(image: Image.Image, size: int) -> Pixels:
    image.load()  # a TIFF turns itself upright here, and says so in its orientation
    orientation = _orientation(image)
    width, height = reversed(image.size) if orientation > 4 else image.size
    shorter = min(width, height)
    # int(), not round(): the longer side as CLIP computes it.
    width, height = int(size * width / shorter), int(size * height / shorter)
    if width * height > MAXIMUM_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, too elongated; cut it")
    left, top = (width - size) // 2, (height - size) // 2

    def fit(picture: Image.Image) -> Pixels:
        if orientation in TURNS:
            picture = picture.transpose(TURNS[orientation])
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        return np.array(picture.crop((left, top, left + size, top + size)))

    if image.width * image.height <= WHOLE_PIXELS:
        return fit(_to_rgb(image, image))
    return np.stack([fit(_channel(image, index)) for index in range(3)], axis=-1)


def _channel(image: Image.Image, index: int) -> Image.Image:
    """One colour of a large image, without a second picture of full size in RGB."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image.getchannel(index)
    channel = Image.new("L", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        channel.paste(_to_rgb(strip, image).getchannel(index), (0, top))
    return channel


def _to_rgb(strip: Image.Image, image: Image.Image) -> Image.Image:
    """Convert a part of an image, of whose file only the whole image tells."""
    # Pillow reads 16-bit PGM, whatever its largest value, as 32-bit pixels from 0 to 65535.
    if strip.mode in SIXTEEN_BIT_MODES or (strip.mode == "I" and image.format == "PPM"):
        grey = (np.asarray(strip).astype(np.uint32) + 128) // 257
        if (
            getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
        ):  # white is zero, which Pillow heeds up to 8 bits
            grey = 255 - grey
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if strip.mode in ("I", "F"):
        raise ValueError("32-bit pixels; save it with 8 or 16 bits a channel")
    if "A" in strip.getbands() or strip.info.get("transparency") is not None:
        white = Image.new("RGBA", strip.size, "white")
        return Image.alpha_composite(white, strip.convert("RGBA")).convert("RGB")
    return strip if strip.mode == "RGB" else strip.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        found: int = image.getexif().get(ORIENTATION, 1)
        return found if found in TURNS else 1
    except Exception:  # damaged EXIF data says nothing of the pixels
        return 1


def _bomb(found: str) -> str:
    return f"{found}, above the limit of {MAXIMUM_PIXELS} (a decompression bomb?); save it smaller"


def _shown(path: Path | str) -> str:
    """A path as one line that any terminal can show."""
    return "".join(
        ascii(letter)[1:-1] if unicodedata.category(letter) in ("Cc", "Cs") else letter
        for letter in str(path)
    )
