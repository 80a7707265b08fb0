"""Keywords in XMP sidecars as digiKam, Lightroom, darktable and Immich read them.

A photo's labels go into ``dc:subject``, ``digiKam:TagsList`` and ``lr:HierarchicalSubject``. For each of these a
property of the same name in this program's own namespace notes which values came from here. So a later run takes back
its own tags and never anyone else's, and a tag that a person has taken out stays out.

Sources: XMP Specification Part 1 (ISO 16684-1) for packet, RDF and containers; names and container kinds of the three
properties as in ExifTool's tag tables for XMP-dc, XMP-digiKam and XMP-lr.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lxml import etree

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import write_atomically

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
OWN = "urn:fedmpt:xmp:1/"
# prefix, namespace, property, container
KEYWORDS = (
    ("dc", "http://purl.org/dc/elements/1.1/", "subject", "Bag"),
    ("digiKam", "http://www.digikam.org/ns/1.0/", "TagsList", "Seq"),
    ("lr", "http://ns.adobe.com/lightroom/1.0/", "hierarchicalSubject", "Bag"),
)
MAXIMUM_BYTES = 64 << 20
EMPTY = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="%b"><rdf:Description rdf:about=""/></rdf:RDF>'
    b"</x:xmpmeta>" % RDF.encode()
)


class XmpError(FedmptError):
    """An existing sidecar cannot be merged into; it is left as it was."""


def sidecar_path(photo: Path, naming: str = "photo.jpg.xmp") -> Path:
    """The sidecar of a photo: ``photo.jpg.xmp`` (digiKam, darktable, Immich) or ``photo.xmp`` (Lightroom)."""
    return photo.with_suffix(".xmp") if naming == "photo.xmp" else photo.with_name(photo.name + ".xmp")


def write_tags(sidecar: Path, labels: Sequence[str]) -> bool:
    """Make ``labels`` this program's keywords in a sidecar, new or existing; others' content stays.

    Returns:
        Whether the file was written: not if it says so already.

    Raises:
        XmpError: the existing file is no XMP, too large, or holds keywords in a form that cannot be merged; or the
            file cannot be read or written.
    """
    try:
        before = _read(sidecar)
        after = merge_tags(before or EMPTY, labels, str(sidecar))
        if after in (before, EMPTY):
            return False
        write_atomically(sidecar, after)
    except OSError as error:
        raise XmpError(f"{sidecar}: {error.strerror or error}") from error
    return True


def merge_tags(packet: bytes, labels: Sequence[str], where: str) -> bytes:
    """The XMP packet with ``labels`` as this program's keywords; the same bytes if nothing is to change.

    Raises:
        XmpError: as :func:`write_tags`; ``where`` starts its text.
    """
    root = _parse(packet, where)
    rdf = root if root.tag == f"{{{RDF}}}RDF" else root.find(f"{{{RDF}}}RDF")
    if rdf is None:
        raise XmpError(f"{where}: has no rdf:RDF, so it is no XMP sidecar; move it away and run again")
    wanted = list(dict.fromkeys(labels))
    try:
        changes = [_merge(rdf, *keyword, wanted, where) for keyword in KEYWORDS]
    except ValueError as error:  # lxml refuses control characters
        raise XmpError(f"{where}: a label cannot be written as XML ({error})") from error
    if not any(changes):
        return packet
    declared = packet.removeprefix(b"\xef\xbb\xbf").startswith(b"<?xml ")
    merged: bytes = etree.tostring(root.getroottree(), encoding="UTF-8", xml_declaration=declared)
    return merged


def _merge(
    rdf: etree._Element, prefix: str, namespace: str, name: str, kind: str, wanted: list[str], where: str
) -> bool:
    key, own_key = f"{{{namespace}}}{name}", f"{{{OWN}}}{name}"
    keywords, own = _find(rdf, key, where), _find(rdf, own_key, where)
    present, ours = _values(keywords), _values(own)
    gone = [label for label in ours if label not in wanted]
    new = [label for label in wanted if label not in present and label not in ours]
    if not gone and not new:
        return False
    if new:
        keywords = _make(rdf, key, prefix, kind) if keywords is None else keywords
        own = _make(rdf, own_key, "fedmpt", kind) if own is None else own
    for container, removed in ((keywords, gone), (own, gone)):
        if container is None:
            continue
        for item in [item for item in container if item.text in removed]:
            _remove(item)
        for label in new:
            _append(container, label)
        if not len(container):
            _remove(container.getparent())
    return True


def _find(rdf: etree._Element, key: str, where: str) -> etree._Element | None:
    """The list (rdf:Bag, rdf:Seq or rdf:Alt) of a property, None where the property is absent."""
    descriptions = rdf.findall(f"{{{RDF}}}Description")
    found = [element for description in descriptions for element in description.findall(key)]
    if len(found) > 1 or any(key in description.attrib for description in descriptions):
        raise XmpError(f"{where}: {key} is written twice or as an attribute; repair the sidecar")
    if not found:
        return None
    containers = [child for child in found[0] if isinstance(child.tag, str)]
    if len(containers) != 1 or etree.QName(containers[0]).namespace != RDF:
        raise XmpError(f"{where}: {key} is not a list of values; repair the sidecar")
    return containers[0]


def _make(rdf: etree._Element, key: str, prefix: str, kind: str) -> etree._Element:
    description = rdf.find(f"{{{RDF}}}Description")
    if description is None:
        description = etree.SubElement(rdf, f"{{{RDF}}}Description", {f"{{{RDF}}}about": ""})
    namespace = etree.QName(key).namespace
    element = etree.SubElement(description, key, nsmap={prefix: namespace})
    return etree.SubElement(element, f"{{{RDF}}}{kind}")


def _values(container: etree._Element | None) -> list[str]:
    return [] if container is None else [item.text or "" for item in container.iter(f"{{{RDF}}}li")]


def _append(container: etree._Element, label: str) -> None:
    item = etree.SubElement(container, f"{{{RDF}}}li")
    item.text = label
    previous = item.getprevious()
    if previous is not None:  # keep the writer's indentation
        item.tail, previous.tail = previous.tail, container.text


def _remove(element: etree._Element) -> None:
    previous, parent = element.getprevious(), element.getparent()
    if previous is not None:
        previous.tail = element.tail
    parent.remove(element)


def _read(sidecar: Path) -> bytes | None:
    try:
        with sidecar.open("rb") as file:
            packet = file.read(MAXIMUM_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(packet) > MAXIMUM_BYTES:
        raise XmpError(f"{sidecar}: larger than {MAXIMUM_BYTES} bytes; this is no XMP sidecar")
    return packet


def _parse(packet: bytes, where: str) -> etree._Element:
    parser = etree.XMLParser(resolve_entities=False, load_dtd=False, no_network=True, remove_blank_text=False)
    try:
        root = etree.fromstring(packet, parser)
    except etree.XMLSyntaxError as error:
        raise XmpError(f"{where}: not well-formed XML ({error}); move it away and run again") from error
    if root.getroottree().docinfo.doctype:
        raise XmpError(f"{where}: has a document type declaration, which no XMP sidecar needs; refused")
    return root
