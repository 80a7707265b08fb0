"""The simulator is the deployed federation in one process: same rounds, same updates, same bits."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmpt.aggregator.rounds import RoundSettings
from fedmpt.aggregator.settings import FederationSettings
from fedmpt.aggregator.strategies import Contribution, StrategySettings, aggregate
from fedmpt.edge_client.cache import build_cache, open_cache
from fedmpt.edge_client.datasets import LabelledPhoto
from fedmpt.edge_client.engine import Engine, open_engine
from fedmpt.edge_client.trainer import SiteData, calibrate, train_round
from fedmpt.protocol.codec import State, Update, load_state, state_digest
from fedmpt.protocol.manifest import BundleManifest, load_manifest
from fedmpt.simulation.attacks import ATTACKS, AttackError, attack, attackers
from fedmpt.simulation.processes import processes
from fedmpt.simulation.simulator import Simulation, SimulationError, simulate

PHOTOS = 20  # at each client, the last four of them for validation


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> BundleManifest:
    return load_manifest(tiny_bundle)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return open_engine(tiny_bundle, "onnx", "cpu", 1)


@pytest.fixture(scope="module")
def initial(tiny_bundle: Path, bundle: BundleManifest) -> State:
    return load_state(tiny_bundle / "state.safetensors", bundle.state)


def some_sites(bundle: BundleManifest, count: int) -> dict[str, SiteData]:
    """Clients that share one array of random photos; each has rows of its own."""
    generator = np.random.default_rng(0)
    total = count * PHOTOS
    tokens = generator.standard_normal((total, bundle.tokens.count, bundle.tokens.width))
    tokens /= np.linalg.norm(tokens, axis=2, keepdims=True)
    labels = generator.integers(0, 2, (total, len(bundle.labels))).astype(np.int8)
    rows = np.arange(total).reshape(count, PHOTOS)
    shared = tokens.astype(np.float16)
    return {
        f"site-{index}": SiteData(shared, labels, part[:-4], part[-4:]) for index, part in enumerate(rows)
    }


def settings(bundle: BundleManifest, **rounds: Any) -> FederationSettings:
    chosen = {"rounds": 2, "calibrate": True} | rounds
    return FederationSettings("test", RoundSettings(**chosen), StrategySettings(), encoding="float32")


@pytest.fixture(scope="module")
def undisturbed(engine: Engine, bundle: BundleManifest, initial: State) -> Simulation:
    return simulate(engine, bundle, initial, some_sites(bundle, 4), settings(bundle))


def test_a_round_is_every_clients_training_and_their_aggregate(
    engine: Engine, bundle: BundleManifest, initial: State, undisturbed: Simulation
) -> None:
    training = dataclasses.replace(bundle.training, rounds=2)
    manifest = dataclasses.replace(bundle, training=training)
    state: State = initial
    for number in (0, 1, 2):
        contributions = []
        for client, data in some_sites(bundle, 4).items():
            if number == 0:
                update = calibrate(engine, data, state, manifest)
            else:
                update = train_round(
                    engine, data, state, manifest, round_number=number, client=client, seed=training.seed
                )
            contributions.append(Contribution(client, update.samples, update.difference))
        state, _ = aggregate(StrategySettings(), state, lambda parts=contributions: parts, {})
    assert state_digest(state) == state_digest(undisturbed.state)
    assert state_digest(state) != state_digest(initial)


def test_the_history_tells_bytes_and_the_received_states_metrics(undisturbed: Simulation) -> None:
    assert [record["phase"] for record in undisturbed.history] == ["calibrate", "train", "train"]
    last = undisturbed.history[-1]
    assert last["chosen"] == last["received"] == 4
    assert last["samples"] == 4 * (PHOTOS - 4)
    assert last["validation_samples"] == 16
    assert 0 <= last["metrics"]["mAP"] <= 1
    assert undisturbed.bytes_per_update == pytest.approx(np.mean(list(last["bytes"].values())), rel=0.01)


def test_the_order_in_which_clients_are_named_does_not_matter(
    engine: Engine, bundle: BundleManifest, initial: State, undisturbed: Simulation
) -> None:
    backwards = dict(reversed(some_sites(bundle, 4).items()))
    result = simulate(engine, bundle, initial, backwards, settings(bundle))
    assert state_digest(result.state) == state_digest(undisturbed.state)


@pytest.mark.parametrize("trainings", [1, 4, 7])
def test_an_interrupted_simulation_goes_on_as_if_nothing_had_happened(
    engine: Engine,
    bundle: BundleManifest,
    initial: State,
    undisturbed: Simulation,
    tmp_path: Path,
    trainings: int,
) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done == trainings:
            raise KeyboardInterrupt

    arguments = (engine, bundle, initial, some_sites(bundle, 4), settings(bundle))
    with pytest.raises(KeyboardInterrupt):
        simulate(*arguments, store=tmp_path, progress=interrupt)
    seen: list[int] = []
    result = simulate(*arguments, store=tmp_path, progress=lambda done, total: seen.append(done))
    assert state_digest(result.state) == state_digest(undisturbed.state)
    assert len(seen) <= 12 - trainings + 4  # at most the round in flight begins anew


def test_a_fraction_of_the_clients_takes_part_in_each_round(
    engine: Engine, bundle: BundleManifest, initial: State
) -> None:
    result = simulate(
        engine, bundle, initial, some_sites(bundle, 10), settings(bundle, fraction=0.3, rounds=4)
    )
    assert [record["chosen"] for record in result.history] == [3] * 5
    assert len({client for record in result.history for client in record["bytes"]}) > 3


def test_rounds_go_on_without_those_who_drop_out(
    engine: Engine, bundle: BundleManifest, initial: State
) -> None:
    sites = some_sites(bundle, 6)
    first, again = (
        simulate(engine, bundle, initial, sites, settings(bundle, rounds=4), dropout=0.5) for _ in range(2)
    )
    received = [record["received"] for record in first.history]
    assert all(record["chosen"] == 6 for record in first.history)
    assert 0 < min(received) < max(received)
    assert sum(received) < 24
    assert state_digest(first.state) == state_digest(again.state)


def test_a_round_that_everybody_left_is_tried_again(
    engine: Engine, bundle: BundleManifest, initial: State
) -> None:
    result = simulate(engine, bundle, initial, some_sites(bundle, 2), settings(bundle), dropout=0.9)
    assert len(result.history) == 3
    assert all(record["received"] > 0 for record in result.history)


def test_too_few_clients_and_an_impossible_drop_out_are_refused(
    engine: Engine, bundle: BundleManifest, initial: State
) -> None:
    sites = some_sites(bundle, 2)
    with pytest.raises(SimulationError, match="2 clients, but a round needs 3"):
        simulate(engine, bundle, initial, sites, settings(bundle, clients_min=3))
    with pytest.raises(SimulationError, match=r"drop-out 1\.0"):
        simulate(engine, bundle, initial, sites, settings(bundle), dropout=1.0)


def test_a_refused_update_stops_the_simulation_with_the_reason(
    engine: Engine, bundle: BundleManifest, initial: State
) -> None:
    strict = dataclasses.replace(settings(bundle), norm=1e-9)
    with pytest.raises(SimulationError, match=r"update of site-0 refused: its L2 norm is"):
        simulate(engine, bundle, initial, some_sites(bundle, 2), strict)


def test_a_thousand_clients_share_one_array(engine: Engine, bundle: BundleManifest, initial: State) -> None:
    result = simulate(
        engine, bundle, initial, some_sites(bundle, 1000), settings(bundle, fraction=0.05, rounds=1)
    )
    assert [record["received"] for record in result.history] == [50, 50]


@pytest.mark.slow
def test_the_final_state_equals_that_of_real_processes_over_a_broker(
    engine: Engine, bundle: BundleManifest, initial: State, tiny_bundle: Path, tmp_path: Path
) -> None:
    from PIL import Image

    generator = np.random.default_rng(1)
    sites = {}
    for name in ("north", "south"):
        photos = []
        for number in range(12):
            path = tmp_path / name / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (48, 48, 3), np.uint8)).save(path)
            photos.append(LabelledPhoto(path, generator.integers(0, 2, 4).astype(np.int8)))
        build_cache(photos, tiny_bundle, tmp_path / f"{name}-cache")
        cache = open_cache(tmp_path / f"{name}-cache", bundle)
        sites[name] = SiteData(cache.tokens, cache.labels, *cache.split())
    federation = dataclasses.replace(settings(bundle), encoding="float16")
    simulated = simulate(engine, bundle, initial, sites, federation)

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shared = ["--broker", f"mqtt://127.0.0.1:{port}", "--federation", "test"]
    with processes(tmp_path / "logs") as running:
        final = tmp_path / "final.safetensors"
        arguments = ["aggregator", "--bundle", tiny_bundle, "--embedded", *shared, "--rounds", "2"]
        arguments += ["--clients-min", "2", "--store", tmp_path / "store", "--out", final]
        commands = [running.start("aggregator", arguments, threads=1)]
        for name in sites:
            arguments = ["client", "--bundle", tiny_bundle, *shared, "--name", name, "--threads", "1"]
            arguments += ["--cache", tmp_path / f"{name}-cache", "--state-dir", tmp_path / f"{name}-state"]
            commands.append(running.start(name, [*arguments, "--device", "cpu"], threads=1))
        running.wait(commands, lambda: None)
    assert state_digest(load_state(final, bundle.state)) == state_digest(simulated.state)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_changes_the_hostile_clients_updates_alone(name: str) -> None:
    hostile = attackers(["a", "b", "c", "d"], 0.5, seed=3)
    assert len(hostile) == 2
    tamper = attack(name, hostile, seed=3)
    honest = {"x": np.array([3.0, 4.0], np.float32), "scale": np.array(0.5, np.float32)}
    for client in ("a", "b", "c", "d"):
        update = Update("test", 1, client, "0" * 64, 10, 0, {}, honest)
        sent = tamper(update).difference
        if client not in hostile:
            assert sent is honest
            continue
        assert {key: value.shape for key, value in sent.items()} == {"x": (2,), "scale": ()}
        cosine = float(sent["x"] @ honest["x"]) / (5 * float(np.linalg.norm(sent["x"])))
        assert {"sign-flip": cosine < -0.999, "scaling": cosine > 0.999, "noise": True}[name]
        assert np.array_equal(tamper(update).difference["x"], sent["x"]), "the same lie every time"


def test_hostile_clients_move_the_average_and_not_the_median(
    engine: Engine, bundle: BundleManifest, initial: State
) -> None:
    sites = some_sites(bundle, 5)
    moved = {}
    for strategy in ("uniform", "median"):
        chosen = dataclasses.replace(settings(bundle, rounds=1), strategy=StrategySettings(strategy))
        honest, poisoned = (
            simulate(engine, bundle, initial, sites, chosen, tamper=tamper).state
            for tamper in (None, attack("sign-flip", {"site-0"}, 0))
        )
        moved[strategy] = max(float(np.abs(honest[key] - poisoned[key]).max()) for key in honest)
    assert moved["median"] < moved["uniform"] / 5


def test_an_unknown_attack_is_refused() -> None:
    with pytest.raises(AttackError, match="choose sign-flip, scaling, noise"):
        attack("flattery", {"a"}, 0)
