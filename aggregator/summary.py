"""The figures of one round, gathered while its updates are read."""

from __future__ import annotations

from fedmpt.protocol.codec import Update


class RoundSummary:
    """Bytes by client, numbers of photos, and metrics as means weighted by validation photos."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget all: a new pass over the updates starts."""
        self.bytes: dict[str, int] = {}
        self.samples = 0
        self.validation_samples = 0
        self._sums: dict[str, float] = {}
        self._weights: dict[str, int] = {}

    def add(self, update: Update, payload_bytes: int) -> None:
        """Count one client's update."""
        self.bytes[update.client] = payload_bytes
        self.samples += update.samples
        self.validation_samples += update.validation_samples
        for name, value in update.metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + update.validation_samples * value
            self._weights[name] = self._weights.get(name, 0) + update.validation_samples

    def metrics(self) -> dict[str, float]:
        """Each metric's mean over the clients that reported it; those without validation photos do not count."""
        return {name: self._sums[name] / weight for name, weight in sorted(self._weights.items()) if weight}
