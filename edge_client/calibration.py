"""Round 0: fit κ and δ alone, on head scores that do not depend on them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedmpt.protocol.manifest import Training

PRIOR = 1e-3  # weight of the pull towards the received values; it keeps separable data from running away
ITERATIONS = 100
GRADIENT_TOLERANCE = 1e-9
BLOCK = 1 << 18  # entries at a time, so that memory does not grow with the number of photos

Vector = NDArray[np.float64]


def asymmetric_loss(logits: Vector, positive: NDArray[np.bool_], training: Training) -> tuple[Vector, Vector]:
    """Asymmetric loss (Ridnik et al. 2021) of single, known entries and its derivative by the logit.

    Args:
        logits: any shape, float64.
        positive: same shape; True where the label holds, False where it does not.
        training: gives γ₊, γ₋ and the probability shift (``clip``).
    """
    bounded = np.clip(logits, -500, 500)  # exp overflows beyond; the loss is linear or 0 there
    probability, complement = 1 / (1 + np.exp(-bounded)), 1 / (1 + np.exp(bounded))
    log_probability = -np.logaddexp(0, -logits)
    weight = complement**training.gamma_pos
    loss_if_positive = -weight * log_probability
    slope_if_positive = weight * (training.gamma_pos * probability * log_probability - complement)

    above = probability > training.clip
    shifted = np.where(above, probability - training.clip, 0.0)
    remainder = np.where(above, complement + training.clip, 1.0)  # 1 − p_m without cancellation
    log_remainder = np.log(remainder)
    weight = shifted**training.gamma_neg
    loss_if_negative = -weight * log_remainder
    slope = weight / remainder
    if training.gamma_neg:
        base = np.where(above, shifted, 1.0)
        slope = slope - training.gamma_neg * base ** (training.gamma_neg - 1) * log_remainder
    slope_if_negative = np.where(above, slope * probability * complement, 0.0)
    return (
        np.where(positive, loss_if_positive, loss_if_negative),
        np.where(positive, slope_if_positive, slope_if_negative),
    )


def fit_scale_and_bias(
    scores: NDArray[np.floating], labels: NDArray[np.int8], scale: float, bias: float, training: Training
) -> tuple[float, float, float]:
    """Minimise the asymmetric loss over κ and δ in ``logit = κ · score + δ``.

    BFGS with backtracking in float64 on standardised scores, deterministic; a weak quadratic pull towards the
    received values keeps κ and δ finite where the labels alone would not (all of one kind, or separable).

    Args:
        scores: ``[B, C]``, the head's scores.
        labels: ``[B, C]``, 1, 0 or −1 (unknown, left out); at least one is known.
        scale: received κ.
        bias: received δ.
        training: the loss's constants.

    Returns:
        κ, δ and the loss there (as the training loss: summed over labels, averaged over images).
    """
    known = labels >= 0
    images = int(known.any(axis=1).sum())
    values = scores[known].astype(np.float64)
    positive = labels[known] == 1
    mean = float(values.mean())
    spread = float(values.std())
    if spread < 1e-6:  # equal scores: only the level can be fitted
        spread = 1.0
    # κ·s + δ = a·u + b with u = (s − mean) / spread, a = κ·spread, b = δ + κ·mean.
    start = np.array([scale * spread, bias + scale * mean])

    def data_loss(point: Vector) -> tuple[float, Vector]:
        loss, gradient = 0.0, np.zeros(2)
        for first in range(0, len(values), BLOCK):
            unit = (values[first : first + BLOCK] - mean) / spread
            losses, slopes = asymmetric_loss(
                point[0] * unit + point[1], positive[first : first + BLOCK], training
            )
            loss += float(losses.sum()) / images
            gradient = gradient + np.array([float((slopes * unit).sum()), float(slopes.sum())]) / images
        return loss, gradient

    def objective(point: Vector) -> tuple[float, Vector]:
        (loss, gradient), offset = data_loss(point), point - start
        return loss + 0.5 * PRIOR * float(offset @ offset), gradient + PRIOR * offset

    point = _minimise(objective, start)
    fitted = float(point[0]) / spread
    return fitted, float(point[1]) - fitted * mean, data_loss(point)[0]


def _minimise(objective: Callable[[Vector], tuple[float, Vector]], point: Vector) -> Vector:
    loss, gradient = objective(point)
    inverse = np.eye(len(point)) / max(1.0, float(np.linalg.norm(gradient)))
    for _ in range(ITERATIONS):
        if float(np.linalg.norm(gradient)) < GRADIENT_TOLERANCE:
            break
        direction = -inverse @ gradient
        step = 1.0
        while True:
            candidate = point + step * direction
            new_loss, new_gradient = objective(candidate)
            if new_loss <= loss + 1e-4 * step * float(gradient @ direction):
                break
            step /= 2
            if step < 1e-12:
                return point
        move, change = candidate - point, new_gradient - gradient
        curvature = float(move @ change)
        point, loss, gradient = candidate, new_loss, new_gradient
        if curvature > 1e-12:
            left = np.eye(len(point)) - np.outer(move, change) / curvature
            inverse = left @ inverse @ left.T + np.outer(move, move) / curvature
    return point
