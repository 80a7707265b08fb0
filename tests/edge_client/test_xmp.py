"""Tags in XMP sidecars: readable by photo tools, merged into what others wrote, never half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from lxml import etree

from fedmpt.edge_client.xmp import EMPTY, MAXIMUM_BYTES, XmpError, merge_tags, sidecar_path, write_tags

OTHERS = b"""<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>
<!-- written by a photo tool -->
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 6.0.0">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:unused="http://example.org/unused/"
   xmp:Rating="4"
   crs:Exposure2012="+0.35">
   <dc:title>
    <rdf:Alt>
     <rdf:li xml:lang="x-default">Gr\xc3\xbc\xc3\x9fe &amp; K\xc3\xbcsse</rdf:li>
    </rdf:Alt>
   </dc:title>
   <dc:subject>
    <rdf:Bag>
     <rdf:li>holiday</rdf:li>
     <rdf:li>cat</rdf:li>
    </rdf:Bag>
   </dc:subject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""

NAMES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "digiKam": "http://www.digikam.org/ns/1.0/",
    "lr": "http://ns.adobe.com/lightroom/1.0/",
}


def values(packet: bytes, path: str) -> list[str | None]:
    return [item.text for item in etree.fromstring(packet).findall(f".//{path}/*/rdf:li", NAMES)]


def without_our_part(packet: bytes, added: set[str]) -> bytes:
    """The document less this program's properties and the named keywords, in canonical form."""
    root = etree.fromstring(packet)
    for name in ("digiKam:TagsList", "lr:hierarchicalSubject"):
        for element in root.findall(f".//{name}", NAMES):
            element.getparent().remove(element)
    for element in list(root.iter("{urn:fedmpt:xmp:1/}*")):
        element.getparent().remove(element)
    for item in root.findall(".//dc:subject/*/rdf:li", NAMES):
        if item.text in added:
            item.getparent().remove(item)
    return b"".join(etree.tostring(root.getroottree(), method="c14n").split())


def test_writes_the_three_keyword_properties_that_photo_tools_read(tmp_path: Path) -> None:
    sidecar = tmp_path / "photo.jpg.xmp"
    assert write_tags(sidecar, ["cat", "traffic light"])
    packet = sidecar.read_bytes()
    for path in ("dc:subject", "digiKam:TagsList", "lr:hierarchicalSubject"):
        assert values(packet, path) == ["cat", "traffic light"]


@pytest.mark.skipif(
    not shutil.which("exiftool"), reason="exiftool is not installed (apt-get install exiftool)"
)
@pytest.mark.parametrize("before", [EMPTY, OTHERS], ids=["new", "merged"])
def test_exiftool_reads_the_tags_and_finds_nothing_wrong(tmp_path: Path, before: bytes) -> None:
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(before)
    write_tags(sidecar, ["bird", "café <&> 猫"])
    command = ["exiftool", "-json", "-struct", "-G1", "-validate", "-warning", "-a", str(sidecar)]
    (read,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    (everything,) = json.loads(
        subprocess.run(["exiftool", "-json", "-G1", str(sidecar)], capture_output=True, check=True).stdout
    )
    assert read["ExifTool:Validate"] in ("OK", 0, "0 0 0")
    assert "ExifTool:Warning" not in read
    theirs = ["holiday", "cat"] if before == OTHERS else []
    assert everything["XMP-dc:Subject"] == [*theirs, "bird", "café <&> 猫"]
    assert everything["XMP-digiKam:TagsList"] == ["bird", "café <&> 猫"]
    assert everything["XMP-lr:HierarchicalSubject"] == ["bird", "café <&> 猫"]


def test_leaves_everything_that_others_wrote() -> None:
    merged = merge_tags(OTHERS, ["bird", "cat"], "x")
    assert values(merged, "dc:subject") == ["holiday", "cat", "bird"]
    assert without_our_part(merged, {"bird"}) == without_our_part(OTHERS, set())
    assert merged.startswith(b'<?xpacket begin="\xef\xbb\xbf"')
    assert merged.endswith(b'<?xpacket end="w"?>')
    assert b"<!-- written by a photo tool -->" in merged
    assert b'xmlns:unused="http://example.org/unused/"' in merged


def test_keeps_characters_that_a_reader_would_normalise() -> None:
    ours = OTHERS.replace(b'xmp:Rating="4"', b'xmp:Label="one&#10;two&#9;three&#13;&quot;&lt;"')
    ours = ours.replace(b"Gr\xc3", b"a&#13;<![CDATA[<b>]]>Gr\xc3")
    assert without_our_part(merge_tags(ours, ["bird"], "x"), {"bird"}) == without_our_part(ours, set())


def test_finds_the_properties_whatever_their_prefixes() -> None:
    renamed = OTHERS.replace(b"rdf:", b"r:").replace(b"xmlns:rdf", b"xmlns:r")
    renamed = (
        renamed.replace(b"dc:", b"rdf:").replace(b"xmlns:dc", b"xmlns:rdf").replace(b"rdf:RDF", b"r:RDF")
    )
    merged = merge_tags(renamed, ["bird"], "x")
    assert values(merged, "dc:subject") == ["holiday", "cat", "bird"]
    assert values(merged, "digiKam:TagsList") == ["bird"]
    assert without_our_part(merged, {"bird"}) == without_our_part(renamed, set())


def test_other_encodings_become_utf_8() -> None:
    packet = b'<?xml version="1.0" encoding="ISO-8859-1"?>\n' + EMPTY.replace(b'about=""', b'about="\xfc"')
    merged = merge_tags(packet, ["bird"], "x")
    assert merged.startswith(b'<?xml version="1.0" encoding="UTF-8"?>')
    assert 'about="ü"'.encode() in merged
    assert values(merged, "dc:subject") == ["bird"]


def test_tagging_again_with_the_same_labels_changes_no_byte(tmp_path: Path) -> None:
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(OTHERS)
    assert write_tags(sidecar, ["bird"])
    before = sidecar.stat().st_mtime_ns, sidecar.read_bytes()
    assert not write_tags(sidecar, ["bird"])
    assert (sidecar.stat().st_mtime_ns, sidecar.read_bytes()) == before


def test_a_later_run_takes_back_its_own_tags_and_no_one_elses() -> None:
    once = merge_tags(OTHERS, ["cat", "bird"], "x")
    again = merge_tags(once, ["dog"], "x")
    assert values(again, "dc:subject") == ["holiday", "cat", "dog"]
    assert values(again, "digiKam:TagsList") == ["dog"]


def test_taking_everything_back_leaves_the_original_content() -> None:
    emptied = merge_tags(merge_tags(OTHERS, ["bird", "cat"], "x"), [], "x")
    assert (
        emptied.split(b"rdf:about", 1)[1].split(b">", 1)[1]
        == OTHERS.split(b"rdf:about", 1)[1].split(b">", 1)[1]
    )
    assert without_our_part(emptied, set()) == without_our_part(OTHERS, set())
    assert b"TagsList" not in emptied


def test_a_tag_that_a_person_took_out_stays_out() -> None:
    tagged = merge_tags(EMPTY, ["cat", "dog"], "x")
    root = etree.fromstring(tagged)
    (wrong,) = [item for item in root.findall(".//dc:subject/*/rdf:li", NAMES) if item.text == "dog"]
    wrong.getparent().remove(wrong)
    corrected = etree.tostring(root)
    assert merge_tags(corrected, ["cat", "dog"], "x") == corrected


def test_a_photo_without_tags_gets_no_sidecar(tmp_path: Path) -> None:
    assert not write_tags(tmp_path / "photo.jpg.xmp", [])
    assert list(tmp_path.iterdir()) == []


def test_an_empty_sidecar_counts_as_none(tmp_path: Path) -> None:
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.touch()
    assert write_tags(sidecar, ["cat"])
    assert values(sidecar.read_bytes(), "dc:subject") == ["cat"]


def test_sidecars_are_named_as_the_photo_tools_expect() -> None:
    assert sidecar_path(Path("a/photo.jpg")) == Path("a/photo.jpg.xmp")
    assert sidecar_path(Path("a/photo.jpg"), "photo.xmp") == Path("a/photo.xmp")


@pytest.mark.parametrize(
    ("packet", "complaint"),
    [
        (b"not XML", "not well-formed"),
        (b"<x:xmpmeta", "not well-formed"),
        (b"<html/>", "no rdf:RDF"),
        (EMPTY.replace(b"</rdf:RDF>", b"<a>" * 9999 + b"</a>" * 9999 + b"</rdf:RDF>"), "nested too deeply"),
        (b'<?xml version="1.0" encoding="no-such"?><r/>', "not well-formed"),
        (b'<?xml version="1.0" encoding="UTF-8"?><r>\xff</r>', "not well-formed"),
        (b'<!DOCTYPE r [<!ENTITY a "aaaa">]><r>&a;</r>', "document type declaration"),
        (OTHERS.replace(b'xmp:Rating="4"', b'dc:subject="cat"'), "twice or as an attribute"),
        (OTHERS.replace(b"rdf:Bag>", b"rdf:Bag2>").replace(b"rdf:Bag2>", b"dc:Bag>"), "not a list of values"),
    ],
)
def test_a_sidecar_that_cannot_be_merged_is_refused_and_kept(
    tmp_path: Path, packet: bytes, complaint: str
) -> None:
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(packet)
    with pytest.raises(XmpError, match=complaint) as caught:
        write_tags(sidecar, ["cat"])
    assert str(sidecar) in str(caught.value)
    assert sidecar.read_bytes() == packet
    assert list(tmp_path.iterdir()) == [sidecar]


def test_a_file_too_large_for_a_sidecar_is_refused_unread(tmp_path: Path) -> None:
    sidecar = tmp_path / "photo.jpg.xmp"
    with sidecar.open("wb") as file:
        file.truncate(MAXIMUM_BYTES + 1)
    with pytest.raises(XmpError, match="larger than 8388608 bytes; this is no XMP sidecar"):
        write_tags(sidecar, ["cat"])


def test_entities_are_not_fetched(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("password")
    packet = b'<!DOCTYPE r [<!ENTITY s SYSTEM "%b">]><r>&s;</r>' % secret.as_uri().encode()
    with pytest.raises(XmpError, match="document type declaration"):
        merge_tags(packet, ["cat"], "x")


def test_a_label_that_xml_cannot_hold_is_refused() -> None:
    with pytest.raises(XmpError, match="cannot be written as XML"):
        merge_tags(EMPTY, ["bad\x00label"], "x")
