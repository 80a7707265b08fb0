"""How a round's differences become the next state: plain functions in float64, clients in name order.

The averages read one update at a time, so their memory does not grow with the number of clients; the robust
rules (median, trimmed mean, Krum) compare all updates and hold them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmpt.aggregator.privacy import l2_norm
from fedmpt.protocol.codec import State
from fedmpt.protocol.errors import FedmptError

STRATEGIES = (
    "uniform",
    "weighted",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "median",
    "trimmed-mean",
    "multi-krum",
    "norm-clip",
)
Tensors = dict[str, NDArray[np.float64]]


class StrategyError(FedmptError):
    """A strategy is unknown or one of its settings is out of range."""


@dataclass(frozen=True)
class StrategySettings:
    """A strategy's name and the settings that some of them read.

    ``server_rate`` (η), ``momentum`` (β₁), ``second_momentum`` (β₂) and ``adaptivity`` (τ) are those of Reddi et
    al. 2021 (FedAvgM reads η and β₁). ``hostile`` is the fraction of clients that may lie: cut off at each end
    by the trimmed mean, left out by multi-Krum. ``clip_norm`` is norm clipping's bound; 0 takes the median of
    the round's norms.
    """

    name: str = "uniform"
    server_rate: float = 1.0
    momentum: float = 0.9
    second_momentum: float = 0.99
    adaptivity: float = 1e-3
    hostile: float = 0.3
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise StrategyError(f"strategy {self.name!r} is unknown; take one of {', '.join(STRATEGIES)}")
        in_range = {
            "server rate": 0 < self.server_rate <= 1000,
            "momentum": 0 <= self.momentum < 1,
            "second momentum": 0 <= self.second_momentum < 1,
            "adaptivity": 0 < self.adaptivity <= 1,
            "hostile fraction": 0 <= self.hostile < 0.5,
            "clip norm": 0 <= self.clip_norm < math.inf,
        }
        for name, good in in_range.items():
            if not good:
                raise StrategyError(f"strategy {self.name}: the {name} is out of range")


@dataclass(frozen=True, eq=False)
class Contribution:
    """One client's difference to the base state, and the number of its training photos."""

    client: str
    samples: int
    difference: State


Contributions = Callable[[], Iterable[Contribution]]


def aggregate(
    settings: StrategySettings,
    base: Mapping[str, NDArray[np.float32]],
    contributions: Contributions,
    memory: Mapping[str, NDArray[np.float64]],
    *,
    calibrating: bool = False,
) -> tuple[State, Tensors]:
    """The next state (float32) and the server optimiser's next memory.

    ``contributions()`` starts a fresh pass over at least one update in client-name order; tensors that are
    missing from the differences stay. ``memory`` holds what an earlier call returned (empty at first). While
    calibrating, the server optimisers only average: a first step of fixed size would undo the calibration.
    """
    step = combine(settings, contributions)
    new_memory = dict(memory)
    if not calibrating:
        step, new_memory = _server_step(settings, step, new_memory)
    return apply_step(base, step), new_memory


def apply_step(base: Mapping[str, NDArray[np.float32]], step: Mapping[str, NDArray[np.float64]]) -> State:
    """``base + step`` in float64, as float32; tensors without a step stay as they are."""
    return {
        name: np.asarray(tensor.astype(np.float64) + step[name], dtype=np.float32) if name in step else tensor
        for name, tensor in base.items()
    }


def combine(settings: StrategySettings, contributions: Contributions) -> Tensors:
    """The strategy's one difference for all (float64), before any server optimiser."""
    if settings.name == "uniform":
        return _mean(contributions(), lambda _: 1.0)
    if settings.name in ("weighted", "fedavgm", "fedadam", "fedyogi"):
        return _mean(contributions(), lambda item: float(item.samples))
    if settings.name == "norm-clip":
        bound = settings.clip_norm or float(np.median([l2_norm(item.difference) for item in contributions()]))
        return _mean(contributions(), lambda _: 1.0, bound)
    items = list(contributions())
    if settings.name == "multi-krum":
        kept = _krum(items, settings.hostile)
        return _mean([items[index] for index in kept], lambda _: 1.0)
    cut = int(settings.hostile * len(items)) if settings.name == "trimmed-mean" else (len(items) - 1) // 2
    return {name: _trimmed_mean(items, name, cut) for name in sorted(items[0].difference)}


def _mean(
    items: Iterable[Contribution], weight: Callable[[Contribution], float], bound: float = math.inf
) -> Tensors:
    """Weighted mean; each difference is first scaled down to an L2 norm of at most ``bound``."""
    total: Tensors = {}
    weights = 0.0
    for item in items:
        factor = weight(item)
        weights += factor
        if bound < math.inf:
            norm = l2_norm(item.difference)
            factor *= bound / norm if norm > bound else 1.0
        for name, tensor in item.difference.items():
            share = factor * tensor.astype(np.float64)
            total[name] = total[name] + share if name in total else share
    return {name: tensor / weights for name, tensor in total.items()}


def _trimmed_mean(items: list[Contribution], name: str, cut: int) -> NDArray[np.float64]:
    """Per coordinate: the mean without the ``cut`` smallest and largest values (the median at most)."""
    stacked = np.sort(np.stack([item.difference[name] for item in items]).astype(np.float64), axis=0)
    kept: NDArray[np.float64] = stacked[cut : len(items) - cut]
    return np.asarray(kept.sum(axis=0) / len(kept))


def _krum(items: list[Contribution], hostile: float) -> list[int]:
    """Indices kept by multi-Krum (Blanchard et al. 2017), ascending: those with the closest neighbours."""
    rows = np.stack(
        [
            np.concatenate([item.difference[name].ravel() for name in sorted(item.difference)])
            for item in items
        ]
    ).astype(np.float64)
    count = len(items)
    outsiders = int(hostile * count)
    neighbours = max(1, count - outsiders - 2)
    scores = []
    for index, row in enumerate(rows):
        distances = np.sort(np.delete(((rows - row) ** 2).sum(axis=1), index))
        scores.append(float(distances[:neighbours].sum()))
    return sorted(sorted(range(count), key=lambda index: (scores[index], index))[: count - outsiders])


def _server_step(settings: StrategySettings, step: Tensors, memory: Tensors) -> tuple[Tensors, Tensors]:
    """One step of the server optimiser on the mean difference (Hsu et al. 2019; Reddi et al. 2021)."""
    if settings.name not in ("fedavgm", "fedadam", "fedyogi"):
        return {name: settings.server_rate * tensor for name, tensor in step.items()}, memory
    beta1, beta2, tau = settings.momentum, settings.second_momentum, settings.adaptivity
    result: Tensors = {}
    memory = dict(memory)
    for name, tensor in step.items():
        first = memory.get(f"first.{name}", np.zeros_like(tensor))
        if settings.name == "fedavgm":
            first = beta1 * first + tensor
            result[name] = settings.server_rate * first
        else:
            first = beta1 * first + (1 - beta1) * tensor
            second = memory.get(f"second.{name}", np.full_like(tensor, tau**2))
            square = tensor**2
            if settings.name == "fedadam":
                second = beta2 * second + (1 - beta2) * square
            else:
                second = second - (1 - beta2) * square * np.sign(second - square)
            result[name] = settings.server_rate * first / (np.sqrt(second) + tau)
            memory[f"second.{name}"] = second
        memory[f"first.{name}"] = first
    return result, memory
