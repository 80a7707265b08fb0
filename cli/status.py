"""``fedmpt status``: show a running federation, from any machine, by MQTT alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import uuid
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmpt.cli.options import OptionsError, add_broker_options, broker_address
from fedmpt.protocol.connection import Connection
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.events import Message
from fedmpt.protocol.messages import MessageError, Presence, Round, Status, from_json
from fedmpt.protocol.text import printable
from fedmpt.protocol.topics import Topics

QUIET_SECONDS = 0.5  # retained messages follow each other closely; such a pause means that all are here

EXAMPLES = """\
Example:
  fedmpt status --broker mqtt://hub.example.org --federation birds"""


class StatusError(FedmptError):
    """No aggregator has said anything about the federation at this broker."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    parser.epilog = EXAMPLES
    add_broker_options(parser, "the operator")
    parser.add_argument("--federation", required=True, metavar="NAME", help="the federation's name")
    parser.add_argument(
        "--timeout", type=float, default=5.0, metavar="S", help="wait so long (%(default)s s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print round, clients and updates; exit code 1 if nothing is known of the federation."""
    if not arguments.broker:
        raise OptionsError("give --broker URL, the federation's broker")
    topics = Topics(arguments.federation)
    connection = Connection(
        broker_address(arguments),
        f"fedmpt-status-{uuid.uuid4().hex[:12]}",
        subscriptions=(topics.status, topics.round, topics.all_presence),
        persistent=False,
    )
    with connection:
        connection.connect(arguments.timeout)
        status, opened, clients = _gather(connection, topics, arguments.timeout)
    if status is None:
        raise StatusError(
            f"no word of federation {topics.federation} at {connection.address.url} within {arguments.timeout:g} s; "
            "check the name, and that its aggregator has run"
        )
    chosen = set(opened.clients) if opened else set()
    if arguments.json:
        result: dict[str, Any] = dataclasses.asdict(status)
        result["clients"] = [
            dataclasses.asdict(client) | {"chosen": client.client in chosen} for client in clients
        ]
        print(json.dumps(result))  # in ASCII: what clients say of themselves must not steer a terminal
    else:
        _show(status, clients, chosen)
    return 0


def _gather(
    connection: Connection, topics: Topics, timeout: float
) -> tuple[Status | None, Round | None, list[Presence]]:
    """What the retained topics say; malformed messages of others are left out."""
    status: Status | None = None
    opened: Round | None = None
    clients: dict[str, Presence] = {}
    end = time.monotonic() + timeout
    while (left := end - time.monotonic()) > 0:
        event = connection.receive(left if status is None else min(left, QUIET_SECONDS))
        if event is None:
            break
        if not isinstance(event, Message):
            continue
        connection.acknowledge(event)
        try:
            if event.topic == topics.status:
                status = from_json(Status, event.payload, event.topic)
            elif event.topic == topics.round:
                opened = from_json(Round, event.payload, event.topic)
            elif event.payload and (client := topics.client_of_presence(event.topic)):
                clients[client] = from_json(Presence, event.payload, event.topic)
        except MessageError:
            continue
    return status, opened, [clients[name] for name in sorted(clients)]


def _show(status: Status, clients: list[Presence], chosen: set[str]) -> None:
    console = Console(highlight=False)
    seconds = max(0.0, time.time() - status.time)
    state = "running" if status.online else "not running"

    def say(text: str) -> None:
        console.print(printable(text), markup=False)

    say(f"federation {status.federation}: aggregator {state}, last heard {seconds:.0f} s ago")
    line = f"round {status.round} of {status.rounds} ({status.phase}): {status.received} of {status.chosen} updates"
    if status.deadline is not None and status.online:
        line += f", closes in {max(0.0, status.deadline - time.time()):.0f} s"
    say(line)
    say(f"{status.present} clients present, {status.refused} refusals, {status.muted} muted")
    if status.waiting:
        say(status.waiting)
    if status.metrics:
        say("validation: " + ", ".join(f"{name} {value:.4f}" for name, value in status.metrics.items()))
    if clients:
        table = Table("client", "online", "chosen", "samples", "capabilities")
        for client in clients:
            cells = (
                client.client,
                "yes" if client.online else "no",
                "yes" if client.client in chosen else "no",
                str(client.samples),
                ", ".join(f"{name} {value}" for name, value in sorted(client.capabilities.items())),
            )
            # Plain text on one line: what clients say of themselves is no markup and steers no terminal.
            table.add_row(*(Text(printable(cell)) for cell in cells))
        console.print(table)
