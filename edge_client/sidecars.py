"""The XMP sidecar of a photo: which file it is, and our tags in it beside everything that a person has.

Photo programs know two names, ``photo.jpg.xmp`` and ``photo.xmp``, and show the keywords of a sidecar instead of the
photo's own. So a sidecar that exists is the one that is written, and what it would hide is carried into it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image, IptcImagePlugin

from fedmpt.edge_client.images import FORMATS
from fedmpt.edge_client.tagging import SUFFIXES, UNREAD_SUFFIXES
from fedmpt.edge_client.xmp import EMPTY, Keyword, merge_tags, read_keywords
from fedmpt.edge_client.xmp_packet import MAXIMUM_BYTES, XmpError
from fedmpt.protocol.files import write_atomically

NAMINGS = ("photo.jpg.xmp", "photo.xmp")
ENDINGS = (".xmp", ".XMP", ".Xmp")
# Raw files, whose sidecar is photo.xmp in Adobe's programs.
RAW_SUFFIXES = frozenset(
    {".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef", ".nrw", ".orf"}
    | {".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"}
)
KEYWORDS_OF_IPTC, CHARACTERS_OF_IPTC = (2, 25), (1, 90)  # record and data set (IPTC IIM 4.2)
UTF_8 = b"\x1b%G"  # as IPTC names it, by its escape sequence
XP_KEYWORDS = 0x9C9E  # EXIF tag of Windows' Explorer: UTF-16, separated by ";"

logger = logging.getLogger(__name__)


def write_sidecar(photo: Path, labels: Sequence[str], naming: str = NAMINGS[0]) -> bool:
    """Make ``labels`` this program's keywords of a photo; a person's keywords stay, in view of every photo program.

    Returns:
        Whether a sidecar was written: not if it says so already.

    Raises:
        XmpError: see :func:`sidecar_path` and :func:`write_tags`; or another sidecar of the photo cannot be read.
    """
    sidecar, others = _sidecars(photo, naming)
    keywords: list[Keyword] = []
    if labels:
        for other in others:
            keywords += read_keywords(_read(other) or EMPTY, str(other))
        keywords += embedded_keywords(photo)
    return write_tags(sidecar, labels, keywords)


def sidecar_path(photo: Path, naming: str = NAMINGS[0]) -> Path:
    """The sidecar of a photo: the one that exists, or else ``photo.jpg.xmp`` (digiKam, darktable, Immich) or
    ``photo.xmp`` (Adobe) as ``naming`` says.

    An existing ``photo.xmp`` is left alone where it may be another photo's or a raw file's.

    Raises:
        XmpError: by ``naming`` it would be another photo's sidecar too, and each would take the other's tags out.
    """
    return _sidecars(photo, naming)[0]


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
    """The keywords in a photo file: XMP, IPTC and those of Windows' Explorer. None where they cannot be read."""
    found: list[Keyword] = []
    try:
        with Image.open(photo, formats=FORMATS) as image:
            if image.format == "PNG":
                image.load()  # its XMP may stand behind the pixels
            for read in (_xmp_keywords, _iptc_keywords, _explorer_keywords):
                try:
                    found += read(image)
                except Exception as error:  # Pillow's readers raise almost anything on damaged metadata
                    logger.info("%s: keywords in the photo cannot be read (%s)", photo, error)
    except Exception as error:
        logger.info("%s: keywords in the photo cannot be read (%s)", photo, error)
    paths = {level for keyword in found if len(keyword) > 1 for level in keyword}
    return list(dict.fromkeys(keyword for keyword in found if len(keyword) > 1 or keyword[0] not in paths))


def _xmp_keywords(image: Image.Image) -> list[Keyword]:
    packet = image.info.get("xmp", b"")
    if not packet or len(packet) > MAXIMUM_BYTES:
        return []
    return read_keywords(
        packet.encode() if isinstance(packet, str) else bytes(packet).rstrip(b"\0"), "its XMP"
    )


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
    return [
        (text.strip(),) for text in bytes(value).decode("utf-16-le").strip("\0").split(";") if text.strip()
    ]


def _sidecars(photo: Path, naming: str) -> tuple[Path, list[Path]]:
    """The sidecar to write, and the others that are there."""
    short = naming == NAMINGS[1]
    existing = {
        NAMINGS[0]: list(_existing(photo, photo.name)),
        NAMINGS[1]: list(_existing(photo, photo.stem)),
    }
    if short and not existing[NAMINGS[0]] and (other := _sharer(photo, SUFFIXES)):
        raise XmpError(
            f"{photo}: {other.name} has the same sidecar, {photo.stem}.xmp; rename one, or use --sidecar "
            "photo.jpg.xmp"
        )
    # By default a photo.xmp that may be a raw file's is that file's.
    sharers = SUFFIXES if short else SUFFIXES | UNREAD_SUFFIXES | RAW_SUFFIXES
    usable = [] if existing[NAMINGS[1]] and _sharer(photo, sharers) else existing[NAMINGS[1]]
    ordered = usable + existing[NAMINGS[0]] if short else existing[NAMINGS[0]] + usable
    new = photo.with_suffix(".xmp") if short else photo.with_name(photo.name + ".xmp")
    chosen = ordered[0] if ordered else new
    return chosen, [path for paths in existing.values() for path in paths if path != chosen]


def _existing(photo: Path, name: str) -> Iterator[Path]:
    """Files of this name with an ending of a sidecar in any case, each once."""
    seen: list[Path] = []
    for ending in ENDINGS:
        path = photo.with_name(name + ending)
        if os.path.lexists(path) and not any(_is_same(path, other) for other in seen):
            seen.append(path)
            yield path


def _sharer(photo: Path, suffixes: Iterable[str]) -> Path | None:
    """Another photo of the same name but for its suffix."""
    spellings = [spelling for suffix in sorted(suffixes) for spelling in (suffix, suffix.upper())]
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
    if len(packet) > MAXIMUM_BYTES:
        raise XmpError(f"{sidecar}: larger than {MAXIMUM_BYTES} bytes; this is no XMP sidecar")
    return packet
