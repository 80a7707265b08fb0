"""A whole federation in one process: the product's aggregator and the product's clients, without a broker.

The aggregator is :class:`fedmpt.aggregator.federation.Federation`, clients run the edge trainer, and every update
goes through the codec, admission and the store; so the final state is that of a run over MQTT, bit for bit.
Time is counted in ticks: chosen clients train one after the other, those that drop out miss the deadline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmpt.aggregator.federation import Federation
from fedmpt.aggregator.settings import FederationSettings
from fedmpt.aggregator.store import Store
from fedmpt.edge_client.answer import answer_round
from fedmpt.edge_client.engine import Engine
from fedmpt.edge_client.trainer import SiteData, generator
from fedmpt.protocol.codec import State, encode_update
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleManifest
from fedmpt.protocol.messages import Presence, to_json
from fedmpt.simulation.attacks import Tamper

Progress = Callable[[int, "int | None"], None]

DEADLINE = 1.0  # ticks after which a round goes on without those who dropped out
FRUITLESS_ATTEMPTS = 1000


class SimulationError(FedmptError):
    """The federation cannot go on: updates are refused, or every client drops out again and again."""


@dataclass(frozen=True)
class Simulation:
    """The final global state and one record per round (see :mod:`fedmpt.aggregator.store`)."""

    state: State
    history: list[dict[str, Any]]

    @property
    def bytes_per_update(self) -> float:
        """Mean payload of one update in a training round."""
        sizes = [
            size for record in self.history if record["phase"] == "train" for size in record["bytes"].values()
        ]
        return float(sum(sizes) / len(sizes))


def simulate(
    engine: Engine,
    bundle: BundleManifest,
    initial: State,
    sites: Mapping[str, SiteData],
    settings: FederationSettings,
    *,
    dropout: float = 0.0,
    tamper: Tamper | None = None,
    store: Path | None = None,
    progress: Progress | None = None,
) -> Simulation:
    """Run a federation to its end.

    Args:
        engine: the bundle's engine; all clients share it, one at a time.
        bundle: its manifest; ``training`` says how to train.
        initial: the state before the first round.
        sites: the clients' photos by client name; views of one cache cost no memory.
        settings: what an operator chooses; the deadline is the simulator's.
        dropout: the probability with which a chosen client vanishes for the round; drawn from the seed.
        tamper: what becomes of each update before it is sent, for experiments with hostile clients.
        store: a folder in which every accepted update and every round is kept, and from which an interrupted
            simulation goes on; None keeps all in memory.
        progress: called with (trainings done, trainings in all) of this call; those that drop out count.

    Raises:
        SimulationError: an update is refused, or nobody ever answers.
        StoreError: the folder holds another federation.
        TrainingError, EngineError: a client cannot train.
    """
    if not 0 <= dropout < 1:
        raise SimulationError(f"drop-out {dropout}: must be at least 0 and below 1")
    settings = dataclasses.replace(settings, rounds=dataclasses.replace(settings.rounds, deadline=DEADLINE))
    with Store(store) as memory:
        federation = Federation(memory, bundle, initial, settings)
        for client, data in sites.items():
            federation.presence(client, _presence(federation, client, len(data.train)))
        total, done, tick, fruitless = None, 0, 0.0, 0
        while not federation.finished:
            federation.tick(tick)
            opened = federation.round
            if opened.opened is None:
                raise SimulationError(
                    f"{len(sites)} clients, but a round needs {settings.rounds.clients_min}; add clients"
                )
            if total is None:
                total = len(opened.chosen) * (settings.rounds.rounds + 1 - opened.number)
            answered = 0
            for client in opened.chosen:
                if not _drops_out(dropout, bundle.training.seed, client, opened.number, fruitless):
                    payload = answer(engine, federation, client, sites[client], tamper)
                    receipt = federation.receive(opened.number, client, payload)
                    if receipt is None or receipt.status not in ("accepted", "duplicate"):
                        reason = receipt.reason if receipt else "it is muted"
                        raise SimulationError(f"round {opened.number}: update of {client} refused: {reason}")
                    federation.commit()
                    answered += 1
                done += 1
                if progress:
                    progress(done, max(done, total))
            fruitless = 0 if answered else fruitless + 1
            if fruitless == FRUITLESS_ATTEMPTS:
                raise SimulationError(f"round {opened.number}: no client answers; lower the drop-out")
            tick += DEADLINE
            federation.tick(tick)
        return Simulation(federation.state, memory.history())


def answer(
    engine: Engine, federation: Federation, client: str, data: SiteData, tamper: Tamper | None = None
) -> bytes:
    """What a client publishes in the open round: its trained (or calibrated) update, encoded."""
    opened = federation.round
    update = answer_round(
        engine,
        data,
        federation.state,
        federation.manifest,
        phase=opened.phase,
        round_number=opened.number,
        client=client,
    )
    return encode_update(tamper(update) if tamper else update, federation.manifest.encoding)


def _drops_out(probability: float, seed: int, client: str, round_number: int, attempt: int) -> bool:
    lot = generator(seed, f"drop-out {attempt} of {client}", round_number).random()
    return bool(lot < probability)


def _presence(federation: Federation, client: str, samples: int) -> bytes:
    return to_json(
        Presence(
            federation=federation.settings.name,
            client=client,
            online=True,
            bundle=federation.manifest.bundle,
            samples=samples,
            capabilities={},
        )
    )
