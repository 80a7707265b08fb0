"""Readers of labels.csv, COCO and VOC: what becomes present, absent, unknown; and what is refused."""

import contextlib
import json
import os
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt.edge_client import datasets
from fedmpt.edge_client.datasets import DatasetError, read_coco, read_folder, read_selection, read_voc
from fedmpt.edge_client.labels import LabelError, LabelRules

LABELS = ("cat", "dog", "potted plant")
RULES = LabelRules(LABELS)
PHOTOS = Path(os.environ.get("FEDMPT_PHOTOS", Path(__file__).parents[2] / ".." / "shared" / "photos"))
needs_photos = pytest.mark.skipif(
    not PHOTOS.is_dir(), reason=f"no photographs in {PHOTOS}; set FEDMPT_PHOTOS"
)


def labels_of(photos):
    return {photo.path.name: photo.labels.tolist() for photo in photos}


# --------------------------------------------------------------- labels.csv


def csv_folder(folder, text, encoding="utf-8"):
    (folder / "labels.csv").write_bytes(text.encode(encoding))
    return folder


def test_csv_names_present_and_unknown_labels_and_the_rest_is_absent(tmp_path):
    folder = csv_folder(
        tmp_path, "path,labels,unknown\na.jpg,cat; dog,\nsub/b.jpg,,potted plant\nc.jpg,cat,cat;dog\n"
    )
    photos = read_folder(folder, RULES)
    assert [photo.path for photo in photos] == [folder / "a.jpg", folder / "sub" / "b.jpg", folder / "c.jpg"]
    assert labels_of(photos) == {"a.jpg": [1, 1, 0], "b.jpg": [0, 0, -1], "c.jpg": [1, -1, 0]}


def test_csv_without_the_unknown_column(tmp_path):
    assert labels_of(read_folder(csv_folder(tmp_path, "path,labels\na.jpg,dog\n"), RULES)) == {
        "a.jpg": [0, 1, 0]
    }


def test_csv_as_windows_writes_it(tmp_path):
    folder = csv_folder(tmp_path, 'path,labels\r\n"sub\\a, b.jpg",cat\r\n\r\n', encoding="utf-8-sig")
    (photo,) = read_folder(folder, RULES)
    assert photo.path == folder / "sub" / "a, b.jpg"


def test_unknown_labels_are_absent_on_request(tmp_path):
    folder = csv_folder(tmp_path, "path,labels,unknown\na.jpg,cat,dog\n")
    rules = LabelRules(LABELS, unknown_as_negative=True)
    assert labels_of(read_folder(folder, rules)) == {"a.jpg": [1, 0, 0]}


def test_a_composed_name_finds_the_decomposed_file_of_macos(tmp_path):
    stored = unicodedata.normalize("NFD", "Häuser.jpg")
    (tmp_path / stored).touch()
    folder = csv_folder(tmp_path, "path,labels\nHäuser.jpg,cat\n")
    (photo,) = read_folder(folder, RULES)
    assert photo.path.name == stored


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 must be `path,labels`"),
        ("path;labels\na.jpg;cat\n", "line 1 must be `path,labels`"),
        ("path,labels\na.jpg\n", "line 2: expected 2 columns, got 1"),
        ("path,labels\na.jpg,cat\na.jpg,dog\n", "line 3: 'a.jpg' is listed twice"),
        ("path,labels\n../a.jpg,cat\n", "line 2: '../a.jpg' is no path inside the photos' folder"),
        ("path,labels\n/etc/passwd,cat\n", "no path inside"),
        ("path,labels\nC:\\a.jpg,cat\n", "no path inside"),
        ("path,labels\n ,cat\n", "no path inside"),
        ("path,labels\n.,cat\n", "line 2: '.' is no path inside"),
        ('path,labels\n"a.jpg,cat\n', "line 2: unexpected end"),
        ("path,labels\n" + "a" * 200_000 + ",cat\n", "field larger than field limit"),
        ("path,labels\n", "names no photo; write a line for each"),
    ],
)
def test_malformed_csv_is_refused_with_the_line(tmp_path, text, message):
    with pytest.raises(DatasetError) as caught:
        read_folder(csv_folder(tmp_path, text), RULES)
    assert message in str(caught.value)
    assert str(tmp_path / "labels.csv") in str(caught.value)


def test_csv_that_is_not_utf8_or_missing_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"no such file; write one .*--coco JSON, or a PASCAL VOC folder"):
        read_folder(tmp_path, RULES)
    with pytest.raises(DatasetError, match="save it as UTF-8"):
        read_folder(csv_folder(tmp_path, "path,labels\nä.jpg,cat\n", encoding="latin-1"), RULES)


def test_annotations_beyond_the_size_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MAXIMUM_TEXT_BYTES", 20)
    with pytest.raises(DatasetError, match="larger than 20 bytes"):
        read_folder(csv_folder(tmp_path, "path,labels\na.jpg,cat\n"), RULES)


# ------------------------------------------------------------- label names


def test_names_that_are_no_labels_are_listed_with_the_nearest(tmp_path):
    folder = csv_folder(tmp_path, "path,labels\na.jpg,pottedplant;Cat;zebra\n")
    with pytest.raises(LabelError) as caught:
        read_folder(folder, RULES)
    text = str(caught.value)
    assert "--map OLD=NEW or leave it out with --ignore-label NAME" in text
    assert "'pottedplant': nearest labels: potted plant" in text
    assert "'Cat': nearest labels: cat" in text
    assert "'zebra': no label is near" in text


def test_the_first_place_of_a_name_that_is_no_label_is_told(tmp_path):
    folder = csv_folder(tmp_path, "path,labels\na.jpg,cat\nb.jpg,zebra\nc.jpg,zebra\n")
    with pytest.raises(LabelError, match=r"'zebra': no label is near \(.*labels\.csv: line 3\)"):
        read_folder(folder, RULES)
    with pytest.raises(LabelError, match=r"'zebra': no label is near \(.*b\.xml\)"):
        read_voc(voc(tmp_path, a=[("cat", 0)], b=[("zebra", 0)]), RULES)
    with pytest.raises(LabelError, match=r"'zebra': no label is near \(.*instances\.json\)"):
        read_coco(
            coco(tmp_path, categories=[{"id": 17, "name": "cat"}, {"id": 18, "name": "zebra"}]),
            tmp_path,
            RULES,
        )


def test_names_are_mapped_or_ignored_on_purpose(tmp_path):
    folder = csv_folder(tmp_path, "path,labels\na.jpg,pottedplant;zebra;cat\n")
    rules = LabelRules(LABELS, mapping={"pottedplant": "potted plant"}, ignored=frozenset({"zebra"}))
    assert labels_of(read_folder(folder, rules)) == {"a.jpg": [1, 0, 1]}
    rules = LabelRules(LABELS, ignore_others=True)
    assert labels_of(read_folder(folder, rules)) == {"a.jpg": [1, 0, 0]}


def test_a_mapping_to_something_that_is_no_label_is_refused(tmp_path):
    folder = csv_folder(tmp_path, "path,labels\na.jpg,kitty\n")
    with pytest.raises(LabelError, match="--map kitty=cats: nearest labels: cat"):
        read_folder(folder, LabelRules(LABELS, mapping={"kitty": "cats"}))


# --------------------------------------------------------------------- COCO


def coco(tmp_path, **changes):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 1, "category_id": 18},
            {"image_id": 1, "category_id": 18, "iscrowd": 1},
            {"image_id": 2, "category_id": 17},
        ],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_coco_labels_without_a_category_are_unknown(tmp_path):
    photos = read_coco(coco(tmp_path), tmp_path / "images", RULES)
    assert photos[0].path == tmp_path / "images" / "a.jpg"
    assert labels_of(photos) == {"a.jpg": [0, 1, -1], "b.jpg": [1, 0, -1]}
    rules = LabelRules(LABELS, unknown_as_negative=True)
    assert labels_of(read_coco(coco(tmp_path), tmp_path, rules)) == {"a.jpg": [0, 1, 0], "b.jpg": [1, 0, 0]}


def test_coco_categories_count_even_where_no_photo_shows_them(tmp_path):
    path = coco(tmp_path, categories=[{"id": 17, "name": "cat"}, {"id": 18, "name": "giraffe"}])
    with pytest.raises(LabelError, match="'giraffe'"):
        read_coco(path, tmp_path, RULES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, "no 'images' of type list"),
        ({"images": [{"id": 1}]}, r"images\[0\]: no 'file_name' of type str"),
        ({"images": [{"id": True, "file_name": "a.jpg"}]}, r"images\[0\]: no 'id' of type int"),
        ({"images": [{"id": 1, "file_name": "../../secret.jpg"}]}, r"images\[0\]: .* is no path inside"),
        (
            {"annotations": [{"image_id": 9, "category_id": 17}]},
            r"annotations\[0\]: image 9 or category 17 is not",
        ),
        ({"categories": [{"id": 17, "name": None}]}, r"categories\[0\]: no 'name' of type str"),
        ({"images": [], "annotations": []}, "instances.json: names no photo"),
        (
            {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]},
            r"images\[1\]: id 1 means 'a.jpg' and 'b.jpg'; give each image an id of its own",
        ),
        (
            {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "./a.jpg"}]},
            r"images\[1\]: 'a.jpg' has the ids 1 and 2; keep one, for all its annotations",
        ),
        (
            {"categories": [{"id": 17, "name": "cat"}, {"id": 17, "name": "dog"}]},
            r"categories\[1\]: id 17 means 'cat' and 'dog'; give each category an id of its own",
        ),
    ],
)
def test_malformed_coco_is_refused_with_the_place(tmp_path, changes, message):
    with pytest.raises(DatasetError, match=message):
        read_coco(coco(tmp_path, **changes), tmp_path, RULES)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "\udcff"])
def test_coco_that_is_not_json_is_refused(tmp_path, text):
    path = tmp_path / "instances.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DatasetError, match=r"instances\.json"):
        read_coco(path, tmp_path, RULES)


# ---------------------------------------------------------------------- VOC


def voc(folder, **annotations):
    (folder / "Annotations").mkdir(exist_ok=True)
    for stem, objects in annotations.items():
        body = "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult></object>"
            for name, difficult in objects
        )
        text = f"<annotation><filename>{stem}.jpg</filename>{body}</annotation>"
        (folder / "Annotations" / f"{stem}.xml").write_text(text)
    return folder


def test_voc_difficult_objects_count_unless_asked_to_be_unknown(tmp_path):
    folder = voc(tmp_path, a=[("cat", 1), ("dog", 0)], b=[("cat", 1), ("cat", 0)], c=[])
    photos = read_voc(folder, RULES)
    assert photos[0].path == folder / "JPEGImages" / "a.jpg"
    assert labels_of(photos) == {"a.jpg": [1, 1, 0], "b.jpg": [1, 0, 0], "c.jpg": [0, 0, 0]}
    photos = read_voc(folder, RULES, difficult_unknown=True)
    assert labels_of(photos) == {"a.jpg": [-1, 1, 0], "b.jpg": [1, 0, 0], "c.jpg": [0, 0, 0]}


def test_voc_parts_of_a_person_are_not_objects_of_their_own(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text(
        "<annotation><object><name>cat</name><part><name>head</name></part></object></annotation>"
    )
    assert labels_of(read_voc(tmp_path, RULES)) == {"a.jpg": [1, 0, 0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not XML"),
        ("<annotation>", "not XML"),
        ("<annotation><object/></annotation>", "an object has no name"),
        ("<html></html>", "begins with <html>, not <annotation>; is this a VOC annotation?"),
        ("<annotation><filename>../../x.jpg</filename></annotation>", "no path inside"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>', "document type declaration"),
        ('<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]><a>&y;</a>', "document type declaration"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "not XML"),
    ],
)
def test_malformed_or_hostile_xml_is_refused(tmp_path, text, message):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(DatasetError, match=message) as caught:
        read_voc(tmp_path, RULES)
    assert "a.xml" in str(caught.value)


def test_deeply_nested_xml_does_no_harm(tmp_path):
    (tmp_path / "Annotations").mkdir()
    nested = "<a>" * 100_000 + "</a>" * 100_000
    (tmp_path / "Annotations" / "a.xml").write_text(f"<annotation>{nested}</annotation>")
    assert labels_of(read_voc(tmp_path, RULES)) == {"a.jpg": [0, 0, 0]}


def test_two_annotations_of_one_photo_are_refused(tmp_path):
    folder = voc(tmp_path, a=[("cat", 0)])
    (folder / "Annotations" / "b.xml").write_text("<annotation><filename>a.jpg</filename></annotation>")
    with pytest.raises(DatasetError, match=r"b\.xml: is of 'a\.jpg', as is .*a\.xml; keep one of them"):
        read_voc(folder, RULES)


def test_what_macos_leaves_beside_annotations_is_passed_over(tmp_path):
    folder = voc(tmp_path, a=[("cat", 0)])
    (folder / "Annotations" / "._a.xml").write_bytes(b"\0\5\x16\7")
    assert labels_of(read_voc(folder, RULES)) == {"a.jpg": [1, 0, 0]}


def test_a_folder_without_annotations_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"no Annotations/\*\.xml; give the folder that holds"):
        read_voc(tmp_path, RULES)


# ---------------------------------------------------------- hostile content


@given(st.one_of(st.text(max_size=200).map(str.encode), st.binary(max_size=200)), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_any_content_is_read_or_refused(content, offset):
    """Bytes in place of, or in the midst of, sound annotations raise nothing but the declared errors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        voc(folder, a=[("cat", 0)])
        sound = {
            "labels.csv": (b"path,labels,unknown\na.jpg,cat,dog\n", lambda: read_folder(folder, RULES)),
            "instances.json": (
                coco(folder).read_bytes(),
                lambda: read_coco(folder / "instances.json", folder, RULES),
            ),
            "Annotations/a.xml": (
                (folder / "Annotations" / "a.xml").read_bytes(),
                lambda: read_voc(folder, RULES),
            ),
            "split.txt": (b"a\n", lambda: read_selection(folder / "split.txt")),
        }
        for file, (whole, read) in sound.items():
            for data in (content, whole[:offset] + content + whole[offset:]):
                (folder / file).write_bytes(data)
                with contextlib.suppress(DatasetError, LabelError):
                    read()


# -------------------------------------------------------------------- splits


def test_a_split_selects_by_path_file_name_or_stem(tmp_path):
    folder = csv_folder(tmp_path, "path,labels\nx/a.jpg,cat\nx/b.jpg,cat\nx/c 1.jpg,cat\nd.jpg,cat\n")
    (tmp_path / "split.txt").write_text("x/a.jpg\nb.jpg\n\nc 1\n")
    photos = read_folder(folder, RULES, selection=read_selection(tmp_path / "split.txt"))
    assert sorted(labels_of(photos)) == ["a.jpg", "b.jpg", "c 1.jpg"]


def test_in_vocs_list_for_one_class_every_photo_counts(tmp_path):
    folder = voc(tmp_path, **{name: [("cat", 0)] for name in ("000024", "000026", "000030", "000032")})
    (tmp_path / "cat_train.txt").write_text("000024  1\n000026 -1\n000030  0\n")
    photos = read_voc(folder, RULES, selection=read_selection(tmp_path / "cat_train.txt"))
    assert sorted(labels_of(photos)) == ["000024.jpg", "000026.jpg", "000030.jpg"]


def test_a_split_of_other_photos_is_refused(tmp_path):
    folder = csv_folder(tmp_path, "path,labels\na.jpg,cat\n")
    with pytest.raises(DatasetError, match=r"names 1 photos that the annotations do not have .zebra"):
        read_folder(folder, RULES, selection={"a", "zebra"})


def test_an_empty_split_is_refused(tmp_path):
    (tmp_path / "split.txt").write_text("\n\n")
    with pytest.raises(DatasetError, match="names no photo"):
        read_selection(tmp_path / "split.txt")


# --------------------------------------------------------------- real photos


@needs_photos
def test_reads_real_voc():
    names = {name.strip() for xml in (PHOTOS / "voc" / "Annotations").glob("*.xml") for name in _names(xml)}
    rules = LabelRules(sorted(names))
    counts = {}
    for split in ("trainval", "test"):
        selection = read_selection(PHOTOS / "voc" / "ImageSets" / "Main" / f"{split}.txt")
        photos = read_voc(PHOTOS / "voc", rules, selection=selection)
        assert all(photo.path.is_file() and (photo.labels == 1).any() for photo in photos)
        counts[split] = len(photos)
    assert counts == {"trainval": 180, "test": 120}


def _names(xml):
    text = xml.read_text()
    return [part.split("</name>")[0] for part in text.split("<name>")[1:]]


@needs_photos
def test_reads_real_coco():
    (file,) = (PHOTOS / "coco" / "annotations").glob("*.json")
    labels = [category["name"] for category in json.loads(file.read_text())["categories"]]
    photos = read_coco(file, PHOTOS / "coco" / "images", LabelRules(labels))
    assert len(labels) == 80
    assert len(photos) == 94
    assert all(photo.path.is_file() for photo in photos)
    assert sum((photo.labels == 1).sum() for photo in photos) / len(photos) == pytest.approx(3.8, abs=0.1)
