"""An MQTT broker inside the aggregator's process, for a federation on one machine.

It is amqtt: MQTT 3.1.1, nothing kept across restarts, no authentication here. So it listens on loopback only;
whoever wants other machines to join needs a real broker, such as mosquitto.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import threading
from types import TracebackType
from typing import Any

from fedmpt.protocol.address import BrokerAddress
from fedmpt.protocol.errors import FedmptError

_CONNECT, _MQTT_5 = 0x10, 5
_UNSUPPORTED_VERSION = bytes((0x20, 3, 0, 0x84, 0))  # MQTT 5's CONNACK with reason 132
_FIRST_PACKET_SECONDS = 10.0


class EmbeddedBrokerError(FedmptError):
    """The embedded broker was asked to serve the network, or its port is taken."""


class EmbeddedBroker:
    """Runs from construction until ``close``; port 0 takes a free one. A context manager."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        _require_loopback(host)
        self.address = BrokerAddress(host, port)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="embedded-broker", daemon=True)
        self._thread.start()
        self._ready.wait()
        if isinstance(self._error, OSError):
            raise EmbeddedBrokerError(
                f"port {port} on {host} cannot be used ({self._error.strerror}); stop what uses it, or give "
                "another --port"
            ) from self._error
        if self._error:
            raise EmbeddedBrokerError(f"the embedded broker did not start: {self._error}") from self._error

    def close(self) -> None:
        """Stop the broker; clients see a lost connection."""
        if self._thread.is_alive():
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
        # A client that hangs up while amqtt reads is no news for anybody.
        self._loop.set_exception_handler(lambda loop, context: None)
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:
            self._error = error
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        from amqtt.broker import Broker  # slow to import, and wanted only here

        for name in ("amqtt", "transitions"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        broker = Broker(
            {
                "listeners": {"default": {"type": "external", "bind": "loopback"}},
                "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
            }
        )

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _accept(broker, reader, writer)

        await broker.start()
        try:
            server = await asyncio.start_server(accept, self.address.host, self.address.port)
            self.address = BrokerAddress(self.address.host, server.sockets[0].getsockname()[1])
            self._ready.set()
            await self._stop.wait()
            server.close()
        finally:
            await broker.shutdown()


async def _accept(broker: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand a connection to amqtt, unless it speaks MQTT 5: amqtt would wait for ever for the rest of it."""
    from amqtt.adapters import StreamWriterAdapter

    try:
        start = await asyncio.wait_for(_read_start(reader), _FIRST_PACKET_SECONDS)
        if start[0] == _CONNECT and start[-1] == _MQTT_5:
            writer.write(_UNSUPPORTED_VERSION)
            await writer.drain()
        else:
            await broker.external_connected(_Resumed(start, reader), StreamWriterAdapter(writer), "default")
    except (OSError, EOFError, asyncio.TimeoutError):
        pass
    finally:
        with contextlib.suppress(OSError):
            writer.close()


async def _read_start(reader: asyncio.StreamReader) -> bytes:
    """The first packet up to CONNECT's protocol level: type, length (1 to 4 bytes), "MQTT" and level."""
    start = await reader.readexactly(2)
    while start[-1] & 0x80 and len(start) < 5:
        start += await reader.readexactly(1)
    return start + await reader.readexactly(7)


class _Resumed:
    """amqtt's reader over a stream whose first bytes have been read already."""

    def __init__(self, start: bytes, reader: asyncio.StreamReader) -> None:
        self._start, self._reader = start, reader

    async def read(self, size: int) -> bytes:
        head, self._start = self._start[:size], self._start[size:]
        return head + await self._reader.readexactly(size - len(head))

    def feed_eof(self) -> None:
        self._reader.feed_eof()


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
