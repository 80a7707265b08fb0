"""What hostile clients send instead of their work, to measure what robust strategies are worth.

All three are ten times as long as an honest update: ``sign-flip`` points the opposite way, ``scaling`` the same
way, and ``noise`` (Gaussian) nowhere in particular. They pass admission; only the strategy can tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection

import numpy as np

from fedmpt.edge_client.trainer import generator
from fedmpt.protocol.codec import State, Update
from fedmpt.protocol.errors import FedmptError

ATTACKS = ("sign-flip", "scaling", "noise")
FACTOR = 10.0

Tamper = Callable[[Update], Update]


class AttackError(FedmptError):
    """An attack is unknown, or the fraction of hostile clients is out of range."""


def attackers(clients: Collection[str], hostile: float, seed: int) -> frozenset[str]:
    """The hostile ones: a fraction of the clients, rounded, drawn by lots.

    Raises:
        AttackError: the fraction is not at least 0 and below 1.
    """
    if not 0 <= hostile < 1:
        raise AttackError(f"hostile = {hostile}: the fraction of hostile clients is at least 0 and below 1")
    order = generator(seed, "attackers", 0).permutation(sorted(clients))
    return frozenset(str(name) for name in order[: round(hostile * len(order))])


def attack(name: str, hostile: Collection[str], seed: int) -> Tamper:
    """Turns the updates of the ``hostile`` clients into the attack ``name``; the others' stay as they are.

    Raises:
        AttackError: it is none of ``ATTACKS``.
    """
    if name not in ATTACKS:
        raise AttackError(f"attack = {name!r}: choose {', '.join(ATTACKS)}")

    def tamper(update: Update) -> Update:
        if update.client not in hostile:
            return update
        if name == "noise":
            difference = _noise(update, seed)
        else:
            factor = FACTOR if name == "scaling" else -FACTOR
            difference = {key: np.asarray(factor * value) for key, value in update.difference.items()}
        return dataclasses.replace(update, difference=difference)

    return tamper


def _noise(update: Update, seed: int) -> State:
    """A random direction, tensor by tensor as long as the update's times the factor."""
    random = generator(seed, f"noise of {update.client}", update.round)
    result: State = {}
    for key, value in sorted(update.difference.items()):
        length = float(np.linalg.norm(value.astype(np.float64)))
        drawn = random.standard_normal(value.shape) * FACTOR * length / math.sqrt(max(1, value.size))
        result[key] = np.asarray(drawn, np.float32)
    return result
