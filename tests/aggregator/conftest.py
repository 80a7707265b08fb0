"""Shared by the aggregator's tests: a bundle without graphs, hand-made updates, and a real mosquitto."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmpt.aggregator.rounds import RoundSettings
from fedmpt.aggregator.settings import FederationSettings
from fedmpt.aggregator.strategies import StrategySettings
from fedmpt.protocol.codec import State, Update, encode_update, save_state, state_digest
from fedmpt.protocol.files import sha256_file
from fedmpt.protocol.manifest import (
    BundleManifest,
    Clip,
    Pooling,
    TensorSpec,
    Tokens,
    Training,
    load_manifest,
    save_manifest,
)

SPECS = {
    "bias": TensorSpec("float32", ()),
    "class_context": TensorSpec("float32", (2, 3)),
    "scale": TensorSpec("float32", ()),
}
FEDERATION = "birds"


def initial_state() -> State:
    """A small state with a tensor of rank 2 and the two scalars that calibration trains."""
    generator = np.random.default_rng(0)
    return {name: np.asarray(generator.normal(size=spec.shape), np.float32) for name, spec in SPECS.items()}


def make_settings(**changes: object) -> FederationSettings:
    """Three training rounds after calibration, two clients; ``changes`` replace fields by name."""
    rounds = {"rounds": 3, "calibrate": True, "clients_min": 2}
    strategy = changes.pop("strategy", "uniform")
    for name in ("rounds", "calibrate", "clients_min", "fraction", "quorum", "deadline", "seed"):
        if name in changes:
            rounds[name] = changes.pop(name)
    return FederationSettings(
        name=FEDERATION, rounds=RoundSettings(**rounds), strategy=StrategySettings(strategy), **changes
    )


def make_bundle(folder: Path) -> BundleManifest:
    """Write a bundle folder that has all an aggregator reads: manifest and initial state."""
    folder.mkdir(parents=True, exist_ok=True)
    save_state(folder / "state.safetensors", initial_state())
    manifest = BundleManifest(
        format="fedmpt-bundle",
        version=1,
        method="coop",
        labels=("cat", "dog"),
        conditions=("background",),
        clip=Clip("test", "none", 32, 16, 4, 3, 10.0),
        tokens=Tokens("plain", "full", 5, (2, 2), 4),
        pooling=Pooling("max", 4.0, 0.2, 10),
        training=Training("sgd", 0.01, 0.9, 0.0, 0.0, 10.0, 8, 1, 3, True, 1.0, 2.0, 0.05, 0),
        precision="float32",
        state=SPECS,
        graphs={},
        files={"state.safetensors": sha256_file(folder / "state.safetensors")},
    )
    save_manifest(folder, manifest)
    return manifest


@pytest.fixture(name="make_settings")
def make_settings_fixture() -> Callable[..., FederationSettings]:
    """``make_settings``, for test modules, which cannot import this one."""
    return make_settings


@pytest.fixture(name="make_update")
def make_update_fixture() -> Callable[..., bytes]:
    """``make_update``, likewise."""
    return make_update


@pytest.fixture
def state() -> State:
    """The bundle's initial state."""
    return initial_state()


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``make_bundle``; read it only."""
    folder = tmp_path_factory.mktemp("bundle")
    make_bundle(folder)
    return folder


@pytest.fixture
def bundle(bundle_folder: Path) -> BundleManifest:
    """The manifest of ``bundle_folder``."""
    return load_manifest(bundle_folder)


def make_update(
    state: State,
    client: str,
    number: int,
    *,
    names: tuple[str, ...] = tuple(SPECS),
    encoding: str = "float32",
    samples: int = 10,
    federation: str = FEDERATION,
    metrics: dict[str, float] | None = None,
    step: float = 0.1,
) -> bytes:
    """The payload of an update that depends on client and round alone."""
    generator = np.random.default_rng([number, *client.encode()])
    difference = {
        name: np.asarray(step * generator.normal(size=SPECS[name].shape), np.float32) for name in names
    }
    update = Update(
        federation=federation,
        round=number,
        client=client,
        base=state_digest(state),
        samples=samples,
        validation_samples=4,
        metrics={"mAP": 0.5} if metrics is None else metrics,
        difference=difference,
    )
    return encode_update(update, encoding)


@pytest.fixture
def mosquitto(start_mosquitto: Callable[..., Any]) -> Any:
    """A real broker without persistence."""
    return start_mosquitto(persistent=False)
