"""Runs an experiment's grid, each combination once: what the store already has is not run again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedmpt.protocol.files import write_atomically
from fedmpt.protocol.manifest import canonical_json
from fedmpt.simulation.cluster import open_cluster
from fedmpt.simulation.experiments import Experiment, Run, Settings
from fedmpt.simulation.experiments_data import bundle_folder, open_bundle, open_photos, training_of
from fedmpt.simulation.experiments_run import Outcome, perform

Report = Callable[[str, int, int], None]

# The settings that decide which photos are drawn and how they are encoded.
DATA_FIELDS = (
    "data",
    "root",
    "clip",
    "tokens",
    "strength",
    "photos",
    "test_photos",
    "partition",
    "clients",
    "seed",
)


def run_experiment(
    experiment: Experiment,
    store: Path,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    report: Report = lambda stage, done, total: None,
) -> list[tuple[Run, Outcome]]:
    """Run what is missing and return every run with its outcome, in the file's order.

    Args:
        store: the folder for bundles, features and results; experiments may share it. After a change of the
            method's code begin a new one: results are named by settings, not by code.
        workers, scheduler: see :func:`fedmpt.simulation.cluster.open_cluster`.
        report: called with (stage, done, total).

    Raises:
        FedmptError: a combination cannot be run.
    """
    wanted = {_result(store, run): run.settings for run in experiment.runs}
    pending = {path: settings for path, settings in wanted.items() if not path.is_file()}
    bundles = {str(bundle_folder(settings, store)): settings for settings in pending.values()}
    photos = {
        tuple(getattr(settings, name) for name in DATA_FIELDS): settings for settings in pending.values()
    }
    stages: Sequence[tuple[str, Callable[[Settings], Any], Sequence[Settings]]] = (
        ("bundles", lambda settings: open_bundle(settings, store) and None, list(bundles.values())),
        ("features", lambda settings: _encode(settings, store), list(photos.values())),
        ("runs", lambda settings: perform(settings, store), list(pending.values())),
    )
    if pending:
        with open_cluster(workers, scheduler) as spread:
            for stage, function, items in stages:
                done = 0

                def finished(index: int, outcome: Any, stage: str = stage, total: int = len(items)) -> None:
                    nonlocal done
                    done += 1
                    if stage == "runs":
                        write_atomically(list(pending)[index], json.dumps(outcome))
                    report(stage, done, total)

                spread(function, items, finished)
    return [(run, json.loads(_result(store, run).read_bytes())) for run in experiment.runs]


def _encode(settings: Settings, store: Path) -> None:
    bundle, _ = open_bundle(settings, store)
    open_photos(settings, store, bundle)


def _result(store: Path, run: Run) -> Path:
    """Named by the settings and what they mean now: the presets, and the checkpoint's weights in the bundle."""
    meaning = [
        run.key,
        dataclasses.asdict(training_of(run.settings)),
        bundle_folder(run.settings, store).name,
    ]
    return store / "results" / f"{hashlib.sha256(canonical_json(meaning)).hexdigest()[:24]}.json"
