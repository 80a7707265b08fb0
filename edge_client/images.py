"""Photos to the model's pixels, exactly as CLIP's own Pillow preprocessing makes them."""

from __future__ import annotations

import io
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fedmpt.protocol.errors import FedmptError

MAXIMUM_BYTES = 256 << 20
# Pillow's own limit for decompression bombs; it warns above it and refuses twice as many only.
MAXIMUM_PIXELS = 89_478_485
# What cameras, phones and web sites write; Pillow's rarer readers are attack surface (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")

Pixels = npt.NDArray[np.uint8]


class PhotoError(FedmptError):
    """One photo cannot be used; ``path`` names it and ``reason`` says why."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


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
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise PhotoError(path, "not a regular file")
        if status.st_size > MAXIMUM_BYTES:
            raise PhotoError(path, f"{status.st_size} bytes, above the limit of {MAXIMUM_BYTES}")
        with path.open("rb") as file:
            data = file.read(MAXIMUM_BYTES + 1)  # the file may have grown since
    except FileNotFoundError:
        raise PhotoError(path, "no such file") from None
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
    try:
        # No draft mode: JPEG's own downscaling by 2 already differs by up to 5 levels from CLIP's pixels.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAXIMUM_PIXELS:
                raise PhotoError(path, _bomb(f"{width}x{height} pixels"))
            return to_pixels(_upright(image), size)
    except PhotoError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PhotoError(path, _bomb("too many pixels")) from None
    except UnidentifiedImageError:
        raise PhotoError(path, f"not an image that can be read ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise PhotoError(path, f"damaged or unsupported ({error or type(error).__name__})") from error


def to_pixels(image: Image.Image, size: int) -> Pixels:
    """Preprocess an upright image as CLIP does, up to normalisation: uint8 RGB ``[size, size, 3]``.

    Transparency is laid over white, colour is converted by Pillow (CMYK and palettes too), 16-bit grey is
    scaled to 8 bits; then the shorter side is resized to ``size`` (bicubic with antialiasing) and the centre
    cut out. The same as ``transformers.CLIPImageProcessorPil`` but for 16-bit grey, which that clips to white.

    Raises:
        ValueError: 32-bit pixels, whose range no one states; or so elongated that resizing would fill the memory.
    """
    image = _to_rgb(image)
    width, height = image.size
    shorter = min(width, height)
    # int(), not round(): the longer side as CLIP computes it.
    width, height = int(size * width / shorter), int(size * height / shorter)
    if width * height > MAXIMUM_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, too elongated; cut it")
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT_MODES:
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels; save it with 8 or 16 bits a channel")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data says nothing of the pixels
        orientation = 1
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _bomb(found: str) -> str:
    return f"{found}, above the limit of {MAXIMUM_PIXELS} (a decompression bomb?); save it smaller"
