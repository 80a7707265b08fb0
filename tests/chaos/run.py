"""A federation under fire: ``python tests/chaos/run.py --rounds 30 --clients 6 --kills 20``.

First an undisturbed federation runs over a real mosquitto. Then the same one runs through a proxy that
duplicates, delays and reorders messages, while aggregator, broker and clients are killed with SIGKILL at random
moments and started again. Every chosen client must answer (quorum 1, no deadline), so the two final states
must be the same, bit for bit. Exit code 0 if they are; a JSON summary on standard output.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedmpt.aggregator.certificates import mosquitto_durability
from fedmpt.protocol.codec import load_state, state_digest
from fedmpt.protocol.manifest import load_manifest
from fedmpt.simulation.demo import BUNDLE, PACK, free_port, unpack

FEDMPT = [sys.executable, "-c", "import sys; from fedmpt.cli import main; sys.exit(main())"]
PROXY = Path(__file__).with_name("proxy.py")
PHOTOS_PER_CLIENT = 24
STALLED_SECONDS = 180


@dataclass
class Runner:
    """Named processes that can be killed and started again with the same command."""

    logs: Path
    commands: dict[str, list[str]] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, command: Sequence[object]) -> None:
        self.commands[name] = [str(word) for word in command]
        self.restart(name)

    def restart(self, name: str) -> None:
        with (self.logs / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                self.commands[name], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()

    def exit_code(self, name: str) -> int | None:
        return self.running[name].poll()

    def end(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
            process.wait()


def prepare_caches(folder: Path, bundle: Path, clients: int) -> list[str]:
    """Feature caches of so many small sites, cut from the shipped Scenes pack; their names."""
    sites = unpack(PACK, folder / "photos")
    names = [f"site-{number}" for number in range(clients)]
    for number, name in enumerate(names):
        photos = folder / "photos" / "clients" / sites[number % len(sites)]
        first = number // len(sites) * PHOTOS_PER_CLIENT
        listed = sorted(path.name for path in photos.glob("*.jpg"))[first : first + PHOTOS_PER_CLIENT]
        (folder / f"{name}.txt").write_text("\n".join(listed))
        split = ["--split", folder / f"{name}.txt", "--bundle", bundle, "--out", folder / "caches" / name]
        subprocess.run([*FEDMPT, "cache", photos, *map(str, split)], check=True, capture_output=True)
    return names


def start_broker(runner: Runner, folder: Path) -> int:
    """A mosquitto with the durability settings that ``fedmpt certs`` ships; its port."""
    mosquitto = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if mosquitto is None:
        sys.exit("mosquitto is not installed: apt-get install mosquitto")
    port = free_port()
    (folder / "persistence").mkdir(parents=True)
    settings = mosquitto_durability(folder / "persistence")
    configuration = folder / "mosquitto.conf"
    configuration.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\n{settings}")
    runner.start("broker", [mosquitto, "-c", configuration])
    wait_for_port(port)
    return port


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"nobody listens on port {port}")


def start_federation(
    runner: Runner, folder: Path, bundle: Path, caches: Path, names: list[str], port: int, rounds: int
) -> None:
    shared = ["--bundle", bundle, "--broker", f"mqtt://127.0.0.1:{port}", "--federation", "chaos"]
    rule = ["--rounds", rounds, "--clients-min", len(names), "--quorum", "1.0"]
    out = ["--store", folder / "store", "--out", folder / "final.safetensors"]
    runner.start("aggregator", [*FEDMPT, "aggregator", *shared, *rule, *out])
    for name in names:
        site = ["--cache", caches / name, "--name", name, "--state-dir", folder / name]
        runner.start(name, [*FEDMPT, "client", *shared, *site, "--threads", "1", "--device", "cpu"])


def finish(runner: Runner, names: list[str], seconds: float) -> None:
    """Wait until aggregator and clients have ended well; raises if one failed or nothing moves."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = {name: runner.exit_code(name) for name in ["aggregator", *names]}
        failed = {name: code for name, code in codes.items() if code not in (None, 0)}
        if failed:
            raise RuntimeError(f"ended with an error: {failed}; see {runner.logs}")
        if all(code == 0 for code in codes.values()):
            return
        time.sleep(0.1)
    raise TimeoutError(f"not finished after {seconds:.0f} s: {codes}; see {runner.logs}")


def kill_at_random(runner: Runner, names: list[str], kills: int, pause: float, seed: int) -> dict[str, int]:
    """Kill and restart random processes; how often each died. Ends early when the aggregator has finished."""
    generator = random.Random(seed)
    killed: dict[str, int] = {}
    targets = ["aggregator", "broker", *names]
    while sum(killed.values()) < kills and runner.exit_code("aggregator") is None:
        time.sleep(generator.uniform(0.3, 2 * pause))
        victim = generator.choice(targets)
        if runner.exit_code(victim) is not None:
            continue
        runner.kill(victim)
        killed[victim] = killed.get(victim, 0) + 1
        time.sleep(generator.uniform(0.05, 1.0))
        runner.restart(victim)
    return killed


def digest_of(path: Path, bundle: Path) -> str:
    return state_digest(load_state(path, load_manifest(bundle).state))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause", type=float, default=2.0, help="mean seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--keep", type=Path, help="a folder for logs and states, kept")
    options = parser.parse_args()
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="fedmpt-chaos-"))).resolve()
    names = prepare_caches(folder, options.bundle, options.clients)
    seconds: dict[str, float] = {}
    killed: dict[str, int] = {}
    try:
        for kind in ("undisturbed", "disturbed"):
            start = time.monotonic()
            place = folder / kind
            place.mkdir()
            runner = Runner(place)
            try:
                port = start_broker(runner, place)
                if kind == "disturbed":
                    broker, port = port, free_port()
                    command = [sys.executable, PROXY, "--listen", port, "--broker", broker]
                    runner.start("proxy", [*command, "--seed", options.seed])
                    wait_for_port(port)
                start_federation(
                    runner, place, options.bundle, folder / "caches", names, port, options.rounds
                )
                if kind == "disturbed":
                    killed = kill_at_random(runner, names, options.kills, options.pause, options.seed)
                finish(runner, names, STALLED_SECONDS + 10 * options.rounds)
            finally:
                runner.end()
            seconds[kind] = round(time.monotonic() - start, 1)
        digests = {
            kind: digest_of(folder / kind / "final.safetensors", options.bundle)
            for kind in ("undisturbed", "disturbed")
        }
        disturbed = (folder / "disturbed" / "proxy.log").read_text().splitlines()
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    equal = len(set(digests.values())) == 1
    summary = {
        "rounds": options.rounds,
        "clients": options.clients,
        "kills": sum(killed.values()),
        "killed": killed,
        "messages": disturbed[-1] if disturbed else "",
        "seconds": seconds,
        "digests": digests,
        "bit_identical": equal,
    }
    print(json.dumps(summary, indent=1))
    if sum(killed.values()) < options.kills:
        print(
            "the federation finished before all kills were made: more --rounds, or less --pause",
            file=sys.stderr,
        )
        return 1
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
