"""Deals one set of labelled photos to many clients, and measures how different their shares are.

A partitioner returns *shares*: one sorted array of photo indices per client, disjoint, together all photos.
Labels are int8 ``[n, C]``: 1 present, 0 absent, -1 unknown (counts as not present here).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmpt.protocol.errors import FedmptError

Shares = list[NDArray[np.int64]]


class PartitionError(FedmptError):
    """Photos cannot be dealt as asked."""


def iid(photos: int, clients: int, seed: int) -> Shares:
    """Shuffle and deal evenly: every client sees the same distribution."""
    _check(photos, clients)
    order = np.random.default_rng(seed).permutation(photos)
    return [np.sort(share) for share in np.array_split(order, clients)]


def dirichlet(labels: NDArray[np.int8], clients: int, alpha: float, seed: int, minimum: int = 1) -> Shares:
    """Deal each label's photos in proportions drawn from a symmetric Dirichlet(α) (Hsu et al. 2019).

    A photo with several labels counts for one of them, drawn at random; photos without any label form a
    group of their own. Small α: few clients hold most of a label. Clients below ``minimum`` photos then
    receive some from the largest, so that every client can train.
    """
    _check(labels.shape[0], clients, minimum)
    if not (math.isfinite(alpha) and alpha > 0):
        raise PartitionError(f"Dirichlet concentration {alpha}: must be a positive number")
    generator = np.random.default_rng(seed)
    owner = np.empty(labels.shape[0], np.int64)
    group = _one_label_each(labels, generator)
    for label in np.unique(group):
        members = generator.permutation(np.flatnonzero(group == label))
        proportions = generator.dirichlet(np.full(clients, alpha))
        bounds = np.round(np.cumsum(proportions)[:-1] * members.size).astype(np.int64)
        for client, part in enumerate(np.split(members, bounds)):
            owner[part] = client
    return _levelled([np.flatnonzero(owner == client) for client in range(clients)], minimum)


def clusters(labels: NDArray[np.int8], clients: int, count: int, seed: int) -> Shares:
    """k-means over L2-normalised label vectors; every client is dealt photos of few clusters.

    One cluster is IID; as many clusters as clients is the extreme, where each client sees one kind of photo.
    """
    from sklearn.cluster import KMeans

    _check(labels.shape[0], clients)
    vectors = (labels == 1).astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1)
    distinct = len(np.unique(vectors, axis=0))
    if not 1 <= count <= distinct:
        raise PartitionError(
            f"{count} clusters: the photos have {distinct} different label sets; choose from 1 to {distinct}"
        )
    groups = KMeans(count, n_init=4, random_state=seed).fit_predict(vectors)
    return by_group(groups.astype(np.int64), clients, seed)


def by_group(groups: NDArray[np.int64], clients: int, seed: int) -> Shares:
    """Deal photos so that a client holds as few groups (styles, domains, clusters) as possible.

    With more clients than groups each group is split evenly among clients in proportion to its size; with
    fewer, whole groups go to the client that holds least.
    """
    _check(groups.shape[0], clients)
    generator = np.random.default_rng(seed)
    members = [generator.permutation(np.flatnonzero(groups == name)) for name in np.unique(groups)]
    members.sort(key=len, reverse=True)
    if len(members) >= clients:
        shares: Shares = [np.empty(0, np.int64)] * clients
        for group in members:
            smallest = min(range(clients), key=lambda client: len(shares[client]))
            shares[smallest] = np.concatenate([shares[smallest], group])
        return [np.sort(share) for share in shares]
    seats = [1] * len(members)
    for _ in range(clients - len(members)):  # the next seat goes where photos per client are most (D'Hondt)
        seats[max(range(len(members)), key=lambda index: len(members[index]) / (seats[index] + 1))] += 1
    parts = [part for group, seat in zip(members, seats, strict=True) for part in np.array_split(group, seat)]
    return _levelled([np.sort(part) for part in parts], 1)


@dataclass(frozen=True)
class Heterogeneity:
    """How far the clients' label distributions lie apart.

    ``prevalence [K, C]``: the fraction of each client's photos that show each label. ``divergence``: the
    Jensen-Shannon divergence in bits between a client's label distribution and the pooled one, averaged over
    clients by photos: 0 all alike, 1 nothing in common. ``sizes [K]``: photos per client.
    """

    prevalence: NDArray[np.float64]
    sizes: NDArray[np.int64]
    divergence: float


def heterogeneity(labels: NDArray[np.int8], shares: Sequence[NDArray[np.int64]]) -> Heterogeneity:
    """Measure a partition; finite shares differ a little even when dealt evenly."""
    counts = np.array([(labels[share] == 1).sum(axis=0) for share in shares], np.float64)
    sizes = np.array([len(share) for share in shares], np.int64)
    totals = counts.sum(axis=1, keepdims=True)
    shown = totals[:, 0] > 0
    if not shown.any():
        return Heterogeneity(np.zeros_like(counts), sizes, 0.0)
    distributions = counts[shown] / totals[shown]
    pooled = counts.sum(axis=0) / counts.sum()
    middle = (distributions + pooled) / 2
    divergences = (_relative_entropy(distributions, middle) + _relative_entropy(pooled[None], middle)) / 2
    prevalence = counts / np.maximum(sizes, 1)[:, None]
    return Heterogeneity(prevalence, sizes, float(np.average(divergences, weights=sizes[shown])))


def mask_labels(labels: NDArray[np.int8], fraction: float, seed: int, *, negative: bool) -> NDArray[np.int8]:
    """Forget a fraction of all annotations: they become unknown or, if ``negative``, absent."""
    if not 0 <= fraction < 1:
        raise PartitionError(f"masked fraction {fraction}: must be at least 0 and below 1")
    hidden = np.random.default_rng(seed).random(labels.shape) < fraction
    masked: NDArray[np.int8] = np.where(hidden, np.int8(0 if negative else -1), labels)
    return masked


def _one_label_each(labels: NDArray[np.int8], generator: np.random.Generator) -> NDArray[np.int64]:
    draws = np.where(labels == 1, generator.random(labels.shape), -1.0)
    group: NDArray[np.int64] = draws.argmax(axis=1)
    group[~(labels == 1).any(axis=1)] = labels.shape[1]
    return group


def _levelled(shares: Shares, minimum: int) -> Shares:
    for client, share in enumerate(shares):
        while len(share) < minimum:
            richest = max(range(len(shares)), key=lambda index: len(shares[index]))
            share = np.append(share, shares[richest][-1])
            shares[richest] = shares[richest][:-1]
            shares[client] = share
    return [np.sort(share) for share in shares]


def _relative_entropy(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio = np.where(p > 0, p, 1) / np.where(q > 0, q, 1)
    entropy: NDArray[np.float64] = np.sum(p * np.log2(ratio), axis=1)
    return entropy


def _check(photos: int, clients: int, minimum: int = 1) -> None:
    if clients < 1 or photos < clients * minimum:
        raise PartitionError(
            f"{photos} photos cannot be dealt to {clients} clients with at least {minimum} each; "
            "choose fewer clients or more photos"
        )
