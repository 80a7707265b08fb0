"""``fedmpt demo``: a whole federation on this machine, every part in a process of its own, and a report.

The shipped Scenes pack stands for four sites, each with its own art style and spurious label pairs; what they
learn together is measured on pictures with independent labels against the untuned CLIP.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedmpt.edge_client import metrics
from fedmpt.edge_client.cache import FeatureCache, open_cache
from fedmpt.edge_client.engine import open_engine, predict
from fedmpt.edge_client.evaluation import RECALL
from fedmpt.edge_client.metrics import Pair
from fedmpt.protocol.codec import load_state
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleManifest, load_manifest, save_manifest
from fedmpt.simulation.processes import Child, Processes, processes
from fedmpt.simulation.scenes_pack import build_pack, unpack_demo

DATA = Path(__file__).parent / "data"
BUNDLE = DATA / "demo-bundle"
PACK = DATA / "scenes-demo.zip"
ZERO_SHOT = DATA / "zero-shot.safetensors"
FEDERATION = "demo"
VALIDATION = "validation"
TEST_SETS = ("test-decorrelated", "test-correlated")
SHARED_SETS = (VALIDATION, *TEST_SETS)
ROUNDS = 10
SHORT_ROUNDS = 2
TAGGED_PHOTOS = 60
LOGS = "logs"
SPACE_BYTES = 160 << 20  # it writes half of that; building a feature cache leaves 64 MB alone

Report = Callable[[str, int, int], None]


class DemoError(FedmptError):
    """The demo's output folder or shipped data cannot be used."""


@dataclass(frozen=True)
class Scores:
    """One model's logits on the test and validation sets, by set name, and what they come to.

    ``spurious_by_pair`` gives the activation rate of each planted pair (i, j) on pictures with independent labels.
    """

    logits: Mapping[str, NDArray[np.floating[Any]]]
    figures: Mapping[str, float]
    average_precision: Mapping[str, float]
    spurious_by_pair: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class DemoResult:
    """Everything that the summary and the report show."""

    out: Path
    manifest: BundleManifest
    before: Scores
    after: Scores
    history: list[dict[str, Any]]
    seconds: Mapping[str, float]


def run_demo(
    out: Path,
    *,
    short: bool = False,
    seed: int | None = None,
    report: Report = lambda stage, done, total: None,
) -> DemoResult:
    """Run the demo into ``out``, which must not hold another one; where it fails, only its logs remain.

    Args:
        out: the folder for photos, caches, logs, the tagger and its tags.
        short: two rounds instead of ten, to see that everything works here.
        seed: draws another federation: other planted pairs, other pictures, another order of the batches.
        report: called with (stage, done, total) as it goes on.

    Raises:
        DemoError: ``out`` is not empty or its disk too full, or the shipped data is missing.
        ProcessError: a process failed.
    """
    if out.exists() and any(path.name != LOGS for path in out.iterdir()):
        raise DemoError(f"{out}: not empty; remove it or choose another folder with --out")
    for path in (BUNDLE / "manifest.json", PACK, ZERO_SHOT):
        if not path.exists():
            raise DemoError(f"{path}: missing from the installed package; install fedmpt-edge again")
    (out / LOGS).mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out).free) < SPACE_BYTES:
        raise DemoError(
            f"{out}: the demo needs {SPACE_BYTES >> 20} MB and {free >> 20} MB are free; free some space, or choose "
            "another folder with --out"
        )
    try:
        return _run(out, SHORT_ROUNDS if short else ROUNDS, seed, report)
    except BaseException:
        for path in out.iterdir():
            if not path.is_dir():
                path.unlink()
            elif path.name != LOGS:
                shutil.rmtree(path)
        raise


def _run(out: Path, rounds: int, seed: int | None, report: Report) -> DemoResult:
    seconds: dict[str, float] = {}
    with processes(out / LOGS) as running:
        bundle, pack = (BUNDLE, PACK) if seed is None else draw_federation(out, seed, report)
        manifest = load_manifest(bundle)
        start = time.monotonic()
        sites = unpack(pack, out / "photos")
        build_caches(running, bundle, out, [*sites, *SHARED_SETS], report)
        seconds["encode all photos"] = time.monotonic() - start
        start = time.monotonic()
        run_federation(running, bundle, out, sites, rounds, report)
        seconds["federation"] = time.monotonic() - start
        start = time.monotonic()
        before, after = compare(bundle, out, manifest, report)
        seconds["evaluate"] = time.monotonic() - start
        start = time.monotonic()
        tag_photos(running, bundle, out, report)
        seconds["export and tag"] = time.monotonic() - start
    return DemoResult(out, manifest, before, after, read_history(out), seconds)


def draw_federation(out: Path, seed: int, report: Report) -> tuple[Path, Path]:
    """A copy of the shipped bundle that trains with another seed, and a pack of other pictures."""
    report("drawing pictures", 0, 1)
    bundle, pack = out / "bundle", out / "scenes.zip"
    shutil.copytree(BUNDLE, bundle)
    manifest = load_manifest(bundle)
    training = dataclasses.replace(manifest.training, seed=seed)
    save_manifest(bundle, dataclasses.replace(manifest, training=training))
    build_pack(pack, seed)
    report("drawing pictures", 1, 1)
    return bundle, pack


def unpack(pack: Path, folder: Path) -> list[str]:
    """Unpack the photo folders, whose digest is checked; return the sites' names."""
    unpack_demo(folder, pack)
    return sorted(path.name for path in (folder / "clients").iterdir())


def photo_folder(out: Path, name: str) -> Path:
    """Where the photos of a site or of a shared set lie."""
    return out / "photos" / name if name in SHARED_SETS else out / "photos" / "clients" / name


def build_caches(running: Processes, bundle: Path, out: Path, names: list[str], report: Report) -> None:
    """Encode every photo folder, each by its own process, two at a time."""
    waiting = list(names)
    active: list[Child] = []
    while waiting or active:
        running.check()
        active = [child for child in active if child.process.poll() is None]
        while waiting and len(active) < 2:
            name = waiting.pop(0)
            folders = [photo_folder(out, name), "--out", out / "caches" / name]
            arguments = ["cache", *folders, "--bundle", bundle, "--threads", 1, "--device", "cpu"]
            active.append(running.start(f"cache-{name}", arguments, threads=1))
        report("photos into features", len(names) - len(waiting) - len(active), len(names))
        time.sleep(0.05)


def run_federation(
    running: Processes, bundle: Path, out: Path, sites: list[str], rounds: int, report: Report
) -> None:
    """Aggregator with its embedded broker, and one client for each site, until the last round has closed."""
    port = free_port()
    broker = f"mqtt://127.0.0.1:{port}"
    shared = ["--broker", broker, "--federation", FEDERATION]
    rule = ["--rounds", rounds, "--clients-min", len(sites), "--out", out / "final.safetensors"]
    aggregator = running.start(
        "aggregator",
        ["aggregator", "--bundle", bundle, "--embedded", *shared, "--store", out / "aggregator", *rule],
        threads=1,
    )
    clients = []
    for site in sites:
        folders = ["--cache", out / "caches" / site, "--state-dir", out / "clients" / site]
        arguments = ["client", "--bundle", bundle, *folders, *shared, "--name", site]
        clients.append(running.start(site, [*arguments, "--threads", 1, "--device", "cpu"], threads=1))
    running.wait(
        [aggregator, *clients], lambda: report("federated rounds", len(read_history(out)), rounds + 1)
    )


def compare(bundle: Path, out: Path, manifest: BundleManifest, report: Report) -> tuple[Scores, Scores]:
    """The untuned CLIP ("a photo of a cat.", class token) and the tuned state, on the same photos."""
    report("evaluation", 0, 2)
    caches = {name: open_cache(out / "caches" / name, manifest) for name in SHARED_SETS}
    planted = json.loads((out / "photos" / "pairs.json").read_text())
    index = {label: position for position, label in enumerate(manifest.labels)}
    pairs = sorted({(index[i], index[j]) for site in planted.values() for i, j in site})
    text = load_file(ZERO_SHOT)["text"]
    zero_shot = {name: cache.tokens[:, 0].astype(np.float32) @ text.T for name, cache in caches.items()}
    report("evaluation", 1, 2)
    engine = open_engine(bundle, "onnx", "cpu")
    state = load_state(out / "final.safetensors", manifest.state)
    tuned = {name: predict(engine, state, cache.tokens)[1] for name, cache in caches.items()}
    report("evaluation", 2, 2)
    return score(zero_shot, caches, pairs, manifest.labels), score(tuned, caches, pairs, manifest.labels)


def score(
    logits: Mapping[str, NDArray[np.floating[Any]]],
    caches: Mapping[str, FeatureCache],
    pairs: list[Pair],
    labels: tuple[str, ...],
) -> Scores:
    """Figures of one model; every threshold is chosen on ``validation``, never on a test set."""
    chosen_on = logits[VALIDATION], caches[VALIDATION].labels
    best = metrics.best_f1_thresholds(*chosen_on)
    equal_recall = metrics.recall_thresholds(*chosen_on, RECALL)
    figures = {}
    for name in TEST_SETS:
        truth, values, kind = caches[name].labels, logits[name], name.removeprefix("test-")
        figures[f"mAP, {kind}"] = metrics.mean_average_precision(values, truth)
        figures[f"CF1, {kind}"] = metrics.class_f1(values >= best, truth)
        figures[f"OF1, {kind}"] = metrics.overall_f1(values >= best, truth)
    decorrelated = TEST_SETS[0]
    active, truth = logits[decorrelated] >= equal_recall, caches[decorrelated].labels
    figures["spurious activation rate"] = metrics.spurious_activation_rate(active, truth, pairs)
    each = metrics.average_precision(logits[decorrelated], truth)
    return Scores(
        logits,
        figures,
        dict(zip(labels, map(float, each), strict=True)),
        {(labels[i], labels[j]): metrics.spurious_activation_rate(active, truth, [(i, j)]) for i, j in pairs},
    )


def tag_photos(running: Processes, bundle: Path, out: Path, report: Report) -> None:
    """Export one tagger.onnx, with thresholds from the validation photos, and tag a folder with it."""
    report("tagger", 0, 2)
    files = ["--state", out / "final.safetensors", "--out", out / "tagger.onnx"]
    arguments = ["export", "--bundle", bundle, *files, "--validation", out / "caches" / VALIDATION]
    running.wait([running.start("export", arguments, threads=2)])
    report("tagger", 1, 2)
    photos = sorted(photo_folder(out, TEST_SETS[0]).glob("*.jpg"))[:TAGGED_PHOTOS]
    arguments = ["tag", "--tagger", out / "tagger.onnx", *photos, "--out", out / "tags.jsonl"]
    running.wait([running.start("tag", [*arguments, "--device", "cpu"], threads=2)])
    report("tagger", 2, 2)


def read_history(out: Path) -> list[dict[str, Any]]:
    """The aggregator's closed rounds so far; a line that is still being written is left for later."""
    path = out / "aggregator" / "history.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def free_port() -> int:
    """A TCP port on loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
