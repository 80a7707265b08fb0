"""A TCP proxy that understands MQTT just enough to duplicate, delay and reorder PUBLISH packets, and no others.

Run as ``python proxy.py --listen PORT --broker PORT --seed N``. A connection whose broker dies is closed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random

PUBLISH = 3
MAXIMUM_PACKET = 64 << 20


async def read_packet(reader: asyncio.StreamReader) -> bytes:
    """One whole MQTT control packet: fixed header, remaining length (MQTT 5, §1.5.5 and §2.1), content."""
    header = await reader.readexactly(1)
    length, shift = 0, 0
    while True:
        byte = await reader.readexactly(1)
        header += byte
        length |= (byte[0] & 0x7F) << shift
        shift += 7
        if not byte[0] & 0x80:
            break
        if shift > 21:
            raise ValueError("malformed remaining length")
    if length > MAXIMUM_PACKET:
        raise ValueError("packet too large")
    return header + await reader.readexactly(length)


def quality_of_service(packet: bytes) -> int:
    """The QoS bits of a PUBLISH packet's fixed header."""
    return (packet[0] >> 1) & 3


async def forward(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    generator: random.Random,
    counts: dict[str, int],
) -> None:
    """Pass packets on; a PUBLISH of QoS 1 may be late (so that others overtake it), or come twice."""
    late: set[asyncio.Task[None]] = set()

    async def send_later(packet: bytes, delay: float) -> None:
        await asyncio.sleep(delay)
        with contextlib.suppress(ConnectionError, RuntimeError):
            writer.write(packet)
            await writer.drain()

    try:
        while True:
            packet = await read_packet(reader)
            disturbed = packet[0] >> 4 == PUBLISH and quality_of_service(packet) == 1
            if disturbed and generator.random() < 0.2:
                counts["duplicated"] += 1
                again = bytes([packet[0] | 0x08]) + packet[1:]  # DUP, MQTT 5 §3.3.1.1
                late.add(asyncio.create_task(send_later(again, generator.uniform(0.0, 0.4))))
            if disturbed and generator.random() < 0.4:
                counts["delayed"] += 1
                late.add(asyncio.create_task(send_later(packet, generator.uniform(0.0, 0.3))))
            else:
                writer.write(packet)
                await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError, ValueError):
        pass
    finally:
        for task in late:
            task.cancel()
        writer.close()


async def serve(listen: int, broker: int, seed: int) -> None:
    """Accept connections for ever."""
    counts = {"duplicated": 0, "delayed": 0}
    connections = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        generator = random.Random(f"{seed}/{connections}")
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", broker)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            forward(reader, upstream_writer, generator, counts),
            forward(upstream_reader, writer, generator, counts),
        )
        print(f"duplicated {counts['duplicated']} delayed {counts['delayed']}", flush=True)

    server = await asyncio.start_server(connected, "127.0.0.1", listen)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", type=int, required=True)
    parser.add_argument("--broker", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(options.listen, options.broker, options.seed))
