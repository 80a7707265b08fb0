"""``fedmpt certs`` against a real mosquitto: who gets in, and what a client may write and read."""

from __future__ import annotations

import datetime
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from paho.mqtt.enums import CallbackAPIVersion

from fedmpt.aggregator.certificates import (
    CertificateError,
    certified_hosts,
    issue_certificate,
    make_authority,
    mosquitto_acl,
    mosquitto_configuration,
)
from fedmpt.cli import main
from fedmpt.protocol.messages import Status, to_json

NOW = datetime.datetime.now(datetime.timezone.utc)
BASE = "fedmpt/v1/farm"


@pytest.fixture(scope="module")
def broker(
    tmp_path_factory: pytest.TempPathFactory, mosquitto_program: str, free_port: Callable[[], int]
) -> Iterator[tuple[Path, int]]:
    """A mosquitto started with the files of ``fedmpt certs``: (their folder, its port)."""
    folder = tmp_path_factory.mktemp("certs")
    port = free_port()
    arguments = f"certs --out {folder} --federation farm --host localhost --host 127.0.0.1 --port {port}"
    assert main([*arguments.split(), "--client", "north", "--client", "south"]) == 0
    process = subprocess.Popen(
        [mosquitto_program, "-c", str(folder / "mosquitto.conf")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield folder, port
    finally:
        process.terminate()
        process.wait(10)


def connect(broker: tuple[Path, int], name: str | None, client_id: str = "") -> paho.Client:
    """A connected client with the certificate ``name``; raises if the broker does not let it in."""
    folder, port = broker
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5)
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    if name:
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    client.tls_set_context(context)
    reasons: list[str] = []
    client.on_connect = lambda c, u, flags, reason, properties: reasons.append(str(reason))
    client.connect("127.0.0.1", port, keepalive=10)
    client.loop_start()
    deadline = time.monotonic() + 2
    while not client.is_connected() and time.monotonic() < deadline:
        time.sleep(0.02)
    if reasons != ["Success"]:
        client.loop_stop()
        raise ConnectionError(f"not let in: {reasons}")
    return client


def close(client: paho.Client) -> None:
    client.disconnect()
    client.loop_stop()


def listen(broker: tuple[Path, int], name: str) -> tuple[paho.Client, list[str]]:
    """A connection that is subscribed to everything, and the topics of what it gets."""
    reader = connect(broker, name)
    got: list[str] = []
    subscribed: list[object] = []
    reader.on_subscribe = lambda *event: subscribed.append(event)
    reader.on_message = lambda c, u, message: got.append(message.topic)
    reader.subscribe(f"{BASE}/#", qos=1)
    while not subscribed:
        time.sleep(0.01)
    return reader, got


def delivered(broker: tuple[Path, int], sender: str, topic: str) -> bool:
    """Whether a message that ``sender`` publishes reaches the operator, who may read everything."""
    (reader, got), writer = listen(broker, "operator"), connect(broker, sender)
    writer.publish(topic, b"x", qos=1)
    # A permitted message behind it: when it is there, the first was delivered or never will be.
    permitted = f"{BASE}/manifest" if sender == "aggregator" else f"{BASE}/presence/{sender}"
    writer.publish(permitted, b"y", qos=1)
    deadline = time.monotonic() + 3
    while permitted not in got and time.monotonic() < deadline:
        time.sleep(0.02)
    assert permitted in got
    close(reader)
    close(writer)
    return topic in got


def test_a_client_writes_its_own_topics_only(broker: tuple[Path, int]) -> None:
    assert delivered(broker, "north", f"{BASE}/update/3/north")
    assert not delivered(broker, "north", f"{BASE}/update/3/south")
    assert not delivered(broker, "north", f"{BASE}/presence/south")
    assert not delivered(broker, "north", f"{BASE}/round")
    assert not delivered(broker, "north", f"{BASE}/state/3")
    assert not delivered(broker, "north", f"{BASE}/receipt/north")


def test_the_aggregator_writes_rounds_and_receipts_but_no_updates(broker: tuple[Path, int]) -> None:
    assert delivered(broker, "aggregator", f"{BASE}/round")
    assert delivered(broker, "aggregator", f"{BASE}/receipt/north")
    assert not delivered(broker, "aggregator", f"{BASE}/update/3/north")


def test_a_client_cannot_read_anothers_receipt_update_or_presence(broker: tuple[Path, int]) -> None:
    reader, writer, other = (connect(broker, name) for name in ("south", "aggregator", "north"))
    got: list[str] = []
    subscribed: list[object] = []
    reader.on_subscribe = lambda *event: subscribed.append(event)
    reader.on_message = lambda c, u, message: got.append(message.topic)
    reader.subscribe(f"{BASE}/#", qos=1)
    while not subscribed:
        time.sleep(0.01)
    writer.publish(f"{BASE}/receipt/north", b"x", qos=1).wait_for_publish(3)
    other.publish(f"{BASE}/update/3/north", b"x", qos=1).wait_for_publish(3)
    other.publish(f"{BASE}/presence/north", b"x", qos=1).wait_for_publish(3)
    writer.publish(f"{BASE}/receipt/south", b"x", qos=1)
    deadline = time.monotonic() + 3
    while f"{BASE}/receipt/south" not in got and time.monotonic() < deadline:
        time.sleep(0.02)
    assert set(got) - {f"{BASE}/manifest", f"{BASE}/round"} == {f"{BASE}/receipt/south"}
    for client in (reader, writer, other):
        close(client)


@pytest.mark.parametrize("name", ["operator", "doctor"])
def test_who_only_reads_cannot_pose_as_a_client(broker: tuple[Path, int], name: str) -> None:
    (reader, got), writer = listen(broker, "aggregator"), connect(broker, name)
    answers = {}
    writer.on_publish = lambda c, u, packet, reason, properties: answers.update({packet: str(reason)})
    for topic in (f"presence/{name}", f"update/1/{name}", "presence/north", "status", "round"):
        writer.publish(f"{BASE}/{topic}", b"x", qos=1).wait_for_publish(3)
    assert list(answers.values()) == ["Not authorized"] * 5
    close(writer)
    close(reader)
    assert f"{BASE}/presence/{name}" not in got


def test_a_doctors_visit_does_not_displace_the_sites_client(
    broker: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, port = broker
    client, aggregator = connect(broker, "north"), connect(broker, "aggregator")
    left: list[object] = []
    client.on_disconnect = lambda *event: left.append(event)
    status = Status("farm", True, 3, 10, "train", 1, 1, 0, 0, 0, None, "", {}, time.time())
    done = threading.Event()

    def speak() -> None:
        while not done.wait(0.2):
            aggregator.publish(f"{BASE}/status", to_json(replace(status, time=time.time())), qos=1)

    speaker = threading.Thread(target=speak)
    speaker.start()
    options = f"--broker mqtts://127.0.0.1:{port} --ca {folder}/ca.pem --cert {folder}/north.pem"
    options += f" --key {folder}/north.key --federation farm"
    try:
        assert main(["doctor", "--json", *options.split()]) == 0
    finally:
        done.set()
        speaker.join()
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    wanted = ("our certificate", "broker", "aggregator", "clock")
    assert [checks[name]["status"] for name in wanted] == ["ok"] * 4, checks
    assert not left
    assert client.is_connected()
    close(client)
    close(aggregator)


def test_a_certificate_that_the_broker_refuses_fails_the_doctors_check(
    broker: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, port = broker
    issue_certificate(folder, "stale", NOW - datetime.timedelta(days=30), days=20)
    options = f"--broker mqtts://127.0.0.1:{port} --ca {folder}/ca.pem --cert {folder}/stale.pem"
    assert main(["doctor", "--json", *options.split(), "--key", f"{folder}/stale.key"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert (checks["our certificate"]["status"], checks["broker"]["status"]) == ("failed", "ok")


def test_nobody_takes_over_a_session_by_its_client_id(broker: tuple[Path, int]) -> None:
    victim = connect(broker, "north", client_id="north")
    attacker = connect(broker, "south", client_id="north")
    time.sleep(0.3)
    assert victim.is_connected()
    close(victim)
    close(attacker)


def test_without_a_certificate_nobody_gets_in(broker: tuple[Path, int]) -> None:
    with pytest.raises((ConnectionError, ssl.SSLError, OSError)):
        connect(broker, None)


def test_an_expired_certificate_does_not_get_in(broker: tuple[Path, int]) -> None:
    issue_certificate(broker[0], "late", NOW - datetime.timedelta(days=30), days=20)
    with pytest.raises((ConnectionError, ssl.SSLError, OSError)):
        connect(broker, "late")


def test_a_certificate_of_another_authority_does_not_get_in(broker: tuple[Path, int], tmp_path: Path) -> None:
    make_authority(tmp_path, "farm", NOW)
    issue_certificate(tmp_path, "north", NOW, days=10)
    (tmp_path / "ca.pem").write_bytes((broker[0] / "ca.pem").read_bytes())
    with pytest.raises((ConnectionError, ssl.SSLError, OSError)):
        connect((tmp_path, broker[1]), "north")


def test_a_second_run_keeps_the_authority_and_adds_clients(tmp_path: Path) -> None:
    arguments = ["certs", "--out", str(tmp_path), "--federation", "farm", "--host", "localhost"]
    assert main([*arguments, "--client", "north"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pem")}
    assert main([*arguments, "--client", "north", "--client", "east"]) == 0
    after = {path.name: path.read_bytes() for path in tmp_path.glob("*.pem")}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"east.pem"}


def broker_hosts(folder: Path) -> list[str]:
    return sorted(certified_hosts(folder / "broker.pem"))


def test_a_second_run_with_another_host_adds_it_to_the_brokers_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["certs", "--out", str(tmp_path), "--federation", "farm", "--json"]
    assert main([*arguments, "--host", "localhost"]) == 0
    before = (tmp_path / "aggregator.pem").read_bytes()
    assert main([*arguments, "--host", "broker.local", "--host", "10.0.0.2"]) == 0
    assert broker_hosts(tmp_path) == ["10.0.0.2", "broker.local", "localhost"]
    assert str(tmp_path / "broker.pem") in json.loads(capsys.readouterr().out.splitlines()[-1])["written"]
    assert (tmp_path / "aggregator.pem").read_bytes() == before
    made = (tmp_path / "broker.pem").read_bytes()
    assert main([*arguments, "--host", "broker.local"]) == 0
    assert (tmp_path / "broker.pem").read_bytes() == made


def test_a_second_run_for_another_federation_is_refused_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["certs", "--out", str(tmp_path), "--host", "localhost"]
    assert main([*arguments, "--federation", "farm"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert main([*arguments, "--federation", "fish"]) == 1
    assert "belongs to the farm federation authority; choose another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_a_second_run_that_fails_half_way_leaves_everything_as_it_was(tmp_path: Path) -> None:
    arguments = ["certs", "--out", str(tmp_path), "--federation", "farm", "--client", "north"]
    assert main([*arguments, "--host", "localhost"]) == 0
    (tmp_path / "south.key").mkdir()  # so that this key cannot be written, after the broker's certificate was
    before = {
        path.name: (path.stat().st_mode, path.is_file() and path.read_bytes()) for path in tmp_path.iterdir()
    }
    assert main([*arguments, "--host", "broker.example", "--client", "south"]) == 1
    after = {
        path.name: (path.stat().st_mode, path.is_file() and path.read_bytes()) for path in tmp_path.iterdir()
    }
    assert after == before


def test_an_authority_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    make_authority(tmp_path, "farm", NOW)
    (tmp_path / "ca.pem").write_bytes(b"rubbish")
    with pytest.raises(CertificateError, match=r"ca\.pem: no readable certificate"):
        make_authority(tmp_path, "farm", NOW)


def test_private_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    make_authority(tmp_path, "farm", NOW)
    issue_certificate(tmp_path, "north", NOW, days=10)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.key")} == {0o600}


def test_a_server_certificate_names_its_hosts(tmp_path: Path) -> None:
    make_authority(tmp_path, "farm", NOW)
    path = issue_certificate(tmp_path, "broker", NOW, days=10, hosts=["broker.local", "10.0.0.2"])
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.local"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.2"]


def test_half_an_authority_is_refused(tmp_path: Path) -> None:
    make_authority(tmp_path, "farm", NOW)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(CertificateError, match=r"only one of ca\.pem and ca\.key"):
        make_authority(tmp_path, "farm", NOW)


@pytest.mark.parametrize("name", ["aggregator", "doctor"])
def test_a_clients_name_that_others_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments = ["certs", "--out", str(tmp_path), "--federation", "farm", "--host", "localhost"]
    assert main([*arguments, "--client", name]) == 1
    assert f"client name '{name}' is taken" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_name_that_could_leave_its_topic_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["certs", "--out", str(tmp_path), "--federation", "farm", "--host", "localhost"]
    assert main([*arguments, "--client", "north/#"]) == 1
    assert "north/#" in capsys.readouterr().err


def test_configuration_and_acl_name_the_same_files(tmp_path: Path) -> None:
    text = mosquitto_configuration(tmp_path, 8883, tmp_path / "persistence")
    assert f"acl_file {tmp_path / 'mosquitto.acl'}" in text
    assert "use_identity_as_username true" in text
    assert "pattern write fedmpt/v1/farm/update/+/%u" in mosquitto_acl("farm")
