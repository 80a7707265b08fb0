"""What a simulated client and round cost, as federations grow: ``python benchmarks/simulator.py``.

Uses the shipped demo bundle; the clients share one memory map of random unit tokens of its shape (time and
memory do not depend on what the photos show). Each size runs in a process of its own, so that peaks are its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fedmpt.aggregator.rounds import RoundSettings
from fedmpt.aggregator.settings import FederationSettings
from fedmpt.aggregator.strategies import StrategySettings
from fedmpt.edge_client.engine import open_engine
from fedmpt.edge_client.trainer import SiteData
from fedmpt.protocol.codec import load_state
from fedmpt.protocol.manifest import load_manifest
from fedmpt.simulation.simulator import simulate

BUNDLE = Path(__file__).resolve().parents[1] / "simulation" / "data" / "demo-bundle"
PHOTOS = 20  # of each client


def measure(clients: int, fraction: float, rounds: int, folder: Path) -> dict[str, float]:
    """Run one federation here; seconds are of the processor, memory is the process's peak."""
    manifest = load_manifest(BUNDLE)
    generator = np.random.default_rng(0)
    shape = (clients * PHOTOS, manifest.tokens.count, manifest.tokens.width)
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.float16, shape)
    for start in range(0, len(tokens), 1000):
        block = generator.standard_normal((min(1000, len(tokens) - start), *shape[1:]), np.float32)
        tokens[start : start + 1000] = block / np.linalg.norm(block, axis=2, keepdims=True)
    labels = (generator.random((len(tokens), len(manifest.labels))) < 0.15).astype(np.int8)
    rows = np.arange(len(tokens)).reshape(clients, PHOTOS)
    sites = {f"client-{i}": SiteData(tokens, labels, part[2:], part[:2]) for i, part in enumerate(rows)}
    settings = FederationSettings(
        "scale", RoundSettings(rounds, calibrate=True, fraction=fraction), StrategySettings()
    )
    engine = open_engine(BUNDLE, "onnx", "cpu", 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start_wall, start = time.perf_counter(), time.process_time()
    result = simulate(
        engine, manifest, load_state(BUNDLE / "state.safetensors", manifest.state), sites, settings
    )
    trainings = sum(record["received"] for record in result.history)
    used = time.process_time() - start
    return {
        "clients": clients,
        "trainings": trainings,
        "processor seconds": used,
        "wall seconds": time.perf_counter() - start_wall,
        "ms per training": 1000 * used / trainings,
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak MB before the first round": before / 1024,
    }


def main() -> None:
    """Print one JSON line for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--here", action="store_true", help="measure the one size in this process")
    options = parser.parse_args()
    if options.here:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options.clients[0], options.fraction, options.rounds, Path(folder))))
        return
    for clients in options.clients:
        arguments = ["--clients", str(clients), "--fraction", str(options.fraction)]
        command = [sys.executable, __file__, "--here", *arguments, "--rounds", str(options.rounds)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
