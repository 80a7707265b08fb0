"""One federation without a broker and without a clock: messages in, receipts and messages out.

``server.py`` connects it to MQTT; the simulator drives it in one process. Nothing here blocks or reads the time.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedmpt.aggregator.admission import AdmissionContext, Admitted, Refused, admit
from fedmpt.aggregator.norms import NormLimit, lower_median, norm_limit
from fedmpt.aggregator.privacy import epsilon, l2_norm, privatise
from fedmpt.aggregator.rounds import (
    first_round,
    following_round,
    is_exhausted,
    is_overdue,
    open_round,
    renewed_round,
    should_close,
)
from fedmpt.aggregator.settings import FederationSettings, manifest_message
from fedmpt.aggregator.store import Store
from fedmpt.aggregator.strategies import Contribution, aggregate, apply_step
from fedmpt.aggregator.summary import RoundSummary
from fedmpt.protocol.codec import (
    CodecError,
    State,
    Update,
    decode_state,
    decode_update,
    encode_state,
    state_digest,
)
from fedmpt.protocol.manifest import BundleManifest, TensorSpec
from fedmpt.protocol.messages import (
    MessageError,
    Presence,
    Receipt,
    Round,
    Status,
    from_json,
    to_json,
)
from fedmpt.protocol.text import quoted
from fedmpt.protocol.topics import Topics

logger = logging.getLogger(__name__)

MAXIMUM_CLIENTS = 100_000
# Honest clients repeat an update now and then (a lost acknowledgement, a restart), so many times that many
# stale or duplicate updates count like that many refusals.
REPEATS_PER_REFUSAL = 10
CALIBRATED = ("bias", "scale")
REASON_CHARACTERS = 1000  # a receipt must stay within what its reader takes
LISTED_REFUSALS = 100  # clients that a round's history names with their refusals


@dataclass(frozen=True)
class Outgoing:
    """A message for the broker; an empty retained payload deletes the topic."""

    topic: str
    payload: bytes
    retain: bool = True


class Examined(NamedTuple):
    """What can be said of an update by itself: its digest, and whether it may count in a round."""

    client: str
    context: AdmissionContext
    sha256: bytes
    verdict: Admitted | Refused


class _Taken(NamedTuple):
    """An update that counts so far: its digest and L2 norm."""

    sha256: str
    norm: float


class Federation:
    """The state of one federation, kept in ``store`` and continued from it.

    Call ``receive`` for updates, ``commit`` before acknowledging them, ``presence`` for presence messages, and
    ``tick`` often: it opens and closes rounds and returns what is to be published.

    Whatever a client sends, nothing but a receipt comes of it; only the store's errors leave these methods.
    """

    def __init__(
        self, store: Store, bundle: BundleManifest, initial: State, settings: FederationSettings
    ) -> None:
        self.settings = settings
        self.topics = Topics(settings.name)
        self._store = store
        self._present: set[str] = set()
        self._away: set[str] = set()  # said, or their last will did, that they are offline
        self._left: set[str] = set()  # of these: stopped, and not expected back
        self._refused: dict[str, str] = {}  # of the chosen: whose update was refused, and by which check
        self._refusals: dict[str, int] = {}
        self._repeats: dict[str, int] = {}
        self._latest_metrics: dict[str, float] = {}
        self.run = store.run()
        self.manifest = manifest_message(bundle, settings, self.run)
        store.bind(
            {
                "federation": settings.name,
                "bundle": bundle.digest,
                "strategy": vars(settings.strategy),
                "training": vars(self.manifest.training),
                "privacy": vars(settings.privacy) if settings.privacy else None,
            }
        )
        if store.load() is None:
            store.close_round(first_round(settings.rounds), encode_state(initial), {}, None)
        loaded = store.load()
        assert loaded is not None
        self.round, self._payload, self._memory = loaded
        self.state = decode_state(self._payload, bundle.state, "the store's state")
        self.digest = state_digest(self.state)
        self._admission = self._context()
        self._received = {client: self._taken(client, payload) for client, payload in store.updates()}
        if past := store.history():
            self._latest_metrics = past[-1].get("metrics", {})

    @property
    def finished(self) -> bool:
        """Whether the last round has closed; ``state`` is then the result."""
        return self.round.phase == "finished"

    @property
    def trainable(self) -> dict[str, TensorSpec]:
        """The tensors that an update of the present round holds."""
        specs = self.manifest.state
        names = {"calibrate": CALIBRATED, "train": tuple(specs), "finished": ()}[self.round.phase]
        return {name: specs[name] for name in sorted(names)}

    def presence(self, client: str, payload: bytes) -> Receipt | None:
        """Take note of a client's presence; a receipt only if it is refused."""
        topic, number = self.topics.presence(client), self.round.number
        if not payload:
            self._present.discard(client)
            return None
        try:
            message = from_json(Presence, payload, topic)
        except MessageError as error:
            return self._refuse(client, number, _sha256(payload), "format", str(error))
        if (message.client, message.federation) != (client, self.settings.name):
            return self._refuse(
                client, number, _sha256(payload), "identity", f"{topic}: it speaks for {message.client}"
            )
        returned = client in self._away
        self._left.discard(client)
        if not message.online:
            self._present.discard(client)
            if len(self._away) < MAXIMUM_CLIENTS:
                self._away.add(client)
                if message.left:
                    self._left.add(client)
        elif message.bundle != self.manifest.bundle:
            return self._refuse(
                client,
                number,
                _sha256(payload),
                "bundle",
                f"its bundle is {quoted(message.bundle[:12])}…, but this federation's is "
                f"'{self.manifest.bundle[:12]}'…; "
                "copy the aggregator's bundle folder to the site",
            )
        elif len(self._present) < MAXIMUM_CLIENTS:
            self._present.add(client)
            self._away.discard(client)
            if returned:  # started anew, it may do better
                self._refused.pop(client, None)
        return None

    def reconnected(self) -> None:
        """Forget who is online and who repeated: over a new connection the broker says it all again."""
        self._present.clear()
        self._repeats.clear()

    def examine(self, topic: str, payload: bytes) -> Examined | None:
        """The costly part of ``receive``, which changes nothing and may run in another thread, ahead of it.

        None for what is no update that is waited for.
        """
        place, context = self.topics.round_and_client_of_update(topic), self._admission
        if place is None:
            return None
        number, client = place
        if number != context.round or client in self._received or self._muted(client):
            return None
        return Examined(client, context, hashlib.sha256(payload).digest(), admit(payload, client, context))

    def receive(
        self, number: int, client: str, payload: bytes, examined: Examined | None = None
    ) -> Receipt | None:
        """Take an update from the topic of (round ``number``, ``client``); None if the client is muted.

        An accepted update is durable only after ``commit``; send its receipt and acknowledgement then.
        ``examined`` is what ``examine`` found earlier, if it was asked.
        """
        if self._muted(client):
            return None
        sha256 = examined.sha256 if examined else hashlib.sha256(payload).digest()
        update = sha256.hex()
        if number != self.round.number or self.round.opened is None:
            return self._repeat(
                client, number, update, "stale", "round", f"round {number} is not open; see the round topic"
            )
        if client in self._received:
            return self._repeat(client, number, update, "duplicate", "", "this round has the client's update")
        if examined and examined.context is self._admission:
            verdict = examined.verdict
        else:
            verdict = admit(payload, client, self._admission)
        if isinstance(verdict, Refused):
            # Of an earlier state: the client may not have seen the round's yet, and will answer that.
            if client in self._admission.chosen and verdict.check != "base":
                self._refused[client] = verdict.check
            return self._refuse(client, number, update, verdict.check, verdict.reason)
        self._store.add_update(client, payload, sha256)
        self._received[client] = _Taken(update, verdict.norm)
        self._refused.pop(client, None)
        if logger.isEnabledFor(logging.DEBUG):
            about = {"client": client, "round": number, "bytes": len(payload)}
            logger.debug("update accepted", extra=about)
        return self._receipt(client, number, update, "accepted", "", "")

    def commit(self) -> None:
        """Make everything received so far durable."""
        self._store.commit()

    def tick(self, now: float) -> list[Outgoing]:
        """Open, close or renew the round as it is due at ``now``; what is to be published for that."""
        before, receipts = self.round, []
        if self.round.opened is not None:
            received, silent = len(self._received), self._silent()
            gone = len(silent - self._muted_clients())
            if should_close(self.round, self.settings.rounds, received, len(silent), now):
                receipts = self._close(now)
            elif is_overdue(self.round, now):
                self._renew("no update came", now)
                self._forgive()
            elif is_exhausted(self.round, received, len(silent), gone):
                # Nobody is forgiven, or the same clients would be chosen and muted over and over.
                self._renew(f"nobody is left to wait for: {self._unawaited()}", now)
        if self.round.opened is None and not self.finished and self._hopeful():
            eligible = self._present - self._muted_clients()
            opened = open_round(self.round, self.settings.rounds, eligible, now)
            if opened is not self.round:
                self.round = opened
                self._store.save_round(opened)
                logger.info(
                    "round open",
                    extra={"round": opened.number, "phase": opened.phase, "chosen": len(opened.chosen)},
                )
        if self.round == before:
            return receipts
        self._admission = self._context()
        return [*receipts, *self._round_messages()]

    def _hopeful(self) -> bool:
        """Whether anybody is present whose update can still be expected."""
        return not self._present.issubset(self._muted_clients().union(self._refused))

    def retained(self) -> list[Outgoing]:
        """Every retained topic, to be published whenever the connection is made."""
        manifest = Outgoing(self.topics.manifest, to_json(self.manifest))
        return [manifest, *self._round_messages()]

    def echo(self, payload: bytes) -> list[Outgoing]:
        """What to publish after reading our own round topic: the round again, if an older one overtook it.

        What the broker still keeps of an earlier run is deleted.
        """
        current = self._round_message()
        if current.payload == payload:
            return []
        try:
            found = from_json(Round, payload, self.topics.round)
        except MessageError:  # empty, or a stranger's
            return [current]
        leftovers: set[int] = set()
        if found.run != self.run:
            leftovers = {found.round, max(0, found.round - 1)} - {self.round.number}
        return [current, *(Outgoing(self.topics.state(number), b"") for number in sorted(leftovers))]

    def status(self, now: float, online: bool = True) -> Status:
        """The aggregator's word on where it stands."""
        return Status(
            federation=self.settings.name,
            online=online,
            round=self.round.number,
            rounds=self.settings.rounds.rounds,
            phase=self.round.phase,
            present=len(self._present),
            chosen=len(self.round.chosen),
            received=len(self._received),
            refused=sum(self._refusals.values()),
            muted=len(self._muted_clients()),
            deadline=self.round.deadline,
            waiting=self._waiting(),
            metrics=self._latest_metrics,
            time=now,
        )

    def present(self) -> list[str]:
        """Names of the clients that are online, in order."""
        return sorted(self._present)

    def _waiting(self) -> str:
        """What and whom it waits for, in words."""
        if self.finished:
            return ""
        if self.round.opened is None:
            muted = self._muted_clients()
            missing = self.settings.rounds.clients_min - len(self._present - muted)
            if missing <= 0 and self._hopeful():
                return ""
            if missing <= 0:
                refused = self._refused.keys() - muted
                return f"waiting for others than those whose update was refused: {_some(refused)}"
            text = f"waiting for {missing} more client{'s' if missing > 1 else ''} to begin"
            if muted:
                text += (
                    f", without those muted until a round ends or the aggregator is restarted: {_some(muted)}"
                )
            return text
        awaited = self._admission.chosen.difference(self._received, self._silent())
        here, absent = awaited & self._present, awaited - self._present
        if here:
            text = f"waiting for {_some(here)}" + (f"; absent: {_some(absent)}" if absent else "")
        else:
            text = f"waiting for absent clients: {_some(absent)}" if absent else ""
        if unawaited := self._unawaited():
            text += ("; " if text else "") + f"not waiting for {unawaited}"
        return text

    def _unawaited(self) -> str:
        """The chosen clients that will not answer, each with the reason."""
        muted = self._muted_clients()
        reasons = {
            client: "muted" if client in muted else self._refused.get(client, "left")
            for client in self._silent()
        }
        return _some([f"{client} ({reason})" for client, reason in reasons.items()])

    def _round_message(self) -> Outgoing:
        message = Round(
            federation=self.settings.name,
            round=self.round.number,
            phase=self.round.phase,
            trainable=tuple(self.trainable),
            state=self.digest,
            deadline=self.round.deadline,
            clients=self.round.chosen,
            edition=self.round.edition,
            run=self.run,
        )
        return Outgoing(self.topics.round, to_json(message))

    def _round_messages(self) -> list[Outgoing]:
        """State first, so that whoever reads the round can have its state; then the old state's deletion."""
        number = self.round.number
        messages = [Outgoing(self.topics.state(number), self._payload), self._round_message()]
        if number > 0:
            messages.append(Outgoing(self.topics.state(number - 1), b""))
        return messages

    def _context(self) -> AdmissionContext:
        return AdmissionContext(
            federation=self.settings.name,
            round=self.round.number,
            base=self.digest,
            chosen=frozenset(self.round.chosen),
            trainable=self.trainable,
            limits=self.manifest.limits,
            metrics=self.settings.metrics,
        )

    def _taken(self, client: str, payload: bytes) -> _Taken:
        """What the store has of a client in the open round."""
        norm = self._admission.screen.norm(payload, client)
        if norm is None:
            try:
                update, _ = decode_update(payload, self.trainable, self.manifest.limits.update_bytes)
                norm = l2_norm(update.difference)
            except CodecError:  # an earlier release took it; it is dropped when the round closes
                norm = 0.0
        return _Taken(_sha256(payload), norm)

    def _renew(self, reason: str, now: float) -> None:
        logger.warning("round renewed", extra={"round": self.round.number, "reason": reason})
        self.round = renewed_round(self.round, now)
        self._store.save_round(self.round)

    def _close(self, now: float) -> list[Outgoing]:
        """Aggregate the round's updates and make the next round's state durable, in one transaction.

        An update that cannot be used after all is dropped instead, and the round stays open. The receipts of those
        that were scaled down are returned.
        """
        factor = 0.0 if self.settings.privacy else self.settings.norm_factor
        norms = [taken.norm for taken in self._received.values()]
        limit = norm_limit(factor, norms, l2_norm(self.state), self.round.phase == "calibrate")
        long = {client: taken for client, taken in self._received.items() if taken.norm > limit.value}
        number = self.round.number
        try:
            self._aggregate(now, limit)
        except _UnusableUpdate as error:
            client = error.client
            logger.error(
                "update dropped",
                extra={"client": client, "round": self.round.number, "reason": quoted(str(error.__cause__))},
            )
            self._store.drop_update(client)
            del self._received[client]
            self._refusals[client] = self.settings.refusals + 1
            return []
        return [self._scaled(client, number, taken, limit) for client, taken in sorted(long.items())]

    def _scaled(self, client: str, number: int, taken: _Taken, limit: NormLimit) -> Outgoing:
        """Tell a client that its update counted for less than it says."""
        reason = f"its L2 norm is {taken.norm:.6g}, but it counts with {limit.value:.6g}, {limit.reason}"
        logger.warning("update scaled down", extra={"client": client, "round": number, "reason": reason})
        receipt = self._receipt(client, number, taken.sha256, "accepted", "norm", reason)
        return Outgoing(self.topics.receipt(client), to_json(receipt), retain=False)

    def _aggregate(self, now: float, limit: NormLimit) -> None:
        closing, base = self.round, self.digest
        calibrating = closing.phase == "calibrate"
        summary = RoundSummary()

        def contributions() -> Iterator[Contribution]:
            summary.begin()
            for client, payload in self._store.updates():
                try:
                    update, _ = decode_update(payload, self.trainable, self.manifest.limits.update_bytes)
                    summary.add(update, len(payload))
                except Exception as error:
                    # It was admitted, so this is a mistake of ours, and it must not stop the federation.
                    raise _UnusableUpdate(client) from error
                yield Contribution(client, update.samples, self._bounded(client, update, limit))

        if self.settings.privacy:
            differences = (item.difference for item in contributions())
            step = privatise(differences, self.settings.privacy, len(closing.chosen))
            self.state = apply_step(self.state, step)
        else:
            self.state, self._memory = aggregate(
                self.settings.strategy, self.state, contributions, self._memory, calibrating=calibrating
            )
        self._payload, self.digest = encode_state(self.state), state_digest(self.state)
        self.round = following_round(closing, self.settings.rounds, now)
        self._latest_metrics = summary.metrics()
        opened = closing.opened if closing.opened is not None else now
        history: dict[str, Any] = {
            "round": closing.number,
            "phase": closing.phase,
            "opened": opened,
            "closed": now,
            "seconds": now - opened,
            "chosen": len(closing.chosen),
            "received": len(summary.bytes),
            "refused": sum(self._refusals.values()),
            "refusals": dict(Counter(self._refusals).most_common(LISTED_REFUSALS)),
            "bytes": summary.bytes,
            "metrics": self._latest_metrics,
            "base": base,
            "state": self.digest,
        }
        if not self.settings.privacy:
            history["samples"] = summary.samples
            history["validation_samples"] = summary.validation_samples
            norms = {client: taken.norm for client, taken in self._received.items()}
            long = Counter({client: norm for client, norm in norms.items() if norm > limit.value})
            history["norms"] = {
                "median": lower_median(sorted(norms.values())),
                "largest": max(norms.values()),
            }
            if math.isfinite(limit.value):
                history["norms"]["limit"] = limit.value
            history["scaled"] = dict(long.most_common(LISTED_REFUSALS))
        else:
            history["epsilon"] = epsilon(self.settings.privacy, len(self._store.history()) + 1)
        self._store.close_round(self.round, self._payload, self._memory, history)
        self._received.clear()
        self._refused.clear()
        self._forgive()
        logger.info(
            "round closed",
            extra={
                key: value
                for key, value in history.items()
                if key not in ("bytes", "refusals", "scaled", "opened", "closed")
            },
        )

    def _muted(self, client: str) -> bool:
        refusals, repeats = self._refusals.get(client, 0), self._repeats.get(client, 0)
        return refusals > self.settings.refusals or repeats > REPEATS_PER_REFUSAL * self.settings.refusals

    def _muted_clients(self) -> set[str]:
        return {client for client in self._refusals.keys() | self._repeats.keys() if self._muted(client)}

    def _silent(self) -> Set[str]:
        """The chosen clients that will not answer: muted, refused, or stopped."""
        silent = self._left.union(self._muted_clients(), self._refused)
        return {client for client in self._admission.chosen & silent if client not in self._received}

    def _bounded(self, client: str, update: Update, limit: NormLimit) -> State:
        """The difference of an update as it counts."""
        scale = limit.scale(self._received[client].norm)
        if scale == 1.0:
            return update.difference
        return {
            name: np.float32(scale * value.astype(np.float64)) for name, value in update.difference.items()
        }

    def _forgive(self) -> None:
        """Hear those again who were muted; who was refused less often has no other update and stays unawaited."""
        for client in self._muted_clients():
            self._refused.pop(client, None)
        self._refusals.clear()
        self._repeats.clear()

    def _repeat(
        self, client: str, number: int, update: str, status: str, check: str, reason: str
    ) -> Receipt | None:
        """Answer an update that changes nothing; a client that floods us with them is muted."""
        if len(self._repeats) >= MAXIMUM_CLIENTS:
            return None
        self._repeats[client] = self._repeats.get(client, 0) + 1
        if self._muted(client):
            reason += f"; repeated {self._repeats[client]} times: muted until the round ends"
            logger.warning("client muted", extra={"client": client, "round": number, "reason": reason})
        return self._receipt(client, number, update, status, check, reason)

    def _refuse(self, client: str, number: int, update: str, check: str, reason: str) -> Receipt | None:
        if self._muted(client) or len(self._refusals) >= MAXIMUM_CLIENTS:
            return None
        self._refusals[client] = self._refusals.get(client, 0) + 1
        if self._muted(client):
            reason += f"; {self._refusals[client]} refusals: muted until the round ends"
        logger.warning(
            "update refused", extra={"client": client, "round": number, "check": check, "reason": reason}
        )
        return self._receipt(client, number, update, "rejected", check, reason)

    def _receipt(
        self, client: str, number: int, update: str, status: str, check: str, reason: str
    ) -> Receipt:
        return Receipt(self.settings.name, client, number, update, status, check, reason[:REASON_CHARACTERS])


class _UnusableUpdate(Exception):
    """The stored update of ``client`` can be decoded or counted no more; the cause says why."""

    def __init__(self, client: str) -> None:
        super().__init__(client)
        self.client = client


def _some(names: Collection[str]) -> str:
    """The first five names in order, and how many more there are."""
    return ", ".join(heapq.nsmallest(5, names)) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
