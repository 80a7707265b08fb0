"""The benchmarks' own layouts are read into labels, training photos and test photos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmpt.simulation.photo_sets import VOC_NAMES, PhotoSetError, read_photo_set

PHOTOS = Path(__file__).parents[2].parent / "shared" / "photos"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no real photographs at {PHOTOS}")


def nus_wide(root: Path) -> Path:
    """Two concepts; three training photos of which one shows nothing; one test photo."""
    files = {
        "ConceptsList/Concepts81.txt": "animal\nsky\n",
        "ImageList/TrainImagelist.txt": "actor\\0001_1.jpg\nactor\\0002_2.jpg\nbeach\\0003_3.jpg\n",
        "ImageList/TestImagelist.txt": "beach\\0004_4.jpg\n",
        "Groundtruth/TrainTestLabels/Labels_animal_Train.txt": "1\n0\n0\n",
        "Groundtruth/TrainTestLabels/Labels_sky_Train.txt": "1\n0\n1\n",
        "Groundtruth/TrainTestLabels/Labels_animal_Test.txt": "1\n",
        "Groundtruth/TrainTestLabels/Labels_sky_Test.txt": "0\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_nus_wide_is_read_from_its_text_lists_without_photos_that_show_no_concept(tmp_path: Path) -> None:
    found = read_photo_set("nus-wide", nus_wide(tmp_path))
    assert found.labels == ("animal", "sky")
    assert [
        (photo.path.relative_to(tmp_path).as_posix(), photo.labels.tolist()) for photo in found.train
    ] == [
        ("Flickr/actor/0001_1.jpg", [1, 1]),
        ("Flickr/beach/0003_3.jpg", [0, 1]),
    ]
    assert [photo.labels.tolist() for photo in found.test] == [[1, 0]]


def test_a_label_file_that_does_not_fit_its_image_list_is_refused(tmp_path: Path) -> None:
    path = nus_wide(tmp_path) / "Groundtruth/TrainTestLabels/Labels_sky_Train.txt"
    path.write_text("1\n0\n")
    with pytest.raises(PhotoSetError, match=r"Labels_sky_Train.txt: expected 3 lines of 0 or 1"):
        read_photo_set("nus-wide", tmp_path)


def test_an_image_list_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    (nus_wide(tmp_path) / "ImageList/TestImagelist.txt").write_text("..\\..\\secret.jpg\n")
    with pytest.raises(PhotoSetError, match="leaves the photo set's folder"):
        read_photo_set("nus-wide", tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("imagenet", ".", "photo set 'imagenet' is unknown; known: voc, coco, nus-wide"),
        ("voc", "nowhere", "no such folder; set `root` to where voc is unpacked"),
        ("coco", ".", "instances_train2014.json: cannot be read"),
        ("nus-wide", ".", "Concepts81.txt: cannot be read"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, name: str, folder: str, message: str) -> None:
    with pytest.raises(PhotoSetError, match=message):
        read_photo_set(name, tmp_path / folder)


@needs_photos
def test_voc_2007_is_split_into_trainval_and_test() -> None:
    found = read_photo_set("voc", PHOTOS / "voc")
    assert found.labels == tuple(VOC_NAMES.values())
    assert (len(found.train), len(found.test)) == (180, 120)
    assert not {photo.path for photo in found.train} & {photo.path for photo in found.test}
    assert all(photo.path.is_file() and 1 in photo.labels for photo in [*found.train, *found.test])


@needs_photos
def test_coco_2014_has_80_labels_and_a_folder_for_each_split(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    content = json.loads((PHOTOS / "coco/annotations/instances.json").read_bytes())
    for split, images in (("train2014", content["images"][:60]), ("val2014", content["images"][60:])):
        kept = {image["id"] for image in images}
        annotations = [item for item in content["annotations"] if item["image_id"] in kept]
        part = {**content, "images": images, "annotations": annotations}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(part))
        (tmp_path / split).symlink_to(PHOTOS / "coco/images")
    found = read_photo_set("coco", tmp_path)
    assert len(found.labels) == 80
    assert (len(found.train), len(found.test)) == (60, len(content["images"]) - 60)
    assert all(photo.path.is_file() for photo in [*found.train, *found.test])
