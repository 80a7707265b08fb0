"""``fedmpt certs``: certificates, mosquitto configuration and ACL of a federation."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import ipaddress
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedmpt.aggregator.certificates import (
    RESERVED,
    CertificateError,
    certified_hosts,
    issue_certificate,
    make_authority,
    mosquitto_acl,
    mosquitto_configuration,
)
from fedmpt.protocol.files import atomic_path, write_atomically
from fedmpt.protocol.topics import check_name

DESCRIPTION = """\
Make a small certificate authority, one certificate each for the broker, the aggregator, an operator (who may
only read) and every client, one with which all sites' `fedmpt doctor` connects (it reads what clients read), and
the mosquitto configuration and ACL with which a client can write only its own topics. Run it again with more
--client or --host options to add clients or names of the broker: the authority is kept.

Give each site ca.pem, doctor.pem, doctor.key and its own .pem and .key, over a channel that you trust; keep
ca.key to yourself."""

MAXIMUM_DAYS = 36500


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    parser.description = DESCRIPTION
    parser.epilog = (
        "Example:\n"
        "  fedmpt certs --out certs --federation farm --host broker.local --client north --client south"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--federation", required=True, help="the federation's name, as in its topics")
    parser.add_argument(
        "--host",
        action="append",
        required=True,
        type=_host,
        help="DNS name or IP address by which clients reach the broker; repeat for more",
    )
    parser.add_argument("--client", action="append", default=[], help="name of a client; repeat for more")
    parser.add_argument("--port", type=int, default=8883, help="the broker's TLS port (default: 8883)")
    parser.add_argument("--days", type=int, default=365, help="validity of certificates (default: 365)")
    parser.add_argument("--json", action="store_true", help="print the written files as JSON")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """Write the files; certificates that exist already are kept, but the broker's is made anew for more hosts."""
    if not 0 < arguments.port < 1 << 16:
        arguments.usage_error("--port must be 1 to 65535")
    if not 0 < arguments.days <= MAXIMUM_DAYS:
        arguments.usage_error(f"--days must be 1 to {MAXIMUM_DAYS}")
    check_name("federation", arguments.federation)
    for client in arguments.client:
        check_name("client", client)
        if client in RESERVED:
            raise CertificateError(
                f"client name {client!r} is taken: {', '.join(RESERVED)} have certificates of their own; choose another"
            )
    folder = arguments.out.resolve()
    now = datetime.datetime.now(datetime.timezone.utc)
    written = []
    with _all_or_nothing(folder):
        make_authority(folder, arguments.federation, now)
        for name in ["broker", "aggregator", "operator", "doctor", *arguments.client]:
            hosts = arguments.host if name == "broker" else []
            if (path := folder / f"{name}.pem").exists():
                known = certified_hosts(path) if hosts else []
                if set(hosts) <= set(known):
                    continue
                hosts = list(dict.fromkeys([*known, *hosts]))
            written.append(str(issue_certificate(folder, name, now, days=arguments.days, hosts=hosts)))
        persistence = folder / "persistence"
        persistence.mkdir(exist_ok=True)
        configuration = mosquitto_configuration(folder, arguments.port, persistence)
        write_atomically(folder / "mosquitto.conf", configuration)
        write_atomically(folder / "mosquitto.acl", mosquitto_acl(arguments.federation))
        written += [str(folder / "mosquitto.conf"), str(folder / "mosquitto.acl")]
    if arguments.json:
        print(json.dumps({"written": written}))
    else:
        print(*written, sep="\n")
        print(f"Start the broker with: mosquitto -c {folder / 'mosquitto.conf'}")
    return 0


@contextlib.contextmanager
def _all_or_nothing(folder: Path) -> Iterator[None]:
    """Leave the folder as it was if the block fails: half a key pair would be in the next run's way."""
    with tempfile.TemporaryDirectory() as name:
        kept = Path(name)
        before = {path for path in folder.glob("*") if path.is_file()}
        for path in before:
            shutil.copy2(path, kept)
        folders = {path for path in folder.glob("*") if path.is_dir()}
        try:
            yield
        except BaseException:
            for path in set(folder.glob("*")) - before - folders:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            for path in before:
                with atomic_path(path) as temporary:
                    shutil.copy2(kept / path.name, temporary)
            raise


def _host(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9*_.-]+", text):
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither an IP address nor a DNS name (one with other letters than a-z: its xn-- form)"
            ) from None
    return text
