"""``fedmpt client``: train with a site's feature cache whenever a round asks for it."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedmpt.cli.logs import show_logs
from fedmpt.cli.options import (
    OptionsError,
    add_broker_options,
    allow_config,
    broker_address,
    require_writable,
    resolve,
)
from fedmpt.cli.progress import progress_bar
from fedmpt.cli.signals import stop_on
from fedmpt.edge_client.cache import FeatureCache, open_cache
from fedmpt.edge_client.client import Limits, Site, run_client
from fedmpt.edge_client.engine import ENGINES, open_engine
from fedmpt.edge_client.onnx_session import DEVICES
from fedmpt.edge_client.schedule import ScheduleError, Window, parse_window
from fedmpt.edge_client.trainer import SiteData
from fedmpt.protocol.codec import State, save_state
from fedmpt.protocol.manifest import load_manifest, verify_bundle
from fedmpt.protocol.topics import check_name

logger = logging.getLogger("fedmpt.client")

DESCRIPTION = """\
Take part in a federation: wait for its rounds, train on this site's feature cache, send updates, until the
federation is finished; where the broker only remembers a finished one, wait for the next. Stop it at any time (SIGTERM
leaves after the batch in flight, and the others do not wait for it) and start it again with the same --state-dir: it
goes on where it was. User name and password for the broker are taken from FEDMPT_MQTT_USERNAME
and FEDMPT_MQTT_PASSWORD."""

EXAMPLES = """\
Examples:
  fedmpt client --bundle bundle/ --cache cache/ --broker mqtt://localhost --federation birds --name site-a
  fedmpt client --bundle bundle/ --cache cache/ --broker mqtts://hub.example.org --federation birds --name site-a \\
    --ca ca.pem --cert site-a.pem --key site-a.key --active 22:00-06:00 --nice 10"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    parser.description = DESCRIPTION
    parser.epilog = EXAMPLES
    parser.add_argument("--bundle", type=Path, required=True, help="the federation's bundle folder")
    parser.add_argument("--cache", type=Path, required=True, help="folder that `fedmpt cache` wrote")
    parser.add_argument("--federation", required=True, metavar="NAME", help="the federation's name")
    parser.add_argument("--name", required=True, help="this site's name, unique in the federation")
    add_broker_options(parser, "this site")
    parser.add_argument("--state-dir", type=Path, help="folder for unfinished work (./fedmpt-NAME)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="save the final state here (safetensors)")
    parser.add_argument("--engine", choices=ENGINES, default="onnx", help="(%(default)s)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where it trains (%(default)s)")
    parser.add_argument("--threads", type=_positive(int), help="cores to use (all)")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="lower this process's priority by N")
    parser.add_argument(
        "--validation",
        type=_fraction,
        default=0.1,
        metavar="PART",
        help="part of the photos held out to measure the global state (%(default)s)",
    )
    parser.add_argument(
        "--max-seconds-per-round",
        type=_positive(float),
        metavar="S",
        help="end a round's training or calibration after S seconds and send what was reached",
    )
    parser.add_argument(
        "--active", type=_window, metavar="HH:MM-HH:MM", help="train only in this time of day (local)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per event")
    allow_config(parser, "client")


def run(arguments: argparse.Namespace) -> int:
    """Take part until the federation is finished (exit code 0) or the process is asked to stop (also 0)."""
    arguments = resolve(arguments)
    if not arguments.broker:
        raise OptionsError("give the federation's broker with --broker")
    address = broker_address(arguments)
    show_logs()
    with stop_on(signal.SIGTERM) as stop:
        check_name("federation", arguments.federation)
        check_name("client", arguments.name)
        if arguments.out:
            require_writable(arguments.out)
        if arguments.nice:
            os.nice(arguments.nice)
        manifest = load_manifest(arguments.bundle)
        verify_bundle(arguments.bundle, manifest)
        cache = open_cache(arguments.cache, manifest)
        train, validation = cache.split(arguments.validation)
        site = Site(
            federation=arguments.federation,
            client=arguments.name,
            bundle=manifest,
            engine=open_engine(arguments.bundle, arguments.engine, arguments.device, arguments.threads),
            data=SiteData(cache.tokens, cache.labels, train, validation),
            fingerprint=_fingerprint(cache, arguments.validation),
            capabilities={
                "version": version("fedmpt-edge"),
                "engine": arguments.engine,
                "device": arguments.device,
            },
        )
        with _Reporter(as_json=arguments.json) as reporter:

            def save(state: State) -> None:
                if arguments.out:
                    provenance = {"federation": arguments.federation, "method": manifest.method}
                    save_state(arguments.out, state, provenance)
                    reporter.report("saved", {"state": str(arguments.out)})

            state = run_client(
                site,
                address,
                arguments.state_dir or Path(f"fedmpt-{arguments.name}"),
                limits=Limits(arguments.max_seconds_per_round, arguments.active),
                stop=stop,
                report=reporter.report,
                progress=reporter.progress,
                on_finished=save,
            )
            if state is None:
                reporter.report("stopped", {})
    return 0


class _Reporter:
    """Events as JSON lines on stdout or as text on stderr, with a progress bar while a round trains."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._bar = contextlib.ExitStack()
        self._callback: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def report(self, event: str, facts: Mapping[str, Any]) -> None:
        if event in ("trained", "interrupted"):
            self._callback = None
            self._bar.close()
        if self._as_json:
            with self._lock:  # the network's thread reports too, and print writes a line in two parts
                print(json.dumps({"event": event, **facts}, ensure_ascii=False), flush=True)
        else:
            logger.info(event, extra={name: value for name, value in facts.items() if value != ""})

    def progress(self, done: int, total: int | None) -> None:
        if self._callback is None:
            self._callback = self._bar.enter_context(progress_bar("training"))
        self._callback(done, total)


def _fingerprint(cache: FeatureCache, validation: float) -> str:
    """A digest of the photos, their labels and which of them train."""
    text = json.dumps([cache.hashes, validation])
    return hashlib.sha256(text.encode() + cache.labels.tobytes()).hexdigest()


def _window(text: str) -> Window:
    try:
        return parse_window(text)
    except ScheduleError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def _positive(kind: type[Any]) -> Any:
    def convert(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    convert.__name__ = kind.__name__
    return convert
