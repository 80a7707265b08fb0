"""Captions: what the text tower reads, and which pictures each is true of."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt.simulation.micro_clip_captions import (
    ANCHORS,
    ART_STYLES,
    CONDITIONS,
    LABELS,
    Caption,
    all_sentences,
    anchor_captions,
    anchor_of,
    attribute_captions,
    context_runs,
    label_captions,
    patch_truth_of,
    shares,
    strange_sentence,
    style_codes,
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


def test_words_are_meant_of_photos_and_codes_turn_them_to_other_styles(photos, drawings):
    words = Caption("a photo of a cat.", (CAT,), codes=(0.0, 0.0, 0.0, 0.0))
    partly = Caption("* cat .", (CAT,), codes=(0.75, -0.2, 0.0, 0.0))
    wholly = Caption("* cat .", (CAT,), codes=(1.3, 0.0, 0.0, 0.0))
    divided = Caption("* cat .", (CAT,), codes=(1.0, 0.0, 1.0, 0.0))
    captions, shown = [words, partly, wholly, divided], drawings.shown[:, CAT]
    assert shown.any()
    assert np.array_equal(truth_of(captions, drawings, ALL), np.outer(shown, [0, 0.75, 1, 0.5]))
    assert np.array_equal(truth_of(captions, photos, ALL), np.outer(photos.shown[:, CAT], [1, 0.25, 0, 0]))


@given(st.lists(st.floats(-1, 2), min_size=4, max_size=4))
def test_a_caption_is_divided_among_styles_and_never_more_than_whole(codes):
    share = shares(tuple(codes))
    art = share[list(ART_STYLES)]
    assert share.min() >= 0
    assert share[0] + art.sum() == pytest.approx(1, abs=1e-6)
    assert share[0] == share[1]  # rendered and glossy, both photo-like


def test_words_alone_are_of_no_art_style_unless_they_name_it(drawings):
    generator = np.random.default_rng(0)
    for caption in label_captions(generator, of_photos=True):
        assert "*" in caption.text or caption.codes == (0.0, 0.0, 0.0, 0.0)
    captions = attribute_captions(drawings, ALL, generator, of_photos=True)
    named = [caption for caption in captions if caption.labels and "*" not in caption.text]
    assert named
    assert all("flat" in caption.text for caption in named)


def test_a_caption_made_from_a_drawing_is_true_of_it(drawings):
    captions = attribute_captions(drawings, ALL, np.random.default_rng(0), of_photos=True)
    assert (truth_of(captions, drawings, ALL).diagonal() >= 0.5).all()


@given(seed=st.integers(0, 2**32 - 1), longest=st.integers(1, 56), name=st.sampled_from(LABELS))
def test_strange_sentences_name_their_label_and_nothing_else_that_captions_know(seed, longest, name):
    text = strange_sentence(name, longest, np.random.default_rng(seed))
    known = {word.strip(".,") for sentence in all_sentences() for word in sentence.split()}
    plain = {"a", "photo", "of", "picture", "with", "in", "the", "and", "on", ""}
    before, _, after = f" {text.rstrip('.!?')} ".partition(f" {name} ")
    assert not {*before.split(), *after.split()} & (known - plain)
    assert len(text.encode()) <= 2 * 77


def test_one_in_four_label_captions_of_photos_is_a_strange_sentence():
    generator = np.random.default_rng(0)
    texts = [caption.text for _ in range(20) for caption in label_captions(generator, of_photos=True)]
    known = {word for sentence in all_sentences() for word in sentence.split()} | {"*"}
    strange = [text for text in texts if set(text.split()) - known]
    assert 0.15 < len(strange) / len(texts) < 0.27


def test_two_art_styles_have_no_name():
    text = " ".join(all_sentences())
    assert all(style in text for style in ("flat", "sketch"))
    assert not any(style in text for style in ("mosaic", "negative"))


def test_context_vectors_carry_as_much_of_a_styles_code_as_their_caption_says():
    directions = style_codes(0, 192)
    codes = (0.5, 1.2, 0.0, -0.3)
    captions = [Caption("* pose * cat .", (CAT,), codes=codes), Caption("* cat .", (CAT,))] * 40
    runs = list(context_runs(captions, np.random.default_rng(0), 0.03, 8, directions))
    assert len(runs) == 120
    coded = np.concatenate([run for index, run in enumerate(runs) if index % 3 < 2])
    plain = np.concatenate(runs[2::3])
    assert np.allclose(np.linalg.lstsq(directions.T, coded.mean(0), rcond=None)[0], codes, atol=0.05)
    assert np.allclose(np.linalg.lstsq(directions.T, plain.mean(0), rcond=None)[0], 0, atol=0.05)
    assert min(len(run) for index, run in enumerate(runs) if index % 3 < 2) == 1


def test_patches_are_meant_like_the_captions_that_name_them(photos, drawings):
    captions = label_captions(np.random.default_rng(0), of_photos=True)
    everywhere = label_captions(np.random.default_rng(0))
    for data, style in ((drawings, 2), (photos, 1)):
        share = np.array([shares(caption.codes)[style] for caption in captions])
        plain = patch_truth_of(everywhere, data, ALL)
        assert plain.max() == 1
        assert np.array_equal(patch_truth_of(captions, data, ALL), plain * share)


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
