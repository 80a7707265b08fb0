"""Durable acceptance of updates against a bare MQTT subscriber, memory over clients, and the average against Flower's.

``python benchmarks/aggregation.py`` needs mosquitto; ``pip install flwr`` adds Flower's aggregation for comparison.

One process publishes 25 kB updates of many clients; the same mosquitto delivers them (A) to a subscriber that
only counts, (B) to ``fedmpt aggregator``, which checks each, stores it durably, acknowledges and answers with a
receipt. A's time ends with the last message, B's when all are durable and the round closes. A and B in turn.

Two layouts. *Live*: time counts from the first publish; publisher, broker and receiver share the cores, which on few
cores is most of what is measured. *Waiting*: the receiver is frozen while all updates are published, and time counts
from when it goes on; the publisher then rests, the broker still delivers.

Both subscribe with QoS 1 and MQTT 5 to the same broker, with its shipped settings, and get the same payloads from
the same publisher in the same way; both acknowledge every message, A as paho does by itself, before any use of it.

The averages: the same updates, decoded and in memory, each client's arrays its own; both weighted by samples.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from record import Row, append_record, copy_floor, interleave, print_rows

from fedmpt.aggregator.certificates import mosquitto_durability
from fedmpt.aggregator.strategies import Contribution, StrategySettings, aggregate
from fedmpt.protocol.codec import Update, encode_update, save_state, state_digest
from fedmpt.protocol.manifest import (
    BundleManifest,
    Clip,
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
    "layout live": "time counts from the first publish: publisher, broker and receiver share the cores, and the ratio "
    "falls with every other process, for the aggregator's chain of receive, fsync, acknowledge waits at each hand-over",
    "layout waiting": "all updates wait at the broker, the receiver frozen, before the clock starts",
    "floor of acceptance": "copying each update's bytes once off the socket and once to where the disk takes them "
    "from (the bare subscriber: off the socket); of the averages, reading the arrays once",
}
TOPICS = Topics("bench")
SHAPES = {"condition_context": (5, 4, 512), "class_context": (4, 512), "scale": (), "bias": ()}
SECONDS = 200
REST = 0.5  # seconds for all processes to come to rest before the clock starts
LAYOUTS = ("live", "waiting")
AVERAGE, FLOWER = "average, streamed in float64", "Flower's average, float32, all in memory"


@dataclass(frozen=True)
class Measured:
    """Updates a second; µs of CPU for each; peak MiB of anonymous memory; seconds from the last to the next round."""

    rate: float
    cpu: float
    memory: float
    closing: float = 0.0


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
        graphs={},
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


@contextlib.contextmanager
def running(command: Sequence[object], **streams: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive a failure: it may be frozen, or wait for ever."""
    with subprocess.Popen([str(word) for word in command], text=True, **streams) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def publish(publisher: Publisher, payloads: list[tuple[str, bytes]], receiver: int, layout: str) -> float:
    """Publish all updates to a receiving process; the moment from which time counts."""
    time.sleep(REST)
    if layout == "waiting":
        os.kill(receiver, signal.SIGSTOP)
    start = time.time()
    sent = [publisher.client.publish(topic, payload, qos=1) for topic, payload in payloads]
    if layout == "waiting":
        for message in sent:
            message.wait_for_publish(SECONDS)  # until the broker has acknowledged it
        time.sleep(REST)
        start = time.time()
        os.kill(receiver, signal.SIGCONT)
    return start


def measure_bare(payloads: list[tuple[str, bytes]], folder: Path, layout: str) -> Measured:
    """Until the subscriber's last message."""
    with broker(folder) as port:
        command = [sys.executable, "-c", BARE, port, len(payloads)]
        with running(command, stdout=subprocess.PIPE) as subscriber:
            assert subscriber.stdout is not None
            assert subscriber.stdout.readline() == "ready\n"
            watch = Watch(subscriber.pid)
            publisher = Publisher(port)
            start = publish(publisher, payloads, subscriber.pid, layout)
            assert subscriber.stdout.readline() == "done\n"
            end = time.time()
            publisher.close()
            watch.stop()
    return Measured(len(payloads) / (end - start), watch.cpu(start, end) / len(payloads), watch.peak)


def measure_durable(
    payloads: list[tuple[str, bytes]], folder: Path, layout: str, bundle: Path, manifest: BundleManifest
) -> Measured:
    """Until all are durable."""
    count = len(payloads)
    with broker(folder) as port:
        publisher = Publisher(port)
        for number in range(count):
            name = f"client-{number:05d}"
            presence = Presence("bench", name, True, manifest.digest, 100, {})
            publisher.client.publish(TOPICS.presence(name), to_json(presence), qos=1, retain=True)
        fedmpt = "import sys; from fedmpt.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", fedmpt, "aggregator"]
        command += ["--bundle", bundle, "--federation", "bench", "--broker", f"mqtt://127.0.0.1:{port}"]
        command += ["--store", folder / "store", "--rounds", 1, "--clients-min", count]
        with running(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            watch = Watch(process.pid)
            publisher.wait(lambda me: me.round is not None and len(me.round.clients) == count)
            start = publish(publisher, payloads, process.pid, layout)
            publisher.wait(lambda me: me.round is not None and me.round.phase == "finished")
            finished = time.time()
            publisher.close()
            process.wait(60)
            watch.stop()
    # The aggregator notes when it had everything, before it averages.
    (line,) = (folder / "store" / "history.jsonl").read_text().splitlines()
    closed = json.loads(line)["closed"]
    return Measured(count / (closed - start), watch.cpu(start, closed) / count, watch.peak, finished - closed)


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


def measure_acceptance(count: int, layout: str, repeats: int, root: Path, copy_bytes: float) -> list[Row]:
    """Both receivers in turn."""
    manifest, state = write_bundle(root / "bundle")
    payloads = list(updates(count, state_digest(state)))
    found: dict[str, list[Measured]] = {"bare": [], "durable": []}
    for _ in range(repeats):
        for kind, measured in found.items():
            with tempfile.TemporaryDirectory(dir=root) as name:
                folder = Path(name)
                if kind == "bare":
                    measured.append(measure_bare(payloads, folder, layout))
                else:
                    measured.append(measure_durable(payloads, folder, layout, root / "bundle", manifest))
    size = len(payloads[0][1])
    sizes = {"clients": count, "bytes": size, "layout": layout}
    once = copy_bytes / (2 * size)  # a copy reads and writes
    bare, durable = found["bare"], found["durable"]
    subscriber = Row("bare subscriber", "updates/s", [item.rate for item in bare], sizes, floor=once)
    accepted = Row(
        "durable acceptance, with receipts",
        "updates/s",
        [item.rate for item in durable],
        sizes,
        floor=once / 2,
    )
    rows = [
        accepted.compared_with(subscriber),
        subscriber,
        Row("aggregator, peak anonymous memory", "MiB", [item.memory for item in durable], sizes),
        Row("from the last update to the next round", "s", [item.closing for item in durable], sizes),
    ]
    if count >= 1000:  # with fewer a run is too short for the kernel's clock
        rows += [
            Row("CPU for each update: aggregator", "µs", [item.cpu for item in durable], sizes),
            Row("CPU for each message: bare subscriber", "µs", [item.cpu for item in bare], sizes),
        ]
    return rows


def measure_average(count: int, repeats: int, copy_bytes: float) -> list[Row]:
    """Our average and Flower's of the same updates."""
    random = np.random.default_rng(0)
    differences = [
        {name: np.asarray(random.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]
    samples = [50 + number % 100 for number in range(count)]
    state = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}

    def contributions() -> Iterator[Contribution]:
        return (
            Contribution(f"client-{number:05d}", weight, difference)
            for number, (weight, difference) in enumerate(zip(samples, differences, strict=True))
        )

    cases: dict[str, Callable[[], Any]] = {
        AVERAGE: lambda: aggregate(StrategySettings("weighted"), state, contributions, {})
    }
    try:
        from flwr.server.strategy.aggregate import aggregate as flower
    except ImportError:
        print("flwr is not installed: our average is not compared with Flower's")
    else:
        results = [
            (list(difference.values()), weight)
            for weight, difference in zip(samples, differences, strict=True)
        ]
        cases[FLOWER] = lambda: flower(results)
        for ours, theirs in zip(cases[AVERAGE]()[0].values(), cases[FLOWER](), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    floor = count * sum(tensor.nbytes for tensor in state.values()) / copy_bytes
    first, *others = (
        Row(name, "s", seconds, {"clients": count}, floor=floor)
        for name, seconds in interleave(cases, repeats).items()
    )
    return [first.compared_with(others[0]), *others] if others else [first]


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 100, 1000, 10_000], help="%(default)s")
    parser.add_argument(
        "--waiting-from", type=int, default=1000, help="least clients for the layout waiting (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="%(default)s")
    options = parser.parse_args()
    floor = {"copy_bytes": copy_floor()}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fedmpt-bench-") as root:
        for count in options.clients:
            for layout in LAYOUTS:
                if layout == "live" or count >= options.waiting_from:
                    rows += measure_acceptance(
                        count, layout, options.repeats, Path(root), floor["copy_bytes"]
                    )
            rows += measure_average(count, options.repeats, floor["copy_bytes"])
    print_rows("aggregation", rows)
    notes = NOTES | {"load average": f"{os.getloadavg()[0]:.1f}"}
    append_record("aggregation", rows, notes=json.dumps(notes, ensure_ascii=False), floor=floor)


if __name__ == "__main__":
    main()
