"""``fedmpt aggregator``: run the rounds of a federation."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from fedmpt.aggregator.broker import EmbeddedBroker
from fedmpt.aggregator.federation import Federation
from fedmpt.aggregator.norms import NORM_FACTOR
from fedmpt.aggregator.privacy import PrivacySettings, epsilon
from fedmpt.aggregator.rounds import RoundSettings
from fedmpt.aggregator.server import connect, serve
from fedmpt.aggregator.settings import MAXIMUM_NORM, MAXIMUM_SAMPLES, FederationSettings
from fedmpt.aggregator.store import Store
from fedmpt.aggregator.strategies import STRATEGIES, StrategySettings
from fedmpt.cli.logs import show_logs
from fedmpt.cli.options import (
    OptionsError,
    add_broker_options,
    allow_config,
    broker_address,
    require_writable,
    resolve,
)
from fedmpt.cli.signals import stop_on
from fedmpt.protocol.address import BrokerAddress
from fedmpt.protocol.codec import load_state, save_state
from fedmpt.protocol.manifest import BundleManifest, load_manifest, verify_bundle
from fedmpt.protocol.messages import ENCODINGS, Status

logger = logging.getLogger("fedmpt.aggregator")

LINGER_SECONDS = 10.0
DEADLINE_SECONDS = 3600.0  # one silent site stalls the others no longer than this

DESCRIPTION = """\
Run a federation: publish the bundle's state, collect the clients' updates, combine them, round after round.
Everything accepted is in --store before it is acknowledged: stop or kill it at any time and start it again with
the same options, and it resumes the round. User name and password for the broker are taken from
FEDMPT_MQTT_USERNAME and FEDMPT_MQTT_PASSWORD."""

EXAMPLES = """\
Examples:
  fedmpt aggregator --bundle bundle/ --embedded --federation birds --clients-min 4
  fedmpt aggregator --bundle bundle/ --broker mqtts://hub.example.org --federation birds --clients-min 10 \\
    --fraction 0.5 --quorum 0.8 --deadline 600 --ca ca.pem --cert aggregator.pem --key aggregator.key"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("--bundle", type=Path, required=True, help="the federation's bundle folder")
    parser.add_argument("--federation", required=True, metavar="NAME", help="the federation's name")
    add_broker_options(parser, "the aggregator")
    parser.add_argument(
        "--embedded",
        action="store_true",
        help="run a broker in this process, for clients on this machine only, at --broker or --port",
    )
    parser.add_argument("--port", type=int, help="port of the embedded broker (1883)")
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="folder of its durable state (./fedmpt-NAME-store)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where the final state goes (final.safetensors in the store)"
    )

    rounds = parser.add_argument_group("rounds")
    rounds.add_argument("--rounds", type=int, help="training rounds (the bundle's number)")
    rounds.add_argument(
        "--clients-min",
        type=int,
        default=1,
        metavar="N",
        help="clients to wait for and to choose at least (%(default)s)",
    )
    rounds.add_argument(
        "--fraction",
        type=float,
        default=1.0,
        metavar="PART",
        help="part of the clients chosen for a round (%(default)s)",
    )
    rounds.add_argument(
        "--quorum",
        type=float,
        default=1.0,
        metavar="PART",
        help="part of the chosen that closes a round (%(default)s)",
    )
    rounds.add_argument(
        "--deadline",
        type=_deadline,
        default=DEADLINE_SECONDS,
        metavar="S",
        help="close a round after S seconds with the updates that came, or never; longer than the nights, say, where "
        "sites train by night alone (%(default)s)",
    )
    rounds.add_argument("--seed", type=int, default=0, help="draws the choice of clients (%(default)s)")

    defaults = StrategySettings()
    strategy = parser.add_argument_group("strategy")
    strategy.add_argument("--strategy", choices=STRATEGIES, default="uniform", help="(%(default)s)")
    strategy.add_argument(
        "--server-rate", type=float, default=defaults.server_rate, metavar="η", help="(%(default)s)"
    )
    strategy.add_argument(
        "--momentum",
        type=float,
        default=defaults.momentum,
        metavar="β₁",
        help="fedavgm, fedadam, fedyogi (%(default)s)",
    )
    strategy.add_argument(
        "--second-momentum",
        type=float,
        default=defaults.second_momentum,
        metavar="β₂",
        help="fedadam, fedyogi (%(default)s)",
    )
    strategy.add_argument(
        "--adaptivity",
        type=float,
        default=defaults.adaptivity,
        metavar="τ",
        help="fedadam, fedyogi (%(default)s)",
    )
    strategy.add_argument(
        "--hostile",
        type=float,
        default=defaults.hostile,
        metavar="PART",
        help="part of the clients that may lie: trimmed-mean, multi-krum (%(default)s)",
    )
    strategy.add_argument(
        "--clip-norm",
        type=float,
        default=defaults.clip_norm,
        metavar="NORM",
        help="norm-clip; 0: the round's median (%(default)s)",
    )

    updates = parser.add_argument_group("updates")
    updates.add_argument(
        "--encoding", choices=ENCODINGS, default="float16", help="how clients send updates (%(default)s)"
    )
    updates.add_argument(
        "--no-metrics", action="store_true", help="do not ask clients for validation metrics"
    )
    updates.add_argument(
        "--max-update-bytes", type=int, metavar="N", help="(what the state takes in float32)"
    )
    updates.add_argument(
        "--max-samples", type=int, default=MAXIMUM_SAMPLES, metavar="N", help="(%(default)s)"
    )
    updates.add_argument(
        "--max-norm",
        type=float,
        default=MAXIMUM_NORM,
        metavar="NORM",
        help="L2 norm of an update (%(default)s)",
    )
    updates.add_argument(
        "--norm-factor",
        type=float,
        default=NORM_FACTOR,
        metavar="F",
        help="scale down updates whose norm is more than F times the round's median (of fewer than three, the state's "
        "norm); 0: off (%(default)s)",
    )
    updates.add_argument(
        "--max-refusals",
        type=int,
        default=10,
        metavar="N",
        help="refusals after which a client is muted for the round (%(default)s)",
    )

    privacy = parser.add_argument_group("differential privacy (give all three, with --no-metrics)")
    privacy.add_argument("--dp-noise", type=float, metavar="σ", help="noise multiplier")
    privacy.add_argument(
        "--dp-clip", type=float, metavar="NORM", help="L2 norm to which each update is clipped"
    )
    privacy.add_argument(
        "--dp-delta",
        type=float,
        metavar="δ",
        help="of (ε, δ); below 1/10000, one over the clients that a round may choose",
    )

    parser.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics on loopback (off)"
    )
    parser.add_argument("--log", choices=("text", "json"), default="text", help="log on stderr (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    allow_config(parser, "aggregator")


def run(arguments: argparse.Namespace) -> int:
    """Run until the last round has closed (exit code 0) or the process is asked to stop (also 0; Ctrl-C: 130)."""
    arguments = resolve(arguments)
    console = Console(stderr=True)
    live = console.is_terminal and arguments.log == "text"
    show_logs(as_json=arguments.log == "json", console=console if live else None)
    bundle = load_manifest(arguments.bundle)
    verify_bundle(arguments.bundle, bundle)
    settings = _settings(arguments, bundle)
    initial = load_state(arguments.bundle / "state.safetensors", bundle.state)
    folder = arguments.store or Path(f"fedmpt-{settings.name}-store")
    out = arguments.out or folder / "final.safetensors"
    require_writable(out)
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(stop_on(signal.SIGTERM, signal.SIGINT))
        store = stack.enter_context(Store(folder))
        federation = Federation(store, bundle, initial, settings)
        address = _broker(arguments, stack)
        latest: list[Status] = []
        if arguments.metrics_port is not None:
            from fedmpt.aggregator.monitoring import serve_metrics

            server = serve_metrics(arguments.metrics_port, lambda: latest[0] if latest else None)
            stack.callback(server.shutdown)
        if settings.privacy:
            _show_privacy(console, settings)
        logger.info(
            "federation",
            extra={
                "federation": settings.name,
                "method": bundle.method,
                "strategy": settings.strategy.name,
                "round": federation.round.number,
                "rounds": settings.rounds.rounds,
                "broker": address.url,
                "store": str(folder),
            },
        )
        connection = stack.enter_context(connect(address, federation, stop=interrupted))
        show = stack.enter_context(_live_line(console)) if live else lambda status: None

        def on_status(status: Status) -> None:
            latest[:] = [status]
            show(status)

        linger = LINGER_SECONDS if arguments.embedded else 0.0
        finished = not interrupted.is_set() and serve(
            federation, connection, stop=interrupted, on_status=on_status, linger=linger
        )
        result = {
            "federation": settings.name,
            "finished": finished,
            "round": federation.round.number,
            "state": federation.digest,
            "metrics": federation.status(time.time()).metrics,
        }
        if finished:
            provenance = {
                "federation": settings.name,
                "method": bundle.method,
                "bundle": bundle.digest,
                "rounds": str(settings.rounds.rounds),
                "strategy": settings.strategy.name,
            }
            save_state(out, federation.state, provenance)
            result["out"] = str(out)
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
    elif finished:
        print(f"federation {settings.name} has finished {settings.rounds.rounds} rounds: {result['out']}")
    else:
        print(f"stopped in round {federation.round.number}; start it again with the same options to go on")
    return 130 if interrupted.is_set() and interrupted.number == signal.SIGINT else 0


def _settings(arguments: argparse.Namespace, bundle: BundleManifest) -> FederationSettings:
    dp = (arguments.dp_noise, arguments.dp_clip, arguments.dp_delta)
    if any(value is None for value in dp) and any(value is not None for value in dp):
        raise OptionsError("differential privacy needs --dp-noise, --dp-clip and --dp-delta together")
    return FederationSettings(
        name=arguments.federation,
        rounds=RoundSettings(
            rounds=bundle.training.rounds if arguments.rounds is None else arguments.rounds,
            calibrate=bundle.training.calibrate,
            clients_min=arguments.clients_min,
            fraction=arguments.fraction,
            quorum=arguments.quorum,
            deadline=arguments.deadline,
            seed=arguments.seed,
        ),
        strategy=StrategySettings(
            arguments.strategy,
            arguments.server_rate,
            arguments.momentum,
            arguments.second_momentum,
            arguments.adaptivity,
            arguments.hostile,
            arguments.clip_norm,
        ),
        encoding=arguments.encoding,
        metrics=not arguments.no_metrics,
        refusals=arguments.max_refusals,
        update_bytes=arguments.max_update_bytes,
        samples=arguments.max_samples,
        norm=arguments.max_norm,
        norm_factor=arguments.norm_factor,
        privacy=None if arguments.dp_noise is None else PrivacySettings(*dp),
    )


def _deadline(text: str) -> float | None:
    if text == "never":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither seconds nor never") from None


def _broker(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> BrokerAddress:
    """The broker's address; starts the embedded one if asked to."""
    if not arguments.embedded:
        if not arguments.broker or arguments.port is not None:
            raise OptionsError("give --broker URL, or --embedded (with --port) for clients on this machine")
        return broker_address(arguments)
    arguments.broker = arguments.broker or f"mqtt://127.0.0.1:{arguments.port or 1883}"
    address = broker_address(arguments)
    if address.tls:
        raise OptionsError(
            "the embedded broker has no TLS; run a real broker for it, and leave out --embedded"
        )
    return stack.enter_context(EmbeddedBroker(address.port, address.host)).address


def _show_privacy(console: Console, settings: FederationSettings) -> None:
    assert settings.privacy is not None
    releases = settings.rounds.rounds + settings.rounds.calibrate
    value = epsilon(settings.privacy, releases)
    console.print(
        f"privacy: ε = {value:.3g} at δ = {settings.privacy.delta:g} after {releases} rounds", highlight=False
    )


@contextlib.contextmanager
def _live_line(console: Console) -> Iterator[Callable[[Status], None]]:
    with console.status("connecting") as line:

        def show(status: Status) -> None:
            place = f"round {status.round}/{status.rounds} ({status.phase})"
            counts = f"{status.present} present · {status.received}/{status.chosen} updates"
            refused = f" · {status.refused} refused" if status.refused else ""
            line.update(f"{place} · {counts}{refused}" + (f" · {status.waiting}" if status.waiting else ""))

        yield show
