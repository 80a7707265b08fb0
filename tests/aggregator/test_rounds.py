"""When rounds open, close and are renewed, with time passed in."""

from __future__ import annotations

import pytest

from fedmpt.aggregator.rounds import (
    RoundError,
    RoundSettings,
    choose,
    first_round,
    following_round,
    is_exhausted,
    is_overdue,
    open_round,
    renewed_round,
    should_close,
)

SETTINGS = RoundSettings(rounds=2, calibrate=True, clients_min=2, quorum=0.5, deadline=60.0)
FOUR = ("a", "b", "c", "d")


def test_rounds_calibrate_train_and_finish() -> None:
    state = first_round(SETTINGS)
    places = [(state.number, state.phase)]
    while state.phase != "finished":
        state = following_round(state, SETTINGS, 0.0)
        places.append((state.number, state.phase))
    assert places == [(0, "calibrate"), (1, "train"), (2, "train"), (3, "finished")]


def test_without_calibration_training_comes_first() -> None:
    assert first_round(RoundSettings(rounds=2, calibrate=False)).number == 1


def test_a_round_waits_for_enough_clients() -> None:
    state = first_round(SETTINGS)
    assert open_round(state, SETTINGS, ["a"], now=5.0) is state
    opened = open_round(state, SETTINGS, ["b", "a"], now=5.0)
    assert (opened.opened, opened.deadline, opened.chosen) == (5.0, 65.0, ("a", "b"))


def test_a_finished_federation_opens_nothing() -> None:
    state = following_round(
        following_round(following_round(first_round(SETTINGS), SETTINGS, 0.0), SETTINGS, 0.0), SETTINGS, 0.0
    )
    assert open_round(state, SETTINGS, FOUR, now=5.0) is state


@pytest.mark.parametrize(("received", "closes"), [(0, False), (1, False), (2, True), (4, True)])
def test_a_quorum_closes_the_round(received: int, closes: bool) -> None:
    opened = open_round(first_round(SETTINGS), SETTINGS, FOUR, now=0.0)
    assert should_close(opened, SETTINGS, received, silent=0, now=1.0) is closes


@pytest.mark.parametrize(("received", "closes"), [(0, False), (1, True)])
def test_a_deadline_closes_the_round_if_any_update_came(received: int, closes: bool) -> None:
    opened = open_round(first_round(SETTINGS), SETTINGS, FOUR, now=0.0)
    assert not is_overdue(opened, 59.9)
    assert is_overdue(opened, 60.0)
    assert should_close(opened, SETTINGS, received, silent=0, now=60.0) is closes


def test_nobody_waits_for_muted_clients() -> None:
    everybody = RoundSettings(rounds=1, calibrate=False, quorum=1.0)
    opened = open_round(first_round(everybody), everybody, FOUR, now=0.0)
    assert not should_close(opened, everybody, received=3, silent=0, now=1.0)
    assert should_close(opened, everybody, received=3, silent=1, now=1.0)


@pytest.mark.parametrize(
    ("received", "muted", "exhausted"), [(0, 3, False), (0, 4, True), (1, 3, False), (4, 0, False)]
)
def test_a_round_whose_chosen_clients_are_all_muted_is_exhausted(
    received: int, muted: int, exhausted: bool
) -> None:
    endless = RoundSettings(rounds=1, calibrate=False)
    opened = open_round(first_round(endless), endless, FOUR, now=0.0)
    assert is_exhausted(opened, received, muted) is exhausted


def test_a_round_with_a_deadline_is_not_exhausted_before_it() -> None:
    opened = open_round(first_round(SETTINGS), SETTINGS, FOUR, now=0.0)
    assert not is_exhausted(opened, received=0, silent=4)


def test_the_choice_is_seeded_and_differs_between_rounds() -> None:
    settings = RoundSettings(rounds=9, calibrate=False, fraction=0.5, seed=1)
    names = [f"site-{number:02}" for number in range(20)]
    first, second = choose(settings, 1, names), choose(settings, 2, names)
    assert len(first) == 10
    assert first == tuple(sorted(first))
    assert first == choose(settings, 1, list(reversed(names)))
    assert first != second
    assert first != choose(RoundSettings(rounds=9, calibrate=False, fraction=0.5, seed=2), 1, names)


def test_every_client_is_chosen_about_equally_often() -> None:
    settings = RoundSettings(rounds=9, calibrate=False, fraction=0.25)
    counts = dict.fromkeys(FOUR, 0)
    for number in range(1000):
        for name in choose(settings, number, FOUR):
            counts[name] += 1
    assert all(190 < count < 310 for count in counts.values()), counts


def test_at_least_the_minimum_is_chosen() -> None:
    settings = RoundSettings(rounds=1, calibrate=False, clients_min=3, fraction=0.1)
    assert len(choose(settings, 1, FOUR)) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 0},
        {"clients_min": 0},
        {"fraction": 0.0},
        {"fraction": 1.1},
        {"quorum": 0.0},
        {"deadline": 0.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(RoundError, match=r"round settings: (the|rounds)"):
        RoundSettings(**({"rounds": 1, "calibrate": False} | change))


def test_editions_grow_though_the_clock_is_set_back() -> None:
    first = first_round(SETTINGS)
    opened = open_round(first, SETTINGS, {"a", "b", "c"}, 1000.0)
    renewed = renewed_round(opened, 10.0)
    assert (first.edition, opened.edition, renewed.edition) == (0, 1_000_000, 1_000_001)
    assert following_round(renewed, SETTINGS, 2000.0).edition == 2_000_000
