"""Heat maps are drawn where the heat is and leave the rest of the photo alone."""

from __future__ import annotations

import numpy as np
import pytest

from fedmpt.edge_client.heatmaps import layer, overlay

GREY = np.full((64, 64, 3), 128, np.uint8)


def hot_corner() -> np.ndarray:
    heat = np.zeros((4, 4), np.float32)
    heat[0, 3] = 1
    return heat


def test_the_hot_patch_is_coloured_and_cold_ones_are_not() -> None:
    picture = np.asarray(overlay(GREY, hot_corner()))
    assert picture.shape == (64, 64, 3)
    red, _, blue = picture[4, 60].astype(int)
    assert red > 200 > blue + 30
    np.testing.assert_array_equal(picture[40:, :24], GREY[40:, :24])


def test_only_proportions_matter() -> None:
    assert layer(hot_corner(), 32).tobytes() == layer(7 * hot_corner(), 32).tobytes()


def test_an_even_map_shows_nothing() -> None:
    assert np.asarray(layer(np.full((4, 4), 1 / 16), 32))[..., 3].max() == 0


def test_a_nearly_even_map_stays_faint() -> None:
    nearly = np.full((4, 4), 1.0)
    nearly[0, 3] = 1.01
    assert np.asarray(layer(nearly, 32))[..., 3].max() < np.asarray(layer(hot_corner(), 32))[..., 3].max() / 3


@pytest.mark.parametrize("heat", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.full((1, 1), 2.0)])
def test_degenerate_maps_leave_the_photo_as_it_is(heat: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(overlay(GREY, heat)), GREY)


def test_grids_need_not_be_square() -> None:
    assert layer(np.arange(6.0).reshape(2, 3), 30).size == (30, 30)
