"""The bound on an update's length, by hand and against NumPy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt.aggregator.norms import NormLimit, lower_median, norm_limit

lengths = st.lists(st.floats(1e-3, 1e6) | st.just(0.0), max_size=12)


@given(lengths, st.floats(1, 100))
def test_a_round_allows_a_multiple_of_its_lower_median(norms, factor):
    positive = [norm for norm in norms if norm > 0]
    limit = norm_limit(factor, norms, state=5.0, calibrating=False)
    if len(positive) < 3:
        assert limit.value == factor * 5.0
    else:
        assert limit.value == factor * np.percentile(positive, 50, method="inverted_cdf")


@given(lengths)
def test_most_updates_of_a_round_are_within_its_limit(norms):
    limit = norm_limit(1.0, norms, state=0.0, calibrating=False)
    assert sum(norm <= limit.value for norm in norms) >= len(norms) / 2


@given(lengths, st.floats(1, 100))
def test_what_is_scaled_counts_with_the_limit_and_the_rest_as_it_is(norms, factor):
    limit = norm_limit(factor, norms, state=5.0, calibrating=False)
    for norm in norms:
        counted = norm * limit.scale(norm)
        assert math.isclose(counted, min(norm, limit.value), rel_tol=1e-12)


def test_of_two_the_shorter_is_the_median():
    assert lower_median([1.0, 9.0]) == 1.0
    assert lower_median([]) == 0.0


@pytest.mark.parametrize(
    ("factor", "state", "calibrating"), [(0.0, 5.0, False), (10.0, 5.0, True), (10.0, 0.0, False)]
)
def test_without_a_factor_a_state_or_before_there_is_one_few_updates_have_no_limit(
    factor, state, calibrating
):
    assert norm_limit(factor, [900.0], state, calibrating) == NormLimit(math.inf, "")


def test_in_a_calibration_twice_the_median_counts():
    assert norm_limit(10.0, [1.0, 2.0, 900.0], 5.0, calibrating=True).value == 4.0
    assert norm_limit(10.0, [2.0, 900.0], 5.0, calibrating=True).value == 4.0
    assert norm_limit(1.5, [2.0, 900.0], 5.0, calibrating=True).value == 3.0
