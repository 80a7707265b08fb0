"""A client's connection: messages go to its inbox, and the federation sees its presence."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedmpt.edge_client.inbox import Inbox
from fedmpt.protocol.address import BrokerAddress
from fedmpt.protocol.connection import Connection
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.events import Connected, Disconnected, Message, PayloadTooLarge, PublishRefused
from fedmpt.protocol.messages import Presence, to_json
from fedmpt.protocol.topics import Topics

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5  # how often a waiting thread looks at the clock and at its stop flag
CONNECT_SECONDS = 15.0
GOODBYE_SECONDS = 2.0
PRESENCE_SECONDS = 30.0  # said again so often: a last will that came late must not hide a living client

Report = Callable[[str, Mapping[str, Any]], None]


@contextmanager
def open_site_connection(
    address: BrokerAddress,
    client: str,
    topics: Topics,
    presence: Presence,
    inbox: Inbox,
    report: Report,
    stop: threading.Event,
) -> Iterator[Connection]:
    """Connect, fill the inbox from a thread of its own, and say hello, again after every reconnection.

    On leaving, the client says that it has left, which frees its place in the round; if it vanishes, the broker says
    that it is offline (last will), and its place is kept. Where ``stop`` is set before the broker has accepted us, the
    connection that comes is not connected.

    Raises:
        BrokerUnreachable: see ``Connection.connect``. What fails later reaches the inbox's reader.
    """
    topic = topics.presence(client)
    online, offline = (to_json(dataclasses.replace(presence, online=value)) for value in (True, False))
    left = to_json(dataclasses.replace(presence, online=False, left=True))
    connection = Connection(address, client, subscriptions=inbox.subscriptions, will=(topic, offline))
    done = threading.Event()

    def read() -> None:
        connected, said = False, -PRESENCE_SECONDS
        while not done.is_set():
            event = connection.receive(timeout=LOOK_SECONDS)
            if isinstance(event, (Connected, Disconnected)):
                connected, said = isinstance(event, Connected), -PRESENCE_SECONDS
            if connected and time.monotonic() - said >= PRESENCE_SECONDS:
                connection.publish(topic, online, retain=True)
                said = time.monotonic()
            if isinstance(event, Connected):
                report("connected", {"broker": address.url, "mqtt": event.protocol})
            elif isinstance(event, Disconnected):
                report("disconnected", {"broker": address.url, "reason": event.reason})
            elif isinstance(event, Message):
                inbox.take(event.topic, event.payload)
                connection.acknowledge(event)

    def listen() -> None:
        try:
            read()
        except FedmptError as error:
            inbox.fail(error)
        except Exception as error:
            # Whoever waits for the inbox would wait for ever.
            logger.exception("reading from %s failed", address.url)
            inbox.fail(FedmptError(f"what broker {address.url} sent could not be handled ({error!r})"))

    with connection:
        if not connection.connect(CONNECT_SECONDS, stop):
            yield connection
            return
        listener = threading.Thread(target=listen, name="fedmpt-inbox", daemon=True)
        listener.start()
        try:
            yield connection
        finally:
            done.set()
            listener.join()
            connection.stop_receiving()
            try:
                connection.publish(topic, left, retain=True).wait(GOODBYE_SECONDS)
            except (PublishRefused, PayloadTooLarge) as error:
                logger.debug("no goodbye: %s", error)
