"""The demo's photos: shipped whole, small, and what the generator draws."""

import json

import numpy as np
import PIL
import pytest

from fedmpt.protocol.files import sha256_file
from fedmpt.simulation.scenes import SceneError
from fedmpt.simulation.scenes_pack import DEMO_PHOTOS, PACK, demo_set, folders, pixel_digest, unpack_demo

SHIPPED = json.loads(PACK.with_suffix(".json").read_text("utf-8"))


def test_the_shipped_pack_is_whole_and_within_its_limit():
    assert sha256_file(PACK) == SHIPPED["sha256"]
    assert PACK.stat().st_size <= 12_000_000


def test_the_pack_holds_a_photo_folder_for_every_set(tmp_path):
    unpack_demo(tmp_path)
    sizes = {"clients/client-1": DEMO_PHOTOS, "validation": 200, "test-decorrelated": 400}
    for folder, count in sizes.items():
        table = (tmp_path / folder / "labels.csv").read_text("utf-8").splitlines()
        assert len(table) == 1 + count
        assert len(list((tmp_path / folder).glob("*.jpg"))) == count
    assert len(json.loads((tmp_path / "pairs.json").read_text("utf-8"))) == 4
    assert len((tmp_path / "labels.txt").read_text("utf-8").splitlines()) == 20


def test_a_damaged_pack_is_refused(tmp_path):
    broken = tmp_path / PACK.name
    broken.write_bytes(PACK.read_bytes()[:-100])
    broken.with_suffix(".json").write_text(json.dumps(SHIPPED))
    with pytest.raises(SceneError, match=r"damaged .* reinstall the package"):
        unpack_demo(tmp_path / "out", broken)


def test_a_rebuild_draws_the_shipped_pixels():
    drew = f"numpy {SHIPPED['numpy']} and pillow {SHIPPED['pillow']}"
    here = f"numpy {np.__version__} and pillow {PIL.__version__}"
    if drew != here:
        pytest.skip(
            f"the shipped pixels were drawn by {drew}, here are {here}: other versions may draw a seed or round a "
            "pixel otherwise, so a rebuild need not match; the shipped files' own digests are checked all the same"
        )
    federation = demo_set()
    assert pixel_digest(federation) == SHIPPED["pixels_sha256"]
    assert sum(len(scenes) for _, scenes in folders(federation)) == 4 * DEMO_PHOTOS + 200 + 300 + 400
