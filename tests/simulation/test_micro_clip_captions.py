"""Captions: what the text tower reads, and which pictures each is true of."""

import numpy as np
import pytest

from fedmpt.simulation.micro_clip_captions import (
    ANCHORS,
    CONDITIONS,
    LABELS,
    Caption,
    all_sentences,
    anchor_captions,
    anchor_of,
    attribute_captions,
    label_captions,
    patch_truth_of,
    truth_of,
)
from fedmpt.simulation.micro_clip_data import TrainingSet, object_attributes, object_patches
from fedmpt.simulation.scenes import SceneSpecification, draw_scenes

CAT, DOG = LABELS.index("cat"), LABELS.index("dog")
ALL = np.arange(60)


def training_set(**change):
    scenes = draw_scenes(SceneSpecification(**change), len(ALL), seed=5)
    table = object_attributes(scenes)
    factors = (scenes.background, scenes.lighting, scenes.style)
    return TrainingSet(scenes.pixels, table[..., 0], table[..., 1:], *factors, object_patches(scenes))


@pytest.fixture(scope="module")
def photos():
    return training_set(styles=(("glossy", 1.0),))


@pytest.fixture(scope="module")
def drawings():
    marginals = tuple(0.5 if index in (CAT, DOG) else 0.0 for index in range(len(LABELS)))
    return training_set(styles=(("flat", 1.0),), marginals=marginals)


def test_captions_are_true_of_the_picture_that_they_were_made_from(photos):
    captions = attribute_captions(photos, ALL, np.random.default_rng(0))
    truth = truth_of(captions, photos, ALL)
    assert truth.diagonal().all()
    assert truth.mean() < 0.5
    kinds = {caption.kind for caption in captions}
    assert kinds == {"", "background", "lighting", "style", "scale", "pose", "layout"}


def test_label_captions_are_true_where_the_label_is_shown(photos):
    captions = label_captions(np.random.default_rng(0))
    assert all(name in caption.text for name, caption in zip(LABELS, captions, strict=True))
    assert np.array_equal(truth_of(captions, photos, ALL), photos.shown)


def test_label_captions_use_the_conditions_words_and_context():
    generator = np.random.default_rng(0)
    texts = [caption.text for _ in range(4) for caption in label_captions(generator)]
    assert all(any(condition in text for text in texts) for condition in CONDITIONS)
    assert any(text.startswith("* ") for text in texts)
    assert any(text.startswith("a photo of a ") for text in texts)


def test_an_attribute_must_belong_to_the_named_object(photos):
    small_cat = Caption("a small cat.", (CAT,), "scale", 0)
    said = truth_of([small_cat], photos, ALL)[:, 0]
    assert np.array_equal(said, photos.attributes[:, CAT, 0])


def test_captions_of_a_label_alone_are_meant_of_photos_unless_they_state_what_there_is(photos, drawings):
    plain, exact = Caption("a photo of a cat.", (CAT,)), Caption("there is a cat.", (CAT,), exact=True)
    small = Caption("a small cat.", (CAT,), "scale", 0)
    meant = truth_of([plain, exact, small], drawings, ALL, photos_only=True)
    assert drawings.shown[:, CAT].any()
    assert not meant[:, 0].any()
    assert np.array_equal(meant[:, 1], drawings.shown[:, CAT])
    assert np.array_equal(meant[:, 2], truth_of([small], drawings, ALL)[:, 0])
    assert np.array_equal(truth_of([plain], photos, ALL, photos_only=True)[:, 0], photos.shown[:, CAT])


def test_patches_are_meant_like_the_captions_that_name_them(photos, drawings):
    captions = label_captions(np.random.default_rng(0))
    exact = np.array([caption.exact for caption in captions])
    meant = patch_truth_of(captions, drawings, ALL, photos_only=True)
    assert np.array_equal(meant, patch_truth_of(captions, drawings, ALL) & exact)
    on_photos = patch_truth_of(captions, photos, ALL, photos_only=True)
    assert np.array_equal(on_photos, patch_truth_of(captions, photos, ALL))


def test_patches_lie_on_the_objects_that_they_name(photos):
    found = np.zeros_like(photos.shown)
    for picture, patches in enumerate(photos.patch_labels):
        found[picture, patches[patches >= 0]] = True
    assert not (found & ~photos.shown).any()
    assert (found & photos.shown).sum() > 0.9 * photos.shown.sum()


def test_every_single_meaning_has_one_anchor():
    anchors = anchor_captions()
    assert [anchor_of(anchor) for anchor in anchors] == list(range(ANCHORS))
    assert anchor_of(Caption("a small cat.", (CAT,), "scale", 0)) == -1
    assert anchor_of(Caption("a cat and a dog.", (CAT, DOG))) == -1


def test_sentences_hold_every_label_and_condition():
    text = " ".join(all_sentences())
    assert all(name in text for name in (*LABELS, *CONDITIONS))
    assert "*" not in text
