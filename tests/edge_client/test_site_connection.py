"""The thread of a client that reads from its broker, against a real mosquitto."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fedmpt.edge_client.inbox import Inbox
from fedmpt.edge_client.site_connection import open_site_connection
from fedmpt.protocol.address import parse_broker
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.messages import Presence
from fedmpt.protocol.topics import Topics

SECONDS = 20.0
TOPICS = Topics("birds")


class Defective(Inbox):
    """An inbox that cannot take a message."""

    def take(self, topic: str, payload: bytes) -> None:
        raise ZeroDivisionError("a defect")


def test_a_defect_in_the_reading_thread_reaches_whoever_waits_for_messages(
    mosquitto: Any, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Defective(TOPICS, "a", {})
    presence = Presence("birds", "a", True, "0" * 64, 10, {})
    address, stop = parse_broker(mosquitto.url), threading.Event()
    with open_site_connection(address, "a", TOPICS, presence, inbox, lambda *said: None, stop) as connection:
        connection.publish(TOPICS.round, b"x")
        inbox.wait(0, SECONDS)
        with pytest.raises(FedmptError, match=r"could not be handled .*a defect"):
            inbox.task()
    assert "ZeroDivisionError" in caplog.text
