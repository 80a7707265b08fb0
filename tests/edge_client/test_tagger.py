"""One call from a photo to its labels."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from fedmpt.edge_client import tagger as tagger_module
from fedmpt.edge_client.images import PhotoError
from fedmpt.edge_client.tagger import Tagger
from fedmpt.protocol.tagger_info import METADATA_KEY, TaggerError, info_from_json, info_to_json


@pytest.fixture(scope="module")
def tagger(colour_tagger: Path) -> Tagger:
    return Tagger.load(colour_tagger, "cpu", threads=1)


def colour(red: int, green: int, blue: int) -> Image.Image:
    return Image.new("RGB", (50, 40), (red, green, blue))


def test_documented_examples_hold(
    colour_tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tagger.onnx").write_bytes(colour_tagger.read_bytes())
    colour(204, 51, 102).save(tmp_path / "sunset.png")
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(tagger_module, optionflags=doctest.ELLIPSIS)
    assert result.attempted >= 9
    assert result.failed == 0


@pytest.mark.parametrize("size", [(150, 101), (57, 203)])
def test_the_documented_use_without_this_projects_code_gives_the_same_probabilities(
    colour_tagger: Path,
    tagger: Tagger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tagger.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "tagger.onnx").write_bytes(colour_tagger.read_bytes())
    texture = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    texture[..., 0] //= 3  # below its threshold
    Image.fromarray(texture).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program, names)
    expected = tagger.predict(tagger.prepare("photo.jpg")[None]).probabilities
    assert names["probabilities"].tolist() == expected.tolist()
    found = [label for label, _ in tagger.tag("photo.jpg")]
    assert sorted(names["tags"]) == sorted(found) != sorted(tagger.info.labels)


def test_labels_reach_their_own_thresholds(tagger: Tagger) -> None:
    assert tagger.tag(colour(127, 127, 64)) == [("blue", pytest.approx(64 / 255))]
    assert tagger.tag(colour(128, 0, 63)) == [("red", pytest.approx(128 / 255))]


def test_most_probable_first_and_at_most_top(tagger: Tagger) -> None:
    labels = [label for label, _ in tagger.tag(colour(150, 200, 255))]
    assert labels == ["blue", "green", "red"]
    assert [label for label, _ in tagger.tag(colour(150, 200, 255), top=2)] == ["blue", "green"]


def test_one_threshold_can_replace_all(tagger: Tagger) -> None:
    assert [label for label, _ in tagger.tag(colour(128, 0, 64), min_probability=0.5)] == ["red"]
    assert len(tagger.tag(colour(0, 0, 0), min_probability=0.0)) == 3


def test_file_image_and_array_give_the_same(tagger: Tagger, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), np.uint8))
    image.save(tmp_path / "photo.png")
    expected = tagger.tag(image, min_probability=0.0)
    assert tagger.tag(tmp_path / "photo.png", min_probability=0.0) == expected
    assert tagger.tag(str(tmp_path / "photo.png"), min_probability=0.0) == expected
    assert tagger.tag(np.asarray(image), min_probability=0.0) == expected


def test_an_image_is_turned_upright_like_its_file(tagger: Tagger, tmp_path: Path) -> None:
    # The upper half is red; displayed turned by 90° clockwise, it is the right half.
    array = np.zeros((32, 32, 3), np.uint8)
    array[:16, :, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise to display
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        pixels = tagger.prepare(image)
    np.testing.assert_array_equal(pixels, tagger.prepare(tmp_path / "turned.png"))
    assert pixels[0, 0, 0] == 0
    assert pixels[0, 31, 0] == 255


def test_a_bad_photo_is_named(tagger: Tagger, tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="no such file"):
        tagger.tag(tmp_path / "absent.jpg")


@pytest.mark.parametrize(
    "pixels", [np.zeros((9, 9), np.float32), np.zeros((9, 9, 3)), np.zeros((0, 0, 3), np.uint8)]
)
def test_an_image_or_array_that_cannot_be_used_is_a_photo_error(tagger: Tagger, pixels: np.ndarray) -> None:
    with pytest.raises(PhotoError, match="the image: damaged or unsupported"):
        tagger.tag(pixels)
    if pixels.dtype == np.float32:
        with pytest.raises(PhotoError, match="32-bit pixels"):
            tagger.tag(Image.fromarray(pixels))


def test_a_missing_tagger_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaggerError, match=r"absent\.onnx: not found; make it with `fedmpt export`"):
        Tagger.load(tmp_path / "absent.onnx")


def _with_metadata(source: Path, target: Path, text: str) -> Path:
    model = onnx.load(source)
    onnx.helper.set_model_props(model, {METADATA_KEY: text})
    onnx.save(model, target)
    return target


def test_any_other_onnx_file_is_refused(colour_tagger: Path, tmp_path: Path) -> None:
    path = _with_metadata(colour_tagger, tmp_path / "other.onnx", "{}")
    with pytest.raises(TaggerError, match="describes no tagger"):
        Tagger.load(path, "cpu")


def test_a_tagger_of_another_version_is_refused(colour_tagger: Path, tmp_path: Path) -> None:
    text = onnx.load(colour_tagger).metadata_props[0].value.replace('"version":1', '"version":2')
    with pytest.raises(TaggerError, match="version 2, but this program reads 1"):
        Tagger.load(_with_metadata(colour_tagger, tmp_path / "newer.onnx", text), "cpu")


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ('"image_size":32', '"image_size":64', "does not fit its description"),
        ('"labels":["red",', '"labels":[', "2 labels but 3 thresholds"),
        ('"image_size":32', '"image_size":0', "out of range"),
        ('"image_size":32', '"image_size":"32"', "image_size: expected int"),
        ('"grid":[4,4]', '"grid":[4]', "grid: expected 2 items"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    colour_tagger: Path, tmp_path: Path, before: str, after: str, complaint: str
) -> None:
    text = onnx.load(colour_tagger).metadata_props[0].value
    assert before in text
    path = _with_metadata(colour_tagger, tmp_path / "odd.onnx", text.replace(before, after))
    with pytest.raises(TaggerError, match=complaint):
        Tagger.load(path, "cpu")


def test_the_description_survives_its_text(tagger: Tagger) -> None:
    assert info_from_json(info_to_json(tagger.info), "here") == tagger.info


def test_tagging_needs_neither_torch_nor_onnx(colour_tagger: Path, tmp_path: Path) -> None:
    program = (
        "import sys, numpy; from fedmpt.edge_client.tagger import Tagger; from fedmpt.edge_client import tagging, xmp;"
        f"Tagger.load({str(colour_tagger)!r}, 'cpu', 1).tag(numpy.zeros((9, 9, 3), numpy.uint8));"
        "print(*{'torch', 'transformers', 'onnx'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.strip() == ""
