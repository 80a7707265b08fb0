"""Partitioners deal every photo to one client; their knobs move the measured heterogeneity as they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon

from fedmpt.simulation.partition import (
    PartitionError,
    Shares,
    by_group,
    clusters,
    dirichlet,
    heterogeneity,
    iid,
    mask_labels,
)

CLIENTS = 5


def themed_labels(photos: int = 400) -> NDArray[np.int8]:
    """Photos of four themes; theme t shows labels 3t, 3t+1 and 3t+2, each with probability 0.7."""
    generator = np.random.default_rng(3)
    theme = np.arange(photos) % 4
    of_theme = np.repeat(np.eye(4, dtype=bool)[theme], 3, axis=1)
    return (of_theme & (generator.random((photos, 12)) < 0.7)).astype(np.int8)


PARTITIONERS: dict[str, Callable[[int], Shares]] = {
    "iid": lambda seed: iid(400, CLIENTS, seed),
    "dirichlet": lambda seed: dirichlet(themed_labels(), CLIENTS, 0.1, seed, minimum=4),
    "clusters": lambda seed: clusters(themed_labels(), CLIENTS, 4, seed),
    "by_group": lambda seed: by_group(np.arange(400) % 3, CLIENTS, seed),
}


@pytest.mark.parametrize("name", PARTITIONERS)
def test_every_photo_goes_to_exactly_one_client(name: str) -> None:
    shares = PARTITIONERS[name](0)
    assert len(shares) == CLIENTS
    assert sorted(np.concatenate(shares).tolist()) == list(range(400))
    assert all(np.array_equal(share, np.sort(share)) for share in shares)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_seed_alone_decides(name: str) -> None:
    first, again, other = (PARTITIONERS[name](seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@given(st.integers(1, 40), st.floats(0.01, 100), st.integers(1, 3), st.integers(0, 99))
def test_dirichlet_leaves_no_client_below_the_minimum(
    clients: int, alpha: float, minimum: int, seed: int
) -> None:
    shares = dirichlet(themed_labels(120), clients, alpha, seed, minimum)
    assert min(map(len, shares)) >= minimum
    assert sum(map(len, shares)) == 120


def test_a_smaller_alpha_is_more_heterogeneous() -> None:
    labels = themed_labels()
    divergences = [
        heterogeneity(labels, dirichlet(labels, CLIENTS, alpha, seed=0)).divergence
        for alpha in (100, 1, 0.05)
    ]
    assert divergences == sorted(divergences)
    assert divergences[-1] > 5 * divergences[0]


def test_more_clusters_are_more_heterogeneous() -> None:
    labels = themed_labels()
    one, four = (heterogeneity(labels, clusters(labels, 4, count, seed=0)).divergence for count in (1, 4))
    assert one < 0.05
    assert four > 0.4


def test_as_many_clusters_as_clients_gives_each_its_own_theme() -> None:
    labels = themed_labels()
    shares = clusters(labels, 4, 4, seed=0)
    shown = heterogeneity(labels, shares).prevalence > 0.05
    assert sorted(np.flatnonzero(row).tolist() for row in shown) == [
        [3 * t, 3 * t + 1, 3 * t + 2] for t in range(4)
    ]


def test_groups_are_kept_together_when_clients_suffice() -> None:
    groups = np.repeat([0, 1], [300, 100])
    shares = by_group(groups, 4, seed=0)
    assert sorted(len(share) for share in shares) == [100, 100, 100, 100]
    assert all(len(np.unique(groups[share])) == 1 for share in shares)


def test_divergence_agrees_with_scipy() -> None:
    labels = themed_labels()
    shares = dirichlet(labels, CLIENTS, 0.3, seed=5)
    pooled = labels.sum(axis=0) / labels.sum()
    expected = [jensenshannon(labels[s].sum(axis=0) / labels[s].sum(), pooled, base=2) ** 2 for s in shares]
    weights = [len(share) for share in shares]
    assert heterogeneity(labels, shares).divergence == pytest.approx(np.average(expected, weights=weights))


def test_divergence_is_zero_for_equal_shares_and_one_bit_apart_for_none_in_common() -> None:
    alike = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.int8)
    assert heterogeneity(alike, [np.array([0, 1]), np.array([2, 3])]).divergence == pytest.approx(0)
    many = np.eye(200, dtype=np.int8)
    apart = heterogeneity(many, [np.array([index]) for index in range(200)]).divergence
    assert 0.95 < apart < 1


def test_masking_forgets_the_asked_fraction_as_unknown_or_as_absent() -> None:
    labels = np.ones((200, 20), np.int8)
    unknown = mask_labels(labels, 0.3, seed=0, negative=False)
    absent = mask_labels(labels, 0.3, seed=0, negative=True)
    assert abs(float((unknown == -1).mean()) - 0.3) < 0.03
    assert np.array_equal(unknown == -1, absent == 0)
    assert np.array_equal(mask_labels(labels, 0.0, seed=0, negative=False), labels)


@pytest.mark.parametrize(
    ("deal", "message"),
    [
        (lambda: iid(3, 4, 0), "3 photos cannot be dealt to 4 clients"),
        (lambda: dirichlet(themed_labels(), 4, 0.0, 0), "must be a positive number"),
        (lambda: clusters(np.eye(3, dtype=np.int8), 2, 9, 0), "the photos have 3 different label sets"),
        (lambda: mask_labels(themed_labels(), 1.0, 0, negative=True), "masked fraction 1.0"),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_the_reason(deal: Callable[[], object], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        deal()
