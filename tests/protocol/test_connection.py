"""The connection against a real mosquitto and the embedded broker."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmpt.aggregator.broker import EmbeddedBroker, EmbeddedBrokerError
from fedmpt.protocol.address import BrokerAddress, parse_broker
from fedmpt.protocol.connection import Connection
from fedmpt.protocol.events import (
    BrokerUnreachable,
    Connected,
    Disconnected,
    IdentityTaken,
    Message,
    PayloadTooLarge,
    PublishRefused,
)

SECONDS = 20.0


@pytest.fixture
def mosquitto(start_mosquitto: Callable[..., Any], tmp_path: Path) -> Any:
    """A broker with an ACL and a limit on packets."""
    (tmp_path / "acl").write_text("topic readwrite open/#\ntopic read closed/#\n")
    return start_mosquitto(f"acl_file {tmp_path / 'acl'}\nmax_packet_size 50000")


@pytest.fixture
def address(mosquitto: Any) -> BrokerAddress:
    return parse_broker(mosquitto.url)


@pytest.fixture
def embedded() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as broker:
        yield broker


def next_message(connection: Connection, seconds: float = SECONDS) -> Message | None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        event = connection.receive(left)
        if isinstance(event, Message):
            return event
    return None


def wait_for(connection: Connection, kind: type) -> object:
    end = time.monotonic() + SECONDS
    while (left := end - time.monotonic()) > 0:
        event = connection.receive(left)
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind.__name__} came")


def receive_both(one: Connection, two: Connection) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        one.receive(0.05)
        two.receive(0.05)


def test_mosquitto_is_spoken_to_in_mqtt_5(address: BrokerAddress) -> None:
    with Connection(address, "one") as connection:
        connection.connect()
        assert connection.receive(SECONDS) == Connected("5")


def test_a_broker_without_mqtt_5_is_spoken_to_in_3_1_1(embedded: EmbeddedBroker) -> None:
    with Connection(embedded.address, "one", subscriptions=["open/+"]) as connection:
        connection.connect()
        assert connection.receive(SECONDS) == Connected("3.1.1")
        connection.publish("open/a", b"hello").wait(SECONDS)
        message = next_message(connection)
        assert message is not None
        assert message.payload == b"hello"


def test_only_what_was_subscribed_to_is_received(embedded: EmbeddedBroker) -> None:
    with Connection(embedded.address, "one", subscriptions=["open/+"]) as one:
        one.connect()
        one.publish("open/a", b"retained", retain=True).wait(SECONDS)
    with Connection(embedded.address, "two", subscriptions=["other/+"]) as two:
        two.connect()
        assert next_message(two, 1.0) is None


def test_a_publication_reaches_the_other_and_completes(address: BrokerAddress) -> None:
    one = Connection(address, "one", subscriptions=["open/+"])
    two = Connection(address, "two")
    with one, two:
        one.connect()
        two.connect()
        assert two.publish("open/a", b"hello").wait(SECONDS)
        message = next_message(one)
        assert message is not None
        assert (message.topic, message.payload, message.retained) == ("open/a", b"hello", False)


def test_a_message_comes_again_until_it_is_acknowledged(address: BrokerAddress) -> None:
    one = Connection(address, "one", subscriptions=["open/+"])
    one.connect()
    one.publish("open/a", b"hello").wait(SECONDS)
    assert next_message(one) is not None
    one.close()

    again = Connection(address, "one", subscriptions=["open/+"])
    again.connect()
    message = next_message(again)
    assert message is not None
    again.acknowledge(message)
    again.publish("open/b", b"the broker has read the acknowledgement before this").wait(SECONDS)
    assert next_message(again) is not None
    again.close()

    with Connection(address, "one", subscriptions=["open/+"]) as last:
        last.connect()
        repeated = next_message(last, 1.0)
        assert repeated is None or repeated.topic == "open/b"


def test_a_session_survives_a_killed_broker(mosquitto: Any, address: BrokerAddress) -> None:
    with Connection(address, "one", subscriptions=["open/+"]) as one:
        one.connect()
        wait_for(one, Connected)
        mosquitto.kill()
        wait_for(one, Disconnected)
        delivery = one.publish("open/a", b"said while the broker was down")
        assert not delivery.wait(0)
        mosquitto.start()
        wait_for(one, Connected)
        assert delivery.wait(SECONDS)
        message = next_message(one)
        assert message is not None
        assert message.payload == b"said while the broker was down"


def test_an_acknowledgement_never_hits_a_message_of_a_later_connection(
    mosquitto: Any, address: BrokerAddress
) -> None:
    with Connection(address, "one", subscriptions=["open/+"]) as one:
        one.connect()
        one.publish("open/a", b"first").wait(SECONDS)
        first = next_message(one)
        mosquitto.kill()
        wait_for(one, Disconnected)
        mosquitto.start()
        wait_for(one, Connected)
        one.publish("open/b", b"second").wait(SECONDS)
        second = next_message(one)
        assert first is not None
        assert second is not None
        assert first.packet == second.packet, "the broker counts from 1 again: the case that matters"
        one.acknowledge(first)
    with Connection(address, "one", subscriptions=["open/+"]) as again:
        again.connect()
        repeated = next_message(again)
        assert repeated is not None
        assert repeated.payload == b"second"


def test_a_payload_beyond_the_brokers_limit_is_refused_with_both_sizes(address: BrokerAddress) -> None:
    with Connection(address, "one") as connection:
        connection.connect()
        with pytest.raises(
            PayloadTooLarge, match=r"a message of 600.. bytes, but the broker takes at most 50000"
        ):
            connection.publish("open/a", b"x" * 60_000)


def test_a_publication_that_the_acl_forbids_is_reported(address: BrokerAddress) -> None:
    with Connection(address, "one") as connection:
        connection.connect()
        with pytest.raises(PublishRefused, match=r"closed/a: the broker refused it .*ACL"):
            connection.publish("closed/a", b"hello").wait(SECONDS)


def test_the_window_is_what_the_broker_allows(address: BrokerAddress) -> None:
    # mosquitto allows 20 messages in flight by default; a burst beyond that still arrives, in order.
    with Connection(address, "one", subscriptions=["open/+"]) as connection:
        connection.connect()
        deliveries = [connection.publish("open/a", str(number).encode()) for number in range(300)]
        for number in range(300):
            message = next_message(connection)
            assert message is not None
            assert message.payload == str(number).encode()
            connection.acknowledge(message)
        assert all(delivery.wait(SECONDS) for delivery in deliveries)


def test_the_last_will_is_published_retained_when_a_client_is_killed(address: BrokerAddress) -> None:
    script = (
        "import time; from fedmpt.protocol.address import BrokerAddress; "
        "from fedmpt.protocol.connection import Connection; "
        f"c = Connection(BrokerAddress('127.0.0.1', {address.port}), 'mortal', "
        "will=('open/will', b'gone')); c.connect(); print('up', flush=True); time.sleep(60)"
    )
    import sys

    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
    with Connection(address, "one", subscriptions=["open/will"]) as connection:
        connection.connect()
        message = next_message(connection)
        assert message is not None
        assert message.payload == b"gone"


def test_two_clients_with_one_id_end_with_a_clear_error(address: BrokerAddress) -> None:
    with Connection(address, "twin") as one, Connection(address, "twin") as two:
        one.connect()
        two.connect()
        with pytest.raises(IdentityTaken, match="another client seems to run under this name"):
            receive_both(one, two)


def test_an_unreachable_broker_is_named_with_its_reason(free_port: Callable[[], int]) -> None:
    address = BrokerAddress("127.0.0.1", free_port())
    refusal = pytest.raises(BrokerUnreachable, match=r"mqtt://127.0.0.1:\d+: .*refused; check that it runs")
    with Connection(address, "one") as connection, refusal:
        connection.connect(timeout=0.5)


def test_a_service_that_is_no_broker_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = BrokerAddress("127.0.0.1", server.getsockname()[1])
        refusal = pytest.raises(BrokerUnreachable, match="did not answer, before accepting us")
        with Connection(address, "one") as connection, refusal:
            connection.connect(timeout=2.0)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "hub.example.org", ""])
def test_the_embedded_broker_serves_loopback_only(host: str) -> None:
    with pytest.raises(EmbeddedBrokerError, match="serves this machine only"):
        EmbeddedBroker(0, host)


def test_a_taken_port_is_named(embedded: EmbeddedBroker) -> None:
    with pytest.raises(
        EmbeddedBrokerError, match=f"port {embedded.address.port} on 127.0.0.1 cannot be used"
    ):
        EmbeddedBroker(embedded.address.port)
