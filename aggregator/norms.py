"""How much one update may weigh by its length: what is much longer than the others counts with less.

Honest updates of one round differ in length with the number of steps behind them: by up to 9 times between sites of
20 and of 2,400 photographs, and by more where sites are smaller still. So a long update is no proof of ill will, and is
scaled down, not thrown away. Random noise that one site of four sends in every round, instead of an honest update,
costs 1.5 points of mAP at three times the honest length, 1.7 at ten, 11 at thirty: the bound is ten times the median
(``benchmarks/norm_bound.py``, docs/results/norm-bound.json). In the calibration all sites fit the same two numbers, and
their lengths differ by a third at most; there the bound is twice the median.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

NORM_FACTOR, CALIBRATION_FACTOR = 10.0, 2.0
# Of fewer no majority can be honest against one that is not. In the calibration the shorter of two is no less honest.
LEAST_UPDATES, LEAST_CALIBRATIONS = 3, 2


@dataclass(frozen=True)
class NormLimit:
    """The L2 norm with which an update counts at most; ``reason`` says in words where it comes from."""

    value: float
    reason: str

    def scale(self, norm: float) -> float:
        """What an update of this norm is multiplied with."""
        return min(1.0, self.value / norm) if norm > 0 else 1.0


def norm_limit(factor: float, norms: Iterable[float], state: float, calibrating: bool) -> NormLimit:
    """The limit of one round, given the norms of all its updates.

    ``factor`` times their median, once three are in; updates that change nothing (a site without known labels) do not
    count. Of fewer, ``factor`` times the norm of the round's base ``state``, which the calibration has set: scale and
    bias alone move by more in it than all that is trained does in a round. In the calibration itself, twice the median
    of two or more. A round with ``factor`` 0 has no limit.
    """
    lengths = sorted(norm for norm in norms if norm > 0)
    if calibrating:
        factor = min(factor, CALIBRATION_FACTOR)
    if factor and len(lengths) >= (LEAST_CALIBRATIONS if calibrating else LEAST_UPDATES):
        median = lower_median(lengths)
        return NormLimit(
            factor * median, f"{factor:g} times the median of this round's {len(lengths)} updates"
        )
    if factor and not calibrating and state > 0:
        return NormLimit(factor * state, f"{factor:g} times the norm of the state")
    return NormLimit(math.inf, "")


def lower_median(values: list[float]) -> float:
    """The median of sorted values, of an even number the smaller of the middle two; 0 of none."""
    return values[(len(values) - 1) // 2] if values else 0.0
