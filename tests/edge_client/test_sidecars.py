"""What a person tagged stays in view: which keywords photo programs show before and after we write a sidecar.

The order in which the programs read is theirs, as they document it: of the properties TagsList, hierarchicalSubject
and subject the first that is there, a sidecar's before the photo's own.
"""

import io
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree
from PIL import Image, PngImagePlugin

from fedmpt.edge_client.sidecars import embedded_keywords, sidecar_path, write_sidecar
from fedmpt.edge_client.xmp import EMPTY, merge_tags
from fedmpt.edge_client.xmp_packet import XmpError

NAMES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "digiKam": "http://www.digikam.org/ns/1.0/",
    "lr": "http://ns.adobe.com/lightroom/1.0/",
    "MicrosoftPhoto": "http://ns.microsoft.com/photo/1.0/",
    "fedmpt": "urn:fedmpt:xmp:1/",
}
SUBJECT, TAGS, PATHS = "dc:subject", "digiKam:TagsList", "lr:hierarchicalSubject"
ORDERS = {
    "Immich": (TAGS, PATHS, "IPTC"),
    "digiKam": (TAGS, PATHS, SUBJECT, "IPTC"),
    "darktable": (PATHS, SUBJECT),
}


def packet(**properties):
    """An XMP packet; ``dc_subject=["a"]`` is a property with one keyword."""
    root = etree.fromstring(EMPTY)
    (description,) = root.findall(".//rdf:Description", NAMES)
    for name, keywords in properties.items():
        prefix, local = name.split("_")
        list_ = etree.SubElement(
            etree.SubElement(description, f"{{{NAMES[prefix]}}}{local}", nsmap={prefix: NAMES[prefix]}),
            f"{{{NAMES['rdf']}}}Bag",
        )
        for keyword in keywords:
            etree.SubElement(list_, f"{{{NAMES['rdf']}}}li").text = keyword
    return etree.tostring(root)


def values(content, name):
    return [item.text for item in etree.fromstring(content).findall(f".//{name}/*/rdf:li", NAMES)]


def iptc(*keywords, utf_8=False):
    """A JPEG segment with IPTC keywords, as Photoshop's resource 1028."""
    sets = b"\x1c\x01\x5a\x00\x03\x1b%G" if utf_8 else b""
    for keyword in keywords:
        sets += b"\x1c\x02\x19" + struct.pack(">H", len(keyword)) + keyword
    resource = b"8BIM\x04\x04\x00\x00" + struct.pack(">I", len(sets)) + sets + b"\x00" * (len(sets) % 2)
    content = b"Photoshop 3.0\x00" + resource
    return b"\xff\xed" + struct.pack(">H", len(content) + 2) + content


def jpeg(path, xmp=b"", segment=b""):
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "JPEG", **({"xmp": xmp} if xmp else {}))
    path.write_bytes(data.getvalue()[:2] + segment + data.getvalue()[2:])
    return path


def levels(keywords):
    return {level for keyword in keywords for level in keyword.replace("|", "/").split("/")}


def shown(program, photo):
    """The keywords that a program shows, with all above them in a path of tags."""
    long, short = photo.with_name(photo.name + ".xmp"), photo.with_suffix(".xmp")
    with Image.open(photo) as image:
        inside = image.info.get("xmp", EMPTY)
    media = {name: values(inside, name) for name in (TAGS, PATHS, SUBJECT)}
    media["IPTC"] = [keyword for (keyword,) in embedded_keywords(jpeg_without_xmp(photo))]
    readable = {"Immich": (long, short), "digiKam": (short, long), "darktable": (long,)}[program]
    sidecar = next((path for path in readable if path.exists()), None)
    side = {name: values(sidecar.read_bytes(), name) for name in (TAGS, PATHS, SUBJECT)} if sidecar else {}
    found = media | {name: keywords for name, keywords in side.items() if keywords}
    return next((levels(found[name]) for name in ORDERS[program] if found[name]), set())


def jpeg_without_xmp(photo):
    with Image.open(photo) as image:
        data = image.info.get("xmp", b"")
    bare = photo.with_name("bare.jpeg")
    bare.write_bytes(photo.read_bytes().replace(data, b" " * len(data)) if data else photo.read_bytes())
    return bare


words = st.sampled_from(["Anna", "Beach", "dog", "Straße", "2024"])
plain = st.lists(words, unique=True, max_size=2)


def paths(separator):
    return st.lists(
        st.lists(words, min_size=1, max_size=3, unique=True).map(separator.join), unique=True, max_size=2
    )


packets = st.builds(
    lambda subject, tags, paths, all_: packet(
        **{
            name: keywords
            for name, keywords in (
                ("dc_subject", subject),
                ("digiKam_TagsList", tags),
                ("lr_hierarchicalSubject", paths),
            )
            if keywords or all_
        }
    ),
    plain,
    paths("/"),
    paths("|"),
    st.booleans(),
)
runs = st.lists(
    st.lists(st.sampled_from(["dog", "cat", "tree"]), unique=True, max_size=3), min_size=1, max_size=3
)


@settings(deadline=None)
@given(
    inside=st.none() | packets, keywords=plain, long=st.none() | packets, short=st.none() | packets, runs=runs
)
def test_no_keyword_of_a_person_leaves_the_view_of_any_program(
    tmp_path_factory, inside, keywords, long, short, runs
):
    folder = tmp_path_factory.mktemp("photos")
    photo = jpeg(
        folder / "a.jpg", inside or b"", iptc(*(word.encode() for word in keywords)) if keywords else b""
    )
    for name, content in (("a.jpg.xmp", long), ("a.xmp", short)):
        if content:
            (folder / name).write_bytes(content)
    before = {program: shown(program, photo) for program in ORDERS}
    for labels in runs:
        write_sidecar(photo, labels)
        for program, theirs in before.items():
            assert theirs <= shown(program, photo), program
        written = {path: path.read_bytes() for path in folder.iterdir()}
        write_sidecar(photo, labels)
        assert {path: path.read_bytes() for path in folder.iterdir()} == written
    write_sidecar(photo, [])
    assert {program: shown(program, photo) for program in ORDERS} == before


def test_a_new_property_starts_with_the_keywords_of_the_others():
    merged = merge_tags(packet(dc_subject=["Wedding", "Anna"]), ["dog"], "x")
    assert (
        values(merged, TAGS) == values(merged, PATHS) == values(merged, SUBJECT) == ["Wedding", "Anna", "dog"]
    )


def test_paths_keep_their_levels_and_plain_keywords_are_their_last():
    merged = merge_tags(packet(digiKam_TagsList=["People/Anna"]), ["dog"], "x")
    assert values(merged, PATHS) == ["People|Anna", "dog"]
    assert values(merged, SUBJECT) == ["Anna", "dog"]


def test_keywords_of_other_programs_count():
    merged = merge_tags(packet(MicrosoftPhoto_LastKeywordXMP=["People/Anna"]), ["dog"], "x")
    assert values(merged, TAGS) == ["People/Anna", "dog"]


def test_a_sidecar_that_an_earlier_version_wrote_is_mended():
    """It gave the properties that it made our labels alone."""
    hiding = packet(
        dc_subject=["Wedding", "dog"],
        fedmpt_subject=["dog"],
        digiKam_TagsList=["dog"],
        fedmpt_TagsList=["dog"],
    )
    assert values(merge_tags(hiding, ["dog"], "x"), TAGS) == ["dog", "Wedding"]


def test_copies_follow_what_a_person_changes():
    merged = merge_tags(packet(dc_subject=["Wedding", "Anna"]), ["dog"], "x")
    edited = merged.replace(b"<rdf:li>Anna</rdf:li>", b"<rdf:li>Bob</rdf:li>", 1)
    assert values(edited, SUBJECT) == ["Wedding", "Bob", "dog"]
    again = merge_tags(edited, ["dog"], "x")
    assert sorted(values(again, TAGS)) == sorted(values(again, PATHS)) == ["Bob", "Wedding", "dog"]


def test_a_copy_that_a_person_takes_out_stays_out():
    merged = merge_tags(packet(dc_subject=["Wedding", "Anna"]), ["dog"], "x")
    root = etree.fromstring(merged)
    for item in root.findall(f".//{TAGS}/*/rdf:li", NAMES):
        if item.text == "Anna":
            item.getparent().remove(item)
    again = merge_tags(etree.tostring(root), ["dog", "cat"], "x")
    assert values(again, TAGS) == ["Wedding", "dog", "cat"]


def test_a_property_that_a_persons_program_wrote_to_keeps_its_copies():
    merged = merge_tags(packet(dc_subject=["Anna"]), ["dog"], "x")
    root = etree.fromstring(merged)
    list_ = root.find(f".//{TAGS}/*", NAMES)
    etree.SubElement(list_, f"{{{NAMES['rdf']}}}li").text = "Beach"
    for item in root.findall(f".//{SUBJECT}/*/rdf:li", NAMES):
        if item.text == "Anna":
            item.getparent().remove(item)
    again = merge_tags(etree.tostring(root), [], "x")
    assert values(again, TAGS) == ["Anna", "Beach"]


def test_a_label_that_the_person_has_is_the_persons():
    merged = merge_tags(packet(lr_hierarchicalSubject=["Animals|dog"]), ["dog"], "x")
    assert values(merged, TAGS) == ["Animals/dog"]
    assert values(merged, "fedmpt:TagsList") == []


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_keywords_in_the_photos_own_xmp_are_found(tmp_path, suffix):
    photo = tmp_path / f"a{suffix}"
    xmp = packet(dc_subject=["Grandma"], lr_hierarchicalSubject=["Family|Grandma"])
    if suffix == ".png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        Image.new("RGB", (8, 8)).save(photo, pnginfo=text)
    elif suffix == ".tif":
        Image.new("RGB", (8, 8)).save(photo, tiffinfo={700: xmp})
    else:
        Image.new("RGB", (8, 8)).save(photo, xmp=xmp)
    assert embedded_keywords(photo) == [("Family", "Grandma")]


@pytest.mark.skipif(
    not shutil.which("exiftool"), reason="exiftool is not installed (apt-get install exiftool)"
)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_keywords_that_exiftool_wrote_are_found(tmp_path, suffix):
    import subprocess

    photo = tmp_path / f"a{suffix}"
    Image.new("RGB", (8, 8)).save(photo)
    tags = ["-XMP-dc:Subject=Großmutter"]
    if suffix in (".jpg", ".tif"):
        tags += ["-IPTC:Keywords=Café", "-codedcharacterset=utf8", "-XPKeywords=Strand;Meer"]
    subprocess.run(["exiftool", "-q", "-overwrite_original", *tags, photo], check=True)
    found = [("Großmutter",), ("Café",), ("Strand",), ("Meer",)]
    expected = {".jpg": found, ".tif": [found[0], *found[2:]]}.get(suffix, found[:1])
    assert set(expected) <= set(embedded_keywords(photo))


@pytest.mark.parametrize(
    ("stored", "declared", "read"),
    [
        ("Müller".encode(), True, "Müller"),
        ("Müller".encode(), False, "Müller"),
        ("Müller".encode("cp1252"), False, "Müller"),
    ],
)
def test_iptc_is_read_in_the_characters_that_it_was_written_in(tmp_path, stored, declared, read):
    photo = jpeg(tmp_path / "a.jpg", segment=iptc(stored, b"Anna", utf_8=declared))
    assert embedded_keywords(photo) == [(read,), ("Anna",)]


@pytest.mark.parametrize("xmp", [b"not XML", b"<a/>", b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>"])
def test_damaged_metadata_of_a_photo_costs_nothing_but_itself(tmp_path, xmp):
    photo = jpeg(tmp_path / "a.jpg", xmp=xmp, segment=iptc(b"Anna"))
    assert embedded_keywords(photo) == [("Anna",)]


@pytest.mark.parametrize(
    "damage",
    [
        (b"<rdf:li>", b"<rdf:li>&"),
        (b"<rdf:RDF", b"<!DOCTYPE a><rdf:RDF"),
        (b"dc:subject", b"dc:subject x:y='1'"),
    ],
)
def test_a_photo_whose_damaged_metadata_has_keywords_is_not_tagged(tmp_path, damage):
    """exiftool reads them all the same, and a sidecar would hide them."""
    photo = jpeg(tmp_path / "a.jpg", xmp=packet(dc_subject=["Anna"]).replace(*damage))
    with pytest.raises(XmpError, match=r"a\.jpg: its own XMP"):
        write_sidecar(photo, ["dog"])
    assert list(tmp_path.iterdir()) == [photo]


def test_spaces_around_a_packet_are_no_damage(tmp_path):
    photo = jpeg(tmp_path / "a.jpg", xmp=b"\n <?xml version='1.0'?>" + packet(dc_subject=["Anna"]) + b" \0\0")
    assert embedded_keywords(photo) == [("Anna",)]


def test_a_large_packet_in_pieces_is_put_together(tmp_path):
    """As Adobe's programs write what is more than 64 kB: the rest follows in segments of its own."""
    names = [f"keyword {number}" for number in range(1500)]
    rest = packet(dc_subject=names)
    segments = b""
    for start in range(0, len(rest), 40_000):
        content = b"http://ns.adobe.com/xmp/extension/\0" + b"A" * 32
        content += struct.pack(">II", len(rest), start) + rest[start : start + 40_000]
        segments += b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
    photo = jpeg(tmp_path / "a.jpg", xmp=packet(), segment=segments)
    assert embedded_keywords(photo) == [(name,) for name in names]


def test_the_xmp_of_a_gif_is_found(tmp_path):
    photo = tmp_path / "a.gif"
    Image.new("L", (8, 8)).save(photo)
    data = photo.read_bytes()
    block = (
        b"\x21\xff\x0bXMP DataXMP" + packet(dc_subject=["Anna"]) + b"\x01" + bytes(range(255, -1, -1)) + b"\0"
    )
    photo.write_bytes(data[:-1] + block + data[-1:])
    assert embedded_keywords(photo) == [("Anna",)]


@pytest.mark.parametrize(
    "keywords", ["Strand;Meer".encode("utf-16-le"), "Strand;Meer".encode("utf-16-le") + b"\0\0x"]
)
def test_keywords_of_windows_explorer_are_found(tmp_path, keywords):
    photo = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x9C9E] = keywords
    Image.new("RGB", (8, 8)).save(photo, exif=exif)
    found = [keyword for (keyword,) in embedded_keywords(photo)]
    assert found[0] == "Strand"
    assert found[1].startswith("Meer")


def test_a_number_where_keywords_should_be_costs_no_memory(tmp_path):
    photo = tmp_path / "a.tif"
    Image.new("RGB", (8, 8)).save(photo, tiffinfo={0x9C9E: 1_500_000_000})
    assert embedded_keywords(photo) == []


def test_more_keywords_than_can_be_merged_are_refused(tmp_path):
    photo = jpeg(tmp_path / "a.jpg")
    (tmp_path / "a.jpg.xmp").write_bytes(packet(dc_subject=[f"keyword {number}" for number in range(2001)]))
    with pytest.raises(XmpError, match="2001 keywords, but at most 2000 are merged"):
        write_sidecar(photo, ["dog"])


@pytest.mark.parametrize(
    "item",
    [
        '<rdf:li rdf:parseType="Resource"><rdf:value>Anna</rdf:value><q:x xmlns:q="urn:q">1</q:x></rdf:li>',
        "<rdf:li><rdf:Description><rdf:value>Anna</rdf:value></rdf:Description></rdf:li>",
        '<rdf:li rdf:value="Anna"/>',
        '<rdf:li xml:lang="x-default">Anna</rdf:li>',
    ],
)
def test_a_qualified_keyword_is_a_keyword(item):
    before = packet(dc_subject=["X"]).replace(b"<rdf:li>X</rdf:li>", item.encode())
    merged = merge_tags(before, ["dog"], "x")
    assert values(merged, TAGS) == ["Anna", "dog"]
    assert item.encode() in merged


def test_what_another_program_spread_goes_with_our_label(tmp_path):
    """digiKam writes all its tags to the properties of other programs, too."""
    once = merge_tags(EMPTY, ["dog"], "x")
    root = etree.fromstring(once)
    (description,) = root.findall(".//rdf:Description", NAMES)
    theirs = etree.fromstring(packet(MicrosoftPhoto_LastKeywordXMP=["dog", "Anna"])).find(
        ".//rdf:Description", NAMES
    )
    description.append(theirs[0])
    again = merge_tags(etree.tostring(root), ["cat"], "x")
    assert values(again, TAGS) == ["Anna", "cat"]
    assert values(again, "MicrosoftPhoto:LastKeywordXMP") == ["Anna"]
    assert merge_tags(again, ["cat"], "x") == again


def test_a_property_that_was_deleted_starts_again_with_the_persons_keywords():
    root = etree.fromstring(merge_tags(packet(dc_subject=["Wedding"]), ["dog"], "x"))
    (made,) = root.findall(f".//{TAGS}", NAMES)
    made.getparent().remove(made)
    again = merge_tags(etree.tostring(root), ["cat"], "x")
    assert values(again, TAGS) == ["Wedding", "cat"]
    assert merge_tags(again, ["cat"], "x") == again


def test_copies_stay_where_the_persons_keywords_are_nowhere_else_any_more(tmp_path):
    """An editor took the metadata out of the photo."""
    photo = jpeg(tmp_path / "a.jpg", segment=iptc(b"Anna"))
    write_sidecar(photo, ["dog"])
    jpeg(photo)
    write_sidecar(photo, ["dog", "cat"])
    assert values((tmp_path / "a.jpg.xmp").read_bytes(), TAGS) == ["Anna", "dog", "cat"]


def test_no_note_is_named_as_a_property_that_programs_read():
    merged = merge_tags(packet(dc_subject=["Wedding"]), ["dog"], "x")
    notes = {element.tag.split("}")[1] for element in etree.fromstring(merged).iter("{urn:fedmpt:xmp:1/}*")}
    assert notes
    assert not notes & {"subject", "TagsList", "hierarchicalSubject", "Keywords"}


def test_an_earlier_versions_notes_get_their_present_names():
    earlier = packet(
        dc_subject=["dog"], fedmpt_subject=["dog"], digiKam_TagsList=["dog"], fedmpt_TagsList=["dog"]
    )
    merged = merge_tags(earlier, ["cat"], "x")
    assert values(merged, SUBJECT) == values(merged, TAGS) == ["cat"]
    assert values(merged, "fedmpt:TagsList") == []


def test_what_is_no_photo_has_no_keywords(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    assert embedded_keywords(tmp_path / "a.jpg") == []
    assert embedded_keywords(tmp_path / "none.jpg") == []


def test_characters_that_xml_cannot_hold_do_not_come_into_the_sidecar(tmp_path):
    photo = jpeg(tmp_path / "a.jpg", segment=iptc(b"An\x00na", b"\x01"))
    assert write_sidecar(photo, ["dog"])
    assert values((tmp_path / "a.jpg.xmp").read_bytes(), SUBJECT) == ["Anna", "dog"]


@pytest.mark.parametrize("name", ["a.jpg.xmp", "a.jpg.XMP", "a.xmp", "a.XMP"])
@pytest.mark.parametrize("naming", ["photo.jpg.xmp", "photo.xmp"])
def test_the_sidecar_that_is_there_is_the_one_that_is_written(tmp_path, name, naming):
    photo = jpeg(tmp_path / "a.jpg")
    (tmp_path / name).write_bytes(packet(dc_subject=["Wedding"]))
    assert write_sidecar(photo, ["dog"], naming)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jpg", name}
    assert values((tmp_path / name).read_bytes(), SUBJECT) == ["Wedding", "dog"]


@pytest.mark.parametrize(("naming", "written"), [("photo.jpg.xmp", "a.jpg.xmp"), ("photo.xmp", "a.xmp")])
def test_of_two_sidecars_the_one_of_the_wanted_name_is_written_with_the_others_keywords(
    tmp_path, naming, written
):
    photo = jpeg(tmp_path / "a.jpg")
    (tmp_path / "a.jpg.xmp").write_bytes(packet(dc_subject=["Wedding"]))
    (tmp_path / "a.xmp").write_bytes(packet(dc_subject=["Anna"]))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert write_sidecar(photo, ["dog"], naming)
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {written}
    assert sorted(values((tmp_path / written).read_bytes(), TAGS)) == ["Anna", "Wedding", "dog"]


@pytest.mark.parametrize(
    "other", ["a.CR2", "a.Cr2", "a.nef", "a.mef", "a.png", "a.Png", "a.heic", "a.mov", "a"]
)
def test_a_sidecar_that_may_be_another_files_is_copied_from_not_written(tmp_path, other):
    photo = jpeg(tmp_path / "a.jpg")
    (tmp_path / other).write_bytes(b"another")
    (tmp_path / "a.xmp").write_bytes(packet(dc_subject=["Wedding"]))
    theirs = (tmp_path / "a.xmp").read_bytes()
    assert write_sidecar(photo, ["dog"])
    assert (tmp_path / "a.xmp").read_bytes() == theirs
    assert values((tmp_path / "a.jpg.xmp").read_bytes(), TAGS) == ["Wedding", "dog"]


@pytest.mark.parametrize(
    ("photo", "other"), [("s.tif.jpg", "s.tif"), ("a.CR2.jpg", "a.CR2"), ("photo.jpg", "photo")]
)
def test_a_photos_own_sidecar_is_not_taken_over_by_another(tmp_path, photo, other):
    jpeg(tmp_path / other)
    jpeg(tmp_path / photo)
    (tmp_path / f"{other}.xmp").write_bytes(packet(dc_subject=["Wedding"]))
    before = (tmp_path / f"{other}.xmp").read_bytes()
    assert write_sidecar(tmp_path / photo, ["dog"])
    assert (tmp_path / f"{other}.xmp").read_bytes() == before
    assert values((tmp_path / f"{photo}.xmp").read_bytes(), TAGS) == ["Wedding", "dog"]


@pytest.mark.parametrize("naming", ["photo.jpg.xmp", "photo.xmp"])
@pytest.mark.parametrize("name", ["photo", ".jpg", "a.b"])
def test_a_photo_of_an_odd_name_has_one_sidecar(tmp_path, name, naming):
    photo = jpeg(tmp_path / name)
    for labels in (["dog"], ["dog"], ["cat"]):
        write_sidecar(photo, labels, naming)
        (sidecar,) = (path for path in tmp_path.iterdir() if path != photo)
        assert values(sidecar.read_bytes(), TAGS) == labels


def test_labels_in_a_sidecar_that_is_no_longer_the_one_are_taken_out(tmp_path):
    photo = jpeg(tmp_path / "a.jpg")
    (tmp_path / "a.xmp").write_bytes(packet(dc_subject=["Wedding"]))
    write_sidecar(photo, ["dog"])
    (tmp_path / "a.jpg.xmp").write_bytes(packet(dc_subject=["Beach"]))  # another program's
    write_sidecar(photo, ["cat"])
    assert values((tmp_path / "a.jpg.xmp").read_bytes(), TAGS) == ["Beach", "Wedding", "cat"]
    assert values((tmp_path / "a.xmp").read_bytes(), SUBJECT) == ["Wedding"]
    assert values((tmp_path / "a.xmp").read_bytes(), TAGS) == []
    written = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert not write_sidecar(photo, ["cat"])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == written


@pytest.mark.parametrize("kind", ["folder", "loop"])
def test_a_second_sidecar_that_is_no_file_stops_that_photo(tmp_path, kind):
    photo = jpeg(tmp_path / "a.jpg")
    (tmp_path / "a.jpg.xmp").write_bytes(packet(dc_subject=["Beach"]))
    odd = tmp_path / "a.xmp"
    if kind == "folder":
        odd.mkdir()
    else:
        odd.symlink_to(odd)
    with pytest.raises(XmpError, match=r"a\.xmp: "):
        write_sidecar(photo, ["dog"])


def test_a_sidecar_that_cannot_be_read_stops_that_photo(tmp_path):
    """Its keywords would be hidden."""
    photo = jpeg(tmp_path / "a.jpg")
    jpeg(tmp_path / "a.png")
    (tmp_path / "a.xmp").write_text("not XML")
    with pytest.raises(XmpError, match=r"a\.xmp: not well-formed"):
        write_sidecar(photo, ["dog"])
    assert not (tmp_path / "a.jpg.xmp").exists()


def test_a_photo_without_labels_gets_no_sidecar_whatever_it_holds(tmp_path):
    photo = jpeg(tmp_path / "a.jpg", segment=iptc(b"Anna"))
    assert not write_sidecar(photo, [])
    assert list(tmp_path.iterdir()) == [photo]


def test_taking_back_the_only_tags_of_a_sidecar_empties_it(tmp_path):
    photo = jpeg(tmp_path / "a.jpg")
    assert write_sidecar(photo, ["dog"])
    assert write_sidecar(photo, [])
    assert (tmp_path / "a.jpg.xmp").read_bytes() == EMPTY


def test_the_path_says_which_sidecar_is_meant(tmp_path):
    photo = jpeg(tmp_path / "a.jpg")
    assert sidecar_path(photo) == tmp_path / "a.jpg.xmp"
    (tmp_path / "a.XMP").touch()
    assert sidecar_path(photo) == tmp_path / "a.XMP"
    assert sidecar_path(Path("none/b.jpg"), "photo.xmp") == Path("none/b.xmp")
