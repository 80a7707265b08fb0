"""An XMP packet as a document: read safely, changed in place, written so that nothing else in it changes.

Sources: XMP Specification Part 1 (ISO 16684-1) for packet, RDF and containers. The standard library's DOM keeps what a
merge must not touch: prefixes, unused namespaces, comments, processing instructions, the order of attributes. Packets
are read through defusedxml, which refuses every document type declaration and with it all entities.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeGuard
from xml.dom import XMLNS_NAMESPACE
from xml.dom.minidom import Document, Element, Node, Text
from xml.parsers.expat import ExpatError

from defusedxml import DefusedXmlException, minidom

from fedmpt.protocol.errors import FedmptError

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
MAXIMUM_BYTES = 8 << 20  # the tree takes up to a hundred times as much
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Written as they are, a reader would make spaces of them in attributes and a line feed of every carriage return.
# Meanwhile they stand as characters that no XML document can hold.
REFERENCES = {"\t": ("\x01", "&#9;"), "\n": ("\x02", "&#10;"), "\r": ("\x03", "&#13;")}


class XmpError(FedmptError):
    """An XMP packet cannot be read or merged into; it is left as it was."""


def parse(packet: bytes, where: str) -> tuple[Document, Element]:
    """The document and its ``rdf:RDF``; raises XmpError, whose text starts with ``where``."""
    document = _parse(packet, where)
    rdf = next(elements(document, RDF, "RDF"), None)
    if rdf is None and document.documentElement:
        rdf = next(elements(document.documentElement, RDF, "RDF"), None)
    if rdf is None:
        raise XmpError(f"{where}: has no rdf:RDF, so it is no XMP sidecar; move it away and run again")
    return document, rdf


def serialise(document: Document, packet: bytes, where: str) -> bytes:
    """The document that was read from ``packet``, as UTF-8."""
    declared = packet.removeprefix(b"\xef\xbb\xbf").startswith(b"<?xml ")
    return _serialise(document, declared, where)


def find_list(rdf: Element, namespace: str, name: str, where: str) -> Element | None:
    """The list (rdf:Bag, rdf:Seq or rdf:Alt) of a property, None where the property is absent."""
    descriptions = list(elements(rdf, RDF, "Description"))
    found = [element for description in descriptions for element in elements(description, namespace, name)]
    if len(found) > 1 or any(description.hasAttributeNS(namespace, name) for description in descriptions):
        raise XmpError(
            f"{where}: {{{namespace}}}{name} is written twice or as an attribute; repair the sidecar"
        )
    if not found:
        return None
    containers = list(elements(found[0]))
    if len(containers) != 1 or containers[0].namespaceURI != RDF:
        raise XmpError(f"{where}: {{{namespace}}}{name} is not a list of values; repair the sidecar")
    return containers[0]


def make_list(rdf: Element, namespace: str, name: str, prefix: str, kind: str) -> Element:
    """A new, empty list as the value of a property; ``kind`` is Bag or Seq."""
    description = next(elements(rdf, RDF, "Description"), None)
    if description is None:
        description = add(rdf, RDF, "Description", "rdf")
        description.setAttributeNS(RDF, f"{description.prefix}:about", "")
    return add(add(description, namespace, name, prefix), RDF, kind, "rdf")


def elements(parent: Node, namespace: str | None = None, name: str | None = None) -> Iterator[Element]:
    """The child elements, all or those of one name."""
    for child in parent.childNodes:
        if isinstance(child, Element) and (
            name is None or (child.namespaceURI, child.localName) == (namespace, name)
        ):
            yield child


def text(element: Element) -> str:
    """The text of a value; of a qualified one (ISO 16684-1, 7.8) that of its ``rdf:value``."""
    plain = "".join(child.data for child in element.childNodes if isinstance(child, Text))
    if plain.strip() or not (element.hasAttributes() or any(elements(element))):
        return plain
    inner = next(elements(element, RDF, "Description"), element)
    if value := next(elements(inner, RDF, "value"), None):
        return text(value)
    return inner.getAttributeNS(RDF, "value") or plain


def values(container: Element | None) -> list[str]:
    """The items of a list."""
    return [] if container is None else [text(item) for item in elements(container, RDF, "li")]


def loose_values(rdf: Element, namespace: str, name: str) -> list[str]:
    """All values of a property, however often and in whatever form it is written."""
    found: list[str] = []
    for description in elements(rdf, RDF, "Description"):
        if description.hasAttributeNS(namespace, name):
            found.append(description.getAttributeNS(namespace, name))
        for element in elements(description, namespace, name):
            containers = list(elements(element))
            found += [value for container in containers for value in values(container)]
            found += [] if containers else [text(element)]
    return found


def add_item(container: Element, value: str) -> None:
    """Append a value to a list."""
    item = add(container, RDF, "li", "rdf")
    item.appendChild(_document(item).createTextNode(value))


def _document(element: Element) -> Document:
    document = element.ownerDocument
    assert document is not None
    return document


def add(parent: Any, namespace: str, name: str, prefix: str) -> Element:
    """A new last child, indented as the first one is; ``prefix`` is declared where the namespace has none here."""
    known = _prefix(parent, namespace)
    element = _document(parent).createElementNS(namespace, f"{known or prefix}:{name}")
    if known is None:
        element.setAttributeNS(XMLNS_NAMESPACE, f"xmlns:{prefix}", namespace)
    first = next(elements(parent), None)
    if first is None:
        parent.appendChild(element)
        return element
    last = parent.lastChild
    while not isinstance(last, Element):
        last = last.previousSibling
    parent.insertBefore(element, last.nextSibling)
    if _is_blank(indentation := first.previousSibling):
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


def rename(element: Any, namespace: str, name: str, prefix: str) -> None:
    """Give an element another name."""
    _document(element).renameNode(element, namespace, f"{_prefix(element, namespace) or prefix}:{name}")


def remove(element: Any) -> None:
    """Take out an element with its indentation."""
    parent = element.parentNode
    if _is_blank(indentation := element.previousSibling):
        parent.removeChild(indentation)
    parent.removeChild(element)


def _is_blank(node: Node | None) -> TypeGuard[Text]:
    return isinstance(node, Text) and not node.data.strip()


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
