"""SGD with momentum and AdamW as plain functions on dictionaries of arrays, equal to PyTorch's.

Weight decay leaves ``scale`` and ``bias`` (all tensors without dimensions) alone: pulling a calibration
towards zero would undo it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from fedmpt.protocol.codec import State

SECOND_MOMENT_DECAY = 0.999
EPSILON = 1e-8

# (state, gradients, memory, learning rate per tensor, momentum, weight decay) → (state, memory).
# Memory holds the optimiser's own tensors; an empty one is its start.
Optimizer = Callable[[State, State, State, Mapping[str, float], float, float], tuple[State, State]]


def sgd_step(
    state: State,
    gradients: State,
    memory: State,
    rates: Mapping[str, float],
    momentum: float,
    weight_decay: float,
) -> tuple[State, State]:
    """One step of SGD with (heavy-ball) momentum and L2 weight decay; the memory is the momentum."""
    new_state, new_memory = {}, {}
    for name, value in state.items():
        gradient = gradients[name] + np.float32(_decay(value, weight_decay)) * value
        velocity = gradient
        if name in memory:
            velocity = np.float32(momentum) * memory[name] + gradient
        new_memory[name] = np.asarray(velocity)
        new_state[name] = np.asarray(value - np.float32(rates[name]) * velocity)
    return new_state, new_memory


def adamw_step(
    state: State,
    gradients: State,
    memory: State,
    rates: Mapping[str, float],
    momentum: float,
    weight_decay: float,
) -> tuple[State, State]:
    """One step of AdamW (Loshchilov & Hutter 2019); ``momentum`` is β₁, β₂ is 0.999."""
    count = float(memory.get("count", np.zeros((), np.float32))) + 1
    first_bias = 1 - momentum**count
    second_bias = 1 - SECOND_MOMENT_DECAY**count
    new_state, new_memory = {}, {"count": np.asarray(count, np.float32)}
    for name, value in state.items():
        gradient, rate = gradients[name], rates[name]
        zero = np.zeros_like(value)
        first = np.float32(momentum) * memory.get(f"first.{name}", zero)
        first = np.asarray(first + np.float32(1 - momentum) * gradient)
        second = np.float32(SECOND_MOMENT_DECAY) * memory.get(f"second.{name}", zero)
        second = np.asarray(second + np.float32(1 - SECOND_MOMENT_DECAY) * gradient * gradient)
        denominator = np.sqrt(second) / np.float32(math.sqrt(second_bias)) + np.float32(EPSILON)
        decayed = value * np.float32(1 - rate * _decay(value, weight_decay))
        new_state[name] = np.asarray(decayed - np.float32(rate / first_bias) * first / denominator)
        new_memory[f"first.{name}"], new_memory[f"second.{name}"] = first, second
    return new_state, new_memory


def clip_gradients(gradients: State, maximum_norm: float) -> State:
    """Scale all gradients so that their joint Euclidean norm is at most ``maximum_norm`` (0: unchanged)."""
    if not maximum_norm:
        return gradients
    norm = math.sqrt(sum(float(np.sum(np.square(value, dtype=np.float64))) for value in gradients.values()))
    if norm <= maximum_norm:
        return gradients
    factor = np.float32(maximum_norm / norm)
    return {name: np.asarray(value * factor) for name, value in gradients.items()}


def cosine_rate(learning_rate: float, round_number: int, rounds: int) -> float:
    """The learning rate of training round ``round_number`` (1 … rounds): full at first, falling to near 0."""
    return learning_rate * 0.5 * (1 + math.cos(math.pi * (round_number - 1) / rounds))


def _decay(value: np.ndarray, weight_decay: float) -> float:
    return weight_decay if value.ndim else 0.0


OPTIMIZERS: Mapping[str, Optimizer] = {"adamw": adamw_step, "sgd": sgd_step}
