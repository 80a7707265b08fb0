"""One MQTT connection that survives its broker: a small blocking interface over paho-mqtt.

MQTT 5 with a session that outlives disconnections, or 3.1.1 where the broker has no 5. Everything is QoS 1 and
acknowledged by hand, so that a message counts as received only once its receiver says so. Reconnection waits a
random time ("full jitter"), so that a thousand sites do not return at once. paho connects, subscribes and keeps
alive; messages and their acknowledgements go past it (see ``wire.py``). That needs more of paho than it promises
to keep, so its version is bounded, and what would fail silently is checked.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fedmpt.protocol.address import BrokerAddress
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.events import (
    BrokerUnreachable,
    Connected,
    Delivery,
    Disconnected,
    Event,
    IdentityTaken,
    Message,
    PayloadTooLarge,
    PublishRefused,
    SubscribeRefused,
)
from fedmpt.protocol.outbox import Outbox
from fedmpt.protocol.wire import Puback, Publish, Taken, Wire, encode_pubacks

logger = logging.getLogger(__name__)

KEEPALIVE_SECONDS = 30
SESSION_EXPIRY_SECONDS = 24 * 3600
IN_FLIGHT = 1000  # paho's default of 20 stalls bursts: each 20 messages would wait for a round trip
OUTBOX, OUTBOX_BYTES = 20_000, 64 << 20
MAXIMUM_PACKET_BYTES = 64 << 20  # that we take, unless told otherwise
WAITING_BYTES = 32 << 20  # of received messages that wait for their reader
UNSENT_BYTES = (
    64 << 10
)  # that the kernel may keep back: on a slow link, a message swallowed whole shows no progress
PATIENCE_SECONDS = 2.0  # for the answer to the first CONNECT
BACKOFF_SECONDS = (0.5, 30.0)  # first ceiling and last
IMPATIENT_PAUSE_SECONDS = 2.0
# Signs of a second client with our id, within a minute: the broker says "taken over" (MQTT 5; mosquitto 2.0 does
# not), or connections end within seconds of being accepted. The weaker sign must show more often.
TAKEOVERS, BRIEF_CONNECTIONS, BRIEF_SECONDS = 3, 6, 5.0
LARGE_BYTES = 64 << 10  # a publication that a broker's limit may be too small for
_UNSUPPORTED_VERSION, _TAKEN_OVER = 132, 142
_FAILURE = 128  # reasons from here on
_HEADER_BYTES = 32  # more than MQTT adds to topic and payload


class Connection:
    """A client of one broker with a stable id. Use it as a context manager.

    ``will`` (topic, payload) is what the broker publishes, retained, if we vanish. With ``persistent`` the broker
    keeps our session for a day; ``receive_window`` bounds how many unacknowledged messages it sends ahead. A
    message whose packet exceeds ``maximum_packet_size`` is not received, and never comes again. ``examine`` (of
    topic and payload) is called for each message in the thread that receives, while the reader's handles others;
    what it returns comes with the message, and what it raises is raised to the reader.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        subscriptions: Sequence[str] = (),
        will: tuple[str, bytes] | None = None,
        persistent: bool = True,
        receive_window: int = IN_FLIGHT,
        maximum_packet_size: int = MAXIMUM_PACKET_BYTES,
        examine: Callable[[str, bytes], Any] = lambda topic, payload: None,
    ) -> None:
        self.address = address
        self.client_id = client_id
        self.maximum_packet_size: int | None = None  # the broker's, known once connected
        self.protocol = MQTTProtocolVersion.MQTTv5
        self._subscriptions = [(topic, 1) for topic in subscriptions]
        self._wanted = re.compile("|".join(map(_pattern, subscriptions)))
        self._will = will
        self._persistent = persistent
        self._receive_window = receive_window
        self._own_maximum = maximum_packet_size
        self._examine = examine
        self._events: deque[Event | Exception] = deque()
        self._waiting_bytes = 0  # of messages among the events
        self._listening = True
        self._events_changed = threading.Condition()
        self._lock = threading.Lock()  # generation, outbox; never held while paho takes a lock of its own
        self._generation = 0
        self._outbox = Outbox()
        self._delivered = threading.Condition()
        self._accepted = threading.Event()
        self._settled = threading.Event()
        self._refusal: ReasonCode | None = None
        self._attempt = 0
        self._patience = PATIENCE_SECONDS
        self._accepted_at: float | None = None  # while it lasts
        self._takeovers: list[float] = []
        self._brief: list[float] = []
        self._closed = False
        self._tls = address.tls_context()
        self._client = self._new_client()

    def connect(self, timeout: float | None = 15.0, stop: threading.Event | None = None) -> bool:
        """Connect and wait until the broker accepts us; keep trying for ``timeout`` seconds (None: for ever).

        False where ``stop`` was set first (from a signal handler, say).

        Raises:
            BrokerUnreachable: with the last failure as its reason.
            FedmptError: another release of paho-mqtt than this works with.
        """
        end = None if timeout is None else time.monotonic() + timeout
        stop = stop or threading.Event()
        while not stop.is_set():
            version = self.protocol
            try:
                problem = self._try_once()
            except ssl.SSLCertVerificationError as error:
                raise BrokerUnreachable(
                    f"broker {self.address.url}: TLS failed ({error}); check --ca, the broker's certificate "
                    "and the name that it is made out to"
                ) from error
            except OSError as error:
                if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
                    raise BrokerUnreachable(
                        f"broker {self.address.url} refuses us by TLS ({error}); check --cert and --key: that "
                        "they are given, not expired, and of the authority that the broker trusts"
                    ) from error
                problem = str(error)
            if not problem:
                return True
            logger.debug("connecting to %s: %s", self.address.url, problem)
            # The other version is tried at once; whoever waits only so long must not sleep half of it away.
            pause = 0.0 if self.protocol != version else self._next_pause()
            if end is not None:
                pause = min(pause, IMPATIENT_PAUSE_SECONDS)
                if time.monotonic() + pause >= end:
                    raise BrokerUnreachable(
                        f"broker {self.address.url}: {problem}; check that it runs and that host, port, TLS "
                        "and firewall are right"
                    )
            stop.wait(pause)
        return False

    def receive(self, timeout: float | None = None) -> Event | None:
        """The next event, or None when none came within ``timeout`` seconds (None: wait for ever).

        Raises:
            IdentityTaken, SubscribeRefused: the connection has been given up.
        """
        events = self.receive_many(1, timeout)
        return events[0] if events else None

    def receive_many(self, most: int, timeout: float | None = None, gather: float = 0.0) -> list[Event]:
        """Up to ``most`` events that are there, waiting for the first like ``receive``.

        Where they are fewer, others have ``gather`` seconds to come after the first.
        """
        taken: list[Event] = []
        with self._events_changed:
            self._events_changed.wait_for(lambda: self._events, timeout)
        if gather and 0 < len(self._events) < most:
            time.sleep(gather)  # waiting for the condition would wake up for each
        with self._events_changed:
            crowded = self._crowded
            while self._events and len(taken) < most:
                event = self._events[0]
                if isinstance(event, Exception):
                    if taken:
                        break
                    raise event
                taken.append(event)
                self._events.popleft()
                if isinstance(event, Message):
                    self._waiting_bytes -= len(event.payload)
            if crowded:
                self._events_changed.notify_all()
        return taken

    def acknowledge(self, message: Message) -> None:
        """Tell the broker that ``message`` need not come again.

        A message of an earlier connection is not acknowledged: the broker sends it again, and its number may
        belong to another message by now.
        """
        self.acknowledge_all([message])

    def acknowledge_all(self, messages: Iterable[Message]) -> None:
        """Acknowledge many at once."""
        with self._lock:
            current = [
                message.packet
                for message in messages
                if message.qos and message.generation == self._generation
            ]
            self._write(encode_pubacks(current))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> Delivery:
        """Send at least once; while the connection is down, the message is kept until it is back.

        Raises:
            PayloadTooLarge: it exceeds the broker's maximum packet size.
            PublishRefused: too many messages wait already.
        """
        self.check_size(topic, len(payload))
        delivery = Delivery(topic, self._delivered)
        with self._lock:
            self._require_room(topic, len(payload))
            self._write(self._outbox.add(topic, payload, retain, delivery))
        return delivery

    def publish_all(self, messages: Iterable[tuple[str, bytes]]) -> None:
        """Send many (topic, payload), not retained, whose fate nobody waits for.

        What exceeds the broker's maximum packet size is logged and left out.

        Raises:
            PublishRefused: too many messages wait already; those from here on are not sent.
        """
        with self._lock:
            parts = []
            try:
                for topic, payload in messages:
                    try:
                        self.check_size(topic, len(payload))
                    except PayloadTooLarge as error:
                        logger.warning("not sent: %s", error)
                        continue
                    self._require_room(topic, len(payload))
                    parts.append(self._outbox.add(topic, payload, False, None))
            finally:
                self._write(b"".join(parts))

    def check_size(self, topic: str, payload_bytes: int) -> None:
        """Raise PayloadTooLarge if the broker would not take such a message; names both sizes."""
        if self.maximum_packet_size is None:
            return
        size = payload_bytes + len(topic.encode()) + _HEADER_BYTES
        if size > self.maximum_packet_size:
            raise PayloadTooLarge(
                f"{topic}: a message of {size} bytes, but the broker takes at most {self.maximum_packet_size}; "
                "raise its maximum packet size (mosquitto: max_packet_size), or use a smaller update encoding"
            )

    def stop_receiving(self) -> None:
        """Drop what has come and what comes, unacknowledged: the broker keeps it for the next connection.

        Without it, a reader that no longer reads holds up the answers to its own last publications.
        """
        with self._events_changed:
            self._listening = False
            self._events.clear()
            self._waiting_bytes = 0
            self._events_changed.notify_all()

    def close(self) -> None:
        """Disconnect cleanly (the will is not published); what the broker has not taken is lost."""
        self._closed = True
        self.stop_receiving()
        self._client.stop()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_room(self, topic: str, payload_bytes: int) -> None:
        count, size = len(self._outbox), self._outbox.payload_bytes
        if count and (count >= OUTBOX or size + payload_bytes > OUTBOX_BYTES):
            raise PublishRefused(
                f"{topic}: {count} messages of {size} bytes wait for the broker already; is it overloaded?"
            )

    def _write(self, packets: bytes) -> None:
        wire = self._client.wire
        if packets and wire is not None:
            wire.write(packets)

    def _new_client(self) -> _Client:
        five = self.protocol == MQTTProtocolVersion.MQTTv5
        client = _Client(
            five,
            self._own_maximum,
            self._take,
            CallbackAPIVersion.VERSION2,
            self.client_id,
            clean_session=None if five else not self._persistent,
            protocol=self.protocol,
        )
        if self.address.username:
            client.username_pw_set(self.address.username, self.address.password)
        if self._tls:
            client.tls_set_context(self._tls)
        if self._will:
            client.will_set(self._will[0], self._will[1], qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        return client

    def _try_once(self) -> str:
        """One attempt from TCP to CONNACK; returns the problem, empty when we are in."""
        self._accepted.clear()
        self._settled.clear()
        self._refusal = None
        options: dict[str, Any] = {}
        if self.protocol == MQTTProtocolVersion.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.ReceiveMaximum = self._receive_window
            properties.SessionExpiryInterval = SESSION_EXPIRY_SECONDS if self._persistent else 0
            properties.MaximumPacketSize = self._own_maximum
            options = {"clean_start": not self._persistent, "properties": properties}
        self._client.connect(self.address.host, self.address.port, KEEPALIVE_SECONDS, **options)
        if self._client.wire is None:
            raise FedmptError(
                "this release of paho-mqtt works differently inside; install paho-mqtt>=2.2,<2.3"
            )
        self._client.loop_start()
        self._settled.wait(self._patience)
        if self._accepted.is_set():
            return ""
        self._client.stop()
        if isinstance(self._client.wire.failure, ssl.SSLError):
            raise self._client.wire.failure
        refusal = self._refusal
        if refusal is not None and refusal.value != _UNSUPPORTED_VERSION:
            raise BrokerUnreachable(
                f"broker {self.address.url} does not accept us as {self.client_id!r} ({refusal}); "
                "check user name, password and certificate"
            )
        # A broker without MQTT 5 may refuse it, hang up or just not answer (amqtt): try the other version, and
        # be more patient each time round.
        self._patience *= 1.5
        was_five = self.protocol == MQTTProtocolVersion.MQTTv5
        self.protocol = MQTTProtocolVersion.MQTTv311 if was_five else MQTTProtocolVersion.MQTTv5
        self._client = self._new_client()
        return "it closed the connection, or did not answer, before accepting us"

    def _next_pause(self) -> float:
        first, last = BACKOFF_SECONDS
        ceiling = min(last, first * 2.0 ** min(self._attempt, 10))
        self._attempt += 1
        return random.uniform(0, ceiling)

    # What follows runs in paho's network thread.

    def _on_connect(
        self, client: mqtt.Client, data: Any, flags: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._refusal = reason
            if self._accepted.is_set():
                logger.error("broker %s no longer accepts us: %s", self.address.url, reason)
            self._settled.set()
            return
        self._accepted_at = time.monotonic()
        self.maximum_packet_size = getattr(properties, "MaximumPacketSize", None)
        if self._subscriptions:
            client.subscribe(self._subscriptions)
            client.loop_write()  # before what we publish ourselves, which may be for us
        self._accepted.set()
        self._settled.set()
        five = self.protocol == MQTTProtocolVersion.MQTTv5
        self._put([Connected("5" if five else "3.1.1")])
        window = min(IN_FLIGHT, getattr(properties, "ReceiveMaximum", IN_FLIGHT))
        with self._lock:
            self._write(self._outbox.connected(window, five))

    def _on_disconnect(
        self, client: mqtt.Client, data: Any, flags: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        with self._lock:
            self._generation += 1
            self._outbox.disconnected()
        self._settled.set()
        if self._closed or not self._accepted.is_set():
            return
        now = time.monotonic()
        brief = self._accepted_at is not None and now - self._accepted_at < BRIEF_SECONDS
        if self._accepted_at is not None and not brief:
            self._attempt = 0
        self._accepted_at = None
        self._pause(client)
        for sign, moments in ((reason.value == _TAKEN_OVER, self._takeovers), (brief, self._brief)):
            moments[:] = [moment for moment in moments if now - moment < 60] + [now] * sign
        if len(self._takeovers) >= TAKEOVERS or len(self._brief) >= BRIEF_CONNECTIONS:
            self._put([IdentityTaken(self._text_of_brief_connections(reason))])
            self._closed = True
            client.disconnect()
            return
        failure = self._client.wire.failure if self._client.wire else None
        self._put([Disconnected(str(failure or reason))])

    def _text_of_brief_connections(self, reason: ReasonCode) -> str:
        text = (
            f"broker {self.address.url} keeps closing the connection of {self.client_id!r} ({reason}): another "
            "client seems to run under this name; stop it, or give each its own name"
        )
        with self._lock:
            topic, size = self._outbox.largest()
        if size >= LARGE_BYTES or (size and self.protocol != MQTTProtocolVersion.MQTTv5):
            text += (
                f". Or the broker does not take packets as large as ours (up to {size} bytes, on {topic}): raise "
                "its maximum packet size (mosquitto: max_packet_size)"
            )
        return text

    def _on_connect_fail(self, client: mqtt.Client, data: Any) -> None:
        self._brief.clear()  # the broker is down: that ended our connections, no second client
        self._pause(client)

    def _pause(self, client: mqtt.Client) -> None:
        """Let paho wait a random time before it tries again."""
        seconds: Any = self._next_pause()  # paho says int, and works with float
        client.reconnect_delay_set(seconds, seconds)

    def _take(self, published: list[Publish], acknowledged: list[Puback]) -> None:
        messages: list[Event | Exception] = []
        unwanted, size = [], 0
        for topic, payload, retained, packet, qos in published:
            name = topic.decode(errors="replace")
            # amqtt greets a client with retained messages of other clients' subscriptions.
            if self._wanted.fullmatch(name):
                try:
                    examined = self._examine(name, payload)
                except Exception as error:
                    messages.append(error)
                    continue
                messages.append(Message(name, payload, retained, packet, qos, self._generation, examined))
                size += len(payload)
            elif qos:
                unwanted.append(packet)
        parts = [encode_pubacks(unwanted)]
        finished = []
        with self._lock:
            for packet, reason in acknowledged:
                delivery, more = self._outbox.acknowledged(packet)
                parts.append(more)
                if delivery is not None:
                    finished.append((delivery, reason))
            self._write(b"".join(parts))
        for delivery, reason in finished:
            refusal = _reason_text(reason) if reason >= _FAILURE else ""
            if refusal:
                logger.warning("%s: the broker refused it: %s", delivery.topic, refusal)
            delivery.finish(refusal)
        if messages:
            self._put(messages, size)

    def _on_subscribe(
        self, client: mqtt.Client, data: Any, packet: int, reasons: list[ReasonCode], properties: Any
    ) -> None:
        for (topic, _), reason in zip(self._subscriptions, reasons, strict=False):
            if reason.is_failure:
                text = (
                    f"broker {self.address.url} refused the subscription to {topic} ({reason}); check its ACL"
                )
                self._put([SubscribeRefused(text)])

    def _put(self, events: Sequence[Event | Exception], payload_bytes: int = 0) -> None:
        """Hand events to the receiver; too many that wait block, and TCP then slows the broker down."""
        with self._events_changed:
            self._events_changed.wait_for(lambda: not (self._crowded and self._listening))
            if self._listening:
                self._events.extend(events)
                self._waiting_bytes += payload_bytes
            self._events_changed.notify_all()

    @property
    def _crowded(self) -> bool:
        return len(self._events) > self._receive_window or self._waiting_bytes > WAITING_BYTES


class _Client(mqtt.Client):
    """paho's client with a ``Wire`` for its socket."""

    def __init__(self, five: bool, maximum: int, taken: Taken, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.wire: Wire | None = None
        self._five = five
        self._maximum = maximum
        self._taken = taken

    def _create_socket(self) -> Any:
        stream: Any = super()._create_socket()
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            with contextlib.suppress(OSError):
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self.wire = Wire(stream, self._five, self._taken, maximum=self._maximum, wake=self._wake)
        return self.wire

    def _wake(self) -> None:
        """Let paho's thread look again, as it does itself when it queues a packet."""
        if self._sockpairW is not None:
            with contextlib.suppress(BlockingIOError):  # full of such bytes
                self._sockpairW.send(b"\0")

    def stop(self) -> None:
        """Disconnect and end paho's thread, which leaves a connection open that it was just making."""
        self.disconnect()
        self.loop_stop()
        if self.wire is not None:
            self.wire.close()

    def want_write(self) -> bool:
        return super().want_write() or (self.wire is not None and self.wire.unsent)

    def loop_write(self) -> MQTTErrorCode:
        if self.wire is not None:
            self.wire.flush()
        return super().loop_write()

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        try:
            return super().loop_read(max_packets)
        except Exception:
            # It would end paho's thread, and with it the connection, without a word.
            logger.exception("what %s sent could not be handled; connecting again", self._host)
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)

    def loop_misc(self) -> MQTTErrorCode:
        # paho sees only its own packets; the answer to its ping may wait behind a message that takes minutes.
        if self.wire is not None and self.wire.alive_at > self._last_bytes_received:
            self._last_bytes_received = self.wire.alive_at
            self._ping_t = 0.0
        return super().loop_misc()


def _reason_text(value: int) -> str:
    """What a PUBACK's reason means; also of one that paho does not know."""
    try:
        return str(ReasonCode(PacketTypes.PUBACK, identifier=value))
    except (KeyError, ValueError):
        return f"reason 0x{value:02x}"


def _pattern(subscription: str) -> str:
    """A regular expression of the topics that a subscription with ``+`` matches."""
    return "/".join("[^/]*" if level == "+" else re.escape(level) for level in subscription.split("/"))
