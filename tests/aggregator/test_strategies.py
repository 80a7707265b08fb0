"""How differences are combined: figures one can check in the head, and outliers that must not matter."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedmpt.aggregator.strategies import (
    STRATEGIES,
    Contribution,
    StrategyError,
    StrategySettings,
    aggregate,
    combine,
)

BASE = {"a": np.zeros(2, np.float32), "scale": np.asarray(1.0, np.float32)}


def contributions(*rows: list[float], samples: list[int] | None = None) -> list[Contribution]:
    return [
        Contribution(f"site-{index}", (samples or [1] * len(rows))[index], {"a": np.asarray(row, np.float32)})
        for index, row in enumerate(rows)
    ]


def combined(name: str, items: list[Contribution], **settings: float) -> NDArray[np.float64]:
    return combine(StrategySettings(name, **settings), lambda: iter(items))["a"]


def test_uniform_is_the_mean() -> None:
    np.testing.assert_array_equal(combined("uniform", contributions([1, 0], [3, 4], samples=[1, 99])), [2, 2])


def test_weighted_is_the_mean_by_samples() -> None:
    np.testing.assert_array_equal(
        combined("weighted", contributions([1, 0], [3, 4], samples=[1, 3])), [2.5, 3]
    )


def test_the_median_ignores_one_liar_of_three() -> None:
    np.testing.assert_array_equal(combined("median", contributions([1, 5], [2, 6], [1e9, -1e9])), [2, 5])


def test_the_median_of_an_even_number_is_the_mean_of_the_middle() -> None:
    np.testing.assert_array_equal(combined("median", contributions([1, 0], [2, 0], [4, 0], [9, 0])), [3, 0])


def test_the_trimmed_mean_cuts_both_ends() -> None:
    items = contributions([-1e9, 0], [1, 0], [2, 0], [1e9, 0])
    np.testing.assert_array_equal(combined("trimmed-mean", items, hostile=0.25), [1.5, 0])


def test_multi_krum_leaves_out_those_far_from_the_others() -> None:
    items = contributions([1.0, 1.0], [1.1, 1.0], [1.0, 1.1], [1.1, 1.1], [-50, -50], [60, 0])
    np.testing.assert_allclose(combined("multi-krum", items, hostile=0.34), [1.05, 1.05], rtol=1e-6)


def test_norm_clipping_bounds_each_difference() -> None:
    items = contributions([3, 4], [0, 1])
    np.testing.assert_allclose(combined("norm-clip", items, clip_norm=1.0), [0.3, 0.9])


def test_norm_clipping_without_a_bound_takes_the_median_norm() -> None:
    items = contributions([1, 0], [0, 2], [3000, 4000])
    np.testing.assert_allclose(combined("norm-clip", items), [(1 + 1.2) / 3, (2 + 1.6) / 3])


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_client_alone_is_enough(name: str) -> None:
    assert np.isfinite(combined(name, contributions([1, 2]))).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_equal_differences_are_their_own_combination(name: str) -> None:
    np.testing.assert_allclose(combined(name, contributions(*[[0.5, -2.0]] * 7)), [0.5, -2.0], rtol=1e-12)


def test_the_step_is_added_to_the_base_and_other_tensors_stay() -> None:
    state, _ = aggregate(StrategySettings("uniform"), BASE, lambda: contributions([1, 0], [3, 4]), {})
    np.testing.assert_array_equal(state["a"], np.asarray([2, 2], np.float32))
    assert state["scale"] == 1.0
    assert state["a"].dtype == np.float32
    assert isinstance(state["scale"], np.ndarray)


def test_sums_are_made_in_float64() -> None:
    # In float32, 2²⁴ + 1 is 2²⁴, and the small difference would vanish.
    items = contributions([2.0**24, 0], [1, 0], [-(2.0**24), 0])
    np.testing.assert_array_equal(combined("uniform", items), [1 / 3, 0])


def test_fedavgm_keeps_its_momentum() -> None:
    settings = StrategySettings("fedavgm", server_rate=0.5, momentum=0.9)
    state, memory = aggregate(settings, BASE, lambda: contributions([1, 0]), {})
    np.testing.assert_allclose(state["a"], [0.5, 0])
    state, _ = aggregate(settings, state, lambda: contributions([1, 0]), memory)
    np.testing.assert_allclose(state["a"], [0.5 + 0.5 * 1.9, 0])


def test_fedadam_takes_the_step_of_its_definition() -> None:
    settings = StrategySettings(
        "fedadam", server_rate=0.1, momentum=0.9, second_momentum=0.99, adaptivity=1e-3
    )
    state, _ = aggregate(settings, BASE, lambda: contributions([2, 0]), {})
    first, second = 0.1 * 2, 0.99 * 1e-6 + 0.01 * 4
    np.testing.assert_allclose(state["a"][0], 0.1 * first / (np.sqrt(second) + 1e-3), rtol=1e-6)


def test_fedyogi_takes_the_step_of_its_definition() -> None:
    settings = StrategySettings(
        "fedyogi", server_rate=0.1, momentum=0.9, second_momentum=0.99, adaptivity=1e-3
    )
    state, memory = aggregate(settings, BASE, lambda: contributions([2, 0]), {})
    first, second = 0.1 * 2, 1e-6 + 0.01 * 4
    np.testing.assert_allclose(state["a"][0], 0.1 * first / (np.sqrt(second) + 1e-3), rtol=1e-6)
    _, memory = aggregate(settings, state, lambda: contributions([0, 0]), memory)
    np.testing.assert_allclose(memory["second.a"][0], second, rtol=1e-9)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_server_optimisers_only_average_while_calibrating(name: str) -> None:
    state, memory = aggregate(
        StrategySettings(name), BASE, lambda: contributions([1, 0], [3, 4]), {}, calibrating=True
    )
    np.testing.assert_array_equal(state["a"], np.asarray([2, 2], np.float32))
    assert memory == {}


def test_an_unknown_strategy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(StrategyError, match="'fedprox' is unknown; take one of uniform, weighted"):
        StrategySettings("fedprox")


@pytest.mark.parametrize("change", [{"hostile": 0.5}, {"momentum": 1.0}, {"server_rate": 0.0}], ids=str)
def test_settings_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(StrategyError, match="is out of range"):
        StrategySettings("uniform", **change)
