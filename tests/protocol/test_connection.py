"""The connection against a real mosquitto and the embedded broker."""

from __future__ import annotations

import contextlib
import datetime
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest

from fedmpt.aggregator.broker import EmbeddedBroker, EmbeddedBrokerError
from fedmpt.aggregator.certificates import issue_certificate, make_authority
from fedmpt.protocol import connection as connection_module
from fedmpt.protocol.address import BrokerAddress, parse_broker
from fedmpt.protocol.connection import Connection
from fedmpt.protocol.errors import FedmptError
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


class Proxy:
    """TCP to a broker with small buffers: ``up`` and ``down`` bytes per second (None: all), or nothing while held."""

    def __init__(self, port: int, up: int | None = None, down: int | None = None) -> None:
        self._server = socket.socket()
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)  # inherited by what it accepts
        self._server.bind(("127.0.0.1", 0))
        self._server.listen()
        self.address = BrokerAddress("127.0.0.1", self._server.getsockname()[1])
        self.flowing = threading.Event()
        self.flowing.set()
        self._port, self._up, self._down = port, up, down
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.flowing.set()
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.socket()
                far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
                far.connect(("127.0.0.1", self._port))
                for pair in ((near, far, self._up), (far, near, self._down)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, rate: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1024 if rate else 65536):
                if rate:
                    time.sleep(len(data) / rate)
                self.flowing.wait()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()


class Script:
    """A broker that accepts every client and then answers as its test says: (packet type, body, socket)."""

    def __init__(self, answer: Callable[[int, bytes, socket.socket], None], five: bool = True) -> None:
        self._answer, self._five = answer, five
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = BrokerAddress("127.0.0.1", self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as stream, contextlib.suppress(OSError):
            while head := stream.read(1):
                length = shift = 0
                while (byte := stream.read(1)[0]) > 127:
                    length, shift = length | (byte & 127) << shift, shift + 7
                body = stream.read(length | byte << shift)
                if head[0] >> 4 != CONNECT:
                    self._answer(head[0] >> 4, body, client)
                elif self._five:
                    client.sendall(b"\x20\x03\x00\x00\x00")
                elif body[6] == 5:
                    client.sendall(b"\x20\x02\x00\x01")  # unacceptable protocol version
                else:
                    client.sendall(b"\x20\x02\x00\x00")


CONNECT, PUBLISH, SUBSCRIBE = 1, 3, 8


def packet_number(publish: bytes) -> bytes:
    """The two bytes of a PUBLISH's body behind its topic."""
    end = 2 + int.from_bytes(publish[:2], "big")
    return publish[end : end + 2]


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


def test_a_message_is_examined_where_it_is_received_and_comes_with_what_was_found(
    address: BrokerAddress,
) -> None:
    def examine(topic: str, payload: bytes) -> tuple[str, int, str]:
        return topic, len(payload), threading.current_thread().name

    with Connection(address, "one", subscriptions=["open/+"], examine=examine) as one:
        one.connect()
        one.publish("open/a", b"hello")
        message = next_message(one)
        assert message is not None
        assert message.examined[:2] == ("open/a", 5)
        assert message.examined[2] != threading.current_thread().name


def test_a_defect_in_examining_reaches_the_reader_and_the_message_comes_again(address: BrokerAddress) -> None:
    def examine(topic: str, payload: bytes) -> None:
        raise ZeroDivisionError("a defect")

    with Connection(address, "one", subscriptions=["open/+"], examine=examine) as one:
        one.connect()
        one.publish("open/a", b"hello")
        with pytest.raises(ZeroDivisionError, match="a defect"):
            next_message(one)
    with Connection(address, "one", subscriptions=["open/+"]) as one:
        one.connect()
        message = next_message(one)
        assert message is not None
        assert message.payload == b"hello"


def test_while_many_messages_come_they_are_taken_together(address: BrokerAddress) -> None:
    with Connection(address, "one", subscriptions=["open/+"]) as one:
        one.connect()
        assert one.receive(SECONDS) == Connected("5")
        for _ in range(5):
            one.publish("open/a", b"hello")
        assert len(one.receive_many(5, SECONDS, gather=SECONDS / 10)) == 5


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


def test_two_clients_with_one_id_end_with_a_clear_error(
    address: BrokerAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "BACKOFF_SECONDS", (0.1, 30.0))
    with Connection(address, "twin") as one, Connection(address, "twin") as two:
        one.connect()
        two.connect()
        with pytest.raises(IdentityTaken, match="another client seems to run under this name"):
            receive_both(one, two)


@pytest.mark.slow
def test_a_message_that_takes_longer_than_the_keepalive_comes_through(
    mosquitto: Any, address: BrokerAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "KEEPALIVE_SECONDS", 2)
    mosquitto.configuration.write_text(mosquitto.configuration.read_text().replace("max_packet_size", "#"))
    mosquitto.kill()
    mosquitto.start()
    payload = b"x" * 400_000
    with Proxy(mosquitto.port, up=50_000) as upward, Connection(upward.address, "one") as one:
        one.connect()
        assert isinstance(one.receive(SECONDS), Connected)
        assert one.publish("open/a", payload, retain=True).wait(SECONDS)
        assert one.receive(0) is None, "never disconnected"
    with (
        Proxy(mosquitto.port, down=50_000) as downward,
        Connection(downward.address, "two", subscriptions=["open/+"]) as two,
    ):
        two.connect()
        assert isinstance(two.receive(SECONDS), Connected)
        message = two.receive(SECONDS)
        assert isinstance(message, Message)
        assert message.payload == payload


def test_a_peer_that_is_silent_for_the_keepalive_is_given_up(
    mosquitto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "KEEPALIVE_SECONDS", 1)
    with Proxy(mosquitto.port) as proxy, Connection(proxy.address, "one") as connection:
        connection.connect()
        assert isinstance(connection.receive(SECONDS), Connected)
        proxy.flowing.clear()
        end = time.monotonic() + SECONDS
        while (event := connection.receive(0.2)) is None and time.monotonic() < end:
            connection.publish("open/a", b"the kernel takes it, but nobody has it")
        assert event == Disconnected("Keep alive timeout")


def test_a_large_publication_does_not_wait_for_a_clock(
    start_mosquitto: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # paho looks once a second even where nothing wakes it; here, only once in a while.
    look = mqtt.Client._loop
    monkeypatch.setattr(mqtt.Client, "_loop", lambda client, timeout: look(client, 2 * SECONDS))
    with Connection(parse_broker(start_mosquitto().url), "one") as connection:
        connection.connect()
        assert connection.publish("open/a", bytes(32 << 20)).wait(SECONDS)


def test_a_clean_end_under_back_pressure_keeps_the_last_will_unsaid(
    start_mosquitto: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmpt.protocol.wire.CLOSE_SECONDS", SECONDS, raising=False)
    broker = start_mosquitto()
    with (
        Connection(parse_broker(broker.url), "watcher", subscriptions=["open/will"]) as watcher,
        Proxy(broker.port) as proxy,
    ):
        watcher.connect()
        leaving = Connection(proxy.address, "leaving", will=("open/will", b"gone"))
        leaving.connect()
        proxy.flowing.clear()
        leaving.publish("open/a", bytes(16 << 20))
        closing = threading.Thread(target=leaving.close)
        closing.start()
        time.sleep(0.5)
        proxy.flowing.set()
        closing.join()
        assert next_message(watcher, 2.0) is None


def test_what_waits_for_its_reader_is_bounded_in_bytes(
    start_mosquitto: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "WAITING_BYTES", 1_000_000)
    address = parse_broker(start_mosquitto("max_inflight_messages 1000").url)
    with (
        Connection(address, "reader", subscriptions=["open/+"]) as reader,
        Connection(address, "w") as writer,
    ):
        reader.connect()
        writer.connect()
        deliveries = [writer.publish("open/a", bytes(100_000)) for _ in range(60)]
        assert all(delivery.wait(SECONDS) for delivery in deliveries)
        time.sleep(0.5)
        seen, most = 0, 0
        while seen < 60:
            events = [event for event in reader.receive_many(1000, SECONDS) if isinstance(event, Message)]
            seen, most = seen + len(events), max(most, sum(len(event.payload) for event in events))
            reader.acknowledge_all(events)
        assert 1_000_000 <= most <= 1_500_000, "the bound, and a block beyond it"


def test_whoever_stops_receiving_still_hears_that_its_last_words_arrived(
    start_mosquitto: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "WAITING_BYTES", 1000)
    address = parse_broker(start_mosquitto().url)
    with Connection(address, "one", subscriptions=["open/+"]) as one:
        one.connect()
        for number in range(5):
            assert one.publish(f"open/{number}", bytes(1500)).wait(1.0) == (number < 1), "nobody reads"
        one.stop_receiving()
        assert one.publish("closed/last", b"words").wait(SECONDS)
    with Connection(address, "one", subscriptions=["open/+"]) as again:
        again.connect()
        message = next_message(again)
        assert message is not None, "it was not acknowledged"
        assert message.topic == "open/0"


def test_a_message_beyond_our_own_limit_is_left_out_for_good(embedded: EmbeddedBroker) -> None:
    # MQTT 3.1.1 cannot tell a broker how much we take.
    with Connection(embedded.address, "writer") as writer:
        writer.connect()
        for again in range(2):
            with Connection(
                embedded.address, "one", subscriptions=["open/+"], maximum_packet_size=1000
            ) as one:
                one.connect()
                if not again:
                    writer.publish("open/large", bytes(5000)).wait(SECONDS)
                writer.publish("open/small", b"x").wait(SECONDS)
                message = next_message(one)
                assert message is not None
                assert message.topic == "open/small"
                one.acknowledge(message)


def test_the_outbox_is_bounded_in_bytes(
    mosquitto: Any, address: BrokerAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "OUTBOX_BYTES", 50_000)
    with Connection(address, "one") as connection:
        connection.connect()
        wait_for(connection, Connected)
        mosquitto.kill()
        wait_for(connection, Disconnected)
        connection.publish("open/a", bytes(30_000))
        with pytest.raises(PublishRefused, match="1 messages of 30000 bytes wait for the broker already"):
            connection.publish("open/b", bytes(30_000))
        connection.publish("open/c", bytes(10_000))


def test_of_many_messages_those_that_the_broker_would_not_take_are_left_out(
    address: BrokerAddress, caplog: pytest.LogCaptureFixture
) -> None:
    with Connection(address, "one", subscriptions=["open/+"]) as connection:
        connection.connect()
        connection.publish_all([("open/a", b"first"), ("open/b", bytes(60_000)), ("open/c", b"last")])
        topics = [
            message.topic for message in (next_message(connection), next_message(connection)) if message
        ]
        assert topics == ["open/a", "open/c"]
        assert "not sent: open/b: a message of 600" in caplog.text


def test_a_refusal_for_a_reason_that_nobody_knows_is_reported_by_its_number() -> None:
    def answer(kind: int, body: bytes, client: socket.socket) -> None:
        if kind == PUBLISH:
            refused = body.startswith(b"\x00\x06open/a")
            client.sendall(b"\x40\x03" + packet_number(body) + (b"\xfe" if refused else b"\x00"))

    with Script(answer) as broker, Connection(broker.address, "one") as connection:
        connection.connect()
        with pytest.raises(PublishRefused, match="reason 0xfe"):
            connection.publish("open/a", b"x").wait(SECONDS)
        assert connection.publish("open/b", b"x").wait(SECONDS)


def test_an_answer_for_more_subscriptions_than_ours_is_no_failure() -> None:
    def answer(kind: int, body: bytes, client: socket.socket) -> None:
        if kind == SUBSCRIBE:
            client.sendall(b"\x90\x06" + body[:2] + b"\x00\x01\x01\x01")
        if kind == PUBLISH:
            client.sendall(b"\x40\x02" + packet_number(body))

    with Script(answer) as broker, Connection(broker.address, "one", subscriptions=["open/+"]) as connection:
        connection.connect()
        assert connection.publish("open/a", b"x").wait(SECONDS)
        assert connection.receive(SECONDS) == Connected("5")
        assert connection.receive(0) is None


@pytest.mark.parametrize("place", ["_take", "_on_subscribe"])
def test_a_failure_of_our_own_is_logged_and_ends_in_a_reconnection(
    place: str, address: BrokerAddress, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    working, failures = getattr(Connection, place), []

    def failing(*arguments: Any) -> None:
        if not failures:
            failures.append(ZeroDivisionError("a defect"))
            raise failures[0]
        working(*arguments)

    monkeypatch.setattr(Connection, place, failing)
    with Connection(address, "one", subscriptions=["open/+"]) as connection:
        connection.connect()
        delivery = connection.publish("open/a", b"x")
        wait_for(connection, Disconnected)
        wait_for(connection, Connected)
        assert delivery.wait(SECONDS)
    assert "a defect" in caplog.text


def test_a_broker_that_hangs_up_at_once_is_asked_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings: list[float] = []

    def at_once(low: float, high: float) -> float:
        ceilings.append(high)
        return 0.01

    monkeypatch.setattr(connection_module.random, "uniform", at_once)

    def answer(kind: int, body: bytes, client: socket.socket) -> None:
        client.shutdown(socket.SHUT_RDWR)

    with Script(answer) as broker, Connection(broker.address, "one", subscriptions=["x"]) as connection:
        connection.connect()
        with pytest.raises(IdentityTaken):
            wait_for(connection, Message)
    assert ceilings[:5] == [0.5, 1.0, 2.0, 4.0, 8.0]


def test_a_broker_that_is_often_down_is_not_taken_for_a_second_client(
    mosquitto: Any, address: BrokerAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "BACKOFF_SECONDS", (0.05, 0.05))
    with Connection(address, "one") as connection:
        connection.connect()
        for _ in range(9):
            wait_for(connection, Connected)
            mosquitto.kill()
            wait_for(connection, Disconnected)
            time.sleep(0.2)
            mosquitto.start()
        wait_for(connection, Connected)


@pytest.mark.parametrize(("five", "size"), [(False, 1000), (True, 100_000)])
def test_a_broker_that_hangs_up_at_a_large_message_may_have_a_limit(
    five: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "BACKOFF_SECONDS", (0.05, 0.05))

    def answer(kind: int, body: bytes, client: socket.socket) -> None:
        client.shutdown(socket.SHUT_RDWR)

    with Script(answer, five) as broker, Connection(broker.address, "one") as connection:
        connection.connect()
        connection.publish("open/a", bytes(size))
        with pytest.raises(
            IdentityTaken, match=f"not take packets as large as ours .up to {size} bytes, on open/a"
        ):
            wait_for(connection, Message)


def test_another_release_of_paho_is_refused(address: BrokerAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if it made its socket in another way: past our wire, every publication would be lost without a word.
    monkeypatch.delattr(connection_module._Client, "_create_socket")
    refusal = pytest.raises(FedmptError, match=r"install paho-mqtt>=2\.2,<2\.3")
    with Connection(address, "one") as connection, refusal:
        connection.connect()


@pytest.mark.parametrize(
    ("case", "said"),
    [("missing", "certificate required"), ("expired", "certificate expired"), ("foreign", "unknown ca")],
)
def test_what_tls_said_about_our_certificate_is_passed_on(
    case: str, said: str, tmp_path: Path, start_mosquitto: Callable[..., Any]
) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    ours, others = tmp_path / "ours", tmp_path / "others"
    for folder in (ours, others):
        folder.mkdir()
        make_authority(folder, "birds", now)
    server = issue_certificate(ours, "broker", now, days=1, hosts=["127.0.0.1"])
    certificate = {
        "missing": lambda: None,
        "expired": lambda: issue_certificate(ours, "late", now - datetime.timedelta(days=9), days=1),
        "foreign": lambda: issue_certificate(others, "north", now, days=1),
    }[case]()
    key = certificate.with_suffix(".key") if certificate else None
    broker = start_mosquitto(
        f"cafile {ours / 'ca.pem'}\ncertfile {server}\nkeyfile {server.with_suffix('.key')}\n"
        "require_certificate true"
    )
    address = BrokerAddress(
        "127.0.0.1", broker.port, tls=True, authority=ours / "ca.pem", certificate=certificate, key=key
    )
    start = time.monotonic()
    refusal = pytest.raises(BrokerUnreachable, match=f"refuses us by TLS .*{said}.*; check --cert and --key")
    with Connection(address, "one") as connection, refusal:
        connection.connect()
    assert time.monotonic() - start < 4, "it is not asked again"


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
