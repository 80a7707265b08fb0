"""What a micro-CLIP is measured by, and that the shipped one reaches it."""

import json

import numpy as np
import pytest

from fedmpt.simulation import micro_clip_evaluation as evaluation
from fedmpt.simulation.micro_clip_captions import all_sentences
from fedmpt.simulation.micro_clip_evaluation import (
    background_retrieval,
    best_wording,
    encode_scenes,
    pointing,
    zero_shot,
)
from fedmpt.simulation.micro_clip_model import load_micro_clip
from fedmpt.simulation.micro_clip_tuning import mean_average_precision, search_tokens, tune
from fedmpt.simulation.micro_clip_wordings import FOUND, WORDINGS, strange_wordings
from fedmpt.simulation.scenes import SceneSpecification, draw_scenes
from fedmpt.simulation.scenes_sets import federation_plan


@pytest.fixture(scope="module")
def shipped():
    return load_micro_clip()


def test_the_shipped_weights_recognise_fresh_scenes(shipped):
    scenes = draw_scenes(SceneSpecification(), 300, seed=424242)
    tokens = encode_scenes(shipped[0], scenes.pixels)
    figures = zero_shot(*shipped, scenes, tokens)
    assert figures["class_token"] >= 0.86
    assert figures["best_patch"] >= 0.92
    assert pointing(*shipped, scenes, tokens)["centre_in_box"] >= 0.90
    assert background_retrieval(*shipped, scenes, tokens) >= 0.95


@pytest.fixture(scope="module")
def federation(shipped):
    """Labels of a federation, tokens and truth of unbiased pictures to train on and to test on, and the mAP of the best
    untrained sentence on the latter."""
    plan = federation_plan(0).decorrelated
    train, test = (draw_scenes(plan, count, seed) for count, seed in ((400, 1), (300, 2)))
    tokens, others = (encode_scenes(shipped[0], scenes.pixels) for scenes in (train, test))
    untrained = best_wording(*shipped, WORDINGS + strange_wordings(), test, others)
    best = {pooling: figures["best"] for pooling, figures in untrained.items()}
    return plan.labels, (tokens, train.truth), (others, test.truth), best


@pytest.mark.slow
@pytest.mark.parametrize("method", ["coop", "adapter"])
@pytest.mark.parametrize("pooling", ["class_token", "best_patch"])
def test_tuning_goes_more_than_five_points_beyond_the_best_untrained_sentence(
    shipped, federation, method, pooling
):
    labels, train, test, untrained = federation
    assert tune(*shipped, method, pooling, train, test, labels, 0, epochs=8) > untrained[pooling] + 0.05


def test_a_search_for_tokens_gains_where_it_may_look_and_repeats(shipped, federation):
    labels, train, _, _ = federation

    def search():
        return search_tokens(*shipped, "class_token", train, train, labels, 0, tries=10, changes=30)

    found = search()
    assert found["climbed"] > found["random"]  # the same pictures, so no change that is kept does harm
    assert search() == found


def test_strange_wordings_hold_the_label_among_words_that_no_caption_has():
    known = {word.strip(".,") for sentence in all_sentences() for word in sentence.split()}
    sentences = strange_wordings()
    assert len(set(sentences)) == 60
    for sentence in sentences:
        assert sentence.count("{}") == 1
    for sentence in sentences[len(FOUND) :]:
        assert not set(sentence.split()) & (known - {"."})


def test_figures_name_the_model_and_are_written_only_where_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluate = evaluation.evaluate
    monkeypatch.setattr(
        evaluation, "evaluate", lambda *model, seeds: evaluate(*model, seeds=seeds, scenes=30, searched=2)
    )
    assert evaluation.main(["--seeds", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model_sha256"] in (evaluation.WEIGHTS.parent / "SHA256SUMS").read_text()
    assert printed["federation_map"][0]["untrained_strange_wordings"]["best_patch"]["best"] <= 1
    assert list(tmp_path.iterdir()) == []
    assert evaluation.main(["--seeds", "1", "--out", "figures.json"]) == 0
    assert json.loads((tmp_path / "figures.json").read_text()) == printed


def test_mean_average_precision_on_a_ranking_done_by_hand():
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    labels = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])
    assert mean_average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)
