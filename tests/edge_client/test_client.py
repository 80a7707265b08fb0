"""A site's client against a real mosquitto and a scripted aggregator; training is the real ONNX engine's."""

import dataclasses
import hashlib
import json
import threading
import time

import numpy as np
import pytest

from fedmpt.edge_client import client as client_module
from fedmpt.edge_client.client import ClientError, Limits, Site, run_client
from fedmpt.edge_client.engine import open_engine
from fedmpt.edge_client.schedule import parse_window
from fedmpt.edge_client.trainer import SiteData, calibrate, train_round
from fedmpt.protocol.address import parse_broker
from fedmpt.protocol.codec import decode_update, encode_state, load_state, state_digest
from fedmpt.protocol.connection import Connection
from fedmpt.protocol.events import Connected, Message, PayloadTooLarge
from fedmpt.protocol.manifest import load_manifest
from fedmpt.protocol.messages import Limits as Accepted
from fedmpt.protocol.messages import Manifest, Presence, Receipt, Round, from_json, to_json
from fedmpt.protocol.topics import Topics

TOPICS = Topics("birds")
PATIENCE = 20.0


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return load_manifest(tiny_bundle)


@pytest.fixture(scope="module")
def initial(tiny_bundle, bundle):
    return load_state(tiny_bundle / "state.safetensors", bundle.state)


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return open_engine(tiny_bundle, "onnx", "cpu", threads=1)


@pytest.fixture
def site(bundle, engine):
    random = np.random.default_rng(3)
    tokens = random.normal(size=(30, bundle.tokens.count, bundle.tokens.width))
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    labels = random.integers(0, 2, size=(30, len(bundle.labels))).astype(np.int8)
    data = SiteData(tokens.astype(np.float16), labels, np.arange(24), np.arange(24, 30))
    return Site("birds", "site-a", bundle, engine, data, "fingerprint", {"engine": "onnx"})


class Hub:
    """What a client sees of an aggregator: retained topics, and receipts when the test says so."""

    def __init__(self, url, bundle):
        self.bundle = bundle
        self.updates, self.presence = [], []
        self._connection = Connection(
            parse_broker(url), "hub", subscriptions=[TOPICS.all_updates, TOPICS.all_presence]
        )
        self._connection.connect()

    def publish(self, topic, payload):
        assert self._connection.publish(topic, payload, retain=topic != TOPICS.receipt("site-a")).wait(
            PATIENCE
        )

    def announce(self, **changes):
        fields = {
            "federation": "birds",
            "method": self.bundle.method,
            "labels": self.bundle.labels,
            "conditions": self.bundle.conditions,
            "bundle": self.bundle.digest,
            "state": self.bundle.state,
            "training": self.bundle.training,
            "strategy": "uniform",
            "encoding": "float32",
            "metrics": True,
            "limits": Accepted(update_bytes=1 << 20, samples=1000, norm=0.0),
        }
        self.publish(TOPICS.manifest, to_json(Manifest(**{**fields, **changes})))

    def open_round(self, number, state, phase="train", clients=("site-a",), edition=None, run=""):
        self.publish(TOPICS.state(number), encode_state(state))
        trainable = ("bias", "scale") if phase == "calibrate" else tuple(sorted(self.bundle.state))
        opened = Round(
            "birds",
            number,
            phase,
            trainable,
            state_digest(state),
            None,
            clients,
            number if edition is None else edition,
            run,
        )
        self.publish(TOPICS.round, to_json(opened))

    def answer(self, payload, number, status="accepted", check="", reason=""):
        digest = hashlib.sha256(payload).hexdigest()
        receipt = Receipt("birds", "site-a", number, digest, status, check, reason)
        self.publish(TOPICS.receipt("site-a"), to_json(receipt))

    def wait_for(self, collected, count=1):
        """The first ``count`` payloads of updates or presence."""
        end = time.monotonic() + PATIENCE
        while len(collected) < count:
            assert time.monotonic() < end, f"{len(collected)} of {count} messages came"
            event = self._connection.receive(timeout=0.1)
            if isinstance(event, Message):
                target = self.updates if "/update/" in event.topic else self.presence
                target.append(event.payload)
                self._connection.acknowledge(event)
        return collected[:count]

    def wait_for_presence(self, online):
        """The first presence from now on that says so."""
        while True:
            self.presence.clear()
            message = from_json(Presence, self.wait_for(self.presence)[0], "presence")
            if message.online == online:
                return message

    def close(self):
        self._connection.close()


@pytest.fixture
def hub(mosquitto, bundle):
    hub = Hub(mosquitto.url, bundle)
    yield hub
    hub.close()


class Running:
    """``run_client`` in a thread, with its events."""

    def __init__(self, site, url, folder, **options):
        self.events, self.stop, self.result, self.error = [], threading.Event(), None, None
        self._arrived = threading.Condition()

        def target():
            try:
                self.result = run_client(
                    site, parse_broker(url), folder, stop=self.stop, report=self.report, **options
                )
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=target)
        self.thread.start()

    def report(self, event, facts):
        with self._arrived:
            self.events.append((event, dict(facts)))
            self._arrived.notify_all()

    def names(self):
        return [event for event, _ in self.events]

    def wait_for(self, event, count=1):
        with self._arrived:
            assert self._arrived.wait_for(lambda: self.names().count(event) >= count, PATIENCE), self.events
        return [facts for name, facts in self.events if name == event][count - 1]

    def wait_until(self, event):
        with self._arrived:
            assert self._arrived.wait_for(lambda: event in self.events, PATIENCE), self.events

    def end(self):
        self.stop.set()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        if self.error:
            raise self.error
        return self.result

    def join(self):
        self.thread.join(PATIENCE)
        return self.end()


@pytest.fixture
def start(site, mosquitto, tmp_path):
    running = []

    def start(changed_site=site, **options):
        running.append(Running(changed_site, mosquitto.url, tmp_path / "state", **options))
        return running[-1]

    yield start
    for client in running:
        client.stop.set()
        client.thread.join(PATIENCE)


def _decode(payload, bundle, names=None):
    specs = {name: spec for name, spec in bundle.state.items() if names is None or name in names}
    return decode_update(payload, specs, 1 << 20)


def _same_bits(first, second):
    return {name: value.tobytes() for name, value in first.items()} == {
        name: value.tobytes() for name, value in second.items()
    }


def test_a_client_joins_from_retained_topics_alone_and_takes_part_until_the_end(
    hub, start, site, bundle, initial
):
    hub.announce()
    hub.open_round(0, initial, "calibrate")
    client = start()
    (payload,) = hub.wait_for(hub.updates)
    update, _ = _decode(payload, bundle, ("bias", "scale"))
    expected = calibrate(site.engine, site.data, initial, bundle)
    assert _same_bits(update.difference, expected.difference)
    assert (update.round, update.client, update.base) == (0, "site-a", state_digest(initial))
    hub.answer(payload, 0)
    calibrated = {**initial, **{name: initial[name] + value for name, value in update.difference.items()}}

    hub.open_round(1, calibrated)
    payload = hub.wait_for(hub.updates, 2)[1]
    update, encoding = _decode(payload, bundle)
    expected = train_round(
        site.engine, site.data, calibrated, bundle, round_number=1, client="site-a", seed=bundle.training.seed
    )
    assert encoding == "float32"
    assert _same_bits(update.difference, expected.difference)
    assert (update.samples, update.validation_samples) == (24, 6)
    assert update.metrics == expected.metrics
    assert {"loss", "mAP", "CF1", "OF1"} == set(update.metrics)
    hub.answer(payload, 1)

    final = {name: calibrated[name] + value for name, value in update.difference.items()}
    hub.open_round(2, final, "finished")
    assert _same_bits(client.join(), final)
    assert [name for name in client.names() if name != "waiting"] == [
        "connected", "joined", "training", "trained", "sent", "receipt", "training", "trained", "sent",
        "receipt", "finished",
    ]  # fmt: skip


def test_updates_are_sent_in_the_encoding_that_the_manifest_asks_for(hub, start, bundle, initial):
    hub.announce(encoding="int8")
    hub.open_round(1, initial)
    start()
    assert _decode(hub.wait_for(hub.updates)[0], bundle)[1] == "int8"


def test_metrics_stay_at_home_where_the_manifest_does_not_ask_for_them(hub, start, bundle, initial):
    hub.announce(metrics=False)
    hub.open_round(1, initial)
    start()
    update, _ = _decode(hub.wait_for(hub.updates)[0], bundle)
    assert (update.metrics, update.validation_samples) == ({}, 0)


def test_a_client_that_is_not_chosen_waits(hub, start, initial):
    hub.announce()
    hub.open_round(1, initial, clients=("site-b",))
    client = start()
    client.wait_until(("waiting", {"for": "the next round (not chosen for round 1)"}))
    assert "training" not in client.names()


def test_a_federation_of_another_bundle_is_refused_with_both_digests(hub, start, bundle):
    hub.announce(bundle="ab" * 32)
    with pytest.raises(
        ClientError, match=rf"trains the bundle abababababab….*bundle is {bundle.digest[:12]}…"
    ):
        start().join()


def test_an_update_beyond_the_federations_limit_is_refused_before_training(hub, start, initial):
    hub.announce(limits=Accepted(update_bytes=300, samples=10, norm=0.0))
    hub.open_round(1, initial)
    client = start()
    with pytest.raises(ClientError, match=r"has [0-9]+ bytes, but federation birds accepts 300"):
        client.join()
    assert "training" not in client.names()


def test_an_update_beyond_the_brokers_packet_size_is_refused_before_training(
    start_mosquitto, site, bundle, tmp_path
):
    broker = start_mosquitto("max_packet_size 2500")
    hub = Hub(broker.url, bundle)
    hub.announce(labels=(), conditions=())
    client = Running(site, broker.url, tmp_path / "state")
    with pytest.raises(PayloadTooLarge, match="takes at most 2500"):
        client.join()
    hub.close()


def test_without_a_receipt_the_same_bytes_are_sent_again(hub, start, initial, monkeypatch):
    monkeypatch.setattr(client_module, "RESEND_SECONDS", (0.3, 0.6))
    hub.announce()
    hub.open_round(1, initial)
    client = start()
    first, second, third = hub.wait_for(hub.updates, 3)
    assert first == second == third
    assert client.names().count("training") == 1
    hub.answer(first, 1, "duplicate")
    assert client.wait_for("receipt")["status"] == "duplicate"


def test_a_refused_update_is_reported_and_not_sent_again(hub, start, initial, tmp_path):
    hub.announce()
    hub.open_round(1, initial)
    client = start()
    (payload,) = hub.wait_for(hub.updates)
    hub.answer(payload, 1, "rejected", "norm", "norm 3.2, at most 1 is accepted")
    assert client.wait_for("receipt") == {
        "round": 1, "status": "rejected", "check": "norm", "reason": "norm 3.2, at most 1 is accepted",
    }  # fmt: skip
    hub.open_round(1, initial)
    time.sleep(0.5)
    assert client.names().count("sent") == 1
    assert not list((tmp_path / "state").glob("update-*"))


def test_a_round_that_is_announced_again_gets_the_same_update_again(hub, start, initial):
    hub.announce()
    hub.open_round(1, initial)
    client = start()
    (payload,) = hub.wait_for(hub.updates)
    hub.answer(payload, 1)
    client.wait_for("receipt")
    hub.open_round(1, initial)
    assert hub.wait_for(hub.updates, 2) == [payload, payload]
    assert client.names().count("training") == 1


def test_a_finished_update_survives_a_restart_without_its_receipt(hub, start, initial):
    hub.announce()
    hub.open_round(1, initial)
    first = start()
    (payload,) = hub.wait_for(hub.updates)
    assert first.end() is None
    second = start()
    assert hub.wait_for(hub.updates, 2) == [payload, payload]
    assert "training" not in second.names()


def test_a_stop_ends_training_and_says_goodbye(hub, start, site, initial):
    slow = _SlowEngine(site.engine)
    hub.announce()
    hub.open_round(1, initial)
    client = start(dataclasses.replace(site, engine=slow))
    slow.in_step.wait(PATIENCE)
    assert hub.wait_for_presence(True).samples == 24
    assert client.end() is None
    assert not hub.wait_for_presence(False).online
    assert "trained" not in client.names()


def test_a_round_that_closes_during_training_is_left_for_the_next(hub, start, site, bundle, initial):
    slow = _SlowEngine(site.engine)
    hub.announce()
    hub.open_round(1, initial)
    client = start(dataclasses.replace(site, engine=slow))
    slow.in_step.wait(PATIENCE)
    hub.open_round(2, initial)
    client.wait_for("interrupted")
    slow.pause = 0.0
    update, _ = _decode(hub.wait_for(hub.updates)[0], bundle)
    assert update.round == 2


def test_a_lost_broker_does_not_disturb_training(mosquitto, hub, start, site, bundle, initial):
    slow = _SlowEngine(site.engine)
    hub.announce()
    hub.open_round(1, initial)
    client = start(dataclasses.replace(site, engine=slow))
    slow.in_step.wait(PATIENCE)
    mosquitto.kill()
    client.wait_for("disconnected")
    slow.pause = 0.0
    client.wait_for("trained")
    mosquitto.start()
    update, _ = _decode(hub.wait_for(hub.updates)[0], bundle)
    expected = train_round(
        site.engine, site.data, initial, bundle, round_number=1, client="site-a", seed=bundle.training.seed
    )
    assert _same_bits(update.difference, expected.difference)
    assert client.names().count("training") == 1


FIRST_RUN, SECOND_RUN = "1" * 16, "2" * 16


def test_what_an_earlier_run_left_ends_nothing(hub, start, initial):
    hub.announce(run=FIRST_RUN)
    hub.open_round(3, initial, "finished", clients=(), run=FIRST_RUN, edition=9)
    client = start()
    client.wait_until(("waiting", {"for": "the next run: the last one ended before this client took part"}))
    assert "finished" not in client.names()
    hub.open_round(1, initial, run=SECOND_RUN, edition=0)
    hub.announce(run=SECOND_RUN)
    hub.wait_for(hub.updates)
    hub.open_round(2, initial, "finished", clients=(), run=SECOND_RUN)
    assert client.join() is not None


def test_a_finished_run_of_another_bundle_is_waited_out(hub, start, initial):
    hub.open_round(3, initial, "finished", clients=(), run=FIRST_RUN)
    hub.announce(run=FIRST_RUN, bundle="0" * 64)
    client = start()
    client.wait_until(("waiting", {"for": "the next run: the last one ended before this client took part"}))
    hub.announce(run=SECOND_RUN)
    hub.open_round(1, initial, run=SECOND_RUN)
    hub.wait_for(hub.updates)


def test_a_round_of_another_run_than_the_manifests_begins_nothing(hub, start, initial):
    hub.announce(run=SECOND_RUN)
    hub.open_round(1, initial, run=FIRST_RUN)
    client = start()
    client.wait_until(("waiting", {"for": "the federation's manifest, round and state"}))
    hub.open_round(1, initial, run=SECOND_RUN)
    client.wait_for("training")


def test_a_client_that_was_away_at_the_end_of_its_run_is_told_it(hub, start, initial):
    hub.announce(run=FIRST_RUN)
    hub.open_round(1, initial, run=FIRST_RUN)
    client = start()
    hub.wait_for(hub.updates)
    assert client.end() is None
    hub.open_round(2, initial, "finished", clients=(), run=FIRST_RUN)
    assert start().join() is not None
    client = start()
    client.wait_until(("waiting", {"for": "the next run: the last one ended before this client took part"}))


def test_a_client_that_dies_before_its_result_is_saved_is_told_the_end_again(hub, start, initial):
    def fail(state):
        raise OSError("no room")

    hub.announce(run=FIRST_RUN)
    hub.open_round(1, initial, run=FIRST_RUN)
    client = start(on_finished=fail)
    hub.wait_for(hub.updates)
    hub.open_round(2, initial, "finished", clients=(), run=FIRST_RUN)
    with pytest.raises(OSError, match="no room"):
        client.join()
    saved = []
    assert start(on_finished=saved.append).join() is saved[0]


def test_an_update_of_an_earlier_run_is_not_sent_in_the_next(hub, start, initial):
    """The round, its base and the photos are the same; the aggregator has lost its store."""
    hub.announce(run=FIRST_RUN)
    hub.open_round(1, initial, run=FIRST_RUN)
    client = start()
    hub.wait_for(hub.updates)
    hub.open_round(1, initial, run=SECOND_RUN)
    hub.announce(run=SECOND_RUN)
    client.wait_for("training", count=2)
    hub.wait_for(hub.updates, 2)


def test_a_stopped_client_says_that_it_has_left(hub, start, site, initial):
    client = start()
    hub.wait_for_presence(True)
    client.end()
    assert hub.wait_for_presence(False).left


def test_an_update_that_counted_for_less_is_told(hub, start, initial, caplog):
    hub.announce()
    hub.open_round(1, initial)
    client = start()
    (payload,) = hub.wait_for(hub.updates)
    hub.answer(payload, 1)
    client.wait_for("receipt")
    hub.answer(payload, 1, "accepted", "norm", "its L2 norm is 99, but it counts with 10")
    facts = client.wait_for("receipt", count=2)
    assert (facts["round"], facts["status"], facts["check"]) == (1, "accepted", "norm")
    hub.open_round(2, initial)
    hub.wait_for(hub.updates, 2)
    assert client.names().count("receipt") == 2
    assert "round 1: its L2 norm is 99, but it counts with 10" in caplog.text


def test_a_round_of_another_run_does_not_disturb_the_present_one(hub, start, site, initial):
    slow = _SlowEngine(site.engine)
    hub.announce(run=SECOND_RUN)
    hub.open_round(1, initial, run=SECOND_RUN)
    client = start(dataclasses.replace(site, engine=slow))
    slow.in_step.wait(PATIENCE)
    hub.open_round(1, initial, "finished", clients=(), run=FIRST_RUN, edition=9)
    slow.pause = 0.0
    client.wait_for("trained")
    assert "interrupted" not in client.names()


def test_outside_its_window_a_site_does_not_train(hub, start, initial):
    now = time.localtime()
    window = f"{(now.tm_hour + 2) % 24:02}:00-{(now.tm_hour + 3) % 24:02}:00"
    hub.announce()
    hub.open_round(1, initial)
    client = start(limits=Limits(active=parse_window(window)))
    client.wait_until(("waiting", {"for": "the time window in which this site trains"}))
    assert "training" not in client.names()


def test_a_round_ends_when_the_sites_seconds_are_over(hub, start, site, bundle, initial):
    slow = _SlowEngine(site.engine)
    hub.announce()
    hub.open_round(1, initial)
    start(dataclasses.replace(site, engine=slow), limits=Limits(seconds_per_round=0.01))
    update, _ = _decode(hub.wait_for(hub.updates)[0], bundle)
    assert slow.steps == 1
    assert np.abs(update.difference["class_context"]).max() > 0


def test_malformed_messages_change_nothing(hub, start, bundle, initial, caplog):
    hub.publish(TOPICS.manifest, b"{")
    hub.publish(TOPICS.round, json.dumps({"version": 9}).encode())
    hub.publish(TOPICS.state(1), encode_state({"scale": np.zeros((), np.float32)}))
    client = start()
    client.wait_for("waiting")
    hub.announce()
    hub.open_round(1, initial)
    hub.wait_for(hub.updates)
    refused = [record.getMessage() for record in caplog.records if "ignored a message" in record.getMessage()]
    assert [next(part for part in ("manifest", "round", "state") if f"/{part}" in text) for text in refused]
    assert len(refused) >= 3


def test_a_connection_is_reported_with_its_protocol(hub, start, mosquitto):
    assert start().wait_for("connected") == {"broker": mosquitto.url, "mqtt": "5"}


class _SlowEngine:
    """A real engine whose steps take ``pause`` seconds longer; tells when the first has begun."""

    def __init__(self, engine):
        self._engine = engine
        self.pause, self.steps, self.in_step = 0.4, 0, threading.Event()

    def train_step(self, state, tokens, labels):
        self.steps += 1
        self.in_step.set()
        time.sleep(self.pause)
        return self._engine.train_step(state, tokens, labels)

    def text_features(self, state):
        return self._engine.text_features(state)

    def head(self, state, text, tokens):
        return self._engine.head(state, text, tokens)


def test_the_hub_connects_with_mqtt_5(hub):
    assert isinstance(hub._connection.receive(timeout=PATIENCE), Connected)
