"""Keywords in XMP packets as digiKam, Lightroom, darktable and Immich read them.

A photo's labels go into ``dc:subject``, ``digiKam:TagsList`` and ``lr:hierarchicalSubject``. For each of these a
property in this program's own namespace, named after it (``…Labels``), notes which values came from here. So a later
run takes back its own tags and never anyone else's, and a tag that a person has taken out stays out. The latter two
properties hold paths in a hierarchy of tags: a label that somebody has filed under others (``Animals/dog``) is known
by its last part.

Photo programs show the first of these properties that is there, and a sidecar's before the photo's own. So a property
that holds nothing of a person's (new, or made by an earlier run) gets *copies* of all keywords that the person has
anywhere else, or our labels would hide them. Copies are noted likewise (``…Copies``): they follow what the person
changes at their place, go with our last label, and stay as they are once a person's program writes to the property, or
where the person's keywords are nowhere else any more.

Sources: names and container kinds of the properties as in ExifTool's tag tables for XMP-dc, XMP-digiKam, XMP-lr,
XMP-microsoft and XMP-mediapro.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple
from xml.dom.minidom import Element

from fedmpt.edge_client import xmp_packet
from fedmpt.edge_client.xmp_packet import NOT_XML, RDF, XmpError, find_list, loose_values, values

OWN = "urn:fedmpt:xmp:1/"
# What notes values is named after their property with this at its end: programs that read names without their namespace
# (exiftool's, and so Immich's) must not take a note for the property. Earlier versions wrote the name alone.
LABELS, COPIES = "Labels", "Copies"
MAXIMUM_KEYWORDS = 2000  # of a person's; they are merged in memory, one by one


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
    renamed = [_rename_note(rdf, each, where) for each in KEYWORDS]
    persons = list(dict.fromkeys([*_keywords(rdf, where), *filter(None, map(_written, keywords))]))
    if len(persons) > MAXIMUM_KEYWORDS:
        raise XmpError(f"{where}: {len(persons)} keywords, but at most {MAXIMUM_KEYWORDS} are merged")
    filed = _filed(rdf, persons, where)
    ours = _labels(rdf, where)
    changes = [_merge(rdf, each, wanted, persons, filed, where) for each in KEYWORDS]
    changes += [_take_out(rdf, each, ours.difference(wanted)) for each in ONLY_READ]
    if not any(renamed + changes):
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
    for each in KEYWORDS:
        noted = _noted(rdf, each.name, where)
        theirs = [value for value in loose_values(rdf, each.namespace, each.name) if value not in noted]
        found += [_written(_levels(value, each)) for value in theirs]
    ours = _labels(rdf, where)
    for each in ONLY_READ:  # where another program spreads our labels, too
        levels = [_levels(value, each) for value in loose_values(rdf, each.namespace, each.name)]
        found += [_written(keyword) for keyword in levels if keyword[-1] not in ours]
    return distinct(found)


def distinct(keywords: Iterable[Keyword]) -> list[Keyword]:
    """One file's keywords, each once: what wrote a path wrote its levels as plain keywords, too."""
    found = list(dict.fromkeys(filter(None, keywords)))
    levels = {level for keyword in found if len(keyword) > 1 for level in keyword}
    return [keyword for keyword in found if len(keyword) > 1 or keyword[0] not in levels]


def _levels(value: str, each: Property) -> list[str]:
    return value.split(each.separator) if each.separator else [value]


def _labels(rdf: Element, where: str) -> set[str]:
    """Our labels in a packet, wherever they are filed."""
    return {
        _levels(value, each)[-1]
        for each in KEYWORDS
        for value in values(find_list(rdf, OWN, each.name + LABELS, where))
    }


def _take_out(rdf: Element, each: Property, labels: set[str]) -> bool:
    """Take labels out of a property that we do not write, but to which another program copied them."""
    changed = False
    for description in xmp_packet.elements(rdf, RDF, "Description"):
        for property_ in list(xmp_packet.elements(description, each.namespace, each.name)):
            for list_ in xmp_packet.elements(property_):
                gone = [value for value in values(list_) if _levels(value, each)[-1] in labels]
                _change(list_, gone, [])
                changed = changed or bool(gone)
    return changed


def _rename_note(rdf: Element, each: Property, where: str) -> bool:
    """Give an earlier version's note its present name."""
    note = find_list(rdf, OWN, each.name, where)
    if note is None:
        return False
    xmp_packet.rename(note.parentNode, OWN, each.name + LABELS, "fedmpt")
    return True


def _written(keyword: Iterable[str]) -> Keyword:
    """A keyword as XML can hold it, without empty levels."""
    return tuple(level for level in (NOT_XML.sub("", level).strip() for level in keyword) if level)


def _noted(rdf: Element, name: str, where: str) -> set[str]:
    """The values of a property that came from here: labels and copies."""
    notes = (name, name + LABELS, name + COPIES)
    return {value for note in notes for value in values(find_list(rdf, OWN, note, where))}


def _merge(
    rdf: Element,
    each: Property,
    labels: list[str],
    persons: list[Keyword],
    filed: Mapping[str, Sequence[str]],
    where: str,
) -> bool:
    list_ = find_list(rdf, each.namespace, each.name, where)
    own = find_list(rdf, OWN, each.name + LABELS, where)
    noted = find_list(rdf, OWN, each.name + COPIES, where)
    present, ours, copies = values(list_), values(own), values(noted)
    # Whether nothing of a person's stands here alone; without the person's keywords elsewhere the copies are theirs.
    mirrors = bool(persons) and set(present) <= {*ours, *copies}
    copied = _copies(persons, each.separator) if mirrors else copies
    wanted = [_place(label, each.separator, (copied, present, ours), filed) for label in labels]
    kept = {value for value in present if value not in copies or value in copied}
    new = [label for label in wanted if label not in kept and label not in ours and label not in copied]
    if mirrors and not new and not any(label in kept or label in copied for label in wanted):
        copied = []  # nothing of ours would hide anything
    gone = [label for label in ours if label not in wanted]
    outdated = [value for value in copies if value not in copied]
    stays_out = set(copies) if list_ else set()  # without the property nobody took a single copy out
    there = {*present} - {*gone}
    missing = [value for value in copied if value not in stays_out and value not in there]
    unnoted = [value for value in missing if value not in copies]
    for note, name, less, more in ((own, LABELS, gone, new), (noted, COPIES, outdated, unnoted)):
        if more and note is None:
            note = xmp_packet.make_list(rdf, OWN, each.name + name, "fedmpt", each.kind)
        _change(note, less, more)
    if missing or new:
        list_ = list_ or xmp_packet.make_list(rdf, each.namespace, each.name, each.prefix, each.kind)
    _change(list_, [*gone, *outdated], [*missing, *new])
    return bool(gone or new or outdated or missing)


def _change(list_: Element | None, less: Collection[str], more: Sequence[str]) -> None:
    """Take values out of a list and append others; an empty list goes with its property."""
    if list_ is None:
        return
    removed = set(less)
    for item in [item for item in xmp_packet.elements(list_) if xmp_packet.text(item) in removed]:
        xmp_packet.remove(item)
    for value in more:
        xmp_packet.add_item(list_, value)
    if removed and not any(xmp_packet.elements(list_)):
        xmp_packet.remove(list_.parentNode)


def _copies(persons: Sequence[Keyword], separator: str) -> list[str]:
    """A person's keywords as a property holds them: paths, or the last part of each."""
    if not separator:
        return list(dict.fromkeys(keyword[-1] for keyword in persons))
    filed = {keyword[-1] for keyword in persons if len(keyword) > 1}
    return [separator.join(each) for each in persons if len(each) > 1 or each[0] not in filed]


def _filed(rdf: Element, persons: Iterable[Keyword], where: str) -> dict[str, Sequence[str]]:
    """The longest path of tags that ends in each tag, in whichever property it stands."""
    paths = [
        _levels(value, each)
        for each in KEYWORDS
        if each.separator
        for value in values(find_list(rdf, each.namespace, each.name, where))
    ]
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
