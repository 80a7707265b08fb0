"""Evaluation of a state: every figure from the head's logits, thresholds only from validation data."""

import json

import numpy as np
import pytest

from fedmpt.edge_client import metrics
from fedmpt.edge_client.cache import FeatureCache
from fedmpt.edge_client.engine import EngineError, HeadOutput, predict
from fedmpt.edge_client.evaluation import RECALL, evaluate

LABELS = ("cat", "sofa", "dog")


class ReadingEngine:
    """An engine whose head reads the scores off the class token and applies scale and bias."""

    def __init__(self):
        self.text_calls = 0

    def text_features(self, state):
        self.text_calls += 1
        return np.zeros((1, len(LABELS), 4), np.float32)

    def head(self, state, text, tokens):
        scores = tokens[:, 0, : len(LABELS)].astype(np.float32)
        return HeadOutput(scores, state["scale"] * scores + state["bias"], np.zeros((len(tokens), 3, 1)))


STATE = {"scale": np.float32(2), "bias": np.float32(-1)}


def make_cache(seed, n=200):
    """Cats sit on sofas nine times in ten; scores are noisy labels, and a cat raises the sofa's as much as a sofa."""
    random = np.random.default_rng(seed)
    cat = random.random(n) < 0.4
    sofa = np.where(cat, random.random(n) < 0.9, random.random(n) < 0.1)
    dog = random.random(n) < 0.3
    labels = np.stack([cat, sofa, dog], 1).astype(np.int8)
    scores = labels + random.normal(0, 0.3, labels.shape)
    scores[:, 1] -= 0.4 * sofa - 0.6 * cat
    labels[:5, 2] = -1
    tokens = np.zeros((n, 2, 4), np.float16)
    tokens[:, 0, :3] = scores
    return FeatureCache(tokens, labels, tuple(map(str, range(n))), tuple(map(str, range(n))))


def test_predict_gives_scores_and_logits_of_every_photo_whatever_the_batch():
    cache, engine = make_cache(0, n=7), ReadingEngine()
    for batch_size in (1, 3, 7, 100):
        scores, logits = predict(engine, STATE, cache.tokens, batch_size=batch_size)
        assert np.array_equal(scores, cache.tokens[:, 0, :3].astype(np.float32))
        assert np.array_equal(logits, 2 * scores - 1)
    assert engine.text_calls == 4  # once each time, not once a batch


def test_predict_of_some_rows_gives_those_in_their_order():
    cache, rows = make_cache(0, n=7), np.array([6, 0, 3])
    scores, _ = predict(ReadingEngine(), STATE, cache.tokens, rows, batch_size=2)
    assert np.array_equal(scores, cache.tokens[rows, 0, :3].astype(np.float32))


def test_predict_out_of_time_gives_the_first_photos():
    cache = make_cache(0, n=7)
    scores, logits = predict(ReadingEngine(), STATE, cache.tokens, batch_size=2, out_of_time=lambda: True)
    assert np.array_equal(scores, cache.tokens[:2, 0, :3].astype(np.float32))
    assert logits.shape == (2, 3)


def test_predict_of_no_photos_is_empty():
    assert predict(ReadingEngine(), STATE, np.empty((0, 2, 4), np.float16))[1].shape == (0, 3)


def test_a_logit_that_is_not_finite_is_an_error():
    with pytest.raises(EngineError, match="not finite; check the state and the feature cache"):
        predict(ReadingEngine(), {"scale": np.float32("nan"), "bias": np.float32(0)}, make_cache(0).tokens)


def test_figures_are_the_metrics_of_the_logits():
    cache = make_cache(0)
    evaluation = evaluate(ReadingEngine(), STATE, cache, LABELS)
    logits = 2 * cache.tokens[:, 0, :3].astype(np.float32) - 1
    assert evaluation.photos == 200
    assert evaluation.map == metrics.mean_average_precision(logits, cache.labels)
    assert evaluation.cf1 == metrics.class_f1(logits >= 0, cache.labels)
    assert evaluation.of1 == metrics.overall_f1(logits >= 0, cache.labels)
    assert evaluation.average_precision["dog"] == metrics.average_precision(logits, cache.labels)[2]
    assert 0 < evaluation.calibration_error < 1
    assert evaluation.cf1_tuned is evaluation.of1_tuned is evaluation.spurious_activation is None


def test_validation_data_tune_thresholds_and_name_the_pairs():
    cache, validation = make_cache(0), make_cache(1)
    badly_scaled = {"scale": np.float32(2), "bias": np.float32(-3)}
    evaluation = evaluate(ReadingEngine(), badly_scaled, cache, LABELS, validation=validation)
    assert evaluation.spurious_pairs == (("cat", "sofa"), ("sofa", "cat"))
    assert evaluation.recall == RECALL
    assert evaluation.cf1_tuned > evaluation.cf1 + 0.2
    # A cat alone raises "sofa" far more often than a dog does.
    pull = evaluate(ReadingEngine(), STATE, cache, LABELS, validation=validation, pairs=[(0, 1)])
    none = evaluate(ReadingEngine(), STATE, cache, LABELS, validation=validation, pairs=[(2, 1)])
    assert pull.spurious_activation > none.spurious_activation + 0.2


def test_equal_recall_makes_spurious_activation_independent_of_scale_and_bias():
    cache, validation = make_cache(0), make_cache(1)
    rates = {
        evaluate(
            ReadingEngine(),
            {"scale": np.float32(scale), "bias": np.float32(bias)},
            cache,
            LABELS,
            validation=validation,
        ).spurious_activation
        for scale, bias in ((1, 0), (4, -8), (0.5, 2))
    }
    assert len(rates) == 1


def test_a_label_that_validation_never_shows_is_in_no_spurious_pair():
    cache, validation = make_cache(0), make_cache(1)
    validation.labels[:, 1] = 0
    evaluation = evaluate(
        ReadingEngine(), STATE, cache, LABELS, validation=validation, pairs=[(0, 1), (0, 2)]
    )
    assert evaluation.spurious_pairs == (("cat", "dog"),)


def test_undefined_figures_are_null_in_json():
    cache = make_cache(0)
    cache.labels[:] = -1
    value = json.loads(json.dumps(evaluate(ReadingEngine(), STATE, cache, LABELS).to_json(), allow_nan=False))
    assert value["map"] is None
    assert value["average_precision"] == {"cat": None, "sofa": None, "dog": None}


def test_progress_counts_both_caches():
    seen = []
    evaluate(
        ReadingEngine(),
        STATE,
        make_cache(0, n=40),
        LABELS,
        validation=make_cache(1, n=10),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(32, 50), (40, 50), (50, 50)]
