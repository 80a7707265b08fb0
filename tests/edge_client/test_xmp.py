"""Tags in XMP sidecars: readable by photo tools, merged into what others wrote, never half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from fedmpt.edge_client.sidecars import sidecar_path, write_tags
from fedmpt.edge_client.xmp import EMPTY, merge_tags
from fedmpt.edge_client.xmp_packet import MAXIMUM_BYTES, XmpError

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

# As digiKam 8 writes it (through Exiv2): every tag as a path, in the properties of five programs.
DIGIKAM = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:digiKam="http://www.digikam.org/ns/1.0/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:MicrosoftPhoto="http://ns.microsoft.com/photo/1.0/"
    xmlns:acdsee="http://ns.acdsee.com/iptc/1.0/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
    xmlns:mediapro="http://ns.iview-multimedia.com/mediapro/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
   digiKam:PickLabel="0"
   digiKam:ColorLabel="3"
   xmp:Rating="4"
   MicrosoftPhoto:Rating="75"
   acdsee:rating="4"
   acdsee:categories="&lt;Categories&gt;&lt;Category Assigned=&quot;1&quot;&gt;dog&lt;/Category&gt;&lt;/Categories&gt;">
   <digiKam:TagsList>
    <rdf:Seq>
     <rdf:li>Animals/dog</rdf:li>
     <rdf:li>People/Ann</rdf:li>
    </rdf:Seq>
   </digiKam:TagsList>
   <MicrosoftPhoto:LastKeywordXMP>
    <rdf:Bag>
     <rdf:li>Animals/dog</rdf:li>
     <rdf:li>People/Ann</rdf:li>
    </rdf:Bag>
   </MicrosoftPhoto:LastKeywordXMP>
   <lr:hierarchicalSubject>
    <rdf:Bag>
     <rdf:li>Animals|dog</rdf:li>
     <rdf:li>People|Ann</rdf:li>
    </rdf:Bag>
   </lr:hierarchicalSubject>
   <mediapro:CatalogSets>
    <rdf:Bag>
     <rdf:li>Animals|dog</rdf:li>
     <rdf:li>People|Ann</rdf:li>
    </rdf:Bag>
   </mediapro:CatalogSets>
   <dc:subject>
    <rdf:Bag>
     <rdf:li>dog</rdf:li>
     <rdf:li>Ann</rdf:li>
    </rdf:Bag>
   </dc:subject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>""".encode()

# As darktable 4 writes it: keywords in rdf:Seq, a history of edits with encoded parameters, no packet wrapper.
DARKTABLE = b"""<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:exif="http://ns.adobe.com/exif/1.0/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"
    xmlns:darktable="http://darktable.sf.net/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
   exif:DateTimeOriginal="2024:05:01 10:11:12.000"
   xmp:Rating="1"
   xmpMM:DerivedFrom="photo.jpg"
   darktable:import_timestamp="63850312345678901"
   darktable:xmp_version="5"
   darktable:raw_params="0"
   darktable:auto_presets_applied="1"
   darktable:history_end="2"
   darktable:iop_order_version="2">
   <darktable:masks_history>
    <rdf:Seq/>
   </darktable:masks_history>
   <darktable:history>
    <rdf:Seq>
     <rdf:li
      darktable:num="0"
      darktable:operation="colorin"
      darktable:enabled="1"
      darktable:modversion="7"
      darktable:params="gz48eJzjYhgFowABWAbaAaNgwAEAEDgABg=="
      darktable:multi_name=""
      darktable:multi_priority="0"
      darktable:blendop_version="11"
      darktable:blendop_params="gz11eJxjYIAACQYYOOHEgAZY0QWAgBGLGANDgz0Ej1Q+dlAx68oBEMbFxwX+AwGIBgCbGCeh"/>
     <rdf:li
      darktable:num="1"
      darktable:operation="exposure"
      darktable:enabled="1"
      darktable:modversion="6"
      darktable:params="00000000000080b90000003f00004842000080c0"
      darktable:multi_name=""
      darktable:multi_priority="0"
      darktable:blendop_version="11"
      darktable:blendop_params="gz11eJxjYIAACQYYOOHEgAZY0QWAgBGLGANDgz0Ej1Q+dlAx68oBEMbFxwX+AwGIBgCbGCeh"/>
    </rdf:Seq>
   </darktable:history>
   <dc:subject>
    <rdf:Seq>
     <rdf:li>Animals</rdf:li>
     <rdf:li>dog</rdf:li>
    </rdf:Seq>
   </dc:subject>
   <lr:hierarchicalSubject>
    <rdf:Seq>
     <rdf:li>Animals|dog</rdf:li>
     <rdf:li>darktable|format|jpg</rdf:li>
    </rdf:Seq>
   </lr:hierarchicalSubject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""

# As Lightroom Classic writes it: develop settings as attributes and structures, a history of events.
LIGHTROOM = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0-c000 1.000000, 0000/00/00-00:00:00">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
    xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"
    xmlns:stEvt="http://ns.adobe.com/xap/1.0/sType/ResourceEvent#"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
    xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"
   xmp:ModifyDate="2024-05-01T10:11:12"
   xmp:CreatorTool="Adobe Photoshop Lightroom Classic 13.2 (Macintosh)"
   xmp:MetadataDate="2024-05-02T09:00:00+02:00"
   xmp:Label="Red"
   photoshop:SidecarForExtension="CR3"
   xmpMM:DocumentID="xmp.did:0f8fad5b-d9cb-469f-a165-70867728950e"
   xmpMM:InstanceID="xmp.iid:7c9e6679-7425-40de-944b-e07fc1f90ae7"
   crs:Version="16.2"
   crs:ProcessVersion="15.4"
   crs:WhiteBalance="As Shot"
   crs:Exposure2012="+0.35"
   crs:HasSettings="True"
   crs:RawFileName="photo.CR3">
   <xmpMM:History>
    <rdf:Seq>
     <rdf:li
      stEvt:action="saved"
      stEvt:instanceID="xmp.iid:7c9e6679-7425-40de-944b-e07fc1f90ae7"
      stEvt:when="2024-05-02T09:00:00+02:00"
      stEvt:softwareAgent="Adobe Photoshop Lightroom Classic 13.2 (Macintosh)"
      stEvt:changed="/metadata"/>
    </rdf:Seq>
   </xmpMM:History>
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Animals</rdf:li>
     <rdf:li>dog</rdf:li>
    </rdf:Bag>
   </dc:subject>
   <lr:hierarchicalSubject>
    <rdf:Bag>
     <rdf:li>Animals|dog</rdf:li>
    </rdf:Bag>
   </lr:hierarchicalSubject>
   <crs:ToneCurvePV2012>
    <rdf:Seq>
     <rdf:li>0, 0</rdf:li>
     <rdf:li>255, 255</rdf:li>
    </rdf:Seq>
   </crs:ToneCurvePV2012>
   <crs:Look>
    <rdf:Description
     crs:Name="Adobe Color"
     crs:Amount="1">
    <crs:Parameters>
     <rdf:Description
      crs:Version="16.2"
      crs:ConvertToGrayscale="False"/>
    </crs:Parameters>
    </rdf:Description>
   </crs:Look>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""

needs_exiftool = pytest.mark.skipif(
    not shutil.which("exiftool"), reason="exiftool is not installed (apt-get install exiftool)"
)

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


@pytest.mark.parametrize(
    ("path", "kind"), [("dc:subject", "Bag"), ("digiKam:TagsList", "Seq"), ("lr:hierarchicalSubject", "Bag")]
)
def test_each_property_has_the_kind_of_list_that_its_owner_defined(path: str, kind: str) -> None:
    root = etree.fromstring(merge_tags(EMPTY, ["cat"], "x"))
    assert [child.tag for child in root.findall(f".//{path}/*", NAMES)] == [f"{{{NAMES['rdf']}}}{kind}"]


@needs_exiftool
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
    assert everything["XMP-digiKam:TagsList"] == [*theirs, "bird", "café <&> 猫"]
    assert everything["XMP-lr:HierarchicalSubject"] == [*theirs, "bird", "café <&> 猫"]


def read_xmp(sidecar: Path) -> dict[str, Any]:
    """What exiftool finds, by group and name, less file properties and this program's notes."""
    command = ["exiftool", "-json", "-struct", "-G1", "-x", "XMPToolkit", "-XMP:all", str(sidecar)]
    (found,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {
        name: value
        for name, value in found.items()
        if name != "SourceFile" and not name.startswith("XMP-fedmpt")
    }


@needs_exiftool
@pytest.mark.parametrize(
    ("before", "tags_list"),
    [
        (DIGIKAM, ["Animals/dog", "People/Ann", "bird"]),
        (DARKTABLE, ["Animals/dog", "darktable/format/jpg", "bird"]),
        (LIGHTROOM, ["Animals/dog", "bird"]),
    ],
    ids=["digiKam", "darktable", "Lightroom"],
)
def test_merging_only_adds_to_what_photo_tools_wrote(
    tmp_path: Path, before: bytes, tags_list: list[str]
) -> None:
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(before)
    theirs = read_xmp(sidecar)
    write_tags(sidecar, ["dog", "bird"])
    assert read_xmp(sidecar) == theirs | {
        "XMP-dc:Subject": [*theirs["XMP-dc:Subject"], "bird"],
        "XMP-lr:HierarchicalSubject": [*theirs["XMP-lr:HierarchicalSubject"], "bird"],
        "XMP-digiKam:TagsList": tags_list,
    }
    added = {"bird"} if before == DIGIKAM else {"bird", "Animals/dog", "darktable/format/jpg"}
    assert without_our_part(sidecar.read_bytes(), added) == without_our_part(before, set())


def test_a_label_that_is_filed_under_others_is_not_added_at_the_root() -> None:
    merged = merge_tags(DIGIKAM, ["dog"], "x")
    assert merged == DIGIKAM


def test_a_label_goes_where_another_property_has_it_filed() -> None:
    merged = merge_tags(LIGHTROOM, ["dog"], "x")
    assert values(merged, "digiKam:TagsList") == ["Animals/dog"]
    assert merge_tags(merged, ["dog"], "x") == merged
    assert values(merge_tags(merged, [], "x"), "digiKam:TagsList") == []


def test_a_tag_that_a_person_filed_under_others_stays_there() -> None:
    root = etree.fromstring(merge_tags(EMPTY, ["dog"], "x"))
    (item,) = root.findall(".//lr:hierarchicalSubject/*/rdf:li", NAMES)
    item.text = "Animals|dog"
    again = merge_tags(etree.tostring(root), ["dog"], "x")
    assert values(again, "lr:hierarchicalSubject") == ["Animals|dog"]


@pytest.mark.parametrize("label", ["tv/monitor", "tv|monitor"])
def test_what_separates_levels_for_photo_tools_is_replaced(label: str) -> None:
    merged = merge_tags(EMPTY, [label], "x")
    for path in ("dc:subject", "digiKam:TagsList", "lr:hierarchicalSubject"):
        assert values(merged, path) == ["tv-monitor"]


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
    assert values(merged, "digiKam:TagsList") == ["holiday", "cat", "bird"]
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
    assert values(again, "digiKam:TagsList") == ["holiday", "cat", "dog"]


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


@pytest.mark.parametrize("other", ["a.png", "a.JPG", "a.jpeg"])
def test_two_photos_never_share_a_sidecar(tmp_path: Path, other: str) -> None:
    photos = [tmp_path / "a.jpg", tmp_path / other]
    for photo in photos:
        photo.write_bytes(b"one" if photo == photos[0] else b"two")
    for photo in photos:
        assert sidecar_path(photo) == tmp_path / f"{photo.name}.xmp"
        with pytest.raises(XmpError, match=r"has the same sidecar, a\.xmp; rename one, or use --sidecar"):
            sidecar_path(photo, "photo.xmp")


def test_the_longest_name_of_a_photo_has_a_sidecar(tmp_path: Path) -> None:
    photo = tmp_path / ("a" * 251 + ".jpg")
    photo.touch()
    assert sidecar_path(photo, "photo.xmp") == photo.with_suffix(".xmp")


def test_a_photo_may_share_the_sidecar_of_its_raw_file(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.cr3"):
        (tmp_path / name).touch()
    assert sidecar_path(tmp_path / "a.jpg", "photo.xmp") == tmp_path / "a.xmp"


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_rewritten_sidecar_keeps_its_permissions_and_owner(tmp_path: Path, mode: int) -> None:
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(OTHERS)
    sidecar.chmod(mode)
    if os.geteuid() == 0:
        os.chown(sidecar, 1000, 1001)
    before = sidecar.stat()
    assert write_tags(sidecar, ["cat", "bird"])
    after = sidecar.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o002, 0o664)])
def test_a_new_sidecar_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_tags(tmp_path / "photo.jpg.xmp", ["cat"])
    finally:
        os.umask(before)
    assert (tmp_path / "photo.jpg.xmp").stat().st_mode & 0o777 == mode


def test_a_symbolic_link_is_written_through(tmp_path: Path) -> None:
    target, sidecar = tmp_path / "elsewhere" / "a.xmp", tmp_path / "photo.jpg.xmp"
    target.parent.mkdir()
    target.write_bytes(OTHERS)
    sidecar.symlink_to("elsewhere/a.xmp")
    assert write_tags(sidecar, ["bird"])
    assert sidecar.is_symlink()
    assert values(target.read_bytes(), "dc:subject") == ["holiday", "cat", "bird"]


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.symlink_to("not-mounted/a.xmp")
    with pytest.raises(XmpError, match="No such file"):
        write_tags(sidecar, ["bird"])
    assert list(tmp_path.iterdir()) == [sidecar]


def test_the_longest_name_that_a_sidecar_can_have_is_written(tmp_path: Path) -> None:
    sidecar = tmp_path / ("猫" * 82 + ".jpg.xmp")
    assert len(os.fsencode(sidecar.name)) == 254
    assert write_tags(sidecar, ["cat"])


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
