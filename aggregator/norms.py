"""How long an update may be beside others: one that is much longer than all the rest is noise, an error or an attack.

Honest updates of one round differ in length with the number of steps behind them: by 8 times between sites of 20 and
of 2,400 photographs. Random noise that one site of four sends in every round, instead of an honest update, costs 1.5
points of mAP at three times the honest length, 1.7 at ten, 11 at thirty. So the bound is ten times the median
(``benchmarks/norm_bound.py``, docs/results/norm-bound.json).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NORM_FACTOR = 10.0
LEAST_UPDATES = 3  # of fewer no majority can be honest against one that is not


@dataclass(frozen=True)
class NormLimit:
    """The most that an update's L2 norm may be; ``reason`` follows the number in a refusal."""

    value: float
    reason: str


UNLIMITED = NormLimit(math.inf, "")


def longest_honest(known: Mapping[str, float], record: Mapping[str, Any]) -> dict[str, float]:
    """``known`` (phase → length) after one more closed round, given its line of the history.

    Of calibration the longest update, of training the largest median.
    """
    length = record.get("norms", {}).get("median" if record["phase"] == "train" else "largest", 0.0)
    return {**known, record["phase"]: max(length, known.get(record["phase"], 0.0))}


def limit_by_history(factor: float, phase: str, known: Mapping[str, float]) -> NormLimit:
    """What earlier rounds suggest for an update of a round in ``phase``, before the others of its round are known.

    ``known`` is of :func:`longest_honest`. For training that is ``factor`` times the largest median of the training
    rounds so far; before there is one, ``factor`` times the longest update of the calibration, which moves scale and
    bias by more than a round of training moves anything. ``factor`` 0 gives no limit; nor is there one for the
    calibration itself.
    """
    trained, calibrated = known.get("train", 0.0), known.get("calibrate", 0.0)
    if not factor or phase != "train" or not (trained or calibrated):
        return UNLIMITED
    if trained:
        return NormLimit(
            factor * trained, _words(factor, f"the largest median of earlier rounds, {trained:.3g}")
        )
    return NormLimit(factor * calibrated, _words(factor, f"the longest in the calibration, {calibrated:.3g}"))


def limit_by_round(factor: float, norms: Iterable[float]) -> NormLimit:
    """What the updates of one round allow each other: ``factor`` times their median, once three are in.

    Updates that change nothing (a site without known labels) do not count.
    """
    lengths = sorted(norm for norm in norms if norm > 0)
    if not factor or len(lengths) < LEAST_UPDATES:
        return UNLIMITED
    median = lower_median(lengths)
    return NormLimit(
        factor * median, _words(factor, f"the median of this round's {len(lengths)}, {median:.3g}")
    )


def lower_median(values: list[float]) -> float:
    """The median of sorted values, of an even number the smaller of the middle two; 0 of none."""
    return values[(len(values) - 1) // 2] if values else 0.0


def _words(factor: float, of_what: str) -> str:
    return f" ({factor:g} times {of_what}; the operator can raise it with --norm-factor)"
