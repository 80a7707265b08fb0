"""Measures a state on a feature cache: mAP, CF1, OF1, spurious activation, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpt.edge_client import metrics
from fedmpt.edge_client.cache import FeatureCache
from fedmpt.edge_client.engine import Engine, FloatArray, Progress, predict
from fedmpt.edge_client.metrics import Pair
from fedmpt.protocol.codec import State

RECALL = 0.8  # at which spurious activation is compared


@dataclass(frozen=True)
class Evaluation:
    """Figures of one state on one cache; None where they are undefined or need validation data.

    ``map`` averages ``average_precision`` (by label) over the labels that a photo shows; ``cf1`` and ``of1`` are
    at probability 0.5, their ``_tuned`` forms at the thresholds of best F1 on the validation data;
    ``spurious_activation`` is the rate over ``spurious_pairs`` at the thresholds that reach ``recall`` there;
    ``calibration_error`` is the expected one over 15 bins.
    """

    photos: int
    map: float | None
    cf1: float | None
    of1: float | None
    calibration_error: float | None
    cf1_tuned: float | None
    of1_tuned: float | None
    spurious_activation: float | None
    spurious_pairs: tuple[tuple[str, str], ...]
    recall: float
    average_precision: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return asdict(self)


def evaluate(
    engine: Engine,
    state: State,
    cache: FeatureCache,
    labels: Sequence[str],
    *,
    validation: FeatureCache | None = None,
    pairs: Sequence[Pair] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a state on the photos of ``cache``.

    Args:
        engine: the bundle's engine.
        state: what to measure.
        cache: the test photos.
        labels: the label names, in the bundle's order.
        validation: other photos, on which thresholds are chosen; without them those figures are None.
        pairs: label pairs (i, j) whose spurious activation is measured; by default those that go together in
            the validation photos, see :func:`fedmpt.edge_client.metrics.correlated_pairs`.
        progress: called with (photos done, total) over both caches.

    Raises:
        EngineError: a logit is not finite.
    """
    total = len(cache) + (len(validation) if validation else 0)

    def logits_of(photos: FeatureCache, before: int) -> FloatArray:
        report = (lambda done, _: progress(before + done, total)) if progress else None
        return predict(engine, state, photos.tokens, progress=report)[1]

    logits = logits_of(cache, 0)
    tuned: NDArray[np.bool_] | None = None
    spurious = None
    if validation:
        chosen_on = logits_of(validation, len(cache))
        tuned = logits >= metrics.best_f1_thresholds(chosen_on, validation.labels, default=0.0)
        pairs = metrics.correlated_pairs(validation.labels) if pairs is None else pairs
        thresholds = metrics.recall_thresholds(chosen_on, validation.labels, RECALL, default=math.inf)
        # A label that no validation photo shows has no threshold of equal recall.
        pairs = [(i, j) for i, j in pairs if math.isfinite(thresholds[j])]
        active = logits >= thresholds
        spurious = _defined(metrics.spurious_activation_rate(active, cache.labels, pairs))
    each = metrics.average_precision(logits, cache.labels)
    probabilities = np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))
    return Evaluation(
        photos=len(cache),
        map=_defined(metrics.mean_average_precision(logits, cache.labels)),
        cf1=_defined(metrics.class_f1(logits >= 0, cache.labels)),
        of1=_defined(metrics.overall_f1(logits >= 0, cache.labels)),
        calibration_error=_defined(metrics.expected_calibration_error(probabilities, cache.labels)),
        cf1_tuned=None if tuned is None else _defined(metrics.class_f1(tuned, cache.labels)),
        of1_tuned=None if tuned is None else _defined(metrics.overall_f1(tuned, cache.labels)),
        spurious_activation=spurious,
        spurious_pairs=tuple((labels[i], labels[j]) for i, j in pairs or ()),
        recall=RECALL,
        average_precision={name: _defined(float(value)) for name, value in zip(labels, each, strict=True)},
    )


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
