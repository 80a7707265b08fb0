"""What a client finds again after a restart."""

import dataclasses

import numpy as np
import pytest

from fedmpt.edge_client.site_state import SiteStateError, Work, open_site_state
from fedmpt.edge_client.trainer import Checkpoint

WORK = Work("birds", "site-a", 3, "train", "ab" * 32, "cd" * 32)
CHECKPOINT = Checkpoint(
    2,
    {"context": np.arange(6, dtype=np.float32).reshape(2, 3), "scale": np.asarray(0.1, np.float32)},
    {"context": np.ones((2, 3), np.float32), "scale": np.asarray(-3.0, np.float32)},
    0.1 + 0.2,
)


def _names(folder):
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    with open_site_state(tmp_path) as site:
        site.save_checkpoint(WORK, CHECKPOINT)
    with open_site_state(tmp_path) as site:
        loaded = site.load_checkpoint(WORK)
    assert (loaded.epochs, loaded.loss) == (2, 0.1 + 0.2)
    for ours, theirs in ((loaded.state, CHECKPOINT.state), (loaded.memory, CHECKPOINT.memory)):
        assert {name: (v.shape, v.tobytes()) for name, v in ours.items()} == {
            name: (v.shape, v.tobytes()) for name, v in theirs.items()
        }


@pytest.mark.parametrize(
    "change", [{"round": 4}, {"base": "00" * 32}, {"setup": "00" * 32}, {"client": "b"}, {"federation": "x"}]
)
def test_other_work_finds_nothing(tmp_path, change):
    other = dataclasses.replace(WORK, **change)
    with open_site_state(tmp_path) as site:
        site.save_checkpoint(WORK, CHECKPOINT)
        site.save_update(WORK, b"payload")
        assert site.load_checkpoint(other) is None
        assert site.load_update(other) is None
        assert site.load_update(WORK) == b"payload"


def test_only_the_latest_work_is_kept(tmp_path):
    later = dataclasses.replace(WORK, round=4)
    with open_site_state(tmp_path) as site:
        site.save_checkpoint(WORK, CHECKPOINT)
        site.save_checkpoint(later, CHECKPOINT)
        assert _names(tmp_path) == ["checkpoint", "lock"]
        site.save_update(WORK, b"old")
        site.save_update(later, b"new")
        assert _names(tmp_path) == ["lock", "update"]
        assert site.load_update(later) == b"new"
        site.discard_update(later)
        assert _names(tmp_path) == ["lock"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: b"", lambda data: data[:-1] + b"\x7f"]
)
def test_a_damaged_checkpoint_counts_as_none(tmp_path, damage):
    with open_site_state(tmp_path) as site:
        site.save_checkpoint(WORK, CHECKPOINT)
        path = next(tmp_path.glob("checkpoint-*"))
        path.write_bytes(damage(path.read_bytes()))
        assert site.load_checkpoint(WORK) is None


def test_two_clients_cannot_share_a_folder(tmp_path):
    with (
        open_site_state(tmp_path),
        pytest.raises(SiteStateError, match="own --state-dir"),
        open_site_state(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(SiteStateError, match="cannot be used as state folder"),
        open_site_state(tmp_path / "file" / "folder"),
    ):
        pass
