"""How many times the median an honest update may be, and what noise of that length does: the choice of NORM_FACTOR.

``python benchmarks/norm_bound.py`` runs the short demo for its caches, then federations of its four sites in one
process: all honest, and with one site that sends random noise of so many times its own update's norm in every training
round. ``--photos CACHE --bundle BUNDLE`` measures the lengths of honest updates of sites of very different size on
other photos as well. The result is docs/results/norm-bound.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fedmpt.aggregator.privacy import l2_norm
from fedmpt.aggregator.rounds import RoundSettings
from fedmpt.aggregator.settings import FederationSettings
from fedmpt.aggregator.strategies import StrategySettings
from fedmpt.edge_client.cache import open_cache
from fedmpt.edge_client.engine import open_engine, predict
from fedmpt.edge_client.metrics import mean_average_precision
from fedmpt.edge_client.trainer import SiteData
from fedmpt.protocol.codec import State, Update, load_state
from fedmpt.protocol.files import write_atomically
from fedmpt.protocol.manifest import load_manifest
from fedmpt.simulation.simulator import simulate

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "norm-bound.json"
DEMO_BUNDLE = ROOT / "simulation" / "data" / "demo-bundle"
FACTORS = (0, 3, 5, 10, 20, 30, 100)  # 0: nobody is hostile
DEMO_SIZES = (8, 8, 8, 1000)  # photos; a site has at most as many as its cache
PHOTO_SIZES = (20, 20, 20, 640, 2400)
ROUNDS = 6
SEEDS = 3

Row = dict[str, Any]


def main() -> None:
    """Measure, write the result file, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, metavar="CACHE", help="feature cache of other photos")
    parser.add_argument("--bundle", type=Path, help="the bundle of that cache")
    arguments = parser.parse_args()
    if bool(arguments.photos) != bool(arguments.bundle):
        parser.error("--photos and --bundle go together")
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        program = "import sys; from fedmpt.cli import main; sys.exit(main())"
        command = [sys.executable, "-P", "-c", program, "demo", "--short", "--out", demo]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
        caches = [demo / "caches" / f"client-{number}" for number in range(1, 5)]
        test = demo / "caches" / "test-decorrelated"
        rows = [
            damage(caches, test, factor, seed) for factor in FACTORS for seed in range(SEEDS if factor else 1)
        ]
        rows += lengths("scenes", DEMO_BUNDLE, caches, DEMO_SIZES)
    if arguments.photos:
        rows += lengths("photographs", arguments.bundle, [arguments.photos], PHOTO_SIZES)
    write_atomically(RESULT, json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(row)


def damage(caches: list[Path], test: Path, factor: float, seed: int) -> Row:
    """Mean average precision of the federation's result where one site sends noise of ``factor`` times its norm."""
    generator = np.random.default_rng(seed)

    def tamper(update: Update) -> Update:
        if not factor or update.client != "site-0" or update.round == 0:
            return update
        noise = {name: generator.standard_normal(value.shape) for name, value in update.difference.items()}
        scale = factor * l2_norm(update.difference) / l2_norm(noise)
        return dataclasses.replace(
            update, difference={name: np.float32(scale * value) for name, value in noise.items()}
        )

    manifest = load_manifest(DEMO_BUNDLE)
    training = dataclasses.replace(manifest.training, rounds=ROUNDS, learning_rate=0.004)
    state = _federate(
        DEMO_BUNDLE, dataclasses.replace(manifest, training=training), caches, (10_000,) * 4, tamper
    )
    cache = open_cache(test, manifest)
    engine = open_engine(DEMO_BUNDLE, "onnx", "cpu")
    _, logits = predict(engine, state, cache.tokens, np.arange(len(cache)))
    score = mean_average_precision(logits, np.asarray(cache.labels))
    return {"what": "noise from one site of four", "factor": factor, "seed": seed, "mAP": score}


def lengths(name: str, bundle: Path, caches: list[Path], sizes: tuple[int, ...]) -> list[Row]:
    """The norm of each site's update in each training round, all honest."""
    rows: list[Row] = []

    def note(update: Update) -> Update:
        rows.append(
            {
                "what": f"honest norms, {name}",
                "round": update.round,
                "site": update.client,
                "photos": update.samples,
                "norm": l2_norm(update.difference),
            }
        )
        return update

    manifest = load_manifest(bundle)
    training = dataclasses.replace(manifest.training, rounds=3)
    _federate(bundle, dataclasses.replace(manifest, training=training), caches, sizes, note)
    return rows


def _federate(bundle: Path, manifest: Any, caches: list[Path], sizes: tuple[int, ...], tamper: Any) -> State:
    sites = {}
    for number, size in enumerate(sizes):
        cache = open_cache(caches[number % len(caches)], manifest)
        rows = np.arange(len(cache))
        sites[f"site-{number}"] = SiteData(cache.tokens, cache.labels, rows[:size], rows[:0])
    rounds = RoundSettings(manifest.training.rounds, True, clients_min=len(sites))
    settings = FederationSettings("norms", rounds, StrategySettings(), norm=1e9, norm_factor=0.0)
    engine = open_engine(bundle, "onnx", "cpu")
    initial = load_state(bundle / "state.safetensors", manifest.state)
    return simulate(engine, manifest, initial, sites, settings, tamper=tamper).state


if __name__ == "__main__":
    main()
