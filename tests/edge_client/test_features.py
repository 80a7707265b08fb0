"""From photo file to cached feature, the edge computes what transformers' CLIP computes from the same file."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fedmpt.edge_client.cache import build_cache, open_cache
from fedmpt.edge_client.datasets import LabelledPhoto
from fedmpt.protocol.manifest import load_manifest

PHOTOS = Path(os.environ.get("FEDMPT_PHOTOS", Path(__file__).parents[2] / ".." / "shared" / "photos"))


def awkward_photos(folder):
    """One photo of each kind that real folders hold."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (9, 12, 3), np.uint8)
    image = Image.fromarray(small).resize((120, 90), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "plain.jpg")
    image.save(folder / "turned.jpg", exif=exif)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("L").save(folder / "grey.png")
    image.quantize(16).save(folder / "palette.png")
    image.resize((20, 200)).save(folder / "tall.webp")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(folder / "alpha.png")
    return sorted(path for path in folder.iterdir() if path.is_file())


def clip_features(folder, paths):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil.from_pretrained(
        folder, crop_size={"height": 48, "width": 48}
    )
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(ImageOps.exif_transpose(image))
    with torch.no_grad():
        vision = model.vision_model(**processor(images, return_tensors="pt"))
        features = model.visual_projection(vision.pooler_output)
    return torch.nn.functional.normalize(features, dim=-1).numpy()


def assert_same_features(paths, tiny_clip, tiny_bundle, out):
    photos = [LabelledPhoto(path, np.zeros(4, np.int8)) for path in paths]
    build_cache(photos, tiny_bundle, out)
    cache = open_cache(out, load_manifest(tiny_bundle))
    ours = cache.tokens[:, 0].astype(np.float32)
    cosines = (ours * clip_features(tiny_clip, paths)).sum(-1) / np.linalg.norm(ours, axis=-1)
    assert len(cosines) == len(paths)
    assert cosines.min() >= 0.999
    # The random model tells photos apart, so that the cosine is no formality.
    assert (ours @ ours.T).min() < 0.99


def test_awkward_photos_have_clips_own_features(tiny_clip, tiny_bundle, tmp_path):
    (tmp_path / "photos").mkdir()
    paths = awkward_photos(tmp_path / "photos")
    assert_same_features(paths, tiny_clip, tiny_bundle, tmp_path / "cache")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs in {PHOTOS}; set FEDMPT_PHOTOS")
def test_real_photographs_have_clips_own_features(tiny_clip, tiny_bundle, tmp_path):
    paths = sorted(PHOTOS.rglob("*.jpg"))[::4]
    assert_same_features(paths, tiny_clip, tiny_bundle, tmp_path / "cache")
