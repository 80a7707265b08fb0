"""``fedmpt aggregator`` and ``fedmpt status`` as processes: a whole run, kills, and what operators get wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedmpt.cli.logs import show_logs
from fedmpt.protocol.address import BrokerAddress
from fedmpt.protocol.codec import State, decode_state, load_provenance, load_state, state_digest
from fedmpt.protocol.connection import Connection
from fedmpt.protocol.events import Connected, Message
from fedmpt.protocol.manifest import BundleManifest
from fedmpt.protocol.messages import Presence, Receipt, Round, from_json, to_json
from fedmpt.protocol.topics import Topics

FEDMPT = [sys.executable, "-c", "import sys; from fedmpt.cli import main; sys.exit(main())"]
TOPICS = Topics("birds")
SECONDS = 60.0


@pytest.fixture
def port(free_port: Callable[[], int]) -> int:
    return free_port()


class Aggregator:
    """The command with its embedded broker, to be killed and started again."""

    def __init__(self, bundle_folder: Path, port: int, folder: Path) -> None:
        self._arguments = ["aggregator", "--bundle", bundle_folder, "--embedded", "--port", port]
        self._arguments += ["--federation", "birds", "--clients-min", 2, "--json", "--log", "json"]
        self._arguments += ["--store", folder / "store", "--out", folder / "final.safetensors"]
        self._log = folder / "log.jsonl"
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*FEDMPT, *map(str, self._arguments)], stdout=subprocess.PIPE, stderr=log, text=True
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self._log.read_text().splitlines()]


@pytest.fixture
def aggregator(bundle_folder: Path, port: int, tmp_path: Path) -> Iterator[Aggregator]:
    running = Aggregator(bundle_folder, port, tmp_path)
    yield running
    running.kill()


class Client(threading.Thread):
    """A client in a thread that answers every round until the federation is finished."""

    def __init__(
        self,
        address: BrokerAddress,
        name: str,
        bundle: BundleManifest,
        make_update: Callable[..., bytes],
        on_accepted: Callable[[int], None] = lambda number: None,
    ) -> None:
        super().__init__(name=name)
        self.bundle, self.make_update, self.on_accepted = bundle, make_update, on_accepted
        self.states: dict[str, State] = {}
        self.opened: Round | None = None  # the round that is still to be answered
        self.connection = Connection(
            address, name, subscriptions=(TOPICS.round, TOPICS.all_states, TOPICS.receipt(name))
        )
        self.start()

    def run(self) -> None:
        with self.connection:
            self.connection.connect(SECONDS)
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                event = self.connection.receive(0.2)
                if isinstance(event, Connected):
                    self.say(True)
                elif isinstance(event, Message):
                    self.connection.acknowledge(event)
                    if self.take(event):
                        self.say(False)
                        return

    def say(self, online: bool) -> None:
        message = Presence("birds", self.name, online, self.bundle.digest, 10, {})
        self.connection.publish(TOPICS.presence(self.name), to_json(message), retain=True).wait(5)

    def take(self, message: Message) -> bool:
        """Answer one message; whether the federation is finished."""
        if message.topic == TOPICS.round:
            self.opened = from_json(Round, message.payload, message.topic)
        elif message.topic == TOPICS.receipt(self.name):
            receipt = from_json(Receipt, message.payload, message.topic)
            if receipt.status == "accepted":
                self.on_accepted(receipt.round)
        elif message.payload:
            state = decode_state(message.payload, self.bundle.state)
            self.states[state_digest(state)] = state
        opened = self.opened
        if opened and self.name in opened.clients and opened.state in self.states:
            state = self.states[opened.state]
            payload = self.make_update(state, self.name, opened.round, names=opened.trainable)
            self.connection.publish(TOPICS.update(opened.round, self.name), payload)
            self.opened = None
        return opened is not None and opened.phase == "finished"


def run_to_the_end(aggregator: Aggregator, clients: list[Client]) -> dict[str, object]:
    for client in clients:
        client.join(SECONDS)
    output, _ = aggregator.process.communicate(timeout=SECONDS)
    assert aggregator.process.returncode == 0
    return json.loads(output)


def fedmpt(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FEDMPT, *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS, check=False
    )


@pytest.mark.slow
def test_a_kill_in_every_round_changes_no_bit_of_the_result(
    bundle_folder: Path,
    bundle: BundleManifest,
    make_update: Callable[..., bytes],
    tmp_path: Path,
    free_port: Callable[[], int],
) -> None:
    results = []
    for disturbed in (False, True):
        place, folder = free_port(), tmp_path / str(disturbed)
        folder.mkdir()
        aggregator = Aggregator(bundle_folder, place, folder)
        killed: set[int] = set()

        def disturb(number: int, aggregator: Aggregator = aggregator, killed: set[int] = killed) -> None:
            if number not in killed:
                killed.add(number)
                aggregator.kill()
                aggregator.start()

        address = BrokerAddress("127.0.0.1", place)
        hooks = {"on_accepted": disturb} if disturbed else {}
        clients = [
            Client(address, "a", bundle, make_update, **hooks),
            Client(address, "b", bundle, make_update),
        ]
        with contextlib.ExitStack() as stack:
            stack.callback(aggregator.kill)
            result = run_to_the_end(aggregator, clients)
        assert len(killed) == (4 if disturbed else 0)
        state = load_state(folder / "final.safetensors", bundle.state)
        assert result["state"] == state_digest(state)
        assert len((folder / "store" / "history.jsonl").read_text().splitlines()) == 4
        results.append(result["state"])
    assert results[0] == results[1]


def test_a_run_reports_its_result_and_logs_its_rounds(
    aggregator: Aggregator,
    bundle: BundleManifest,
    make_update: Callable[..., bytes],
    port: int,
    tmp_path: Path,
) -> None:
    address = BrokerAddress("127.0.0.1", port)
    result = run_to_the_end(aggregator, [Client(address, name, bundle, make_update) for name in ("a", "b")])
    assert result["finished"] is True
    assert result["metrics"] == {"mAP": 0.5}
    assert aggregator.events().count("round closed") == 4
    provenance = load_provenance(tmp_path / "final.safetensors")
    assert (provenance["federation"], provenance["rounds"]) == ("birds", "3")
    again = fedmpt("aggregator", "--bundle", "nowhere", "--config", tmp_path / "none.toml")
    assert again.returncode == 1


def test_status_shows_round_and_clients_from_outside(
    aggregator: Aggregator, bundle: BundleManifest, port: int
) -> None:
    address = BrokerAddress("127.0.0.1", port)
    connection = Connection(address, "a")
    with connection:
        connection.connect(SECONDS)
        message = Presence("birds", "a", True, bundle.digest, 120, {"engine": "[bold]onnx"})
        connection.publish(TOPICS.presence("a"), to_json(message), retain=True).wait(5)
        time.sleep(1.5)
        shown = fedmpt("status", "--broker", address.url, "--federation", "birds")
        assert shown.returncode == 0, shown.stderr
        assert "waiting for 1 more client to begin" in shown.stdout
        assert "engine [bold]onnx" in shown.stdout
        plain = json.loads(
            fedmpt("status", "--broker", address.url, "--federation", "birds", "--json").stdout
        )
        assert (plain["round"], plain["phase"], plain["present"]) == (0, "calibrate", 1)
        assert plain["clients"][0]["samples"] == 120
        missing = fedmpt("status", "--broker", address.url, "--federation", "fish", "--timeout", 3)
        assert missing.returncode == 1
        assert "no word of federation fish" in missing.stderr


def test_what_clients_say_of_themselves_steers_no_terminal_and_stops_nobody(
    aggregator: Aggregator, bundle: BundleManifest, port: int
) -> None:
    address = BrokerAddress("127.0.0.1", port)
    said = {
        "a": {"capabilities": {"x": "\x1b]0;owned\x07\n\x9b2J\u202e"}},
        "b": {"bundle": "\ud800"},
        "c": {"capabilities": {"\ud800": 1}},
    }
    with Connection(address, "a") as connection:
        connection.connect(SECONDS)
        for name, changes in said.items():
            presence = json.loads(to_json(Presence("birds", name, True, bundle.digest, 120, {}))) | changes
            connection.publish(TOPICS.presence(name), json.dumps(presence).encode(), retain=True).wait(5)
        time.sleep(1.5)
        for options in ((), ("--json",)):
            shown = fedmpt("status", "--broker", address.url, "--federation", "birds", *options)
            assert shown.returncode == 0, shown.stderr
            assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown.stdout)
            assert "owned" in shown.stdout
    assert aggregator.process.poll() is None


def test_strangers_text_in_the_log_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_logs()
    logging.getLogger("fedmpt.aggregator").warning("refused", extra={"reason": "x\nround closed\x1b[2J"})
    assert capsys.readouterr().err == "refused: reason x\\nround closed\\x1b[2J\n"


def test_sigterm_ends_cleanly_and_says_how_to_go_on(aggregator: Aggregator) -> None:
    end = time.monotonic() + SECONDS
    while "connected" not in aggregator.events() and time.monotonic() < end:
        time.sleep(0.1)
    aggregator.process.send_signal(signal.SIGTERM)
    output, _ = aggregator.process.communicate(timeout=SECONDS)
    assert aggregator.process.returncode == 0
    assert json.loads(output)["finished"] is False


def test_sigterm_while_no_broker_answers_ends_cleanly(bundle_folder: Path, tmp_path: Path, port: int) -> None:
    log = tmp_path / "log"
    arguments = ["aggregator", "--bundle", bundle_folder, "--federation", "birds", "--json", "--log", "json"]
    arguments += ["--store", tmp_path / "store", "--broker", f"mqtt://127.0.0.1:{port}"]
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [*FEDMPT, *map(str, arguments)], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        end = time.monotonic() + SECONDS
        while "federation" not in log.read_text() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=10)
    assert process.returncode == 0, log.read_text()
    assert json.loads(output)["finished"] is False


def test_a_taken_port_is_a_clear_error(bundle_folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = fedmpt(
            "aggregator",
            *("--bundle", bundle_folder, "--federation", "birds", "--store", tmp_path / "store"),
            *("--embedded", "--port", port),
        )
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1 cannot be used" in done.stderr


def test_an_embedded_broker_for_other_machines_is_refused(bundle_folder: Path, tmp_path: Path) -> None:
    done = fedmpt(
        "aggregator",
        *("--bundle", bundle_folder, "--federation", "birds", "--store", tmp_path / "store"),
        *("--embedded", "--broker", "mqtt://0.0.0.0:1883"),
    )
    assert done.returncode == 1
    assert "serves this machine only, not 0.0.0.0" in done.stderr


def test_an_unreachable_broker_is_a_clear_error(bundle_folder: Path, tmp_path: Path, port: int) -> None:
    done = fedmpt(
        "aggregator",
        *("--bundle", bundle_folder, "--federation", "birds", "--store", tmp_path / "store"),
        *("--broker", f"mqtt://127.0.0.1:{port}"),
    )
    assert done.returncode == 1
    assert f"broker mqtt://127.0.0.1:{port}: [Errno 111] Connection refused" in done.stderr


def test_privacy_needs_all_its_settings(bundle_folder: Path, tmp_path: Path) -> None:
    done = fedmpt(
        *("aggregator", "--bundle", bundle_folder, "--federation", "birds", "--store", tmp_path / "store"),
        *("--embedded", "--dp-noise", 1.0),
    )
    assert done.returncode == 1
    assert "needs --dp-noise, --dp-clip and --dp-delta together" in done.stderr
