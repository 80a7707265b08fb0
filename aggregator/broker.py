"""An MQTT broker inside the aggregator's process, for a federation on one machine.

It is amqtt: MQTT 3.1.1, nothing kept across restarts, no authentication here. So it listens on loopback only;
whoever wants other machines to join needs a real broker, such as mosquitto.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
from types import TracebackType

from fedmpt.protocol.address import BrokerAddress
from fedmpt.protocol.errors import FedmptError


class EmbeddedBrokerError(FedmptError):
    """The embedded broker was asked to serve the network, or its port is taken."""


class EmbeddedBroker:
    """Runs from construction until ``close``; port 0 takes a free one. A context manager."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        _require_loopback(host)
        self.address = BrokerAddress(host, _free_port(host, port))
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="embedded-broker", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error:
            raise EmbeddedBrokerError(f"the embedded broker did not start: {self._error}") from self._error

    def close(self) -> None:
        """Stop the broker; clients see a lost connection."""
        if self._stop and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def __enter__(self) -> EmbeddedBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:
            self._error = error
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        from amqtt.broker import Broker  # slow to import, and wanted only here

        # amqtt reports every client that hangs up as a warning; MQTT 5 attempts of our own are among them.
        logging.getLogger("amqtt").setLevel(logging.CRITICAL)
        logging.getLogger("transitions").setLevel(logging.CRITICAL)
        self._loop.set_exception_handler(lambda loop, context: None)
        broker = Broker(
            {
                "listeners": {
                    "default": {"type": "tcp", "bind": f"{self.address.host}:{self.address.port}"},
                },
                "plugins": {
                    "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True},
                },
            }
        )
        self._stop = asyncio.Event()
        await broker.start()
        self._ready.set()
        await self._stop.wait()
        await broker.shutdown()


def _require_loopback(host: str) -> None:
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise EmbeddedBrokerError(
            f"the embedded broker serves this machine only, not {host}: it knows no passwords and no "
            "certificates; run a real broker (`fedmpt certs` writes mosquitto's configuration) and use --broker"
        )


def _free_port(host: str, port: int) -> int:
    """Check that the port can be bound, and pick a free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EmbeddedBrokerError(
                f"port {port} on {host} cannot be used ({error.strerror}); stop what uses it, or give another --port"
            ) from error
        return int(probe.getsockname()[1])
