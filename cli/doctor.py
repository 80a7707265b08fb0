"""``fedmpt doctor``: check what a site needs."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from collections.abc import Iterator
from pathlib import Path

from fedmpt.cli.options import add_broker_options, broker_address
from fedmpt.edge_client.doctor import (
    Check,
    check_broker,
    check_bundle,
    check_cache,
    check_certificates,
    check_disk,
    check_memory,
    check_versions,
)
from fedmpt.edge_client.onnx_session import DEVICES

DESCRIPTION = """\
Check what a site needs: versions, ONNX Runtime and its devices, disk and memory; with --bundle and --cache whether
they are whole and fit; with --broker whether it takes us and how long the certificates last; with --federation the
clock against the aggregator's (MQTT itself has no clock to compare with). Where doctor.pem and doctor.key of
`fedmpt certs` lie beside --cert, it connects with them; without them, stop this site's client first: a broker that
knows clients by their certificates takes both for one, and lets the newer in.
Exit code 1 if a check failed; warnings and what cannot be known do not count."""

EXAMPLES = """\
Examples:
  fedmpt doctor
  fedmpt doctor --bundle bundle/ --cache cache/ --broker mqtts://hub.example.org --federation birds \\
    --ca ca.pem --cert site-a.pem --key site-a.key"""

MARKS = {"ok": "ok     ", "warning": "WARNING", "failed": "FAILED ", "unknown": "unknown"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("--bundle", type=Path, help="the federation's bundle folder")
    parser.add_argument("--cache", type=Path, help="folder that `fedmpt cache` wrote (needs --bundle)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where training is to run (auto)")
    parser.add_argument("--federation", metavar="NAME", help="the federation's name")
    add_broker_options(parser, "this site")
    parser.add_argument(
        "--state-dir", type=Path, default=Path(), metavar="DIR", help="where the client keeps its work (.)"
    )
    parser.add_argument(
        "--timeout", type=float, default=20.0, metavar="S", help="wait so long for the aggregator (20)"
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """Print each check as it is done; exit code 1 if one failed."""
    if arguments.cache and not arguments.bundle:
        arguments.usage_error("--cache needs --bundle, to see whether they fit")
    if arguments.federation and not arguments.broker:
        arguments.usage_error("--federation needs --broker")
    checks = []
    for check in _checks(arguments):
        checks.append(check)
        if not arguments.json:
            print(f"{MARKS[check.status]}  {check.name}: {check.text}", flush=True)
    failed = any(check.status == "failed" for check in checks)
    if arguments.json:
        print(
            json.dumps(
                {"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}, indent=1
            )
        )
    return 1 if failed else 0


def _checks(arguments: argparse.Namespace) -> Iterator[Check]:
    yield from check_versions()
    yield check_disk(arguments.state_dir)
    yield check_memory(Path("/proc/meminfo").read_text())
    if arguments.bundle:
        yield from check_bundle(arguments.bundle, arguments.device)
    if arguments.cache:
        yield from check_cache(arguments.cache, arguments.bundle)
    if arguments.broker:
        address = broker_address(arguments)
        yield from check_certificates(address, datetime.datetime.now(datetime.timezone.utc))
        yield from check_broker(address, arguments.federation, arguments.timeout)
