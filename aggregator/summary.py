"""The figures of one round, gathered while its updates are read."""

from __future__ import annotations

import math

from fedmpt.protocol.codec import Update

KNOWN_METRICS = ("mAP", "CF1", "OF1", "loss")
OTHER_METRICS = 12  # clients make names up; the status carries what is gathered here, so it must stay small


class RoundSummary:
    """Bytes by client, numbers of photos, and metrics as means weighted by validation photos.

    Of metrics beside mAP, CF1, OF1 and loss it keeps the first twelve names that it meets.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget all: a new pass over the updates starts."""
        self.bytes: dict[str, int] = {}
        self.samples = 0
        self.validation_samples = 0
        self._sums: dict[str, tuple[float, int]] = {}  # metric → (weighted sum, sum of weights)
        self._others = 0

    def add(self, update: Update, payload_bytes: int) -> None:
        """Count one client's update.

        Raises:
            OverflowError: a sum of metrics would not be finite. The update is not counted.
        """
        sums = {}
        for name, value in update.metrics.items():
            total, weight = self._sums.get(name, (0.0, 0))
            total += update.validation_samples * value
            if not math.isfinite(total):
                raise OverflowError(f"the sum of metric {name!r} is not finite")
            sums[name] = (total, weight + update.validation_samples)
        for name, entry in sums.items():
            if name not in KNOWN_METRICS and name not in self._sums:
                if self._others == OTHER_METRICS:
                    continue
                self._others += 1
            self._sums[name] = entry
        self.bytes[update.client] = payload_bytes
        self.samples += update.samples
        self.validation_samples += update.validation_samples

    def metrics(self) -> dict[str, float]:
        """Each metric's mean over the clients that reported it; those without validation photos do not count."""
        return {name: total / weight for name, (total, weight) in sorted(self._sums.items()) if weight}
