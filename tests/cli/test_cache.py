"""``fedmpt cache`` from labelled photos to a cache that opens, with what went wrong listed at the end."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from fedmpt.cli import main
from fedmpt.edge_client.cache import open_cache
from fedmpt.protocol.manifest import load_manifest


@pytest.fixture
def photos(tmp_path):
    """Three photos with labels.csv; the bundle's labels are cat, dog, traffic light, potted plant."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b", "c"):
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "labels.csv").write_text(
        "path,labels,unknown\na.png,cat,\nb.png,cat;traffic light,dog\nc.png,,\n"
    )
    return folder


def fedmpt_cache(photos, bundle, out, *options):
    return main(
        ["cache", str(photos), "--bundle", str(bundle), "--out", str(out), "--threads", "1", *options]
    )


def test_encodes_a_labelled_folder(tiny_bundle, photos, tmp_path, capsys):
    assert fedmpt_cache(photos, tiny_bundle, tmp_path / "cache") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'cache'}: 3 photos (3 encoded, 0 dropped, 0 copies of others)\n"
    assert "image_encoder.onnx runs on CPU (1 threads)" in captured.err
    assert "labels that no photo shows: dog, potted plant" in captured.err
    cache = open_cache(tmp_path / "cache", load_manifest(tiny_bundle))
    assert cache.labels.tolist() == [[1, 0, 0, 0], [1, -1, 1, 0], [0, 0, 0, 0]]
    norms = np.linalg.norm(cache.tokens.astype(np.float32), axis=-1)
    np.testing.assert_allclose(norms, 1, atol=2e-3)


def test_lists_bad_photos_at_the_end_and_fails_only_if_strict(tiny_bundle, photos, tmp_path, capsys):
    (photos / "b.png").write_bytes(b"")
    assert fedmpt_cache(photos, tiny_bundle, tmp_path / "cache") == 0
    assert capsys.readouterr().err.endswith(
        f"1 photos could not be read:\n  {photos / 'b.png'}: empty file\n"
    )
    assert fedmpt_cache(photos, tiny_bundle, tmp_path / "cache", "--strict") == 1


def test_fails_if_no_photo_can_be_read(tiny_bundle, photos, tmp_path, capsys):
    for name in ("a", "b", "c"):
        (photos / f"{name}.png").unlink()
    assert fedmpt_cache(photos, tiny_bundle, tmp_path / "cache") == 1
    assert "none of 3 photos could be read" in capsys.readouterr().err


def test_a_folder_without_labels_is_told_apart_from_none(tiny_bundle, tmp_path, capsys):
    assert fedmpt_cache(tmp_path / "none", tiny_bundle, tmp_path / "cache") == 1
    assert f"{tmp_path / 'none'}: no such folder" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert fedmpt_cache(tmp_path / "none", tiny_bundle, tmp_path / "cache") == 1
    assert "holds neither labels.csv nor Annotations" in capsys.readouterr().err


def test_reports_as_json(tiny_bundle, photos, tmp_path, capsys):
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes())
    (photos / "c.png").write_bytes(b"no image")
    assert fedmpt_cache(photos, tiny_bundle, tmp_path / "cache", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["photos"], report["encoded"]) == (1, 1)
    assert report["duplicates"] == [str(photos / "b.png")]
    assert report["failed"][0]["path"] == str(photos / "c.png")
    assert "not an image" in report["failed"][0]["reason"]


def test_reports_names_that_are_no_unicode_as_escapes(tiny_bundle, photos, tmp_path, capsys):
    renamed = photos.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    out = tmp_path / os.fsdecode(b"cache\xe9")
    (renamed / "c.png").write_bytes(b"no image")
    assert fedmpt_cache(renamed, tiny_bundle, out, "--json") == 0
    report = json.loads(capsys.readouterr().out.encode())
    assert (report["cache"], report["failed"][0]["path"]) == (str(out), str(renamed / "c.png"))
    assert fedmpt_cache(renamed, tiny_bundle, out) == 0
    assert "cache\\udce9: 2 photos" in capsys.readouterr().out


def test_copies_with_contradicting_labels_are_listed(tiny_bundle, photos, tmp_path, capsys):
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes())
    assert fedmpt_cache(photos, tiny_bundle, tmp_path / "cache") == 0
    assert (
        f"those are unknown until the files agree:\n  {photos / 'a.png'} and {photos / 'b.png'}"
        in capsys.readouterr().err
    )


def test_unknown_names_are_refused_until_mapped_or_ignored(tiny_bundle, photos, tmp_path, capsys):
    (photos / "labels.csv").write_text("path,labels\na.png,pottedplant\nb.png,zebra\n")
    assert fedmpt_cache(photos, tiny_bundle, tmp_path / "cache") == 1
    assert "'pottedplant': nearest labels: potted plant" in capsys.readouterr().err
    options = ("--map", "pottedplant=potted plant", "--ignore-label", "zebra")
    assert fedmpt_cache(photos, tiny_bundle, tmp_path / "cache", *options) == 0
    cache = open_cache(tmp_path / "cache", load_manifest(tiny_bundle))
    assert cache.labels.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]


def test_unknown_as_negative(tiny_bundle, photos, tmp_path):
    assert fedmpt_cache(photos, tiny_bundle, tmp_path / "cache", "--unknown-as-negative") == 0
    assert (open_cache(tmp_path / "cache", load_manifest(tiny_bundle)).labels >= 0).all()


def test_reads_coco_with_a_split(tiny_bundle, photos, tmp_path):
    (tmp_path / "instances.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate("abc")],
                "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "zebra"}],
                "annotations": [{"image_id": 0, "category_id": 1}, {"image_id": 1, "category_id": 2}],
            }
        )
    )
    (tmp_path / "split.txt").write_text("a\nb.png\n")
    options = ("--coco", str(tmp_path / "instances.json"), "--split", str(tmp_path / "split.txt"))
    assert fedmpt_cache(photos, tiny_bundle, tmp_path / "cache", *options, "--ignore-other-labels") == 0
    cache = open_cache(tmp_path / "cache", load_manifest(tiny_bundle))
    assert cache.labels.tolist() == [[-1, 1, -1, -1], [-1, 0, -1, -1]]


def test_reads_voc_with_a_split_by_name(tiny_bundle, photos, tmp_path):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (photos / folder).mkdir(parents=True)
    for name in ("a", "b"):
        (photos / f"{name}.png").rename(photos / "JPEGImages" / f"{name}.png")
        (photos / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.png</filename>"
            "<object><name>cat</name><difficult>1</difficult></object></annotation>"
        )
    (photos / "ImageSets" / "Main" / "train.txt").write_text("b\n")
    assert (
        fedmpt_cache(photos, tiny_bundle, tmp_path / "cache", "--split", "train", "--difficult-unknown") == 0
    )
    cache = open_cache(tmp_path / "cache", load_manifest(tiny_bundle))
    assert cache.paths == (str(photos / "JPEGImages" / "b.png"),)
    assert cache.labels.tolist() == [[-1, 0, 0, 0]]


def test_a_device_that_is_not_there_is_an_error(tiny_bundle, photos, tmp_path, capsys):
    import onnxruntime

    if "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has TensorRT")
    assert fedmpt_cache(photos, tiny_bundle, tmp_path / "cache", "--device", "tensorrt") == 1
    assert "--device tensorrt: this ONNX Runtime" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--map", "cat"), ("--threads", "0"), ("--batch-size", "0")])
def test_wrong_usage_exits_with_2(tiny_bundle, photos, tmp_path, options):
    with pytest.raises(SystemExit) as caught:
        fedmpt_cache(photos, tiny_bundle, tmp_path / "cache", *options)
    assert caught.value.code == 2
