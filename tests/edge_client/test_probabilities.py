"""Temperature and thresholds from validation photos."""

from __future__ import annotations

import numpy as np
import pytest

from fedmpt.edge_client.metrics import precision_thresholds
from fedmpt.edge_client.probabilities import LARGEST_TEMPERATURE, calibrate_probabilities, fit_temperature


def drawn(temperature: float, photos: int = 4000, labels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels such that P(label) = sigmoid(logit / temperature)."""
    random = np.random.default_rng(0)
    logits = random.normal(-1, 2, (photos, labels)) * temperature
    truth = random.random((photos, labels)) < 1 / (1 + np.exp(-logits / temperature))
    return logits.astype(np.float32), truth.astype(np.int8)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_finds_the_temperature_that_the_labels_were_drawn_with(temperature: float) -> None:
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.05)


def test_overconfident_probabilities_become_honest() -> None:
    found = calibrate_probabilities(*drawn(5.0))
    assert found.error_before > 0.1
    assert found.error_after < 0.03


def test_the_error_after_is_measured_on_photos_that_were_not_fitted() -> None:
    logits, labels = drawn(1.0, photos=200)
    labels[::2] = 1 - labels[::2]  # the halves contradict each other: what fits one is wrong on the other
    assert calibrate_probabilities(logits, labels).error_after > 0.2


def test_unknown_labels_are_left_out() -> None:
    logits, labels = drawn(2.0)
    hidden = np.random.default_rng(1).random(labels.shape) < 0.3
    expected = fit_temperature(logits[~hidden][:, None], labels[~hidden][:, None])
    assert fit_temperature(logits, np.where(hidden, -1, labels).astype(np.int8)) == pytest.approx(expected)


@pytest.mark.parametrize(("sign", "expected"), [(1, 1 / LARGEST_TEMPERATURE), (-1, LARGEST_TEMPERATURE)])
def test_data_without_a_best_temperature_give_a_finite_one(sign: int, expected: float) -> None:
    logits = sign * np.array([[-3.0], [-1.0], [1.0], [3.0]])
    assert fit_temperature(logits, np.array([[0], [0], [1], [1]], np.int8)) == pytest.approx(expected)


def test_without_a_known_label_nothing_changes() -> None:
    assert fit_temperature(np.ones((3, 2)), np.full((3, 2), -1, np.int8)) == 1.0


def test_thresholds_of_best_f1_are_on_the_calibrated_probabilities() -> None:
    logits = np.array([[-4.0], [-2.0], [2.0], [4.0]] * 5)
    labels = np.array([[0], [1], [1], [1]] * 4 + [[1], [0], [0], [1]], np.int8)
    found = calibrate_probabilities(logits, labels)
    probabilities = 1 / (1 + np.exp(-logits[:4, 0] / found.temperature))
    assert probabilities[0] < found.thresholds[0] < probabilities[1]


def test_a_label_that_no_photo_shows_gets_one_half() -> None:
    logits, labels = drawn(1.0)
    labels[:, 1] = 0
    assert calibrate_probabilities(logits, labels).thresholds[1] == 0.5


def test_precision_thresholds_are_the_lowest_that_reach_it() -> None:
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.5], [0.4]])
    labels = np.array([[1], [0], [1], [1], [0], [0]], np.int8)
    # precision from the top: 1, 1/2, 2/3, 3/4, 3/5, 1/2
    assert precision_thresholds(scores, labels, 0.7)[0] == pytest.approx(0.55)
    assert precision_thresholds(scores, labels, 0.75)[0] == pytest.approx(0.55)
    assert precision_thresholds(scores, labels, 0.8)[0] == pytest.approx(0.85)


def test_a_precision_out_of_reach_gives_the_best_there_is() -> None:
    scores = np.array([[0.9], [0.8], [0.7]])
    labels = np.array([[0], [1], [1]], np.int8)
    assert precision_thresholds(scores, labels, 0.99)[0] == pytest.approx(0.7)
    assert precision_thresholds(scores, np.zeros_like(labels), 0.99)[0] == 0.5
