"""Shared by the aggregator's tests: a bundle without graphs, hand-made updates, and a real mosquitto."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """A mosquitto of one's own on loopback, to be killed and started again."""

    def __init__(self, folder: Path, extra: str = "") -> None:
        self.port = free_port()
        self.configuration = folder / "mosquitto.conf"
        self.configuration.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser {_user()}\n{extra}\n"
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["mosquitto", "-c", str(self.configuration)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("mosquitto did not start")

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()


def _user() -> str:
    import getpass

    return getpass.getuser()


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A running mosquitto without persistence; skipped where the program is not installed."""
    if shutil.which("mosquitto") is None:
        pytest.skip("mosquitto is not installed (apt install mosquitto)")
    broker = Mosquitto(tmp_path)
    yield broker
    broker.kill()
