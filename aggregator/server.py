"""Connects a federation to MQTT: the only place of the aggregator that knows a network and a clock."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from fedmpt.aggregator.federation import Federation, Outgoing
from fedmpt.protocol.address import BrokerAddress
from fedmpt.protocol.codec import MAXIMUM_METRICS, Update, encode_update
from fedmpt.protocol.connection import IN_FLIGHT, Connection
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.events import (
    Connected,
    Delivery,
    Disconnected,
    Message,
    PayloadTooLarge,
    PublishRefused,
)
from fedmpt.protocol.messages import Receipt, Status, receipt_to_json, to_json

logger = logging.getLogger(__name__)

BATCH = 100  # messages that share one commit at most
# A commit costs as much as checking several updates, so while many come, it waits for more of them.
BUSY_BATCH = 8
GATHER_SECONDS = 0.002
# Of updates of full size that the broker may send ahead of our acknowledgements. Larger packets can come (to be
# refused with a receipt), and the round's own message is larger; what waits of all is bounded by the connection.
WINDOW_BYTES = 32 << 20
WINDOW_LEAST = 20
TICK_SECONDS = 0.25
STATUS_SECONDS = 1.0  # the status topic changes no faster
HEARTBEAT_SECONDS = 15.0  # and no slower
WAITING_SECONDS = 5.0  # so long must it wait for the same clients before the log says so
SETTLE_SECONDS = 1.0  # after connecting, what waited at the broker comes in before any deadline is judged
FAREWELL_SECONDS = 30.0  # for the broker to take the last messages
HASTY_FAREWELL_SECONDS = 2.0  # the same, when an error ends it


def connect(
    address: BrokerAddress,
    federation: Federation,
    timeout: float | None = 15.0,
    stop: threading.Event | None = None,
) -> Connection:
    """A connection as the federation's aggregator, with a last will on the status topic.

    Where ``stop`` is set before the broker has accepted us, it is not connected.

    Raises:
        BrokerUnreachable: no broker there, or it does not accept us.
        PayloadTooLarge: the broker would not take the federation's state or updates.
    """
    topics, limit = federation.topics, federation.manifest.limits.update_bytes
    connection = Connection(
        address,
        f"fedmpt-{topics.federation}-aggregator",
        subscriptions=(topics.all_presence, topics.all_updates, topics.round),
        # Without what may be large: a will beyond the broker's limit would keep us out, and says no more.
        will=(topics.status, to_json(_cut(federation.status(time.time(), online=False)))),
        maximum_packet_size=max(1 << 20, 4 * limit),
        receive_window=max(WINDOW_LEAST, min(IN_FLIGHT, WINDOW_BYTES // limit)),
        examine=federation.examine,
    )
    try:
        connection.connect(timeout, stop)
        for message in federation.retained():
            connection.check_size(message.topic, len(message.payload))
        connection.check_size(topics.update(federation.round.number, "x" * 64), _update_size(federation))
    except BaseException:
        connection.close()
        raise
    return connection


def serve(
    federation: Federation,
    connection: Connection,
    *,
    stop: threading.Event,
    on_status: Callable[[Status], None] = lambda status: None,
    linger: float = 0.0,
) -> bool:
    """Run rounds until the last has closed (True) or ``stop`` is set (False).

    ``linger`` is how many seconds to stay for clients that are still online after the last round; an embedded
    broker must not vanish before they have read the result.
    """
    loop = _Loop(federation, connection, on_status)
    leave_at: float | None = None
    try:
        while not stop.is_set():
            loop.step()
            if federation.finished:
                leave_at = leave_at or time.monotonic() + linger
                if time.monotonic() >= leave_at or not federation.present():
                    break
        federation.commit()
    except BaseException:
        with contextlib.suppress(FedmptError):
            loop.farewell(HASTY_FAREWELL_SECONDS)
        raise
    loop.farewell(FAREWELL_SECONDS)
    return federation.finished


def _update_size(federation: Federation) -> int:
    """About the most bytes that a client's update takes in the federation's encoding."""
    nothing = Update(
        federation=federation.settings.name,
        round=federation.round.number,
        client="x" * 64,
        base=federation.digest,
        samples=federation.settings.samples,
        validation_samples=federation.settings.samples,
        metrics={f"metric number {number}": 1 / 3 for number in range(MAXIMUM_METRICS)},
        difference=federation.state,
    )
    return len(encode_update(nothing, federation.settings.encoding))


class _Loop:
    """What one pass after another shares: whether we are connected, what is on its way, what was last said."""

    def __init__(
        self, federation: Federation, connection: Connection, on_status: Callable[[Status], None]
    ) -> None:
        self._federation = federation
        self._connection = connection
        self._on_status = on_status
        self._busy = False  # many messages came last time
        self._judge_from = float("inf")  # inf while there is no connection
        self._said = 0.0
        self._last: Status | None = None
        self._waiting, self._waiting_since = "", 0.0
        self._looked = 0.0
        self._deliveries: list[Delivery] = []

    def step(self) -> None:
        """Wait for messages, take a batch of them, commit, acknowledge, and let the rounds go on."""
        gather = GATHER_SECONDS if self._busy else 0.0
        events = self._connection.receive_many(BATCH, TICK_SECONDS, gather)
        self._busy = len(events) >= BUSY_BATCH
        messages: list[Message] = []
        receipts: list[Receipt] = []
        for event in events:
            if isinstance(event, Message):
                messages.append(event)
                if (receipt := self._handle(event)) is not None:
                    receipts.append(receipt)
            elif isinstance(event, Connected):
                logger.info("connected", extra={"mqtt": event.protocol})
                self._judge_from = time.monotonic() + SETTLE_SECONDS
                self._federation.reconnected()
                self._said = 0.0
                self._publish(self._federation.retained())
            elif isinstance(event, Disconnected):
                logger.warning("disconnected", extra={"reason": event.reason})
                self._judge_from = float("inf")
        self._federation.commit()
        self._connection.acknowledge_all(messages)
        self._answer(receipts)
        if time.monotonic() >= self._judge_from:
            self._publish(self._federation.tick(time.time()))
        self._say_status()

    def farewell(self, seconds: float) -> None:
        """Publish the last status and wait for the broker to have everything."""
        self._connection.stop_receiving()
        self._publish([self._status_message(self._federation.status(time.time(), online=False))])
        end = time.monotonic() + seconds
        for delivery in self._deliveries:
            if not delivery.wait(max(0.0, end - time.monotonic())):
                logger.warning("the broker did not take the last messages", extra={"topic": delivery.topic})
                break

    def _handle(self, message: Message) -> Receipt | None:
        topics = self._federation.topics
        if found := message.examined:
            return self._federation.receive(found.context.round, found.client, message.payload, found)
        if (place := topics.round_and_client_of_update(message.topic)) is not None:
            return self._federation.receive(*place, message.payload)
        if (client := topics.client_of_presence(message.topic)) is not None:
            return self._federation.presence(client, message.payload)
        if message.topic == topics.round:
            self._publish(self._federation.echo(message.payload))
            return None
        logger.warning("message ignored", extra={"topic": message.topic[:200]})
        return None

    def _answer(self, receipts: list[Receipt]) -> None:
        topics = self._federation.topics
        try:
            self._connection.publish_all(
                [(topics.receipt(receipt.client), receipt_to_json(receipt)) for receipt in receipts]
            )
        except PublishRefused as error:
            # The outbox is full. A client without its receipt sends its update again.
            logger.warning("receipts dropped", extra={"reason": str(error)})

    def _publish(self, messages: list[Outgoing]) -> None:
        """Send messages, and keep an eye on the retained ones: raises PublishRefused if the broker's ACL does."""
        self._deliveries = [delivery for delivery in self._deliveries if not delivery.wait(0)]
        for message in messages:
            try:
                delivery = self._connection.publish(message.topic, message.payload, retain=message.retain)
            except (PublishRefused, PayloadTooLarge) as error:
                # The outbox is full, or the broker's limit is too small for this one message: the rounds go on.
                # Retained topics are published again after every reconnection.
                level = logging.ERROR if isinstance(error, PayloadTooLarge) else logging.WARNING
                logger.log(level, "message dropped", extra={"topic": message.topic, "reason": str(error)})
                continue
            if message.retain:
                self._deliveries.append(delivery)

    def _say_status(self) -> None:
        """Publish the status when it has changed, and now and then as a sign of life."""
        now = time.time()
        if now - self._looked < TICK_SECONDS:
            return
        self._looked = now
        status = self._federation.status(now)
        self._on_status(status)
        if status.waiting != self._waiting:
            self._waiting, self._waiting_since = status.waiting, now
        elif self._waiting and now - self._waiting_since >= WAITING_SECONDS:
            logger.info(status.waiting, extra={"round": status.round})
            self._waiting_since = float("inf")  # said once
        changed = self._last is None or replace(status, time=self._last.time) != self._last
        # What is said without a connection is old when it is heard, and would fill the outbox.
        connected = self._judge_from != float("inf")
        if connected and now - self._said >= (STATUS_SECONDS if changed else HEARTBEAT_SECONDS):
            self._publish([self._status_message(status)])
            self._last, self._said = status, now

    def _status_message(self, status: Status) -> Outgoing:
        """The status, cut where the broker would not take all of it."""
        topic, payload = self._federation.topics.status, to_json(status)
        try:
            self._connection.check_size(topic, len(payload))
        except PayloadTooLarge:
            payload = to_json(_cut(status))
        return Outgoing(topic, payload)


def _cut(status: Status) -> Status:
    """Only what cannot be large."""
    return replace(status, metrics={}, waiting="")
