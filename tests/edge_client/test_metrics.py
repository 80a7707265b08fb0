"""Metrics against scikit-learn and against counts one can do in the head."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from fedmpt.edge_client import metrics


def draw(seed, n=60, labels=5, levels=None, unknown=0.2):
    """Random scores (on ``levels`` distinct values, so that some tie) and labels with some unknown."""
    random = np.random.default_rng(seed)
    scores = (
        random.normal(size=(n, labels)) if levels is None else random.integers(0, levels, (n, labels)) / 7
    )
    truth = (random.random((n, labels)) < 0.3).astype(np.int8)
    truth[random.random((n, labels)) < unknown] = -1
    return scores, truth


@pytest.mark.parametrize("levels", [None, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_scikit_learn_over_known_labels(seed, levels):
    scores, labels = draw(seed, levels=levels)
    for c, value in enumerate(metrics.average_precision(scores, labels)):
        known = labels[:, c] >= 0
        expected = sklearn_metrics.average_precision_score(labels[known, c], scores[known, c])
        assert value == pytest.approx(expected, abs=1e-12)


def test_mean_average_precision_is_over_labels_with_a_positive():
    scores = np.array([[0.9, 0.1], [0.8, 0.2]])
    labels = np.array([[0, 0], [1, 0]], np.int8)
    assert np.isnan(metrics.average_precision(scores, labels)[1])
    assert metrics.mean_average_precision(scores, labels) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_f1_equals_scikit_learn(seed):
    scores, labels = draw(seed, unknown=0)
    predicted = scores > 0.4
    options = {"average": "macro", "zero_division": 0}
    precision = sklearn_metrics.precision_score(labels, predicted, **options)
    recall = sklearn_metrics.recall_score(labels, predicted, **options)
    assert metrics.class_f1(predicted, labels) == pytest.approx(2 * precision * recall / (precision + recall))
    assert metrics.overall_f1(predicted, labels) == pytest.approx(
        sklearn_metrics.f1_score(labels, predicted, average="micro")
    )


def test_unknown_labels_change_no_f1():
    labels = np.array([[1, 0], [0, 1], [-1, -1]], np.int8)
    predicted = np.array([[True, True], [False, True], [True, True]])
    for measure in (metrics.class_f1, metrics.overall_f1):
        assert measure(predicted, labels) == measure(predicted[:2], labels[:2])


def test_a_silent_model_has_no_f1():
    labels = np.array([[1, 0], [0, 1]], np.int8)
    assert metrics.class_f1(np.zeros((2, 2), bool), labels) == 0
    assert metrics.overall_f1(np.zeros((2, 2), bool), labels) == 0


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("seed", range(5))
def test_best_f1_thresholds_cannot_be_beaten(seed, levels):
    scores, labels = draw(seed, n=20, labels=2, levels=levels)
    thresholds = metrics.best_f1_thresholds(scores, labels)
    for c in range(labels.shape[1]):
        known = labels[:, c] >= 0
        truth, values = labels[known, c], scores[known, c]
        best = max(sklearn_metrics.f1_score(truth, values >= cut) for cut in np.unique(values))
        assert sklearn_metrics.f1_score(truth, values >= thresholds[c]) == pytest.approx(best)


@pytest.mark.parametrize("recall", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("levels", [None, 3])
def test_recall_thresholds_are_the_highest_that_reach_the_recall(recall, levels):
    scores, labels = draw(0, levels=levels)
    thresholds = metrics.recall_thresholds(scores, labels, recall)
    for c in range(labels.shape[1]):
        positives = np.sort(scores[labels[:, c] == 1, c])
        assert (positives >= thresholds[c]).mean() >= recall
        higher = positives[positives > thresholds[c]]
        if recall > 0 and len(higher):
            assert (positives > higher[0]).mean() < recall


def test_thresholds_without_a_positive_are_the_default():
    scores, labels = np.ones((3, 1)), np.zeros((3, 1), np.int8)
    assert metrics.best_f1_thresholds(scores, labels, default=0.7) == [0.7]
    assert metrics.recall_thresholds(scores, labels, 0.5, default=0.7) == [0.7]


def test_spurious_activation_counts_j_predicted_where_only_i_shows():
    # i shows in all five; j: absent, absent, present, unknown, absent.
    labels = np.array([[1, 0], [1, 0], [1, 1], [1, -1], [1, 0]], np.int8)
    predicted = np.array([[0, 1], [0, 0], [0, 1], [0, 1], [0, 0]], bool)
    assert metrics.spurious_activation_rate(predicted, labels, [(0, 1)]) == pytest.approx(1 / 3)
    # j never shows without i, so the other direction offers no chance to err.
    assert np.isnan(metrics.spurious_activation_rate(predicted, labels, [(1, 0)]))


def test_correlated_pairs_are_ordered_likely_and_frequent():
    labels = np.zeros((60, 3), np.int8)
    labels[:20, 0] = 1  # 20 photos of label 0 …
    labels[:10, 1] = 1  # … half of them with label 1
    labels[20:50, 1] = 1  # label 1 is mostly without label 0
    labels[:19, 2] = 1  # label 2 always with label 0, but on 19 photos only
    assert metrics.correlated_pairs(labels) == [(0, 1), (0, 2)]
    labels[0, 1] = -1  # one photo less where label 1 is known: 19
    assert metrics.correlated_pairs(labels) == [(0, 2)]


def test_calibration_error_of_known_gaps():
    # Ten decisions at 0.9, six present: gap 0.3. Ten at 0.1, one present: gap 0.
    probabilities = np.array([[0.9]] * 10 + [[0.1]] * 10)
    labels = np.array([[1]] * 6 + [[0]] * 4 + [[1]] + [[0]] * 9, np.int8)
    assert metrics.expected_calibration_error(probabilities, labels) == pytest.approx(0.15)
    assert metrics.expected_calibration_error(np.array([[1.0], [0.3]]), np.array([[1], [-1]], np.int8)) == 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_ranking_measures_ignore_monotone_changes_of_scores(seed, levels):
    scores, labels = draw(seed, n=12, labels=3, levels=levels)
    before = metrics.average_precision(scores, labels)
    np.testing.assert_allclose(metrics.average_precision(np.exp(3 * scores) - 5, labels), before)


def test_without_any_known_label_figures_are_undefined():
    labels = np.full((3, 2), -1, np.int8)
    scores = np.zeros((3, 2))
    assert np.isnan(metrics.mean_average_precision(scores, labels))
    assert np.isnan(metrics.class_f1(scores > 0, labels))
    assert np.isnan(metrics.overall_f1(scores > 0, labels))
    assert np.isnan(metrics.expected_calibration_error(scores, labels))
