"""What an operator chooses for a federation, and the manifest message that tells the clients."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedmpt.aggregator.norms import NORM_FACTOR
from fedmpt.aggregator.privacy import PrivacySettings, check_privacy
from fedmpt.aggregator.rounds import MAXIMUM_CHOSEN, RoundSettings
from fedmpt.aggregator.strategies import StrategySettings
from fedmpt.protocol.codec import state_limit
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleManifest
from fedmpt.protocol.messages import ENCODINGS, Limits, Manifest
from fedmpt.protocol.topics import check_name

MAXIMUM_SAMPLES = 10_000_000  # unless the operator says otherwise, to this many at most:
LARGEST_MAXIMUM_SAMPLES = 10**12
MAXIMUM_NORM = 1000.0


class SettingsError(FedmptError):
    """A setting of the federation is out of range."""


@dataclass(frozen=True)
class FederationSettings:
    """``refusals`` is how many a client may collect in a round before it is muted until the round ends.

    ``encoding`` is how clients send their updates; ``metrics`` whether they are asked for validation metrics.
    ``update_bytes`` None takes the size of the state in float32; ``norm`` bounds a difference's L2 norm. An update
    that is longer than ``norm_factor`` times the round's median is scaled down to that (0: off; see
    :mod:`fedmpt.aggregator.norms`). With privacy this is off: updates are clipped, and what one counts for must not
    depend on the others.
    """

    name: str
    rounds: RoundSettings
    strategy: StrategySettings
    encoding: str = "float16"
    metrics: bool = True
    refusals: int = 10
    update_bytes: int | None = None
    samples: int = MAXIMUM_SAMPLES
    norm: float = MAXIMUM_NORM
    norm_factor: float = NORM_FACTOR
    privacy: PrivacySettings | None = None

    def __post_init__(self) -> None:
        check_name("federation", self.name)
        if self.encoding not in ENCODINGS:
            raise SettingsError(
                f"update encoding {self.encoding!r} is unknown; take one of {', '.join(ENCODINGS)}"
            )
        if self.refusals < 1 or not 0 < self.norm < 1e30:
            raise SettingsError("the limits on refusals and norm must be positive")
        if self.norm_factor != 0 and not 1 <= self.norm_factor < 1e30:
            raise SettingsError("the factor of the norm limit must be at least 1, or 0 for no such limit")
        if not 1 <= self.samples <= LARGEST_MAXIMUM_SAMPLES:
            raise SettingsError(f"the limit on samples must be 1 to {LARGEST_MAXIMUM_SAMPLES}")
        if self.privacy:
            check_privacy(
                self.privacy,
                strategy=self.strategy.name,
                metrics=self.metrics,
                clients=MAXIMUM_CHOSEN,
                rounds=self.rounds.rounds + self.rounds.calibrate,
            )


def manifest_message(bundle: BundleManifest, settings: FederationSettings, run: str) -> Manifest:
    """The federation's manifest in one run; the training set-up carries the operator's number of rounds."""
    rounds = settings.rounds
    return Manifest(
        federation=settings.name,
        method=bundle.method,
        labels=bundle.labels,
        conditions=bundle.conditions,
        bundle=bundle.digest,
        state=bundle.state,
        training=replace(bundle.training, rounds=rounds.rounds, calibrate=rounds.calibrate),
        strategy=settings.strategy.name,
        encoding=settings.encoding,
        metrics=settings.metrics,
        limits=Limits(
            update_bytes=settings.update_bytes or state_limit(bundle.state),
            samples=settings.samples,
            norm=settings.norm,
        ),
        run=run,
    )
