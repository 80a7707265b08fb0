"""The bound on an update's length, by hand and against NumPy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt.aggregator.norms import (
    UNLIMITED,
    limit_by_history,
    limit_by_round,
    longest_honest,
    lower_median,
)

lengths = st.lists(st.floats(0, 1e6), max_size=12)


@given(lengths, st.floats(1, 100))
def test_a_round_allows_a_multiple_of_its_lower_median(norms, factor):
    positive = [norm for norm in norms if norm > 0]
    limit = limit_by_round(factor, norms)
    if len(positive) < 3:
        assert limit == UNLIMITED
    else:
        assert limit.value == factor * np.percentile(positive, 50, method="inverted_cdf")


@given(lengths)
def test_most_updates_of_a_round_are_within_its_limit(norms):
    limit = limit_by_round(1.0, norms)
    assert sum(norm <= limit.value for norm in norms) >= len(norms) / 2


def test_of_two_the_shorter_is_the_median():
    assert lower_median([1.0, 9.0]) == 1.0
    assert lower_median([]) == 0.0


def record(phase, median, largest):
    return {"phase": phase, "norms": {"median": median, "largest": largest}}


def test_history_gives_the_largest_median_of_training():
    known = {}
    for each in (record("calibrate", 20.0, 30.0), record("train", 1.5, 9.0), record("train", 0.5, 9.0)):
        known = longest_honest(known, each)
    assert known == {"calibrate": 30.0, "train": 1.5}
    limit = limit_by_history(10.0, "train", known)
    assert limit.value == 15.0
    assert "10 times the largest median of earlier rounds, 1.5" in limit.reason


def test_before_any_training_the_calibration_counts():
    known = longest_honest({}, record("calibrate", 20.0, 30.0))
    assert limit_by_history(10.0, "train", known).value == 300.0
    assert limit_by_history(10.0, "calibrate", known) == UNLIMITED


@pytest.mark.parametrize("known", [{}, {"train": 0.0, "calibrate": 0.0}])
def test_without_a_known_length_there_is_no_limit(known):
    assert limit_by_history(10.0, "train", known) == UNLIMITED
    assert limit_by_history(0.0, "train", {"train": 1.0}) == UNLIMITED
    assert UNLIMITED.value == math.inf


def test_a_history_of_an_earlier_release_has_no_lengths():
    assert longest_honest({}, {"phase": "train"}) == {"train": 0.0}
