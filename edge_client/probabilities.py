"""From logits to probabilities that mean what they say, and thresholds on them: temperature scaling.

Source: Guo et al. 2017, *On Calibration of Modern Neural Networks*, here for independent labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmpt.edge_client import metrics
from fedmpt.edge_client.labels import UNKNOWN, Labels

LARGEST_TEMPERATURE = 100.0  # separable data would drive it to 0, useless data to infinity
STEPS = 60  # of bisection; each halves the interval

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Calibrated:
    """``temperature`` divides the logits; ``thresholds`` [C] are probabilities after it.

    ``missed`` are the indices of labels for which no threshold reaches the wanted precision.

    The errors are expected calibration errors without and with a temperature; the latter is measured on photos that
    its temperature was not fitted on (fitted on one half, measured on the other, and the reverse).
    """

    temperature: float
    thresholds: tuple[float, ...]
    missed: tuple[int, ...]
    error_before: float
    error_after: float


def calibrate_probabilities(logits: Floats, labels: Labels, precision: float | None = None) -> Calibrated:
    """Choose temperature and thresholds on validation photos.

    Args:
        logits: ``[n, C]``.
        labels: ``[n, C]``, 1, 0 or −1 (unknown: left out).
        precision: thresholds are the lowest that reach it for each label; those of best F1 where None. A label that
            no photo shows gets 0.5.
    """
    temperature = fit_temperature(logits, labels)
    probabilities = _sigmoid(logits / temperature)
    held_out = np.empty_like(probabilities)
    for half in (0, 1):
        held_out[half::2] = _sigmoid(
            logits[half::2] / fit_temperature(logits[1 - half :: 2], labels[1 - half :: 2])
        )
    missed: tuple[int, ...] = ()
    if precision is None:
        thresholds = metrics.best_f1_thresholds(probabilities, labels)
    else:
        thresholds = metrics.precision_thresholds(probabilities, labels, precision)
        missed = _missed(probabilities >= thresholds, labels, precision)
    return Calibrated(
        temperature=temperature,
        thresholds=tuple(float(threshold) for threshold in thresholds),
        missed=missed,
        error_before=metrics.expected_calibration_error(_sigmoid(logits), labels),
        error_after=metrics.expected_calibration_error(held_out, labels),
    )


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """The temperature of least cross-entropy, between 1/100 and 100; 1 where no label is known.

    The derivative by 1/T is Σ (σ(x/T) − y) x and grows with 1/T, so bisection finds its zero.
    """
    known = labels != UNKNOWN
    x, y = logits[known].astype(np.float64), (labels[known] == 1).astype(np.float64)
    if not len(x):
        return 1.0
    low, high = -np.log(LARGEST_TEMPERATURE), np.log(LARGEST_TEMPERATURE)
    for _ in range(STEPS):
        middle = (low + high) / 2  # log(1/T)
        if float(((_sigmoid(np.exp(middle) * x) - y) * x).sum()) < 0:
            low = middle
        else:
            high = middle
    return float(np.exp(-(low + high) / 2))


def _missed(predicted: NDArray[np.bool_], labels: Labels, precision: float) -> tuple[int, ...]:
    right = (predicted & (labels == 1)).sum(axis=0)
    given = (predicted & (labels != UNKNOWN)).sum(axis=0)
    shown = (labels == 1).any(axis=0)
    return tuple(int(c) for c in np.flatnonzero(shown & (right < precision * given - 1e-9)))


def _sigmoid(logits: Floats) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))
    return result
