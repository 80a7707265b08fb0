"""Keywords in XMP packets as digiKam, Lightroom, darktable and Immich read them.

A photo's labels go into ``dc:subject``, ``digiKam:TagsList`` and ``lr:hierarchicalSubject``. For each of these a
property of the same name in this program's own namespace notes which values came from here. So a later run takes back
its own tags and never anyone else's, and a tag that a person has taken out stays out. The latter two properties hold
paths in a hierarchy of tags: a label that somebody has filed under others (``Animals/dog``) is known by its last part.

Photo programs show the first of these properties that is there, and a sidecar's before the photo's own. So a property
that holds nothing of a person's (new, or made by an earlier run) gets *copies* of all keywords that the person has
anywhere else, or our labels would hide them. Copies are noted likewise (``…Copies``): they follow what the person
changes at their place, go with our last label, and stay as they are once a person's program writes to the property.

Sources: names and container kinds of the properties as in ExifTool's tag tables for XMP-dc, XMP-digiKam, XMP-lr,
XMP-microsoft and XMP-mediapro.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from xml.dom.minidom import Element

from fedmpt.edge_client import xmp_packet
from fedmpt.edge_client.xmp_packet import NOT_XML, RDF, XmpError, find_list, loose_values, values

OWN = "urn:fedmpt:xmp:1/"
COPIES = "Copies"  # ends the names of the properties that note copies


class Property(NamedTuple):
    """A property that holds keywords; ``separator`` is between the levels of a path of tags (none: no paths)."""

    prefix: str
    namespace: str
    name: str
    kind: str
    separator: str


KEYWORDS = (
    Property("dc", "http://purl.org/dc/elements/1.1/", "subject", "Bag", ""),
    Property("digiKam", "http://www.digikam.org/ns/1.0/", "TagsList", "Seq", "/"),
    Property("lr", "http://ns.adobe.com/lightroom/1.0/", "hierarchicalSubject", "Bag", "|"),
)
ONLY_READ = (
    Property("MicrosoftPhoto", "http://ns.microsoft.com/photo/1.0/", "LastKeywordXMP", "Bag", "/"),
    Property("MicrosoftPhoto", "http://ns.microsoft.com/photo/1.0", "LastKeywordXMP", "Bag", "/"),
    Property("mediapro", "http://ns.iview-multimedia.com/mediapro/1.0/", "CatalogSets", "Bag", "|"),
)
SEPARATORS = re.compile("[/|]")
EMPTY = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="%b"><rdf:Description rdf:about=""/></rdf:RDF>'
    b"</x:xmpmeta>" % RDF.encode()
)

Keyword = tuple[str, ...]  # the levels of a path of tags, the root first; one for a plain keyword


def merge_tags(packet: bytes, labels: Sequence[str], where: str, keywords: Iterable[Keyword] = ()) -> bytes:
    """The XMP packet with ``labels`` as this program's keywords; the same bytes if nothing is to change.

    ``keywords`` are those that the person has elsewhere: in the photo, or in another sidecar. In a label ``/`` and
    ``|`` become ``-``: digiKam and Lightroom would read levels of a hierarchy.

    Raises:
        XmpError: no XMP, or keywords in a form that cannot be merged; ``where`` starts its text.
    """
    document, rdf = xmp_packet.parse(packet, where)
    wanted = list(dict.fromkeys(SEPARATORS.sub("-", label) for label in labels))
    for label in wanted:
        if NOT_XML.search(label):
            raise XmpError(f"{where}: the label {label!r} cannot be written as XML; rename it")
    persons = list(dict.fromkeys([*_keywords(rdf, where), *filter(None, map(_written, keywords))]))
    filed = _filed(rdf, persons, where)
    changes = [_merge(rdf, each, wanted, persons, filed, where) for each in KEYWORDS]
    if not any(changes):
        return packet
    return xmp_packet.serialise(document, packet, where)


def read_keywords(packet: bytes, where: str) -> list[Keyword]:
    """The keywords of a packet that are a person's: neither ours nor copied by us.

    Raises:
        XmpError: no XMP; ``where`` starts its text.
    """
    return _keywords(xmp_packet.parse(packet, where)[1], where)


def _keywords(rdf: Element, where: str) -> list[Keyword]:
    found: list[Keyword] = []
    for each in KEYWORDS + ONLY_READ:
        noted = _noted(rdf, each.name, where)
        theirs = [value for value in loose_values(rdf, each.namespace, each.name) if value not in noted]
        found += [_written(value.split(each.separator) if each.separator else [value]) for value in theirs]
    # What wrote a path wrote its levels as plain keywords, too.
    levels = {level for keyword in found if len(keyword) > 1 for level in keyword}
    return list(dict.fromkeys(each for each in found if len(each) > 1 or (each and each[0] not in levels)))


def _written(keyword: Iterable[str]) -> Keyword:
    """A keyword as XML can hold it, without empty levels."""
    return tuple(level for level in (NOT_XML.sub("", level).strip() for level in keyword) if level)


def _noted(rdf: Element, name: str, where: str) -> set[str]:
    """The values of a property that came from here: labels and copies."""
    return {value for note in (name, name + COPIES) for value in values(find_list(rdf, OWN, note, where))}


def _merge(
    rdf: Element,
    each: Property,
    labels: list[str],
    persons: list[Keyword],
    filed: Mapping[str, Sequence[str]],
    where: str,
) -> bool:
    list_ = find_list(rdf, each.namespace, each.name, where)
    own = find_list(rdf, OWN, each.name, where)
    noted = find_list(rdf, OWN, each.name + COPIES, where)
    present, ours, copies = values(list_), values(own), values(noted)
    mirrors = all(
        value in ours or value in copies for value in present
    )  # nothing of a person's stands here alone
    copied = _copies(persons, each.separator) if mirrors else copies
    wanted = [_place(label, each.separator, (copied, present, ours), filed) for label in labels]
    kept = [value for value in present if value not in copies or value in copied]
    new = [label for label in wanted if label not in kept and label not in ours and label not in copied]
    if mirrors and not new and not any(label in kept or label in copied for label in wanted):
        copied = []  # nothing of ours would hide anything
    gone = [label for label in ours if label not in wanted]
    outdated = [value for value in copies if value not in copied]
    missing = [value for value in copied if value not in copies and (value not in present or value in gone)]
    changes = ((own, each.name, gone, new), (noted, each.name + COPIES, outdated, missing))
    for note, name, less, more in changes:
        _change(
            note or (xmp_packet.make_list(rdf, OWN, name, "fedmpt", each.kind) if more else None), less, more
        )
    if missing or new:
        list_ = list_ or xmp_packet.make_list(rdf, each.namespace, each.name, each.prefix, each.kind)
    _change(list_, [*gone, *outdated], [*missing, *new])
    return bool(gone or new or outdated or missing)


def _change(list_: Element | None, less: list[str], more: list[str]) -> None:
    """Take values out of a list and append others; an empty list goes with its property."""
    if list_ is None:
        return
    for item in [item for item in xmp_packet.elements(list_) if xmp_packet.text(item) in less]:
        xmp_packet.remove(item)
    for value in more:
        xmp_packet.add_item(list_, value)
    if less and not any(xmp_packet.elements(list_)):
        xmp_packet.remove(list_.parentNode)


def _copies(persons: Sequence[Keyword], separator: str) -> list[str]:
    """A person's keywords as a property holds them: paths, or the last part of each."""
    if not separator:
        return list(dict.fromkeys(keyword[-1] for keyword in persons))
    filed = {keyword[-1] for keyword in persons if len(keyword) > 1}
    return [separator.join(each) for each in persons if len(each) > 1 or each[0] not in filed]


def _filed(rdf: Element, persons: Iterable[Keyword], where: str) -> dict[str, Sequence[str]]:
    """The longest path of tags that ends in each tag, in whichever property it stands."""
    paths: list[Sequence[str]] = []
    for each in KEYWORDS:
        found = values(find_list(rdf, each.namespace, each.name, where)) if each.separator else []
        paths += [value.split(each.separator) for value in found]
    filed: dict[str, Sequence[str]] = {}
    for path in [*paths, *persons]:
        if len(path) > len(filed.get(path[-1], ())):
            filed[path[-1]] = path
    return filed


def _place(label: str, separator: str, known: Iterable[list[str]], filed: Mapping[str, Sequence[str]]) -> str:
    """The value that stands for a label in one property: as it is there already, or as another property has it."""
    if not separator:
        return label
    for found in known:
        if placed := [value for value in found if value.split(separator)[-1] == label]:
            return max(placed, key=len)
    return separator.join(filed.get(label, [label]))
