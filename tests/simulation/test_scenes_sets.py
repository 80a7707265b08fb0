"""The standard sets: different strong pairs at every client, independent labels in the tests, photo folders."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fedmpt.edge_client.datasets import read_folder
from fedmpt.edge_client.labels import LabelRules
from fedmpt.simulation.scenes import SceneError, SceneSpecification, draw_scenes
from fedmpt.simulation.scenes_render import BACKGROUNDS, LIGHTINGS
from fedmpt.simulation.scenes_sets import (
    FEDERATION_LABELS,
    federation_plan,
    federation_set,
    pretrain_specification,
    write_photo_folder,
)


def presence(truth, source, target):
    """How often the target is shown with the source, and without it."""
    i, j = FEDERATION_LABELS.index(source), FEDERATION_LABELS.index(target)
    with_source = truth[:, i] == 1
    return truth[with_source, j].mean(), truth[~with_source, j].mean()


def small(specification):
    return replace(specification, size=32)


def test_pretraining_shows_all_labels_independently():
    truth = draw_scenes(small(pretrain_specification()), 600, 0).truth
    assert truth.mean(0).min() > 0.02
    assert np.abs(np.corrcoef(truth.T) - np.eye(truth.shape[1])).mean() < 0.06


def test_every_client_shows_its_own_pairs_and_no_pair_twice():
    plan = federation_plan(3, clients=4, strength=0.9)
    assert len({pair for pairs in plan.pairs.values() for pair in pairs}) == 20
    for name, specification in plan.clients.items():
        truth = draw_scenes(small(specification), 400, 0).truth
        for source, target in plan.pairs[name]:
            together, apart = presence(truth, source, target)
            assert together == pytest.approx(0.9, abs=0.12), (name, source, target)
            assert apart == pytest.approx(0.12, abs=0.08), (name, source, target)


def test_the_sources_go_with_conditions_the_first_of_each_kind_the_strongest():
    names = {"background": list(BACKGROUNDS), "lighting": list(LIGHTINGS)}
    expected = (0.91, 0.75, 0.62, 0.92, 0.75)  # three backgrounds, two lightings
    shares = []
    for number, specification in enumerate(federation_plan(3).clients.values()):
        scenes = draw_scenes(small(specification), 500, number)
        factors = [link.factor for link in specification.condition_links]
        assert factors == ["background"] * 3 + ["lighting"] * 2
        for link in specification.condition_links:
            found = getattr(scenes, link.factor) == names[link.factor].index(link.value)
            shown = scenes.truth[:, FEDERATION_LABELS.index(link.label)] == 1
            shares.append((found[shown].mean(), found[~shown].mean()))
    present, absent = np.reshape(shares, (4, 5, 2)).transpose(2, 0, 1)
    assert present.mean(0) == pytest.approx(expected, abs=0.07)
    assert (present - absent).min() > 0.3


def test_up_to_four_clients_have_a_style_of_their_own_and_more_share_them():
    styles = [specification.styles for specification in federation_plan(3, clients=6).clients.values()]
    assert len(set(styles[:4])) == 4
    assert styles[4:] == styles[:2]


def test_without_strength_nothing_is_planted():
    plan = federation_plan(3, strength=0.0)
    assert all(not s.links and not s.condition_links for s in plan.clients.values())
    assert plan.pairs == federation_plan(3, strength=0.9).pairs  # the same pairs are watched


def test_the_decorrelated_set_holds_no_pair_and_the_correlated_set_all():
    drawn = federation_set(1, photos=4, correlated=400, decorrelated=400, validation=4)
    gaps = {"correlated": [], "decorrelated": []}
    for pairs in drawn.plan.pairs.values():
        for source, target in pairs:
            for name, found in gaps.items():
                together, apart = presence(getattr(drawn, name).truth, source, target)
                found.append(together - apart)
    assert np.mean(gaps["decorrelated"]) == pytest.approx(0, abs=0.04)
    assert np.mean(gaps["correlated"]) > 0.15  # each pair holds at one client in four


def test_sets_of_one_federation_share_no_picture():
    drawn = federation_set(1, photos=10, correlated=12, decorrelated=10, validation=10)
    sets = [*drawn.clients.values(), drawn.correlated, drawn.decorrelated, drawn.validation]
    assert {len(part) for part in sets} == {10, 12}
    pictures = [picture.tobytes() for part in sets for picture in part.pixels]
    assert len(set(pictures)) == len(pictures)


def test_the_correlated_sets_objects_point_to_their_own_pictures():
    drawn = federation_set(1, photos=2, correlated=40, decorrelated=2, validation=2).correlated
    shown = np.zeros_like(drawn.truth)
    rows = drawn.objects[drawn.objects["label"] >= 0]
    shown[rows["scene"], rows["label"]] = 1
    assert np.array_equal(shown, drawn.truth)


def test_more_clients_than_pairs_are_refused():
    with pytest.raises(SceneError, match="ask for fewer clients"):
        federation_plan(0, clients=200)


def test_a_photo_folder_is_read_back_with_the_same_labels(tmp_path):
    labels = ("cat", "dining table", "dog")
    scenes = draw_scenes(SceneSpecification(labels, (0.5, 0.5, 0.5), unknown=0.2), 20, 0)
    write_photo_folder(scenes, tmp_path)
    with (tmp_path / "labels.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["path", "labels", "unknown"]
    photos = read_folder(tmp_path, LabelRules(labels))
    assert np.array_equal(np.stack([photo.labels for photo in photos]), scenes.labels)
    decoded = np.asarray(Image.open(photos[3].path), int)
    assert np.abs(decoded - scenes.pixels[3]).mean() < 8
