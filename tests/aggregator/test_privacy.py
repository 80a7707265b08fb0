"""Differential privacy: clipping, noise, accounting, and settings that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fedmpt.aggregator.privacy import (
    MAXIMUM_EPSILON,
    MINIMUM_NOISE,
    PrivacyError,
    PrivacySettings,
    check_privacy,
    epsilon,
    l2_norm,
    privatise,
    secure_normal,
)

SETTINGS = PrivacySettings(noise_multiplier=1.0, clip_norm=2.0, delta=1e-3)
SOUND = PrivacySettings(noise_multiplier=2.0, clip_norm=2.0, delta=1e-5)
FAINT = PrivacySettings(noise_multiplier=1e-12, clip_norm=2.0, delta=1e-3)


def test_a_difference_above_the_clip_norm_counts_with_that_norm() -> None:
    huge = {"a": np.full(4, 1e6, np.float32), "b": np.zeros((), np.float32)}
    mean = privatise([huge], FAINT, chosen=1)
    assert l2_norm({name: value.astype(np.float32) for name, value in mean.items()}) == pytest.approx(2.0)


def test_a_difference_below_the_clip_norm_is_untouched() -> None:
    small = {"a": np.array([0.5, -0.25], np.float32)}
    np.testing.assert_allclose(privatise([small], FAINT, chosen=1)["a"], small["a"], atol=1e-9)


def test_the_sum_is_divided_by_the_chosen_not_by_those_that_answered() -> None:
    ones = {"a": np.ones(1, np.float32)}
    np.testing.assert_allclose(privatise([ones, ones], FAINT, chosen=4)["a"], [0.5], atol=1e-9)


def test_the_noise_has_the_stated_deviation() -> None:
    zeros = {"a": np.zeros(200_000, np.float32)}
    noise = privatise([zeros], SETTINGS, chosen=4)["a"]
    assert noise.std() == pytest.approx(1.0 * 2.0 / 4, rel=0.01)
    assert abs(noise.mean()) < 0.01


def test_normal_numbers_are_normal_and_never_the_same_twice() -> None:
    numbers = secure_normal((100_000,))
    for quantile, expected in ((0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0), (0.9772, 2.0)):
        assert np.quantile(numbers, quantile) == pytest.approx(expected, abs=0.03)
    assert not np.array_equal(numbers, secure_normal((100_000,)))
    assert secure_normal(()).shape == ()


def test_epsilon_is_that_of_the_gaussian_mechanism() -> None:
    pytest.importorskip("dp_accounting", reason="the privacy extra is not installed")
    # k rounds with multiplier σ are one round with σ/√k, whose exact δ(ε) is Balle and Wang's (2018).
    value = epsilon(SETTINGS, rounds=4)
    sensitivity = math.sqrt(4) / SETTINGS.noise_multiplier

    def below(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    delta = below(sensitivity / 2 - value / sensitivity) - math.exp(value) * below(
        -sensitivity / 2 - value / sensitivity
    )
    assert delta == pytest.approx(SETTINGS.delta, rel=0.02)
    assert epsilon(SETTINGS, rounds=8) > value > epsilon(SETTINGS, rounds=0) == 0.0


@pytest.mark.parametrize(
    ("settings", "strategy", "metrics", "text"),
    [
        (PrivacySettings(0.0, 1.0, 1e-3), "uniform", False, "noise multiplier"),
        (PrivacySettings(math.nan, 1.0, 1e-3), "uniform", False, "noise multiplier"),
        (PrivacySettings(1.0, 0.0, 1e-3), "uniform", False, "clip norm"),
        (PrivacySettings(1.0, math.inf, 1e-3), "uniform", False, "clip norm"),
        (PrivacySettings(5.0, 1.0, 0.5), "uniform", False, "delta 0.5 must lie between 0 and 1/10000"),
        (PrivacySettings(5.0, 1.0, 1e-4), "uniform", False, "delta"),
        (PrivacySettings(5.0, 1.0, 0.0), "uniform", False, "delta"),
        (SOUND, "median", False, "strategy 'median'"),
        (SOUND, "uniform", True, "metrics"),
        (PrivacySettings(1e-12, 1.0, 1e-5), "uniform", False, "multiplier 1e-12 gives no guarantee"),
        (PrivacySettings(1e-6, 1.0, 1e-5), "uniform", False, "multiplier 1e-06 gives no guarantee"),
        (PrivacySettings(1.1, 1.0, 1e-5), "uniform", False, "over 20 rounds .* take one above 1.12"),
    ],
)
def test_settings_without_a_guarantee_are_refused(
    settings: PrivacySettings, strategy: str, metrics: bool, text: str
) -> None:
    with pytest.raises(PrivacyError, match=text):
        check_privacy(settings, strategy=strategy, metrics=metrics, clients=10_000, rounds=20)


def test_more_than_the_largest_epsilon_is_refused() -> None:
    pytest.importorskip("dp_accounting", reason="the privacy extra is not installed")
    with pytest.raises(PrivacyError, match=r"ε would be 22\.\d at δ = 1e-05 after 20 rounds, but at most 20"):
        check_privacy(
            PrivacySettings(1.2, 1.0, 1e-5), strategy="uniform", metrics=False, clients=10_000, rounds=20
        )
    check_privacy(SOUND, strategy="uniform", metrics=False, clients=10_000, rounds=20)


def test_below_the_least_noise_epsilon_is_above_the_largest_for_any_delta_that_is_taken() -> None:
    pytest.importorskip("dp_accounting", reason="the privacy extra is not installed")
    assert epsilon(PrivacySettings(MINIMUM_NOISE, 1.0, 1 / 10_000), rounds=1) > MAXIMUM_EPSILON


def test_what_the_accounting_library_cannot_handle_is_a_clear_error() -> None:
    pytest.importorskip("dp_accounting", reason="the privacy extra is not installed")
    with pytest.raises(PrivacyError, match=r"cannot handle noise multiplier 1e\+300"):
        epsilon(PrivacySettings(1e300, 1.0, 1e-5), rounds=1)


def test_delta_is_held_against_all_clients_that_may_be_chosen(make_settings: Callable[..., object]) -> None:
    with pytest.raises(PrivacyError, match=r"delta 0\.5"):
        make_settings(clients_min=1, metrics=False, privacy=PrivacySettings(5.0, 1.0, 0.5))


def test_calibration_counts_as_a_round(make_settings: Callable[..., object]) -> None:
    settings = PrivacySettings(0.4, 1.0, 1e-5)
    with pytest.raises(PrivacyError, match="over 4 rounds"):
        make_settings(rounds=3, calibrate=True, metrics=False, privacy=settings)


def test_a_round_without_updates_publishes_nothing() -> None:
    with pytest.raises(PrivacyError, match="without updates"):
        privatise([], SETTINGS, chosen=3)
