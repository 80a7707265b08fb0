"""Client-level differential privacy at the aggregator: the Gaussian mechanism on the sum of clipped updates.

Each client's difference is scaled to an L2 norm of at most ``clip_norm`` over all tensors; Gaussian noise of
standard deviation ``noise_multiplier · clip_norm`` is added to their sum, which is then divided by the number
of clients *chosen* (public: the ``round`` message names them), not of those that answered. Neighbouring
federations differ in one client's whole contribution, in every round: its updates against zeros. Rounds
compose without any credit for sampling, because who was chosen is published (McMahan et al. 2018; Dwork and
Roth 2014).

The guarantee is for everybody but the aggregator, the broker and the operator, who see each update as it comes. So
what clients write (updates and presence, with their numbers of photos) is for these three only, and `fedmpt certs`
makes a broker's ACL to that end. What all may read (round, state, status) has no client's metrics or counts.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmpt.protocol.errors import FedmptError

MAXIMUM_EPSILON = 20.0  # the redistricting data of the US census of 2020 had 19.61
# Noise multiplier over the square root of the number of rounds; below it, ε is above the largest whatever δ is, and
# the accountant would need minutes and gigabytes to say so.
MINIMUM_NOISE = 0.25


class PrivacyError(FedmptError):
    """The settings give no guarantee, or the accounting library is missing."""


@dataclass(frozen=True)
class PrivacySettings:
    """``noise_multiplier`` σ, L2 ``clip_norm`` S of one client's difference, and the δ of (ε, δ)."""

    noise_multiplier: float
    clip_norm: float
    delta: float


def check_privacy(
    settings: PrivacySettings, *, strategy: str, metrics: bool, clients: int, rounds: int
) -> None:
    """Refuse settings that would publish a number without the guarantee that the operator asked for.

    ``clients`` is how many may be chosen for a round, ``rounds`` how many states will be published.

    Raises:
        PrivacyError: names the setting and what to choose instead; or the accounting library is missing.
    """
    if not (math.isfinite(settings.noise_multiplier) and settings.noise_multiplier > 0):
        raise PrivacyError(
            f"privacy: noise multiplier {settings.noise_multiplier} gives no guarantee; take one above 0"
        )
    if not (math.isfinite(settings.clip_norm) and settings.clip_norm > 0):
        raise PrivacyError(
            f"privacy: clip norm {settings.clip_norm} bounds no client's influence; take one above 0"
        )
    if not 0 < settings.delta < 1 / clients:
        raise PrivacyError(
            f"privacy: delta {settings.delta} must lie between 0 and 1/{clients} (one over the number of "
            "clients that a round may choose); else publishing one client's data outright would count as private"
        )
    if strategy != "uniform":
        raise PrivacyError(
            f"privacy: strategy {strategy!r} has no bounded influence of one client; take 'uniform'"
        )
    if metrics:
        raise PrivacyError("privacy: clients' metrics are published without noise; turn metrics off")
    least = MINIMUM_NOISE * math.sqrt(rounds)
    if settings.noise_multiplier < least:
        raise PrivacyError(
            f"privacy: noise multiplier {settings.noise_multiplier:g} gives no guarantee worth the name over "
            f"{rounds} rounds (ε would be above {MAXIMUM_EPSILON:g}); take one above {least:.3g}, or fewer rounds"
        )
    if (value := epsilon(settings, rounds)) > MAXIMUM_EPSILON:
        raise PrivacyError(
            f"privacy: ε would be {value:.3g} at δ = {settings.delta:g} after {rounds} rounds, but at most "
            f"{MAXIMUM_EPSILON:g} is allowed; take a larger noise multiplier, or fewer rounds"
        )


def privatise(
    differences: Iterable[Mapping[str, NDArray[np.float32]]], settings: PrivacySettings, chosen: int
) -> dict[str, NDArray[np.float64]]:
    """The noisy mean of clipped differences, float64; ``differences`` is read once, one at a time.

    Draw it once for a round and store it before anything is published: a second draw of the same round would
    let readers average the noise away.

    Raises:
        PrivacyError: there was no difference at all, so that the tensors' shapes are unknown.
    """
    total: dict[str, NDArray[np.float64]] = {}
    for difference in differences:
        factor = min(1.0, settings.clip_norm / max(l2_norm(difference), 1e-300))
        for name in sorted(difference):
            total[name] = total.get(name, 0.0) + factor * difference[name].astype(np.float64)
    if not total:
        raise PrivacyError("privacy: a round without updates has nothing to publish")
    deviation = settings.noise_multiplier * settings.clip_norm
    return {name: (value + deviation * secure_normal(value.shape)) / chosen for name, value in total.items()}


def l2_norm(difference: Mapping[str, NDArray[np.float32]]) -> float:
    """The L2 norm over all tensors, in float64."""
    return math.sqrt(
        math.fsum(float(np.square(value, dtype=np.float64).sum()) for value in difference.values())
    )


def secure_normal(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Standard normal numbers from the operating system's generator.

    Four Box-Muller draws are added for each number, so that the gaps of floating-point numbers do not give the
    noise away (Holohan and Braghin 2021, "Secure random sampling in differential privacy").
    """
    count = math.prod(shape)
    bits = np.frombuffer(secrets.token_bytes(8 * 8 * count), dtype="<u8").reshape(8, count)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    normal = np.sqrt(-2 * np.log(uniform[:4])) * np.cos(2 * math.pi * uniform[4:])
    return np.asarray(normal.sum(axis=0) / 2).reshape(shape)


@functools.cache
def epsilon(settings: PrivacySettings, rounds: int) -> float:
    """The ε of (ε, δ) after ``rounds`` published rounds, by privacy loss distributions.

    Raises:
        PrivacyError: the accounting library is not installed, or cannot handle the settings.
    """
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ModuleNotFoundError:
        raise PrivacyError(
            "privacy: the accounting library is missing; run: pip install 'fedmpt-edge[privacy]'"
        ) from None
    if rounds == 0:
        return 0.0
    # Rounded up to a grid that grows with the noise's inverse, like ε itself; so it takes a second at most.
    interval = 1e-4 * max(1.0, math.sqrt(rounds) / settings.noise_multiplier)
    try:
        accountant = PLDAccountant(value_discretization_interval=interval)
        accountant.compose(dp_accounting.GaussianDpEvent(settings.noise_multiplier), rounds)
        return float(accountant.get_epsilon(settings.delta))
    except Exception as error:  # the library promises nothing about what it raises
        raise PrivacyError(
            f"privacy: the accounting library cannot handle noise multiplier {settings.noise_multiplier:g} and "
            f"δ = {settings.delta:g} over {rounds} rounds ({error}); choose less extreme ones"
        ) from error
