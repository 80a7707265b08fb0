"""Whether an update may count: every check has a name, and a refusal says which one failed and its limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fedmpt.aggregator.privacy import l2_norm
from fedmpt.protocol.codec import CodecError, decode_update
from fedmpt.protocol.manifest import TensorSpec
from fedmpt.protocol.messages import Limits
from fedmpt.protocol.screening import Screen
from fedmpt.protocol.text import quoted

# In the order in which they are made. The codec makes those from ``size`` to ``finite``.
CHECKS = (
    "chosen",
    "size",
    "format",
    "encoding",
    "scale",
    "names",
    "dtype",
    "shape",
    "finite",
    "identity",
    "base",
    "samples",
    "metrics",
    "norm",
)


@dataclass(frozen=True)
class AdmissionContext:
    """What an update must fit: the open round, its base state's digest, its chosen clients and tensors."""

    federation: str
    round: int
    base: str
    chosen: frozenset[str]
    trainable: Mapping[str, TensorSpec]
    limits: Limits
    metrics: bool

    @cached_property
    def screen(self) -> Screen:
        """Sees quickly that an update passes all checks but ``chosen``."""
        return Screen(
            self.trainable,
            self.limits,
            federation=self.federation,
            round_number=self.round,
            base=self.base,
            metrics=self.metrics,
        )


@dataclass(frozen=True)
class Admitted:
    """An update counts; ``norm`` is the L2 norm of its difference."""

    norm: float


@dataclass(frozen=True)
class Refused:
    """Why an update does not count: the name of the check, and a text with its limit."""

    check: str
    reason: str


def admit(payload: bytes, client: str, context: AdmissionContext) -> Admitted | Refused:
    """Check an update that arrived on ``client``'s topic of the open round."""
    if client not in context.chosen:
        return Refused("chosen", f"{client} is not among the {len(context.chosen)} clients of this round")
    if (norm := context.screen.norm(payload, client)) is not None:
        return Admitted(norm)
    try:
        update, _ = decode_update(payload, context.trainable, context.limits.update_bytes)
    except CodecError as error:
        return Refused(error.check, str(error))
    if (update.federation, update.round, update.client) != (context.federation, context.round, client):
        return Refused(
            "identity",
            f"it says federation {update.federation}, round {update.round}, client {update.client}, but its "
            f"topic says {context.federation}, {context.round}, {client}",
        )
    if update.base != context.base:
        return Refused(
            "base",
            f"its base state is {quoted(update.base[:12])}…, but the round's is '{context.base[:12]}'…",
        )
    if not 1 <= update.samples <= context.limits.samples:
        return Refused("samples", f"{update.samples} samples, but 1 to {context.limits.samples} are accepted")
    if not 0 <= update.validation_samples <= context.limits.samples:
        return Refused("samples", f"at most {context.limits.samples} validation samples are accepted")
    if update.metrics and not context.metrics:
        return Refused("metrics", "this federation does not collect metrics; send none")
    norm = l2_norm(update.difference)
    if norm > context.limits.norm:
        return Refused(
            "norm", f"its L2 norm is {norm:.6g}, but at most {context.limits.norm:.6g} is accepted"
        )
    return Admitted(norm)
