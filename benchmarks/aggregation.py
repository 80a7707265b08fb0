"""Durable acceptance of updates against a bare MQTT subscriber, and memory over clients.

``python benchmarks/aggregation.py`` needs mosquitto; ``pip install flwr`` adds Flower's aggregation for comparison.

One process publishes 25 kB updates of many clients; the same mosquitto delivers them (A) to a subscriber that
only counts, (B) to ``fedmpt aggregator``, which checks each, stores it durably, acknowledges and answers with a
receipt. A's time ends with the last message, B's when all are durable and the round closes. A and B in turn.

Both subscribe with QoS 1 and MQTT 5 to the same broker, with its shipped settings, and get the same payloads from
the same publisher in the same way; both acknowledge every message, A as paho does by itself, before any use of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from record import Row, append_record, print_rows

from fedmpt.aggregator.certificates import mosquitto_durability
from fedmpt.aggregator.strategies import Contribution, StrategySettings, aggregate
from fedmpt.protocol.codec import Update, encode_update, save_state, state_digest
from fedmpt.protocol.manifest import (
    BundleManifest,
    Clip,
    Graph,
    Pooling,
    TensorSpec,
    Tokens,
    Training,
    save_manifest,
)
from fedmpt.protocol.messages import Presence, Round, from_json, to_json
from fedmpt.protocol.topics import Topics

NOTES = {
    "payload": "ViT-B/16 prompts, float16",
    "what an update costs the aggregator": "one by one, best of 15 on one core: 19 µs to see that header and values "
    "are sound, 14 µs SHA-256, 10 to 15 µs to append it, 5 µs receipt, 2 µs to take it off the wire, besides what the "
    "kernel does for 25 kB; a bare paho subscriber spends about 50 µs on the same message and keeps nothing",
    "where cores are few": "publisher, broker and aggregator share them, and the ratio falls with every other process: "
    "the aggregator's chain of receive, fsync, acknowledge waits at each hand-over",
}
TOPICS = Topics("bench")
SHAPES = {"condition_context": (5, 4, 512), "class_context": (4, 512), "scale": (), "bias": ()}
SECONDS = 200


class Publisher:
    """All clients in one connection: announces them and publishes their updates; sees the rounds."""

    def __init__(self, port: int) -> None:
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id="publisher", protocol=paho.MQTTv5)
        self.client.max_inflight_messages_set(200)
        self.client.max_queued_messages_set(0)
        self.round: Round | None = None
        self.changed = threading.Condition()
        self.client.on_message = self._take
        self.client.connect("127.0.0.1", port)
        self.client.subscribe(TOPICS.round, qos=1)
        self.client.loop_start()

    def _take(self, client: paho.Client, data: object, message: paho.MQTTMessage) -> None:
        with self.changed:
            self.round = from_json(Round, message.payload, message.topic)
            self.changed.notify_all()

    def wait(self, reached) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: reached(self), SECONDS):
                sys.exit(f"waited {SECONDS} s in {self.round}")

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def write_bundle(folder: Path) -> tuple[BundleManifest, dict[str, np.ndarray]]:
    """All that an aggregator reads of a bundle with ViT-B/16's prompt shapes."""
    state = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    save_state(folder / "state.safetensors", state)
    manifest = BundleManifest(
        format="fedmpt-bundle",
        version=1,
        method="fedmpt-prompts",
        labels=("cat",),
        conditions=("background",),
        clip=Clip("none", "none", 224, 16, 512, 512, 100.0),
        tokens=Tokens("plain", "full", 197, (14, 14), 512),
        pooling=Pooling("transport", 4.0, 0.2, 10),
        training=Training("sgd", 0.001, 0.9, 0.0, 0.0, 10.0, 32, 1, 1, False, 1.0, 2.0, 0.05, 0),
        precision="float32",
        state={name: TensorSpec("float32", shape) for name, shape in SHAPES.items()},
        graphs={"image_encoder": Graph("none.onnx", {}, {})},
        files={},
    )
    save_manifest(folder, manifest)
    return manifest, state


def updates(count: int, base: str) -> Iterator[tuple[str, bytes]]:
    """(topic, payload) of so many clients; four different differences, in turn."""
    generator = np.random.default_rng(0)
    differences = [
        {name: generator.standard_normal(shape).astype(np.float32) * 0.01 for name, shape in SHAPES.items()}
        for _ in range(4)
    ]
    for number in range(count):
        name = f"client-{number:05d}"
        update = Update("bench", 1, name, base, 100, 10, {"mAP": 0.5}, differences[number % 4])
        yield TOPICS.update(1, name), encode_update(update, "float16")


@contextlib.contextmanager
def broker(folder: Path) -> Iterator[int]:
    """A mosquitto with the shipped durability settings; its port."""
    mosquitto = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if mosquitto is None:
        sys.exit("mosquitto is not installed: apt-get install mosquitto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "persistence").mkdir()
    configuration = folder / "mosquitto.conf"
    configuration.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\nlog_dest none\n"
        + mosquitto_durability(folder / "persistence")
    )
    process = subprocess.Popen([mosquitto, "-c", configuration])
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


BARE = """
import sys, paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
count, expected = 0, int(sys.argv[2])
client = paho.Client(CallbackAPIVersion.VERSION2, client_id="bare", protocol=paho.MQTTv5)
def take(c, data, message):
    global count
    count += 1
    if count == expected:
        print("done", flush=True)
        c.disconnect()
client.on_message = take
client.on_subscribe = lambda *event: print("ready", flush=True)
client.connect("127.0.0.1", int(sys.argv[1]))
client.subscribe("fedmpt/v1/bench/update/+/+", qos=1)
client.loop_forever()
"""


def bare_rate(payloads: list[tuple[str, bytes]], folder: Path) -> tuple[float, float]:
    """Messages per second from the first publish to the subscriber's last message; its µs of CPU for each."""
    with broker(folder) as port:
        command = [sys.executable, "-c", BARE, str(port), str(len(payloads))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as subscriber:
            assert subscriber.stdout is not None
            assert subscriber.stdout.readline() == "ready\n"
            watch = Watch(subscriber.pid)
            publisher = Publisher(port)
            start = time.time()
            for topic, payload in payloads:
                publisher.client.publish(topic, payload, qos=1)
            assert subscriber.stdout.readline() == "done\n"
            end = time.time()
            publisher.close()
            watch.stop()
    return len(payloads) / (end - start), watch.cpu(start, end) / len(payloads)


def durable_rate(
    payloads: list[tuple[str, bytes]], folder: Path, bundle: Path, manifest: BundleManifest
) -> tuple[float, float, float, float]:
    """Updates a second until all are durable; µs of CPU for each; peak MiB of anonymous memory; seconds to go on."""
    count = len(payloads)
    with broker(folder) as port:
        publisher = Publisher(port)
        for number in range(count):
            name = f"client-{number:05d}"
            presence = Presence("bench", name, True, manifest.digest, 100, {})
            publisher.client.publish(TOPICS.presence(name), to_json(presence), qos=1, retain=True)
        command = [
            sys.executable,
            "-c",
            "import sys; from fedmpt.cli import main; sys.exit(main())",
            "aggregator",
        ]
        command += ["--bundle", bundle, "--federation", "bench", "--broker", f"mqtt://127.0.0.1:{port}"]
        command += ["--store", folder / "store", "--rounds", "1", "--clients-min", count]
        with subprocess.Popen(
            [str(word) for word in command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as process:
            watch = Watch(process.pid)
            publisher.wait(lambda me: me.round is not None and len(me.round.clients) == count)
            start = time.time()
            for topic, payload in payloads:
                publisher.client.publish(topic, payload, qos=1)
            publisher.wait(lambda me: me.round is not None and me.round.phase == "finished")
            finished = time.time()
            publisher.close()
            process.wait(60)
            watch.stop()
    # The aggregator notes when it had everything, before it averages.
    (line,) = (folder / "store" / "history.jsonl").read_text().splitlines()
    closed = json.loads(line)["closed"]
    return count / (closed - start), watch.cpu(start, closed) / count, watch.peak, finished - closed


class Watch:
    """Watches a process: CPU time, and resident memory without file-backed pages (RssAnon), in MiB."""

    def __init__(self, pid: int) -> None:
        self._folder, self._done = Path(f"/proc/{pid}"), threading.Event()
        self._moments: list[tuple[float, float]] = []
        self.peak = 0.0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            try:
                status = (self._folder / "status").read_text().splitlines()
                times = (self._folder / "stat").read_text().rpartition(")")[2].split()[11:13]
            except OSError:
                return
            self._moments.append((time.time(), sum(map(int, times)) / os.sysconf("SC_CLK_TCK")))
            anonymous = [int(line.split()[1]) / 1024 for line in status if "RssAnon" in line]
            self.peak = max([self.peak, *anonymous])
            if self._done.wait(0.02):
                return

    def cpu(self, start: float, end: float) -> float:
        """Microseconds of CPU between two moments, to the nearest samples, 20 ms apart."""
        return 1e6 * (self._used(end) - self._used(start))

    def _used(self, moment: float) -> float:
        return min(self._moments, key=lambda sample: abs(sample[0] - moment))[1]

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def flower_row(count: int) -> list[Row]:
    """Flower's own average of the same updates, all in memory, beside ours from decoded updates."""
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(shape).astype(np.float32) for shape in SHAPES.values()]
    state = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    difference = dict(zip(SHAPES, arrays, strict=True))

    def contributions() -> Iterator[Contribution]:
        return (Contribution(f"c{number:05d}", 100, difference) for number in range(count))

    start = time.perf_counter()
    aggregate(StrategySettings("uniform"), state, contributions, {}, calibrating=False)
    seconds = time.perf_counter() - start
    rows = [Row("average, streamed in float64", "s", [seconds], {"clients": count})]
    try:
        from flwr.server.strategy.aggregate import aggregate as flower
    except ImportError:
        return rows
    results = [([array.copy() for array in arrays], 100) for _ in range(count)]
    start = time.perf_counter()
    flower(results)
    other = time.perf_counter() - start
    name = "Flower's average, float32, all in memory"
    rows[0] = Row(rows[0].name, "s", [seconds], {"clients": count}, against=name, ratio=other / seconds)
    return [*rows, Row(name, "s", [other], {"clients": count})]


def cpu_rows(used: dict[str, list[float]], sizes: dict[str, int]) -> list[Row]:
    """CPU for each update; with fewer clients a run is too short for the kernel's clock."""
    if sizes["clients"] < 1000:
        return []
    return [
        Row("CPU for each update: aggregator", "µs", used["durable"], sizes),
        Row("CPU for each message: bare subscriber", "µs", used["bare"], sizes),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fedmpt-bench-") as scratch:
        root = Path(scratch)
        manifest, state = write_bundle(root / "bundle")
        for count in options.clients:
            payloads = list(updates(count, state_digest(state)))
            bare, durable, memory, closing = [], [], [], []
            used: dict[str, list[float]] = {"bare": [], "durable": []}
            for repeat in range(options.repeats):
                for kind in ("bare", "durable"):
                    folder = root / f"{count}-{repeat}-{kind}"
                    folder.mkdir()
                    if kind == "bare":
                        rate, cpu = bare_rate(payloads, folder)
                        bare.append(rate)
                    else:
                        rate, cpu, peak, close = durable_rate(payloads, folder, root / "bundle", manifest)
                        durable.append(rate)
                        memory.append(peak)
                        closing.append(close)
                    used[kind].append(cpu)
                    shutil.rmtree(folder)
            sizes = {"clients": count, "bytes": len(payloads[0][1])}
            name = "bare subscriber"
            ratio = float(np.median(durable) / np.median(bare))
            rows += [
                Row(
                    "durable acceptance, with receipts",
                    "updates/s",
                    durable,
                    sizes,
                    against=name,
                    ratio=ratio,
                ),
                Row(name, "updates/s", bare, sizes),
                Row("aggregator, peak anonymous memory", "MiB", memory, sizes),
                *cpu_rows(used, sizes),
                Row("from the last update to the next round", "s", closing, sizes),
                *flower_row(count),
            ]
    print_rows("aggregation", rows)
    notes = NOTES | {"load average": f"{os.getloadavg()[0]:.1f}"}
    append_record("aggregation", rows, notes=json.dumps(notes))


if __name__ == "__main__":
    main()
