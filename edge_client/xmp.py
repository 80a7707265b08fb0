"""Keywords in XMP sidecars as digiKam, Lightroom, darktable and Immich read them.

A photo's labels go into ``dc:subject``, ``digiKam:TagsList`` and ``lr:HierarchicalSubject``. For each of these a
property of the same name in this program's own namespace notes which values came from here. So a later run takes back
its own tags and never anyone else's, and a tag that a person has taken out stays out. The latter two properties hold
paths in a hierarchy of tags: a label that somebody has filed under others (``Animals/dog``) is known by its last part.

Sources: XMP Specification Part 1 (ISO 16684-1) for packet, RDF and containers; names and container kinds of the three
properties as in ExifTool's tag tables for XMP-dc, XMP-digiKam and XMP-lr.

The standard library's DOM keeps what a merge must not touch: prefixes, unused namespaces, comments, processing
instructions, the order of attributes. Sidecars are read through defusedxml, which refuses every document type
declaration and with it all entities.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard
from xml.dom import XMLNS_NAMESPACE
from xml.dom.minidom import Document, Element, Node, Text
from xml.parsers.expat import ExpatError

from defusedxml import DefusedXmlException, minidom

from fedmpt.edge_client.tagging import SUFFIXES
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import write_atomically

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
OWN = "urn:fedmpt:xmp:1/"
# prefix, namespace, property, container, what separates the levels of a path of tags ("": no paths)
KEYWORDS = (
    ("dc", "http://purl.org/dc/elements/1.1/", "subject", "Bag", ""),
    ("digiKam", "http://www.digikam.org/ns/1.0/", "TagsList", "Seq", "/"),
    ("lr", "http://ns.adobe.com/lightroom/1.0/", "hierarchicalSubject", "Bag", "|"),
)
SEPARATORS = re.compile("[/|]")
MAXIMUM_BYTES = 8 << 20  # the tree takes up to a hundred times as much
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Written as they are, a reader would make spaces of them in attributes and a line feed of every carriage return.
# Meanwhile they stand as characters that no XML document can hold.
REFERENCES = {"\t": ("\x01", "&#9;"), "\n": ("\x02", "&#10;"), "\r": ("\x03", "&#13;")}
EMPTY = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="%b"><rdf:Description rdf:about=""/></rdf:RDF>'
    b"</x:xmpmeta>" % RDF.encode()
)


class XmpError(FedmptError):
    """An existing sidecar cannot be merged into; it is left as it was."""


def sidecar_path(photo: Path, naming: str = "photo.jpg.xmp") -> Path:
    """The sidecar of a photo: ``photo.jpg.xmp`` (digiKam, darktable, Immich) or ``photo.xmp`` (Adobe).

    Raises:
        XmpError: ``photo.xmp`` would be another photo's sidecar too, and each would take the other's tags out.
    """
    if naming != "photo.xmp":
        return photo.with_name(photo.name + ".xmp")
    spellings = [spelling for suffix in sorted(SUFFIXES) for spelling in (suffix, suffix.upper())]
    for other in map(photo.with_suffix, spellings):
        if _is_another(other, photo):
            raise XmpError(
                f"{photo}: {other.name} has the same sidecar, {photo.stem}.xmp; rename one, or use --sidecar "
                "photo.jpg.xmp"
            )
    return photo.with_suffix(".xmp")


def _is_another(other: Path, photo: Path) -> bool:
    try:
        return other != photo and other.exists() and not other.samefile(photo)
    except OSError:  # such a name would be too long, or the photo has gone
        return False


def write_tags(sidecar: Path, labels: Sequence[str]) -> bool:
    """Make ``labels`` this program's keywords in a sidecar, new or existing; others' content stays.

    In a label ``/`` and ``|`` become ``-``: digiKam and Lightroom would read levels of a hierarchy. Of a symbolic
    link the target is written.

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
        write_atomically(sidecar.resolve(strict=sidecar.is_symlink()), after)
    except OSError as error:
        raise XmpError(f"{sidecar}: {error.strerror or error}") from error
    return True


def merge_tags(packet: bytes, labels: Sequence[str], where: str) -> bytes:
    """The XMP packet with ``labels`` as this program's keywords; the same bytes if nothing is to change.

    Raises:
        XmpError: as :func:`write_tags`; ``where`` starts its text.
    """
    document = _parse(packet, where)
    rdf = next(_elements(document, RDF, "RDF"), None)
    if rdf is None and document.documentElement:
        rdf = next(_elements(document.documentElement, RDF, "RDF"), None)
    if rdf is None:
        raise XmpError(f"{where}: has no rdf:RDF, so it is no XMP sidecar; move it away and run again")
    wanted = list(dict.fromkeys(SEPARATORS.sub("-", label) for label in labels))
    for label in wanted:
        if NOT_XML.search(label):
            raise XmpError(f"{where}: the label {label!r} cannot be written as XML; rename it")
    filed = _filed(rdf, where)
    changes = [_merge(rdf, *keyword, wanted, filed, where) for keyword in KEYWORDS]
    if not any(changes):
        return packet
    declared = packet.removeprefix(b"\xef\xbb\xbf").startswith(b"<?xml ")
    return _serialise(document, declared, where)


def _merge(
    rdf: Element,
    prefix: str,
    namespace: str,
    name: str,
    kind: str,
    separator: str,
    labels: list[str],
    filed: dict[str, list[str]],
    where: str,
) -> bool:
    keywords, own = _find(rdf, namespace, name, where), _find(rdf, OWN, name, where)
    present, ours = _values(keywords), _values(own)
    wanted = labels
    if separator:
        wanted = [_place(label, separator, (present, ours), filed) for label in labels]
    gone = [label for label in ours if label not in wanted]
    new = [label for label in wanted if label not in present and label not in ours]
    if not gone and not new:
        return False
    if new:
        keywords = keywords or _make(rdf, namespace, name, prefix, kind)
        own = own or _make(rdf, OWN, name, "fedmpt", kind)
    for container, removed in ((keywords, gone), (own, gone)):
        if container is None:
            continue
        for item in [item for item in _elements(container) if _text(item) in removed]:
            _remove(item)
        for label in new:
            _add(container, RDF, "li", "rdf").appendChild(_document(container).createTextNode(label))
        if not any(_elements(container)):
            _remove(container.parentNode)
    return True


def _filed(rdf: Element, where: str) -> dict[str, list[str]]:
    """The longest path of tags that ends in each tag, in whichever property it stands."""
    filed: dict[str, list[str]] = {}
    for _, namespace, name, _, separator in KEYWORDS:
        for value in _values(_find(rdf, namespace, name, where)) if separator else ():
            path = value.split(separator)
            if len(path) > len(filed.get(path[-1], ())):
                filed[path[-1]] = path
    return filed


def _place(label: str, separator: str, known: Iterable[list[str]], filed: dict[str, list[str]]) -> str:
    """The value that stands for a label in one property: as it is there already, or as another property has it."""
    for values in known:
        if found := [value for value in values if value.split(separator)[-1] == label]:
            return max(found, key=len)
    return separator.join(filed.get(label, [label]))


def _find(rdf: Element, namespace: str, name: str, where: str) -> Element | None:
    """The list (rdf:Bag, rdf:Seq or rdf:Alt) of a property, None where the property is absent."""
    descriptions = list(_elements(rdf, RDF, "Description"))
    found = [element for description in descriptions for element in _elements(description, namespace, name)]
    if len(found) > 1 or any(description.hasAttributeNS(namespace, name) for description in descriptions):
        raise XmpError(
            f"{where}: {{{namespace}}}{name} is written twice or as an attribute; repair the sidecar"
        )
    if not found:
        return None
    containers = list(_elements(found[0]))
    if len(containers) != 1 or containers[0].namespaceURI != RDF:
        raise XmpError(f"{where}: {{{namespace}}}{name} is not a list of values; repair the sidecar")
    return containers[0]


def _make(rdf: Element, namespace: str, name: str, prefix: str, kind: str) -> Element:
    description = next(_elements(rdf, RDF, "Description"), None)
    if description is None:
        description = _add(rdf, RDF, "Description", "rdf")
        description.setAttributeNS(RDF, f"{description.prefix}:about", "")
    return _add(_add(description, namespace, name, prefix), RDF, kind, "rdf")


def _elements(parent: Node, namespace: str | None = None, name: str | None = None) -> Iterator[Element]:
    """The child elements, all or those of one name."""
    for child in parent.childNodes:
        if isinstance(child, Element) and (
            name is None or (child.namespaceURI, child.localName) == (namespace, name)
        ):
            yield child


def _text(element: Element) -> str:
    return "".join(child.data for child in element.childNodes if isinstance(child, Text))


def _values(container: Element | None) -> list[str]:
    return [] if container is None else [_text(item) for item in _elements(container, RDF, "li")]


def _document(element: Element) -> Document:
    document = element.ownerDocument
    assert document is not None
    return document


def _add(parent: Any, namespace: str, name: str, prefix: str) -> Element:
    """A new last child, indented as the first one is; ``prefix`` is declared where the namespace has none here."""
    known = _prefix(parent, namespace)
    element = _document(parent).createElementNS(namespace, f"{known or prefix}:{name}")
    if known is None:
        element.setAttributeNS(XMLNS_NAMESPACE, f"xmlns:{prefix}", namespace)
    siblings = list(_elements(parent))
    if not siblings:
        parent.appendChild(element)
        return element
    parent.insertBefore(element, siblings[-1].nextSibling)
    if _is_blank(indentation := siblings[0].previousSibling):
        parent.insertBefore(indentation.cloneNode(False), element)
    return element


def _prefix(element: Node, namespace: str) -> str | None:
    """A prefix that means the namespace at an element, None if there is none."""
    hidden: set[str] = set()
    node: Node | None = element
    while isinstance(node, Element):
        for attribute, value in node.attributes.items():
            if attribute.startswith("xmlns:"):
                prefix = attribute.removeprefix("xmlns:")
                if value == namespace and prefix not in hidden:
                    return prefix
                hidden.add(prefix)
        node = node.parentNode
    return None


def _remove(element: Any) -> None:
    """Take out an element with its indentation."""
    parent = element.parentNode
    if _is_blank(indentation := element.previousSibling):
        parent.removeChild(indentation)
    parent.removeChild(element)


def _is_blank(node: Node | None) -> TypeGuard[Text]:
    return isinstance(node, Text) and not node.data.strip()


def _read(sidecar: Path) -> bytes | None:
    try:
        with sidecar.open("rb") as file:
            packet = file.read(MAXIMUM_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(packet) > MAXIMUM_BYTES:
        raise XmpError(f"{sidecar}: larger than {MAXIMUM_BYTES} bytes; this is no XMP sidecar")
    return packet


def _parse(packet: bytes, where: str) -> Document:
    try:
        document: Document = minidom.parseString(packet, forbid_dtd=True)
    except DefusedXmlException as error:
        raise XmpError(
            f"{where}: has a document type declaration, which no XMP sidecar needs; refused"
        ) from error
    except (ExpatError, ValueError, LookupError) as error:  # the latter two: an encoding that is unknown
        raise XmpError(f"{where}: not well-formed XML ({error}); move it away and run again") from error
    return document


def _serialise(document: Document, declared: bool, where: str) -> bytes:
    try:
        _protect(document)
        parts = [node.toxml() for node in document.childNodes]
    except RecursionError as error:
        raise XmpError(
            f"{where}: nested too deeply for an XMP sidecar; move it away and run again"
        ) from error
    text = "\n".join(['<?xml version="1.0" encoding="UTF-8"?>'] * declared + parts)
    for placeholder, reference in REFERENCES.values():
        text = text.replace(placeholder, reference)
    return text.encode()


def _protect(document: Document) -> None:
    """Put placeholders where a character has to be written as a reference to survive."""
    table = str.maketrans({character: placeholder for character, (placeholder, _) in REFERENCES.items()})
    waiting: list[Node] = [document]
    while waiting:
        node = waiting.pop()
        waiting.extend(node.childNodes)
        if isinstance(node, Element):
            for attribute in node.attributes.values():
                attribute.value = attribute.value.translate(table)
        elif type(node) is Text:  # no CDATA section
            node.data = node.data.replace("\r", REFERENCES["\r"][0])
