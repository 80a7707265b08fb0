"""What a site needs, checked one by one: versions, devices, bundle, cache, broker, certificates, clock, room."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shutil
import socket
import ssl
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmpt.edge_client.cache import open_cache
from fedmpt.edge_client.onnx_session import (
    PROVIDERS,
    SessionError,
    describe,
    import_onnxruntime,
    is_confined,
    open_session,
    session_device,
)
from fedmpt.protocol.address import BrokerAddress
from fedmpt.protocol.connection import Connection
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.events import Disconnected, Message, SubscribeRefused
from fedmpt.protocol.manifest import load_manifest, verify_bundle
from fedmpt.protocol.messages import MessageError, Status, from_json
from fedmpt.protocol.topics import Topics

PACKAGES = ("fedmpt-edge", "numpy", "paho-mqtt", "safetensors", "pillow", "cryptography")
CERTIFICATE_WARNING = datetime.timedelta(days=30)
SKEW_WARNING, SKEW_FAILURE = 30.0, 600.0  # seconds; new certificates are valid from ten minutes before
DISK_WARNING, DISK_FAILURE = 2 << 30, 200 << 20  # bytes
MEMORY_WARNING = 1 << 30
CONNECT_SECONDS = 10.0
HANDSHAKE_SECONDS = 5.0
REFUSAL_SECONDS = 1.0


@dataclass(frozen=True)
class Check:
    """One finding: ``status`` is ``ok``, ``warning``, ``failed`` or ``unknown``; ``text`` says what to do."""

    name: str
    status: str
    text: str


def check_versions() -> Iterator[Check]:
    """Python, the packages, and ONNX Runtime: exactly one of its two, with its providers."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.machine()}, {platform.platform()}")
    found = {name: _version(name) for name in PACKAGES}
    absent = [name for name, number in found.items() if number is None]
    text = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    if absent:
        text = f"missing: {', '.join(absent)}; pip install --force-reinstall fedmpt-edge"
    yield Check("packages", "failed" if absent else "ok", text)
    try:
        onnxruntime = import_onnxruntime()
    except SessionError as error:
        yield Check("onnxruntime", "failed", str(error))
        return
    providers = onnxruntime.get_available_providers()
    usable = [name for name, provider in PROVIDERS.items() if provider in providers]
    text = f"{onnxruntime.__version__}, built for {', '.join(usable)}"
    yield _confinement(onnxruntime)
    if nvidia := nvidia_device():
        if "cuda" not in usable:
            text += f"; but {nvidia} is there: for CUDA pip uninstall -y onnxruntime && pip install "
            text += "'fedmpt-edge[gpu]' (on Jetson from NVIDIA's package index, see docs/deploy)"
        yield Check("onnxruntime", "ok" if "cuda" in usable else "warning", text)
    else:
        yield Check("onnxruntime", "ok", text)
    torch = _version("torch")
    yield Check(
        "torch engine", "ok", f"torch {torch}" if torch else "not installed; the onnx engine needs none"
    )


def _confinement(onnxruntime: Any) -> Check:
    """Whether ONNX Runtime keeps graphs from other files by itself, or our check of every graph is all there is."""
    if is_confined(onnxruntime):
        return Check("external data", "ok", "ONNX Runtime and fedmpt keep graphs from reading other files")
    text = (
        f"ONNX Runtime {onnxruntime.__version__} lets a graph read any file; fedmpt checks every graph before it opens "
        "it, other programs may not"
    )
    # For Python 3.10 there is no newer one.
    if sys.version_info < (3, 11):
        return Check("external data", "ok", text)
    return Check("external data", "warning", f"{text}; run: pip install 'onnxruntime>=1.24.1'")


def check_bundle(folder: Path, device: str) -> Iterator[Check]:
    """Whether a bundle is whole, and on which device its graphs really run."""
    try:
        manifest = load_manifest(folder)
        verify_bundle(folder, manifest)
    except FedmptError as error:
        yield Check("bundle", "failed", str(error))
        return
    text = f"{manifest.method}, {len(manifest.labels)} labels, digest {manifest.digest[:12]}…"
    yield Check("bundle", "ok", text)
    try:
        session = open_session(folder / manifest.graphs["head"].file, device, files=manifest.files)
    except FedmptError as error:
        yield Check("device", "failed", str(error))
    else:
        yield Check("device", "ok", describe(session_device(session), len(os.sched_getaffinity(0))))


def check_cache(folder: Path, bundle: Path) -> Iterator[Check]:
    """Whether a feature cache is whole and fits the bundle."""
    try:
        cache = open_cache(folder, load_manifest(bundle))
    except FedmptError as error:
        yield Check("cache", "failed", str(error))
        return
    known = int((cache.labels >= 0).any(axis=1).sum())
    status = "ok" if known else "failed"
    yield Check("cache", status, f"{len(cache)} photos, {known} with a known label")


def check_certificates(address: BrokerAddress, now: datetime.datetime) -> Iterator[Check]:
    """Expiry of the authority's, our own and the broker's certificate; who can read our key."""
    from cryptography import x509

    for name, path in (("authority", address.authority), ("certificate", address.certificate)):
        if path is None:
            continue
        try:
            loaded = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            yield Check(name, "failed", f"{path}: no PEM certificate ({error})")
        else:
            yield _validity(name, str(path), loaded, now)
    if address.key is not None and address.key.is_file() and address.key.stat().st_mode & 0o077:
        yield Check("key", "warning", f"{address.key}: others may read it; run: chmod 600 {address.key}")
    if address.tls:
        try:
            certificate = x509.load_der_x509_certificate(_broker_certificate(address))
        except (OSError, ValueError) as error:
            yield Check("broker certificate", "unknown", f"{address.url}: no TLS handshake ({error})")
        else:
            yield _validity("broker certificate", address.url, certificate, now)
            if doctors_address(address) != address:
                yield _acceptance(address)


def doctors_address(address: BrokerAddress) -> BrokerAddress:
    """The broker with the certificate ``doctor.pem`` where it lies beside ours, so that nobody is displaced.

    A broker set up by ``fedmpt certs`` takes the certificate's name for the MQTT client id: with our own, the
    check would be taken for the site's client.
    """
    if address.certificate is None:
        return address
    certificate, key = (address.certificate.with_name(name) for name in ("doctor.pem", "doctor.key"))
    if not (certificate.is_file() and key.is_file()):
        return address
    return dataclasses.replace(address, certificate=certificate, key=key)


def check_broker(address: BrokerAddress, federation: str | None, seconds: float) -> Iterator[Check]:
    """Whether the broker takes us, and the clock against the aggregator's if a federation is given.

    MQTT has no time of its own. The aggregator says the time in its status at least every 15 seconds, so the
    clock is compared with a message that arrives while we wait (at most ``seconds``).
    """
    address = doctors_address(address)
    topics = Topics(federation) if federation else None
    subscriptions = (topics.status,) if topics else ()
    try:
        name = f"fedmpt-doctor-{uuid.uuid4().hex[:12]}"
        with Connection(address, name, subscriptions=subscriptions, persistent=False) as connection:
            connection.connect(CONNECT_SECONDS)
            version = "3.1.1" if connection.protocol < 5 else "5"
            limit = connection.maximum_packet_size
            size = f"packets up to {limit} bytes" if limit else "no packet limit named"
            yield Check("broker", "ok", f"{address.url}: accepts us, MQTT {version}, {size}")
            if topics is None:
                yield Check("clock", "unknown", "give --federation to compare it with the aggregator's")
            else:
                yield from _check_clock(connection, topics, seconds)
    except FedmptError as error:
        yield Check("broker", "failed", str(error))


def clock_check(skew: float) -> Check:
    """Judge how far our clock is ahead of the aggregator's, in seconds (network delay included)."""
    direction = "ahead of" if skew >= 0 else "behind"
    text = f"{abs(skew):.1f} s {direction} the aggregator's, network delay included"
    if abs(skew) < SKEW_WARNING:
        return Check("clock", "ok", text)
    status = "warning" if abs(skew) < SKEW_FAILURE else "failed"
    return Check("clock", status, f"{text}; set it by NTP (timedatectl set-ntp true)")


def check_disk(folder: Path) -> Check:
    """Free space where the client keeps its work."""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:.1f} GB free at {existing}"
    if not os.access(existing, os.W_OK):
        return Check("disk", "failed", f"{existing}: not writable; choose another folder with --state-dir")
    if free < DISK_WARNING:
        return Check("disk", "failed" if free < DISK_FAILURE else "warning", f"{text}; make room")
    return Check("disk", "ok", text)


def check_memory(meminfo: str) -> Check:
    """Available memory, from the text of /proc/meminfo."""
    fields = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    if "MemAvailable" not in fields:
        return Check("memory", "unknown", "the system does not tell how much is available")
    available = int(fields["MemAvailable"].split()[0]) << 10
    text = f"{available / 1e9:.1f} GB available, {len(os.sched_getaffinity(0))} cores"
    if available < MEMORY_WARNING:
        return Check("memory", "warning", f"{text}; ViT-B/16 wants 1 GB: end other programs, or add swap")
    return Check("memory", "ok", text)


def nvidia_device() -> str | None:
    """The NVIDIA device that this machine shows: a Jetson's release line, or a device file."""
    release = Path("/etc/nv_tegra_release")
    if release.is_file():
        return f"a Jetson ({release.read_text(errors='replace').splitlines()[0].strip('# ')[:40]})"
    return "an NVIDIA GPU" if Path("/dev/nvidia0").exists() else None


def _check_clock(connection: Connection, topics: Topics, seconds: float) -> Iterator[Check]:
    end = time.monotonic() + seconds
    retained = None
    while (left := end - time.monotonic()) > 0:
        try:
            event = connection.receive(timeout=left)
        except SubscribeRefused as error:
            yield Check("clock", "unknown", str(error))
            return
        if isinstance(event, Disconnected):
            # Where certificates name the MQTT client, this check and the site's client displace each other.
            text = f"the connection ended ({event.reason}); if this site's client is running, stop it for this check"
            yield Check("clock", "unknown", text)
            return
        if not isinstance(event, Message) or event.topic != topics.status:
            continue
        connection.acknowledge(event)
        try:
            status = from_json(Status, event.payload, event.topic)
        except MessageError as error:
            yield Check("clock", "unknown", str(error))
            return
        if event.retained:
            retained = status
            continue
        yield Check("aggregator", "ok", f"online, round {status.round} of {status.rounds} ({status.phase})")
        yield clock_check(time.time() - status.time)
        return
    if retained is None:
        what = f"nothing is known of federation {topics.federation} at this broker; is the name right?"
    else:
        what = f"silent for {seconds:.0f} s; it last spoke at round {retained.round}; is it running?"
    yield Check("aggregator", "warning", what)
    if retained is not None and time.time() < retained.time - SKEW_WARNING:
        yield clock_check(time.time() - retained.time)  # it cannot have spoken in the future
    else:
        yield Check("clock", "unknown", "no live message of the aggregator to compare it with")


def _validity(name: str, where: str, certificate: Any, now: datetime.datetime) -> Check:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        text = f"{where}: not valid before {begins:%Y-%m-%d %H:%M} UTC; is this machine's clock right?"
        return Check(name, "failed", text)
    if now >= ends:
        text = f"{where}: expired on {ends:%Y-%m-%d}; ask the operator for a new one (fedmpt certs)"
        return Check(name, "failed", text)
    text = f"{where}: valid until {ends:%Y-%m-%d} ({(ends - now).days} days)"
    if ends - now < CERTIFICATE_WARNING:
        return Check(name, "warning", f"{text}; ask the operator for a new one (fedmpt certs)")
    return Check(name, "ok", text)


def _broker_certificate(address: BrokerAddress) -> bytes:
    """The certificate that the broker shows, DER, unverified: an expired one is to be reported, not refused."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with _handshake(address, context) as secure:
        certificate = secure.getpeercert(binary_form=True)
    if certificate is None:
        raise ValueError("it shows no certificate")
    return certificate


@contextlib.contextmanager
def _handshake(address: BrokerAddress, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection((address.host, address.port), HANDSHAKE_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=address.host) as secure,
    ):
        yield secure


def _acceptance(address: BrokerAddress) -> Check:
    """Whether the broker takes our own certificate: TLS only, so that it sees no second MQTT client."""
    try:
        context = address.tls_context()
        assert context is not None
        with _handshake(address, context) as secure:
            # In TLS 1.3 a refusal comes after the handshake; a broker that takes us waits for MQTT.
            secure.settimeout(REFUSAL_SECONDS)
            with contextlib.suppress(TimeoutError):
                if not secure.recv(1):
                    raise ConnectionError("it hung up")
    except (OSError, FedmptError) as error:
        text = (
            f"{address.certificate}: the broker refuses it ({error}); is it of this federation's authority?"
        )
        return Check("our certificate", "failed", text)
    return Check("our certificate", "ok", f"{address.certificate}: accepted by the broker")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
