"""The aggregator's server against a real mosquitto, with hand-driven clients."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedmpt.aggregator import server as server_module
from fedmpt.aggregator.federation import Federation
from fedmpt.aggregator.server import connect, serve
from fedmpt.aggregator.store import Store, StoreError
from fedmpt.protocol import connection as connection_module
from fedmpt.protocol.address import BrokerAddress, parse_broker
from fedmpt.protocol.codec import State, decode_state, state_digest
from fedmpt.protocol.connection import Connection
from fedmpt.protocol.events import Connected, Message, PayloadTooLarge
from fedmpt.protocol.manifest import BundleManifest
from fedmpt.protocol.messages import Presence, Receipt, Round, Status, from_json, to_json
from fedmpt.protocol.topics import Topics

SECONDS = 30.0
TOPICS = Topics("birds")


class Client:
    """A hand-driven client: it sends what its test says, and remembers what it was sent."""

    def __init__(self, address: BrokerAddress, name: str, bundle: BundleManifest) -> None:
        self.name, self.bundle = name, bundle
        self.round: Round | None = None
        self.status: Status | None = None
        self.states: dict[str, State] = {}
        self.receipts: list[Receipt] = []
        self.connection = Connection(
            address,
            name,
            subscriptions=(TOPICS.round, TOPICS.all_states, TOPICS.receipt(name), TOPICS.status),
            will=(TOPICS.presence(name), self._presence(False)),
        )
        self.connection.connect()
        self.say(True)

    def _presence(self, online: bool) -> bytes:
        return to_json(Presence("birds", self.name, online, self.bundle.digest, 10, {}))

    def say(self, online: bool) -> None:
        self.connection.publish(TOPICS.presence(self.name), self._presence(online), retain=True)

    def until(self, reached: Callable[[Client], object]) -> None:
        end = time.monotonic() + SECONDS
        while not reached(self):
            assert time.monotonic() < end, f"{self.name}: {self.round}, {self.receipts}"
            event = self.connection.receive(0.1)
            if isinstance(event, Connected):
                self.say(True)
            if isinstance(event, Message):
                self._take(event)
                self.connection.acknowledge(event)

    def _take(self, message: Message) -> None:
        if message.topic == TOPICS.round:
            self.round = from_json(Round, message.payload, message.topic)
        elif message.topic == TOPICS.status:
            self.status = from_json(Status, message.payload, message.topic)
        elif message.topic == TOPICS.receipt(self.name):
            self.receipts.append(from_json(Receipt, message.payload, message.topic))
        elif message.payload:
            state = decode_state(message.payload, self.bundle.state)
            self.states[state_digest(state)] = state

    def in_round(self, number: int) -> None:
        self.until(
            lambda me: (
                me.round
                and me.round.round == number
                and me.round.state in me.states
                and (me.round.phase == "finished" or me.name in me.round.clients)
            )
        )

    def publish(self, payload: bytes) -> None:
        assert self.round
        self.connection.publish(TOPICS.update(self.round.round, self.name), payload)

    def answer(self, make_update: Callable[..., bytes], **changes: object) -> Receipt:
        assert self.round
        fields = {"names": self.round.trainable} | changes
        self.publish(make_update(self.states[self.round.state], self.name, self.round.round, **fields))
        before = len(self.receipts)
        self.until(lambda me: len(me.receipts) > before)
        return self.receipts[-1]


class Server:
    """An aggregator in a thread."""

    def __init__(self, federation: Federation, connection: Connection) -> None:
        self.federation, self.connection = federation, connection
        self.stop, self.finished = threading.Event(), False
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with self.connection:
            try:
                self.finished = serve(self.federation, self.connection, stop=self.stop)
            except StoreError as error:
                self.failure = error

    def join(self) -> None:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


@pytest.fixture
def address(mosquitto) -> BrokerAddress:
    return parse_broker(mosquitto.url)


@pytest.fixture
def server(
    address: BrokerAddress,
    bundle: BundleManifest,
    state: State,
    make_settings: Callable[..., object],
    tmp_path: Path,
) -> Iterator[Server]:
    with Store(tmp_path / "store") as store:
        federation = Federation(store, bundle, state, make_settings())
        running = Server(federation, connect(address, federation))
        yield running
        running.stop.set()
        running.join()


@pytest.fixture
def clients(address: BrokerAddress, bundle: BundleManifest, server: Server) -> Iterator[list[Client]]:
    made = [Client(address, name, bundle) for name in ("a", "b")]
    yield made
    for client in made:
        client.connection.close()


def test_a_federation_runs_to_its_end(
    server: Server, clients: list[Client], make_update: Callable[..., bytes]
) -> None:
    for number in range(4):
        for client in clients:
            client.in_round(number)
            assert client.answer(make_update).status == "accepted"
    for client in clients:
        client.in_round(4)
    assert clients[0].round is not None
    assert clients[0].round.phase == "finished"
    assert clients[0].round.state == server.federation.digest
    server.join()
    assert server.finished


def test_a_repeated_update_is_a_duplicate_and_a_bad_one_is_refused(
    server: Server, clients: list[Client], make_update: Callable[..., bytes]
) -> None:
    a, b = clients
    a.in_round(0)
    b.in_round(0)
    refused = a.answer(make_update, step=1e9)
    assert (refused.status, refused.check) == ("rejected", "norm")
    assert a.answer(make_update).status == "accepted"
    assert a.answer(make_update).status == "duplicate"


def test_rubbish_does_not_stop_the_server(
    server: Server, clients: list[Client], make_update: Callable[..., bytes]
) -> None:
    a, b = clients
    a.in_round(0)
    b.in_round(0)
    for topic in (
        TOPICS.presence("c"),
        TOPICS.update(0, "c"),
        f"{TOPICS.root}/update/x/..",
        TOPICS.update(0, "b"),
    ):
        for payload in (b"", b"{", b"\xff" * 1000, b"[" * 5000):
            a.connection.publish(topic, payload)
    b.answer(make_update)  # its topic had rubbish too, so refusals come first
    b.until(lambda me: me.receipts[-1].status == "accepted")
    a.answer(make_update)
    a.in_round(1)


def test_a_disk_that_fails_stops_the_server_and_what_it_did_not_answer_comes_again(
    address: BrokerAddress,
    bundle: BundleManifest,
    state: State,
    make_settings: Callable[..., object],
    make_update: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(tmp_path / "store")
    federation = Federation(store, bundle, state, make_settings())
    failing = Server(federation, connect(address, federation))
    made = [Client(address, name, bundle) for name in ("a", "b")]
    for client in made:
        client.in_round(0)
    assert made[0].answer(make_update).status == "accepted"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        assert made[1].round
        before = made[1].states[made[1].round.state]
        made[1].publish(make_update(before, "b", 0, names=made[1].round.trainable))
        failing.join()
        assert "No space left on device" in str(failing.failure)
        assert "nothing that was acknowledged is lost" in str(failing.failure)
    with pytest.raises(StoreError, match="No space left on device"):
        store.close()
    assert made[1].receipts == []
    with Store(tmp_path / "store") as store:
        federation = Federation(store, bundle, state, make_settings())
        running = Server(federation, connect(address, federation))
        for client in made:
            client.in_round(1)  # the broker had kept the unacknowledged update
        running.stop.set()
        running.join()
    for client in made:
        client.connection.close()


def test_an_update_is_acknowledged_and_answered_only_once_it_is_durable(
    server: Server,
    clients: list[Client],
    make_update: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = clients
    a.in_round(0)
    b.in_round(0)
    done: list[str] = []
    sync, acknowledge, answer = os.fdatasync, server.connection.acknowledge_all, server.connection.publish_all

    def noting(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def noted(argument: object) -> None:
            if argument:
                done.append(name)
            function(argument)

        return noted

    monkeypatch.setattr(os, "fdatasync", noting("durable", sync))
    monkeypatch.setattr(server.connection, "acknowledge_all", noting("acknowledged", acknowledge))
    monkeypatch.setattr(server.connection, "publish_all", noting("answered", answer))
    assert a.answer(make_update).status == "accepted"
    assert done[done.index("durable") :][:3] == ["durable", "acknowledged", "answered"]
    assert "answered" not in done[: done.index("durable")]


def test_the_status_topic_tells_where_it_stands(server: Server, clients: list[Client]) -> None:
    a, b = clients
    a.in_round(0)
    b.say(False)
    a.until(lambda me: me.status and me.status.present == 1)
    assert a.status is not None
    assert (a.status.online, a.status.round, a.status.phase, a.status.chosen) == (True, 0, "calibrate", 2)


def test_after_a_broker_restart_everything_is_published_again(
    mosquitto, server: Server, clients: list[Client], make_update: Callable[..., bytes]
) -> None:
    a, b = clients
    a.in_round(0)
    b.in_round(0)
    assert a.answer(make_update).status == "accepted"
    mosquitto.kill()  # without persistence: sessions and retained messages are gone
    a.round = b.round = None
    mosquitto.start()
    a.in_round(0)
    b.in_round(0)
    assert b.answer(make_update).status == "accepted"
    a.in_round(1)
    b.in_round(1)


def test_a_stop_says_offline_and_keeps_the_round(
    server: Server, clients: list[Client], make_update: Callable[..., bytes]
) -> None:
    a, b = clients
    a.in_round(0)
    b.in_round(0)
    assert a.answer(make_update).status == "accepted"
    server.stop.set()
    server.join()
    a.until(lambda me: me.status and not me.status.online)
    assert not server.finished
    assert server.federation.status(0.0).received == 1


def test_a_broker_that_would_not_take_an_update_is_refused_at_the_start(
    mosquitto, bundle: BundleManifest, state: State, make_settings: Callable[..., object], tmp_path: Path
) -> None:
    mosquitto.kill()
    mosquitto.configuration.write_text(mosquitto.configuration.read_text() + "max_packet_size 2000\n")
    mosquitto.start()
    with Store(None) as store:
        federation = Federation(store, bundle, state, make_settings())
        with pytest.raises(PayloadTooLarge, match="the broker takes at most 2000"):
            connect(parse_broker(mosquitto.url), federation)


def test_after_a_broker_restart_clients_that_are_gone_are_not_counted(
    mosquitto, server: Server, clients: list[Client]
) -> None:
    a, b = clients
    a.in_round(0)
    b.connection.close()
    mosquitto.kill()  # nobody is left to publish b's last will
    a.round = a.status = None
    mosquitto.start()
    a.until(lambda me: me.status and me.status.online and me.status.present == 1)


def test_what_the_broker_would_not_take_is_left_out_and_the_round_goes_on(
    server: Server,
    clients: list[Client],
    make_update: Callable[..., bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    a, b = clients
    a.in_round(0)
    b.in_round(0)
    assert a.answer(make_update).status == "accepted"
    server.connection.maximum_packet_size = 100  # of the broker: not even a receipt fits
    assert b.states
    b.publish(make_update(b.states[b.round.state], "b", 0, names=b.round.trainable))
    end = time.monotonic() + SECONDS
    while "message dropped" not in caplog.text and time.monotonic() < end:
        time.sleep(0.05)
    server.connection.maximum_packet_size = None
    assert server.federation.round.number == 1
    assert "not sent: fedmpt/v1/birds/receipt/b" in caplog.text
    a.until(lambda me: me.status and me.status.round == 1)


def test_a_status_that_is_too_large_comes_without_its_metrics(
    server: Server, clients: list[Client], make_update: Callable[..., bytes]
) -> None:
    metrics = {f"metric number {number}": 1 / 3 for number in range(32)}
    for number in (0, 1):
        for client in clients:
            client.in_round(number)
            assert client.answer(make_update, metrics=metrics).status == "accepted"
        if number == 0:
            clients[0].until(lambda me: me.status and me.status.round == 1 and me.status.metrics)
            server.connection.maximum_packet_size = 600  # of the broker
    clients[0].until(lambda me: me.status and me.status.round == 2)
    assert clients[0].status is not None
    assert clients[0].status.metrics == {}


def test_after_a_long_outage_all_retained_topics_are_said_again(
    mosquitto, server: Server, clients: list[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TICK_SECONDS", "STATUS_SECONDS", "HEARTBEAT_SECONDS"):
        monkeypatch.setattr(server_module, name, 0.05)
    monkeypatch.setattr(connection_module, "OUTBOX", 10)
    for client in clients:
        client.in_round(0)
        client.connection.close()
    mosquitto.kill()  # without persistence
    time.sleep(2.0)  # of heartbeats
    mosquitto.start()
    topics = {TOPICS.manifest, TOPICS.round, TOPICS.state(0), TOPICS.status}
    with Connection(
        parse_broker(mosquitto.url), "fresh", subscriptions=[f"{TOPICS.root}/+", TOPICS.all_states]
    ) as fresh:
        fresh.connect()
        end = time.monotonic() + SECONDS
        while topics and time.monotonic() < end:
            event = fresh.receive(0.1)
            if isinstance(event, Message):
                topics.discard(event.topic)
    assert not topics
