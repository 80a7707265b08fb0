"""One run of an experiment: deal the photos, simulate the federation, measure the final state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpt.aggregator.rounds import RoundSettings
from fedmpt.aggregator.settings import FederationSettings
from fedmpt.aggregator.strategies import StrategySettings
from fedmpt.edge_client import metrics
from fedmpt.edge_client.engine import Engine, open_engine, predict
from fedmpt.edge_client.evaluation import RECALL
from fedmpt.edge_client.metrics import Pair
from fedmpt.edge_client.trainer import SiteData
from fedmpt.protocol.codec import State
from fedmpt.simulation import partition
from fedmpt.simulation.attacks import Tamper, attack, attackers
from fedmpt.simulation.experiments import ExperimentError, Settings
from fedmpt.simulation.experiments_data import (
    Photos,
    initial_state,
    open_bundle,
    open_photos,
    training_of,
)
from fedmpt.simulation.partition import Shares, heterogeneity, mask_labels
from fedmpt.simulation.simulator import Simulation, simulate

# What may be trained alone; κ and δ are trained always.
TRAINED = {
    "prompts": ("condition_context", "class_context"),
    "adapters": ("adapter_down", "adapter_up"),
    "gate": ("gate_down", "gate_up"),
    "scalars": ("scale", "bias"),
}
# The thresholds from which the field's "best of nine" F1 is chosen, on the test set itself.
NINE_THRESHOLDS = tuple(index / 10 for index in range(1, 10))
CENTRE = "centre"

Outcome = dict[str, Any]


def perform(settings: Settings, store: Path) -> Outcome:
    """Run one combination in this process, on one core.

    Returns:
        ``metrics``: figures by name; ``curve``: the clients' own validation mAP of the global state by round;
        ``prevalence [K, C]``: each client's fraction of photos that show a label.

    Raises:
        ExperimentError: a setting is unknown.
        FedmptError: the data or the bundle cannot be made, or the federation cannot be run.
    """
    start = time.process_time()
    bundle, manifest = open_bundle(settings, store)
    photos = open_photos(settings, store, bundle)
    shares = deal(settings, photos)
    sites = make_sites(settings, photos, shares)
    training = training_of(settings)
    if set(manifest.state) == set(TRAINED["scalars"]):
        training = dataclasses.replace(training, rounds=1)  # zero-shot: calibration has fitted all there is
    manifest = dataclasses.replace(manifest, training=training)
    engine = open_engine(bundle, "onnx", "cpu", 1)
    federation = FederationSettings(
        name="experiment",
        rounds=RoundSettings(
            rounds=training.rounds,
            calibrate=training.calibrate,
            fraction=settings.participation,
            seed=settings.seed,
        ),
        strategy=StrategySettings(settings.strategy),
        encoding=settings.encoding,
        norm_factor=0.0,  # an experiment with hostile clients is to show what its strategy does alone
    )
    simulation = simulate(
        _partly_frozen(engine, settings.trained),
        manifest,
        initial_state(bundle, settings.seed),
        sites,
        federation,
        dropout=settings.dropout,
        tamper=tampering(settings, sites),
    )
    measured = heterogeneity(photos.train.labels, shares)
    figures = {
        **measure(engine, simulation.state, photos, found_pairs(photos, shares)),
        "clients.mAP": _held_out(engine, simulation.state, photos, sites),
        "divergence": measured.divergence,
        "bytes per update": simulation.bytes_per_update,
        "updates": float(sum(record["received"] for record in simulation.history)),
        "seconds": time.process_time() - start,
    }
    return {
        "metrics": figures,
        "curve": _curve(simulation),
        "prevalence": np.round(measured.prevalence, 3).tolist(),
    }


def tampering(settings: Settings, clients: Collection[str]) -> Tamper | None:
    """What the experiment's hostile clients do to their updates; None without an attack.

    Raises:
        AttackError: the attack is unknown, or the fraction out of range.
    """
    if not settings.attack:
        return None
    return attack(settings.attack, attackers(clients, settings.hostile, settings.seed), settings.seed)


def deal(settings: Settings, photos: Photos) -> Shares:
    """The rows of the training photos that each client holds.

    Raises:
        ExperimentError: unknown partition, or ``own`` where photos have no owner.
    """
    labels, count = photos.train.labels, settings.clients
    if settings.centralised:
        return [np.arange(len(labels))]
    if settings.partition == "own" and settings.data == "scenes":
        return [np.flatnonzero(photos.owner == client) for client in range(count)]
    if settings.partition == "iid":
        return partition.iid(len(labels), count, settings.seed)
    if settings.partition == "dirichlet":
        return partition.dirichlet(labels, count, settings.alpha, settings.seed, minimum=2)
    if settings.partition == "clusters":
        return partition.clusters(labels, count, settings.clusters, settings.seed)
    raise ExperimentError(
        f"partition {settings.partition!r}: choose iid, dirichlet or clusters (or own, with scenes)"
    )


def make_sites(settings: Settings, photos: Photos, shares: Shares) -> dict[str, SiteData]:
    """The clients; a tenth of each one's photos validates the global state, as on a real site."""
    if settings.unknown not in ("ignored", "negative"):
        raise ExperimentError(f"unknown = {settings.unknown!r}: choose ignored or negative")
    labels = photos.train.labels
    if settings.masked:
        labels = mask_labels(labels, settings.masked, settings.seed, negative=settings.unknown == "negative")
    sites = {}
    for client, share in enumerate(shares):
        held_out = np.array([int(photos.train.hashes[row][:13], 16) < 16**13 / 10 for row in share], bool)
        if held_out.all():
            held_out[:] = False
        name = CENTRE if settings.centralised else f"client-{client + 1}"
        sites[name] = SiteData(photos.train.tokens, labels, share[~held_out], share[held_out])
    return sites


def found_pairs(photos: Photos, shares: Shares) -> Sequence[Pair]:
    """The planted pairs; on real photos those that go together at some client."""
    if photos.pairs is not None:
        return photos.pairs
    labels = photos.train.labels
    return sorted({pair for share in shares for pair in metrics.correlated_pairs(labels[share])})


def measure(engine: Engine, state: State, photos: Photos, pairs: Sequence[Pair]) -> dict[str, float]:
    """Figures of a state on every test set; every threshold comes from the validation set.

    The exceptions are named so: ``CF1 best of 9`` and ``OF1 best of 9`` take the best of nine thresholds on
    the test set itself, a habit of the field, and are given to show what it is worth. ``unplanted activation``
    is the same rate as ``spurious activation`` over all ordered pairs but ``pairs``.
    """
    validation = photos.validation
    chosen_on = predict(engine, state, validation.tokens)[1]
    tuned = metrics.best_f1_thresholds(chosen_on, validation.labels, default=0.0)
    equal_recall = metrics.recall_thresholds(chosen_on, validation.labels, RECALL, default=np.inf)
    reached = np.flatnonzero(np.isfinite(equal_recall)).tolist()
    pairs = [(i, j) for i, j in pairs if j in reached]
    others = {(i, j) for i in range(len(equal_recall)) for j in reached if i != j} - set(pairs)
    figures: dict[str, float] = {}
    for name, test in photos.tests.items():
        logits = predict(engine, state, test.tokens)[1]
        active = logits >= equal_recall
        present = (test.labels == 1) & np.isfinite(equal_recall)
        cuts = [np.log(value / (1 - value)) for value in NINE_THRESHOLDS]
        values = {
            "mAP": metrics.mean_average_precision(logits, test.labels),
            "CF1": metrics.class_f1(logits >= 0, test.labels),
            "OF1": metrics.overall_f1(logits >= 0, test.labels),
            "CF1 tuned": metrics.class_f1(logits >= tuned, test.labels),
            "OF1 tuned": metrics.overall_f1(logits >= tuned, test.labels),
            "CF1 best of 9": max(metrics.class_f1(logits >= cut, test.labels) for cut in cuts),
            "OF1 best of 9": max(metrics.overall_f1(logits >= cut, test.labels) for cut in cuts),
            "recall": float(active[present].mean()) if present.any() else float("nan"),
            "spurious activation": metrics.spurious_activation_rate(active, test.labels, pairs),
            "unplanted activation": metrics.spurious_activation_rate(active, test.labels, others),
        }
        figures |= {f"{name}.{key}": float(value) for key, value in values.items()}
    return figures


def _held_out(engine: Engine, state: State, photos: Photos, sites: Mapping[str, SiteData]) -> float:
    """mAP of a state on all that the clients hold out: what a federation can choose its settings by."""
    rows = np.concatenate([site.validation for site in sites.values()])
    if not len(rows):
        return float("nan")
    logits = predict(engine, state, photos.train.tokens[rows])[1]
    return metrics.mean_average_precision(logits, photos.train.labels[rows])


def _curve(simulation: Simulation) -> list[float | None]:
    return [record["metrics"].get("mAP") for record in simulation.history]


def _partly_frozen(engine: Engine, trained: str) -> Engine:
    """The engine, with gradients of zero for the tensors that are not to learn (empty: all learn)."""
    if not trained:
        return engine
    groups = trained.split("+")
    if unknown := [name for name in groups if name not in TRAINED]:
        raise ExperimentError(f"trained = {trained!r}: {unknown[0]!r} is none of {', '.join(TRAINED)}")
    names = {name for group in (*groups, "scalars") for name in TRAINED[group]}
    return _Frozen(engine, frozenset(names))


@dataclasses.dataclass(frozen=True)
class _Frozen:
    engine: Engine
    learning: frozenset[str]

    def train_step(
        self, state: State, tokens: NDArray[np.floating[Any]], labels: NDArray[np.int8]
    ) -> tuple[float, State]:
        loss, gradients = self.engine.train_step(state, tokens, labels)
        return loss, {
            name: value if name in self.learning else np.zeros_like(value)
            for name, value in gradients.items()
        }

    def text_features(self, state: State) -> NDArray[np.float32]:
        return self.engine.text_features(state)

    def head(self, state: State, text: NDArray[np.float32], tokens: NDArray[np.floating[Any]]) -> Any:
        return self.engine.head(state, text, tokens)
