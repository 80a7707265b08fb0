"""The XMP sidecar of a photo: which file it is, and our tags in it beside everything that a person has.

Photo programs know two names, ``photo.jpg.xmp`` and ``photo.xmp``, and show the keywords of a sidecar instead of the
photo's own. So a sidecar that exists is the one that is written, and what it would hide is carried into it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, IptcImagePlugin, JpegImagePlugin

from fedmpt.edge_client.images import FORMATS, read_photo
from fedmpt.edge_client.tagging import SUFFIXES, UNREAD_SUFFIXES
from fedmpt.edge_client.xmp import EMPTY, KEYWORDS, ONLY_READ, Keyword, distinct, merge_tags, read_keywords
from fedmpt.edge_client.xmp_packet import MAXIMUM_BYTES, XmpError
from fedmpt.protocol.files import write_atomically

NAMINGS = ("photo.jpg.xmp", "photo.xmp")
ENDINGS = (".xmp", ".XMP", ".Xmp")
# Other files that photo.xmp may belong to: raw files, whose sidecar it is in Adobe's programs, drawings, films.
OTHER_SUFFIXES = frozenset((
    ".3fr", ".arw", ".cap", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".eip", ".erf", ".fff", ".gpr", ".iiq", ".kdc",
    ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw",
    ".x3f", ".jfif", ".jxl", ".psd", ".psb", ".avi", ".m4v", ".mov", ".mp4", "",
))  # fmt: skip
KEYWORDS_OF_IPTC, CHARACTERS_OF_IPTC = (2, 25), (1, 90)  # record and data set (IPTC IIM 4.2)
UTF_8 = b"\x1b%G"  # as IPTC names it, by its escape sequence
# What begins a piece of an XMP packet above 64 kB in a JPEG (XMP Specification Part 3, 1.1.3.1).
EXTENSION = b"http://ns.adobe.com/xmp/extension/\0"
PIECE = len(EXTENSION) + 32 + 4 + 4  # and its content begins here, after digest, total size and offset
# Formats of whose XMP Pillow does not always tell; in these it stands as it is.
SCANNED_FORMATS = ("PNG", "GIF", "JPEG2000")
PACKET = re.compile(rb"<x:xmpmeta\b.*?</x:xmpmeta>", re.DOTALL)
XP_KEYWORDS = 0x9C9E  # EXIF tag of Windows' Explorer: UTF-16, separated by ";"

logger = logging.getLogger(__name__)


def write_sidecar(photo: Path, labels: Sequence[str], naming: str = NAMINGS[0]) -> bool:
    """Make ``labels`` this program's keywords of a photo; a person's keywords stay, in view of every photo program.

    Labels that an earlier run wrote to another sidecar of this photo are taken out there.

    Returns:
        Whether a sidecar was written: not if it says so already.

    Raises:
        XmpError: see :func:`sidecar_path` and :func:`write_tags`; or keywords of the photo cannot be read, in another
            sidecar or in the photo itself: a new sidecar would hide them.
    """
    found = _sidecars(photo, naming)
    if not (labels or os.path.lexists(found.chosen)):
        keywords: list[Keyword] = []
    else:
        packets = [(_read(other) or EMPTY, str(other)) for other in (*found.shared, *found.others)]
        keywords = [keyword for packet, where in packets for keyword in read_keywords(packet, where)]
        keywords += embedded_keywords(photo)
    written = write_tags(found.chosen, labels, keywords)
    return any([written, *(write_tags(other, []) for other in found.others)])


def sidecar_path(photo: Path, naming: str = NAMINGS[0]) -> Path:
    """The sidecar of a photo: the one that exists, or else ``photo.jpg.xmp`` (digiKam, darktable, Immich) or
    ``photo.xmp`` (Adobe) as ``naming`` says.

    An existing ``photo.xmp`` is left alone where it may be another photo's or a raw file's.

    Raises:
        XmpError: by ``naming`` it would be another photo's sidecar too, and each would take the other's tags out.
    """
    return _sidecars(photo, naming).chosen


def write_tags(sidecar: Path, labels: Sequence[str], keywords: Iterable[Keyword] = ()) -> bool:
    """Make ``labels`` this program's keywords in a sidecar, new or existing; others' content stays.

    ``keywords`` are those that the person has elsewhere (see :func:`merge_tags`). Of a symbolic link the target is
    written.

    Returns:
        Whether the file was written: not if it says so already.

    Raises:
        XmpError: the existing file is no XMP, too large, or holds keywords in a form that cannot be merged; or the
            file cannot be read or written.
    """
    try:
        before = _read(sidecar)
        after = merge_tags(before or EMPTY, labels, str(sidecar), keywords)
        if after == (before or EMPTY):
            return False
        write_atomically(sidecar.resolve(strict=sidecar.is_symlink()), after)
    except OSError as error:
        raise XmpError(f"{sidecar}: {error.strerror or error}") from error
    return True


def embedded_keywords(photo: Path) -> list[Keyword]:
    """The keywords in a photo file: XMP, IPTC and those of Windows' Explorer. None in what is no photo.

    Raises:
        XmpError: its XMP speaks of keywords, but is damaged. Other damaged metadata is left to who can read it.
    """
    found: list[Keyword] = []
    try:
        with Image.open(photo, formats=FORMATS) as image:
            packets = _packets(image, photo)
            for read in (_iptc_keywords, _explorer_keywords):
                try:
                    found += read(image)
                except Exception as error:  # Pillow's readers raise almost anything on damaged metadata
                    logger.info("%s: keywords in the photo cannot be read (%s)", photo, error)
    except Exception as error:
        logger.info("%s: keywords in the photo cannot be read (%s)", photo, error)
        return []
    keywords = [keyword for packet in packets for keyword in _keywords_in(packet, photo)]
    return distinct([*keywords, *found])


def _packets(image: Image.Image, photo: Path) -> list[bytes]:
    """The XMP packets in a photo: as Pillow finds them, in the pieces of a large one, or by their own signs."""
    packet = image.info.get("xmp", b"")
    packets = [packet.encode() if isinstance(packet, str) else bytes(packet)] if packet else []
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        pieces = [data for name, data in image.applist if name == "APP1" and data.startswith(EXTENSION)]
        pieces.sort(key=lambda piece: piece[len(EXTENSION) : PIECE])  # by digest, total size and offset
        packets += [b"".join(piece[PIECE:] for piece in pieces)] if pieces else []
    elif not packets and image.format in SCANNED_FORMATS:
        data = read_photo(photo)
        packets += [data[match.start() : match.end()] for match in PACKET.finditer(data)]
    return [packet for packet in packets if len(packet) <= MAXIMUM_BYTES]


def _keywords_in(packet: bytes, photo: Path) -> list[Keyword]:
    try:
        return read_keywords(packet.strip(b"\0 \t\r\n"), f"{photo}: its own XMP")
    except XmpError:
        if any(each.name.encode() in packet for each in KEYWORDS + ONLY_READ):
            raise
        return []  # whatever it is, it hides no keywords


def _iptc_keywords(image: Image.Image) -> list[Keyword]:
    data = IptcImagePlugin.getiptcinfo(image) or {}  # type: ignore[arg-type]  # it takes any opened image
    values = data.get(KEYWORDS_OF_IPTC, [])
    declared = data.get(CHARACTERS_OF_IPTC) == UTF_8
    texts = [_decoded(value, declared) for value in ([values] if isinstance(values, bytes) else values)]
    return [(text,) for text in texts if text]


def _decoded(value: bytes, declared: bool) -> str:
    """IPTC text: UTF-8 where it is declared or can be, else Windows' Latin."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("utf-8" if declared else "cp1252", "replace")


def _explorer_keywords(image: Image.Image) -> list[Keyword]:
    value = image.getexif().get(XP_KEYWORDS, b"")
    if not isinstance(value, (bytes, tuple)) or len(value) > MAXIMUM_BYTES:
        return []
    text = bytes(value).decode("utf-16-le", "ignore").strip("\0")
    return [(keyword.strip(),) for keyword in text.split(";") if keyword.strip()]


class _Sidecars(NamedTuple):
    """Of a photo: the sidecar to write, others of this photo alone, and those that may be other files', too."""

    chosen: Path
    others: list[Path]
    shared: list[Path]


def _sidecars(photo: Path, naming: str) -> _Sidecars:
    adobe = naming == NAMINGS[1]
    long = list(_existing(photo, photo.name))
    short = list(_existing(photo, photo.stem)) if photo.suffix else []
    if adobe and not long and (other := _sharer(photo, SUFFIXES)):
        raise XmpError(
            f"{photo}: {other.name} has the same sidecar, {photo.stem}.xmp; rename one, or use --sidecar "
            "photo.jpg.xmp"
        )
    # By default a photo.xmp that may be a raw file's is that file's.
    sharers = SUFFIXES if adobe else SUFFIXES | UNREAD_SUFFIXES | OTHER_SUFFIXES
    own, shared = ([], short) if short and _sharer(photo, sharers) else (short, [])
    ordered = own + long if adobe else long + own
    new = photo.with_suffix(".xmp") if adobe else photo.with_name(photo.name + ".xmp")
    chosen = ordered[0] if ordered else new
    return _Sidecars(chosen, ordered[1:], shared)


def _existing(photo: Path, name: str) -> Iterator[Path]:
    """Files of this name with an ending of a sidecar in any case, each once."""
    seen: list[Path] = []
    for ending in ENDINGS:
        path = photo.with_name(name + ending)
        if os.path.lexists(path) and not any(_is_same(path, other) for other in seen):
            seen.append(path)
            yield path


def _sharer(photo: Path, suffixes: Iterable[str]) -> Path | None:
    """Another file of the same name but for its suffix, which may be spelled in three ways."""
    spellings = [
        spelling
        for suffix in sorted(suffixes)
        for spelling in dict.fromkeys(
            (suffix, suffix.upper(), f".{suffix[1:].capitalize()}" if suffix else "")
        )
    ]
    return next((path for path in map(photo.with_suffix, spellings) if _is_another(path, photo)), None)


def _is_another(other: Path, photo: Path) -> bool:
    try:
        return other != photo and other.exists() and not other.samefile(photo)
    except OSError:  # such a name would be too long, or the photo has gone
        return False


def _is_same(path: Path, other: Path) -> bool:
    """Whether two names are one file, as on a file system that does not tell cases apart."""
    try:
        return path.samefile(other)
    except OSError:  # a link to nowhere
        return False


def _read(sidecar: Path) -> bytes | None:
    try:
        with sidecar.open("rb") as file:
            packet = file.read(MAXIMUM_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise XmpError(f"{sidecar}: {error.strerror or error}") from error
    if len(packet) > MAXIMUM_BYTES:
        raise XmpError(f"{sidecar}: larger than {MAXIMUM_BYTES} bytes; this is no XMP sidecar")
    return packet
