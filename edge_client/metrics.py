"""Multi-label metrics in NumPy. Everywhere labels are 1, 0 or −1 (unknown: left out), ``[n, C]``."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fedmpt.edge_client.labels import UNKNOWN, Labels

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Pair = tuple[int, int]


def average_precision(scores: Floats, labels: Labels) -> npt.NDArray[np.float64]:
    """Per-label average precision ``[C]``, Σ (Rₖ − Rₖ₋₁) Pₖ over distinct scores; NaN without a positive.

    The definition of ``sklearn.metrics.average_precision_score``: equal scores count as one threshold.
    """
    result = np.full(labels.shape[1], np.nan)
    for c in range(labels.shape[1]):
        precision, recall, _ = _precision_recall(scores[:, c], labels[:, c])
        if len(recall):
            result[c] = np.sum(np.diff(recall, prepend=0.0) * precision)
    return result


def mean_average_precision(scores: Floats, labels: Labels) -> float:
    """Mean of the average precision over the labels that have a positive (mAP); NaN if none has."""
    each = average_precision(scores, labels)
    return float(np.nanmean(each)) if not np.isnan(each).all() else float("nan")


def class_f1(predicted: Bools, labels: Labels) -> float:
    """CF1: the harmonic mean of per-label precision and recall, each averaged over labels with a positive.

    A label that is never predicted has precision 0.
    """
    true, false, missed = _counts(predicted, labels)
    seen = true + missed > 0
    if not seen.any():
        return float("nan")
    precision = true[seen] / np.maximum(true + false, 1)[seen]
    recall = true[seen] / (true + missed)[seen]
    return _harmonic(float(precision.mean()), float(recall.mean()))


def overall_f1(predicted: Bools, labels: Labels) -> float:
    """OF1: the F1 of all known (photo, label) decisions together; NaN without a positive."""
    true, false, missed = (int(count.sum()) for count in _counts(predicted, labels))
    return 2 * true / (2 * true + false + missed) if true + missed else float("nan")


def best_f1_thresholds(scores: Floats, labels: Labels, default: float = 0.5) -> npt.NDArray[np.float64]:
    """Per-label thresholds ``[C]`` with the highest F1, to be used as ``scores >= threshold``.

    The threshold lies midway between the last score taken and the next; ``default`` without a positive.
    """
    thresholds = np.full(labels.shape[1], default)
    for c in range(labels.shape[1]):
        precision, recall, cuts = _precision_recall(scores[:, c], labels[:, c])
        if len(recall):
            # precision + recall is 0 only where both are; the last cut has recall 1.
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            thresholds[c] = _between(cuts, int(np.argmax(f1)))
    return thresholds


def recall_thresholds(
    scores: Floats, labels: Labels, recall: float, default: float = 0.5
) -> npt.NDArray[np.float64]:
    """Per-label thresholds ``[C]``: the highest that reach ``recall``; ``default`` without a positive."""
    thresholds = np.full(labels.shape[1], default)
    for c in range(labels.shape[1]):
        _, reached, cuts = _precision_recall(scores[:, c], labels[:, c])
        if len(reached):
            thresholds[c] = _between(cuts, int(np.searchsorted(reached, recall - 1e-12)))
    return thresholds


def precision_thresholds(
    scores: Floats, labels: Labels, precision: float, default: float = 0.5
) -> npt.NDArray[np.float64]:
    """Per-label thresholds ``[C]``: the lowest that reach ``precision``; ``default`` without a positive.

    Where none reaches it, the one with the highest precision.
    """
    thresholds = np.full(labels.shape[1], default)
    for c in range(labels.shape[1]):
        reached, _, cuts = _precision_recall(scores[:, c], labels[:, c])
        if len(reached):
            enough = np.flatnonzero(reached >= min(precision, reached.max()) - 1e-12)
            thresholds[c] = _between(cuts, int(enough[-1]))
    return thresholds


def spurious_activation_rate(predicted: Bools, labels: Labels, pairs: Iterable[Pair]) -> float:
    """How often j is predicted where i is present and j absent, over all such photos of all pairs (i, j).

    Compare models at thresholds of equal recall (:func:`recall_thresholds` on validation data), so that a
    silent model does not win. NaN without pairs or such photos.
    """
    activations = chances = 0
    for i, j in pairs:
        tempted = (labels[:, i] == 1) & (labels[:, j] == 0)
        chances += int(tempted.sum())
        activations += int((predicted[:, j] & tempted).sum())
    return activations / chances if chances else float("nan")


def correlated_pairs(labels: Labels, probability: float = 0.5, minimum: int = 20) -> list[Pair]:
    """Pairs (i, j) with P(j | i) ≥ ``probability`` over at least ``minimum`` photos of i with j known."""
    present = (labels == 1).astype(np.int64)
    known = (labels != UNKNOWN).astype(np.int64)
    together, chances = present.T @ present, present.T @ known
    likely = (chances >= minimum) & (together >= probability * chances)
    np.fill_diagonal(likely, False)
    return [(int(i), int(j)) for i, j in np.argwhere(likely)]


def expected_calibration_error(probabilities: Floats, labels: Labels, bins: int = 15) -> float:
    """Mean gap between predicted probability and frequency of presence, over equal-width bins of probability.

    All known (photo, label) decisions are pooled and each bin weighs by its count; NaN without any.
    """
    known = labels != UNKNOWN
    p, y = probabilities[known].astype(np.float64), (labels[known] == 1).astype(np.float64)
    if not len(p):
        return float("nan")
    which = np.clip((p * bins).astype(np.int64), 0, bins - 1)
    gaps = np.bincount(which, p, bins) - np.bincount(which, y, bins)
    return float(np.abs(gaps).sum() / len(p))


def _precision_recall(scores: Floats, labels: Labels) -> tuple[Floats, Floats, Floats]:
    """Precision and recall with each distinct score as threshold, descending; empty without positives."""
    known = labels != UNKNOWN
    scores, positive = scores[known], labels[known] == 1
    if not positive.any():
        empty = np.empty(0)
        return empty, empty, empty
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(positive[order])
    last = np.flatnonzero(np.diff(scores, append=np.nan) != 0)  # of each run of equal scores
    return hits[last] / (last + 1), hits[last] / hits[-1], scores[last]


def _between(cuts: Floats, position: int) -> float:
    """A threshold that takes ``cuts[0 … position]`` and nothing below, with room on both sides."""
    if position + 1 == len(cuts):
        return float(cuts[position])
    middle = (float(cuts[position]) + float(cuts[position + 1])) / 2
    return middle if middle > cuts[position + 1] else float(cuts[position])


def _counts(predicted: Bools, labels: Labels) -> tuple[npt.NDArray[np.int64], ...]:
    present, absent = labels == 1, labels == 0
    return (
        (predicted & present).sum(axis=0),
        (predicted & absent).sum(axis=0),
        (~predicted & present).sum(axis=0),
    )


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
