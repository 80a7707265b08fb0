"""What a site's client needs: disk, time to import, memory through a round, bytes on the network.

``python benchmarks/footprint.py``: makes a fresh environment with the ``cpu`` extra, and runs a whole federation of
one client in it, over the embedded broker: calibration and one round, 20 labels, batch 32, two threads; once with
ViT-B/16's shapes (random weights) and once with the shipped micro-CLIP bundle.

Memory is the kernel's RssAnon (anonymous resident pages: file-backed ones, which it can drop, do not count) of the
client's process, read every few milliseconds; its peak.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
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
from record import Row, append_record, print_rows

from fedmpt.edge_client.cache_store import Entry, Meta, open_store
from fedmpt.protocol.manifest import load_manifest

ROOT = Path(__file__).resolve().parents[1]
MICRO_BUNDLE = ROOT / "simulation" / "data" / "demo-bundle"
LABELS = tuple(f"object {number}" for number in range(20))
FEDMPT = ["-c", "import sys; from fedmpt.cli import main; sys.exit(main())"]
SAMPLE_SECONDS = 0.003
NOT_OURS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence")


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, help="interpreter of an environment that is there already")
    parser.add_argument(
        "--vit-bundle", type=Path, help="a ViT-B/16 bundle with 20 labels (built if not given)"
    )
    parser.add_argument("--photos", type=int, default=180, help="photos of the client (%(default)s)")
    parser.add_argument("--imports", type=int, default=15, help="fresh imports to time (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="federations for each case (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="cores of the client (%(default)s)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = arguments.python or fresh_environment(folder / "environment")
        rows = [*environment_size(python), *import_time(python, arguments.imports)]
        vit = arguments.vit_bundle or build_vit(folder / "vit")
        for case, bundle in (("ViT-B/16", vit), ("micro-CLIP", MICRO_BUNDLE)):
            cache = write_cache(folder / f"{case.replace('/', '-')}-cache", bundle, arguments.photos)
            for encoding in ("float16", "int8"):
                measured = [
                    federate(python, bundle, cache, encoding, arguments.threads)
                    for _ in range(arguments.repeats)
                ]
                rows += client_rows(case, encoding, bundle, measured)
    print_rows("A client's footprint", rows)
    if not arguments.no_record:
        append_record("footprint", rows)


def fresh_environment(folder: Path) -> Path:
    """A virtual environment with ``.[cpu]``; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    # A copy, because a build in the tree leaves files behind that a later one would take up.
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{source}[cpu]"], check=True)
    return python


def environment_size(python: Path) -> list[Row]:
    """Megabytes (10⁶ bytes) of site-packages on disk without pip and setuptools, and the bytecode among them."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    )
    total = bytecode = 0
    for path in packages.rglob("*"):
        if path.is_file() and not path.relative_to(packages).parts[0].startswith(NOT_OURS):
            total += path.stat().st_size
            bytecode += path.stat().st_size if path.suffix == ".pyc" else 0
    return [
        Row("site-packages with [cpu]", "MB", [total / 1e6]),
        Row("… of which bytecode, which pip --no-compile leaves out", "MB", [bytecode / 1e6]),
    ]


def import_time(python: Path, repeats: int) -> list[Row]:
    """Seconds to import the client's modules in a fresh process, less an empty one's; what must not be loaded."""
    rows = []
    for module in ("fedmpt.edge_client", "fedmpt.edge_client.client"):
        code = (
            f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start); "
            "import sys; print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
        )
        seconds = []
        for _ in range(repeats):
            result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
            taken, loaded = result.stdout.splitlines()
            if loaded != "[]":
                raise SystemExit(f"import {module} loads {loaded}")
            seconds.append(float(taken))
        rows.append(Row(f"import {module}", "s", seconds))
    return rows


def build_vit(folder: Path) -> Path:
    """A bundle of ViT-B/16's shapes with random weights."""
    from clip_shapes import random_clip

    from fedmpt.export.bundle import build_bundle

    build_bundle(random_clip(), LABELS, folder)
    return folder


def write_cache(folder: Path, bundle: Path, photos: int) -> Path:
    """A feature cache of random tokens, as `fedmpt cache` would lay it out."""
    manifest = load_manifest(bundle)
    random = np.random.default_rng(0)
    count, width = manifest.tokens.count, manifest.tokens.width
    meta = Meta(manifest.encoder_digest, manifest.labels, count, width, generation=0, photos=None)
    hashes = [random.bytes(32).hex() for _ in range(photos)]
    with open_store(folder, meta) as store:
        for content in hashes:
            tokens = random.normal(size=(count, width))
            tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
            store.append(content, tokens.astype(np.float16))
        labels = (random.random((photos, len(manifest.labels))) < 0.2).astype(np.int8)
        store.publish(
            {content: Entry(f"{content}.jpg", row) for content, row in zip(hashes, labels, strict=True)},
            manifest.labels,
        )
    return folder


@dataclasses.dataclass(frozen=True)
class Measured:
    """One federation of one client: peak RssAnon in bytes, and the events that the client reported."""

    peak: int
    events: list[dict[str, object]]

    def of(self, event: str, key: str) -> float:
        """A figure of the training round's event."""
        return float(next(item[key] for item in reversed(self.events) if item["event"] == event))  # type: ignore[arg-type]


def federate(python: Path, bundle: Path, cache: Path, encoding: str, threads: int) -> Measured:
    """An aggregator with its embedded broker and one client, both in the measured environment."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = ["--bundle", bundle, "--broker", f"mqtt://127.0.0.1:{port}", "--federation", "footprint"]
        rule = ["--embedded", "--rounds", "1", "--encoding", encoding, "--store", folder / "store"]
        site = ["--name", "site", "--cache", cache, "--state-dir", folder / "state", "--json"]
        limits = ["--threads", threads, "--device", "cpu"]
        aggregator = subprocess.Popen(
            [str(word) for word in (python, *FEDMPT, "aggregator", *shared, *rule)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            client = subprocess.Popen(
                [str(word) for word in (python, *FEDMPT, "client", *shared, *site, *limits)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            with peak_memory(client.pid) as peak:
                output, _ = client.communicate()
        finally:
            aggregator.kill()
            aggregator.wait()
        if client.returncode:
            raise SystemExit(f"the client ended with exit code {client.returncode}")
        return Measured(max(peak), [json.loads(line) for line in output.splitlines()])


@contextlib.contextmanager
def peak_memory(process: int) -> Iterator[list[int]]:
    """Watch a process's RssAnon from a thread; the list holds its highest value so far, in bytes."""
    peak, done = [0], threading.Event()
    status = Path(f"/proc/{process}/status")

    def watch() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):
                for line in status.read_text().splitlines():
                    if line.startswith("RssAnon:"):
                        peak[0] = max(peak[0], int(line.split()[1]) << 10)
            time.sleep(SAMPLE_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def client_rows(case: str, encoding: str, bundle: Path, measured: list[Measured]) -> list[Row]:
    """Memory, time and bytes of a case."""
    manifest = load_manifest(bundle)
    sizes = {
        "labels": len(manifest.labels),
        "tokens": manifest.tokens.count,
        "batch": manifest.training.batch_size,
        "samples": int(measured[0].of("trained", "samples")),
        "encoding": encoding,
    }
    return [
        Row(f"{case}: peak RssAnon", "MB", [item.peak / 1e6 for item in measured], sizes),
        Row(f"{case}: training round", "s", [item.of("trained", "seconds") for item in measured], sizes),
        Row(f"{case}: update payload", "bytes", [item.of("sent", "bytes") for item in measured], sizes),
    ]


if __name__ == "__main__":
    main()
