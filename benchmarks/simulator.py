"""What a simulated client and round cost, as federations grow, and how fast scenes are drawn.

``python benchmarks/simulator.py`` uses the shipped demo bundle; the clients share one memory map of random unit
tokens of its shape (time and memory do not depend on what the photos show). Each federation runs in a process of its
own, so that peaks are its own. Scenes are drawn by one process. Nothing is compared: the growth is the result.
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
from record import Row, append_record, interleave, print_rows

from fedmpt.aggregator.rounds import RoundSettings
from fedmpt.aggregator.settings import FederationSettings
from fedmpt.aggregator.strategies import StrategySettings
from fedmpt.edge_client.engine import open_engine
from fedmpt.edge_client.trainer import SiteData
from fedmpt.protocol.codec import load_state
from fedmpt.protocol.manifest import load_manifest
from fedmpt.simulation.scenes import draw_scenes
from fedmpt.simulation.scenes_sets import federation_plan
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
    start = time.process_time()
    result = simulate(
        engine, manifest, load_state(BUNDLE / "state.safetensors", manifest.state), sites, settings
    )
    trainings = sum(record["received"] for record in result.history)
    used = time.process_time() - start
    return {
        "trainings": trainings,
        "processor seconds": used,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "peak before": before * 1024 / 1e6,
    }


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[50, 200, 1000], help="%(default)s")
    parser.add_argument("--fraction", type=float, default=0.05, help="chosen in each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="after the calibration (%(default)s)")
    parser.add_argument("--scenes", type=int, default=500, help="drawn in each repetition (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="%(default)s")
    parser.add_argument("--here", action="store_true", help="measure the one size in this process")
    options = parser.parse_args()
    if options.here:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options.clients[0], options.fraction, options.rounds, Path(folder))))
        return
    found: dict[int, list[dict[str, float]]] = {clients: [] for clients in options.clients}
    for _ in range(options.repeats):
        for clients, measured in found.items():
            arguments = ["--clients", str(clients), "--fraction", str(options.fraction)]
            command = [sys.executable, __file__, "--here", *arguments, "--rounds", str(options.rounds)]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            measured.append(json.loads(result.stdout))
    rows = [row for clients, measured in found.items() for row in federation_rows(clients, measured)]
    rows.append(scenes_row(options.scenes, options.repeats))
    print_rows("Simulation", rows)
    append_record("simulator", rows)


def federation_rows(clients: int, measured: list[dict[str, float]]) -> list[Row]:
    """Processor time and peak memory of one size."""
    sizes = {"clients": clients, "photos of each": PHOTOS, "trainings": int(measured[0]["trainings"])}
    used = [item["processor seconds"] for item in measured]
    each = [1000 * item["processor seconds"] / item["trainings"] for item in measured]
    return [
        Row("whole federation", "CPU s", used, sizes),
        Row("each training", "CPU ms", each, sizes),
        Row("peak memory", "MB", [item["peak"] for item in measured], sizes),
        Row("… of that before the first round", "MB", [item["peak before"] for item in measured], sizes),
    ]


def scenes_row(count: int, repeats: int) -> Row:
    """Pictures a second."""
    specification = federation_plan(0).decorrelated
    seconds = interleave({"draw": lambda: draw_scenes(specification, count, 0)}, repeats)["draw"]
    parameters = {"pictures": count, "pixels": "112x112"}
    return Row("scenes drawn", "pictures/s", [count / value for value in seconds], parameters)


if __name__ == "__main__":
    main()
