"""Every method of the registry learns on scenes, in a federation of clients with correlations of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmpt.edge_client.engine import open_engine
from fedmpt.edge_client.evaluation import predict
from fedmpt.edge_client.metrics import mean_average_precision
from fedmpt.export.methods import METHODS
from fedmpt.simulation.experiments import Settings
from fedmpt.simulation.experiments_data import initial_state, open_bundle, open_photos
from fedmpt.simulation.experiments_run import perform

LEARNERS = sorted(name for name, method in METHODS.items() if method.text_state)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.mark.slow
@pytest.mark.parametrize("method", LEARNERS)
def test_a_federation_lifts_the_accuracy_on_independent_labels(method: str, store: Path) -> None:
    settings = Settings(
        method=method,
        clients=2,
        photos=160,
        test_photos=160,
        rounds=3,
        epochs=2,
        optimizer="adamw",
        learning_rate=0.004,
        seed=5,
    )
    bundle, _ = open_bundle(settings, store)
    test = open_photos(settings, store, bundle).tests["decorrelated"]
    untrained = predict(
        open_engine(bundle, "onnx", "cpu", 1), initial_state(bundle, settings.seed), test.tokens
    )
    before = mean_average_precision(untrained[1], test.labels)
    after = perform(settings, store)["metrics"]["decorrelated.mAP"]
    assert after > before + 0.03
