"""The micro-CLIP's training set on disk: drawn once, gone on with, and never mixed up with another."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fedmpt.simulation.micro_clip_data import SPARE_BYTES, SceneFolder, check_room
from fedmpt.simulation.scenes import SIZE, SceneError
from fedmpt.simulation.scenes_sets import pretrain_specification

COUNT = 12


@pytest.fixture
def folder(tmp_path):
    return SceneFolder(tmp_path / "scenes", pretrain_specification(), COUNT, 0)


def test_drawing_goes_on_where_it_was_interrupted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fedmpt.simulation.micro_clip_data.CHUNK", 5)

    def interrupt(done, total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.render(interrupt)
    begun = []
    resumed = folder.render(lambda done, total: begun.append(done))
    assert begun == [COUNT]
    whole = replace(folder, path=tmp_path / "whole").render()
    for name in ("pixels", "shown", "attributes", "background", "lighting", "style", "patch_labels"):
        assert np.array_equal(getattr(resumed, name), getattr(whole, name)), name


def test_a_finished_set_is_only_opened(folder):
    folder.render()
    folder.render(lambda done, total: pytest.fail("drew again"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"count": 6}, {"specification": pretrain_specification(1)}])
def test_another_set_in_the_folder_is_refused_and_stays(folder, change):
    folder.render()
    before = (folder.path / "pixels.npy").read_bytes()
    with pytest.raises(SceneError, match="scenes: holds other scenes; delete it or choose another folder"):
        replace(folder, **change).render()
    assert (folder.path / "pixels.npy").read_bytes() == before


def damage_by_removal(path):
    (path / "pixels.npy").unlink()


def damage_by_truncation(path):
    with (path / "pixels.npy").open("r+b") as file:
        file.truncate(1000)


def damage_by_another_shape(path):
    np.save(path / "pixels.npy", np.zeros((COUNT, 2, 2, 3), np.uint8))


def damage_the_note(path):
    (path / "done.json").write_text("[")


@pytest.mark.parametrize(
    "damage", [damage_by_removal, damage_by_truncation, damage_by_another_shape, damage_the_note]
)
def test_a_damaged_set_is_refused(folder, damage):
    folder.render()
    damage(folder.path)
    with pytest.raises(SceneError, match=r"its scenes are damaged .*; delete the folder"):
        check_room(folder.path, [folder])


def test_a_set_misses_the_bytes_of_the_pictures_not_yet_drawn(folder):
    whole = folder.missing_bytes()
    assert whole > COUNT * SIZE * SIZE * 3
    folder.render()
    assert folder.missing_bytes() == 0
    assert whole <= sum(path.stat().st_size for path in folder.path.glob("*.npy"))
    note = json.loads((folder.path / "done.json").read_text())
    (folder.path / "done.json").write_text(json.dumps({**note, "done": COUNT // 2}))
    assert folder.missing_bytes() == whole // 2


def test_too_full_a_disk_is_refused_before_anything_is_drawn(folder, tmp_path, monkeypatch):
    needed = 2 * folder.missing_bytes() + SPARE_BYTES
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    check_room(tmp_path, [folder, folder])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(
        SceneError, match=r"the scenes need 0\.3 GB more and 0\.3 GB are free; free some space"
    ):
        check_room(tmp_path, [folder, folder])
    assert not folder.path.exists()


def test_a_drawn_set_needs_no_room(folder, tmp_path, monkeypatch):
    folder.render()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    check_room(tmp_path, [folder])
