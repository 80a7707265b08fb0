"""Scenes: every control of the specification shows in the pictures' factors, and factors are true of the pixels."""

from dataclasses import replace

import numpy as np
import pytest

from fedmpt.simulation.scenes import (
    ConditionLink,
    LabelLink,
    SceneError,
    SceneSpecification,
    draw_scenes,
    links_from_matrix,
)
from fedmpt.simulation.scenes_render import BACKGROUNDS, LIGHTINGS
from fedmpt.simulation.sprites import CELL, LABELS, STYLES, sprites

PETS = SceneSpecification(labels=("cat", "chair", "dog", "sofa"), marginals=(0.5, 0.5, 0.5, 0.5), size=48)


def test_fifty_objects_have_sprites_in_every_style():
    assert len(LABELS) >= 40
    for style in STYLES:
        for label, variants in sprites(style).items():
            for sprite in variants:
                opaque = np.asarray(sprite)[..., 3] > 127
                assert sprite.size == (CELL, CELL)
                assert opaque.mean() > 0.08, (style, label)


def test_styles_look_different():
    pictures = {style: np.asarray(sprites(style)["cat"][0].convert("RGB"), float) for style in STYLES}
    names = list(STYLES)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            assert np.abs(pictures[one] - pictures[two]).mean() > 10, (one, two)


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others():
    one, same, other = draw_scenes(PETS, 5, 1), draw_scenes(PETS, 5, 1), draw_scenes(PETS, 5, 2)
    assert np.array_equal(one.pixels, same.pixels)
    assert np.array_equal(one.objects, same.objects)
    assert not np.array_equal(one.pixels, other.pixels)


def test_a_picture_depends_on_its_number_not_on_what_was_drawn_before():
    assert np.array_equal(draw_scenes(PETS, 6, 1).pixels[4:], draw_scenes(PETS, 2, 1, start=4).pixels)


def test_labels_follow_their_marginals():
    spec = replace(PETS, marginals=(0.1, 0.9, 0.5, 0.0))
    shown = draw_scenes(spec, 800, 3).truth.mean(0)
    assert shown == pytest.approx([0.1, 0.9, 0.5, 0.0], abs=0.06)


def test_a_link_plants_the_co_occurrence_it_states():
    spec = replace(PETS, links=(LabelLink("cat", "chair", 0.9, 0.1),))
    truth = draw_scenes(spec, 800, 4).truth
    cat = truth[:, 0] == 1
    assert truth[cat, 1].mean() == pytest.approx(0.9, abs=0.05)
    assert truth[~cat, 1].mean() == pytest.approx(0.1, abs=0.05)
    assert np.corrcoef(truth[:, 2], truth[:, 3])[0, 1] == pytest.approx(0, abs=0.1)


def test_a_co_occurrence_matrix_is_planted_and_measured():
    when_present = np.full((4, 4), np.nan)
    when_present[0, 1], when_present[2, 3] = 0.9, 0.2
    links = links_from_matrix(PETS.labels, when_present, np.full((4, 4), 0.1))
    found = draw_scenes(replace(PETS, links=links), 800, 4).co_occurrence()
    assert found[0, 1] == pytest.approx(0.9, abs=0.05)
    assert found[2, 3] == pytest.approx(0.2, abs=0.05)
    assert found[0, 2] == pytest.approx(0.5, abs=0.07)
    assert (found.diagonal() == 1).all()


def test_a_matrix_has_no_links_on_its_diagonal():
    when_present = np.full((4, 4), np.nan)
    when_present[0, 1] = 0.9
    np.fill_diagonal(when_present, 1.0)
    links = links_from_matrix(PETS.labels, when_present, np.full((4, 4), 0.1))
    assert links == (LabelLink("cat", "chair", 0.9, 0.1),)


def test_of_two_sources_of_one_target_the_largest_probability_counts():
    spec = replace(
        PETS, links=(LabelLink("cat", "sofa", 0.5, 0.2), LabelLink("dog", "sofa", 0.9, 0.1)), size=32
    )
    scenes = draw_scenes(spec, 1200, 4)
    cat, dog, sofa = (scenes.truth[:, index] == 1 for index in (0, 2, 3))
    found = scenes.co_occurrence()
    assert found[2, 3] == pytest.approx(0.9, abs=0.05)  # the stronger link comes out as stated
    assert found[0, 3] == pytest.approx(0.5 * 0.5 + 0.5 * 0.9, abs=0.06)  # half of the cats are with a dog
    assert sofa[cat & ~dog].mean() == pytest.approx(0.5, abs=0.08)
    assert sofa[~cat & ~dog].mean() == pytest.approx(0.1, abs=0.06)  # the smallest when_absent


def test_links_may_form_chains():
    links = (
        LabelLink("dog", "sofa", 1.0, 0.0),
        LabelLink("chair", "dog", 1.0, 0.0),
        LabelLink("cat", "chair", 1.0, 0.0),
    )
    truth = draw_scenes(replace(PETS, links=links), 50, 5).truth
    assert 0 < truth[:, 0].sum() < 50
    assert (truth == truth[:, :1]).all()


def test_condition_links_choose_background_lighting_and_scale():
    rules = (
        ConditionLink("cat", "background", "snow", 1.0),
        ConditionLink("cat", "lighting", "night", 1.0),
        ConditionLink("cat", "scale", "large", 1.0),
    )
    scenes = draw_scenes(replace(PETS, condition_links=rules), 200, 6)
    cat = scenes.truth[:, 0] == 1
    assert (scenes.background[cat] == list(BACKGROUNDS).index("snow")).all()
    assert (scenes.lighting[cat] == list(LIGHTINGS).index("night")).all()
    assert (scenes.objects["scale"][scenes.objects["label"] == 0] == 2).all()
    assert len(np.unique(scenes.background[~cat])) > 5


def test_the_first_condition_link_that_comes_up_decides():
    rules = (
        ConditionLink("cat", "background", "beach", 0.8),
        ConditionLink("dog", "background", "road", 1.0),
    )
    scenes = draw_scenes(replace(PETS, condition_links=rules, size=32), 1200, 6)
    cat, dog = scenes.truth[:, 0] == 1, scenes.truth[:, 2] == 1
    road = scenes.background == list(BACKGROUNDS).index("road")
    assert road[dog & ~cat].all()
    assert road[dog & cat].mean() == pytest.approx(0.2, abs=0.07)


@pytest.mark.parametrize(("probability", "share"), [(0.8, 0.9), (0.0, 0.5)])
def test_where_no_condition_link_comes_up_the_weights_draw_among_all_values(probability, share):
    rules = (ConditionLink("cat", "background", "beach", probability),)
    weights = (("beach", 1.0), ("snow", 1.0))
    scenes = draw_scenes(replace(PETS, condition_links=rules, backgrounds=weights, size=32), 600, 6)
    beach = scenes.background[scenes.truth[:, 0] == 1] == list(BACKGROUNDS).index("beach")
    assert beach.mean() == pytest.approx(share, abs=0.08)


def test_annotation_noise_spares_the_truth():
    clean = draw_scenes(PETS, 300, 7)
    noisy = draw_scenes(replace(PETS, missing=0.3, claimed=0.1, unknown=0.2), 300, 7)
    assert np.array_equal(clean.labels, clean.truth)
    assert np.array_equal(noisy.truth, clean.truth)
    assert np.array_equal(noisy.pixels, clean.pixels)
    known = noisy.labels >= 0
    shown = noisy.truth == 1
    assert (~known).mean() == pytest.approx(0.2, abs=0.05)
    assert (noisy.labels[known & shown] == 0).mean() == pytest.approx(0.3, abs=0.06)
    assert (noisy.labels[known & ~shown] == 1).mean() == pytest.approx(0.1, abs=0.06)


def test_every_shown_label_has_a_box_where_the_picture_differs_from_its_background():
    spec = replace(PETS, marginals=(1.0, 0.0, 0.0, 0.0), lightings=(("daylight", 1.0),), size=112)
    empty = replace(spec, marginals=(0.0, 0.0, 0.0, 0.0), backgrounds=(("snow", 1.0),))
    scenes = draw_scenes(replace(spec, backgrounds=(("snow", 1.0),)), 20, 8)
    snow = draw_scenes(empty, 20, 9).pixels.mean((0, 1, 2))
    for row in scenes.objects:
        left, top, right, bottom = row["box"]
        picture = scenes.pixels[row["scene"]].astype(float)
        assert 0 <= left < right <= 112
        assert 0 <= top < bottom <= 112
        inside = np.zeros((112, 112), bool)
        for other in scenes.objects[scenes.objects["scene"] == row["scene"]]:
            inside[other["box"][1] : other["box"][3], other["box"][0] : other["box"][2]] = True
        distance = np.abs(picture - snow).sum(2)
        assert distance[inside].mean() > 1.5 * distance[~inside].mean()


def test_an_object_alone_and_upright_is_wholly_visible():
    scenes = draw_scenes(replace(PETS, marginals=(1.0, 0.0, 0.0, 0.0)), 100, 10)
    alone = np.bincount(scenes.objects["scene"])[scenes.objects["scene"]] == 1
    upright = scenes.objects["pose"] == 0
    assert scenes.objects["visible"][alone & upright].min() == 1.0
    assert scenes.objects["visible"][scenes.objects["pose"] == 2].max() < 1.0


def test_distractors_are_objects_without_labels():
    scenes = draw_scenes(replace(PETS, distractors=2.0), 200, 11)
    assert (scenes.objects["label"] == -1).sum() / 200 == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("cat", "unicorn", "dog", "sofa")}, "no sprite shows 'unicorn'"),
        ({"marginals": (0.5,)}, "1 marginals for 4 labels"),
        ({"marginals": (0.5, 0.5, 0.5, 1.5)}, "outside 0 … 1"),
        ({"links": (LabelLink("cat", "pizza", 0.9, 0.1),)}, "names 'pizza', which is not among the labels"),
        (
            {"links": (LabelLink("cat", "dog", 0.9, 0.1), LabelLink("dog", "cat", 0.9, 0.1))},
            "form a circle among cat, dog",
        ),
        (
            {"condition_links": (ConditionLink("cat", "weather", "fog", 1.0),)},
            "names 'weather': use background",
        ),
        (
            {"condition_links": tuple(ConditionLink("cat", "scale", v, 0.5) for v in ("small", "large"))},
            "two condition links give 'cat' a scale: keep one",
        ),
        ({"styles": (("oil", 1.0),)}, "no 'oil': choose from rendered"),
        ({"styles": (("flat", 0.0),)}, "adds up to nothing"),
        ({"size": 8}, "too small"),
    ],
)
def test_a_specification_that_cannot_be_drawn_is_refused(change, message):
    with pytest.raises(SceneError, match=message):
        replace(PETS, **change)
