"""A small certificate authority for one federation, with the mosquitto configuration and ACL that go with it.

The certificate's common name is the broker's user name and MQTT client id, so that the ACL can let a client
write its own topics only and nobody can take over another's session.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import pwd
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import atomic_path, write_atomically

AUTHORITY_DAYS = 3650
RESERVED = ("ca", "broker", "aggregator", "operator", "doctor")  # no client's names
# Certificates start a little early, so that a site whose clock is slow can connect at once.
CLOCK_TOLERANCE = datetime.timedelta(minutes=10)


class CertificateError(FedmptError):
    """A certificate authority's folder cannot be used as asked."""


def make_authority(folder: Path, federation: str, now: datetime.datetime) -> None:
    """Write ``ca.pem`` and ``ca.key`` for a federation, unless the folder already has both.

    Raises:
        CertificateError: only one of the two is there, so that nothing new could be signed or trusted; or they are
            another federation's, whose clients the new ACL would lock out.
    """
    certificate_path, key_path = folder / "ca.pem", folder / "ca.key"
    name = _name(f"{federation} federation authority")
    if certificate_path.exists() and key_path.exists():
        if (made_for := _load(certificate_path).subject) != name:
            raise CertificateError(
                f"{folder}: belongs to the {made_for.rfc4514_string().removeprefix('CN=')}; choose another folder for "
                f"federation {federation}"
            )
        return
    if certificate_path.exists() or key_path.exists():
        raise CertificateError(
            f"{folder}: has only one of ca.pem and ca.key; restore the other, or choose an empty folder"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_key(key_path, key)
    write_atomically(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))


def certified_hosts(certificate_path: Path) -> list[str]:
    """The DNS names and IP addresses of a server's certificate; raises CertificateError if it cannot be read."""
    try:
        extension = _load(certificate_path).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in extension.value]


def issue_certificate(
    folder: Path,
    common_name: str,
    now: datetime.datetime,
    *,
    days: int,
    hosts: Sequence[str] = (),
) -> Path:
    """Write ``<common_name>.pem`` and ``.key``, signed by the folder's authority; return the former's path.

    With ``hosts`` (DNS names or IP addresses) it is a server's certificate, without it a client's.

    Raises:
        CertificateError: the authority's files are missing or unreadable.
    """
    try:
        authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        authority_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise CertificateError(f"{folder}: no usable certificate authority ({error})") from error
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{folder / 'ca.key'}: not an elliptic-curve key; choose an empty folder")
    key = ec.generate_private_key(ec.SECP256R1())
    usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
    )
    if hosts:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False
        )
    certificate_path = folder / f"{common_name}.pem"
    _write_key(folder / f"{common_name}.key", key)
    write_atomically(
        certificate_path,
        builder.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
    )
    return certificate_path


def mosquitto_configuration(folder: Path, port: int, persistence: Path) -> str:
    """The text of ``mosquitto.conf``: TLS with client certificates, durable queues, bounded packets.

    See mosquitto.conf(5) for every option. A mosquitto that root starts changes to another account, which must be able
    to read the broker's private key and to write the persistence folder: the account that runs this.
    """
    return f"""# Made by `fedmpt certs`. Start with: mosquitto -c {folder / "mosquitto.conf"}
{_account()}per_listener_settings false
listener {port}
cafile {folder / "ca.pem"}
certfile {folder / "broker.pem"}
keyfile {folder / "broker.key"}
require_certificate true
tls_version tlsv1.2
# The certificate's common name is the user name and the client id: nobody can pose as another.
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {folder / "mosquitto.acl"}
{mosquitto_durability(persistence)}"""


def _account() -> str:
    """The lines that name the account of this process; empty for a user without a name, as in some containers."""
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return ""
    return f"""# Where root starts it, it runs as this account, which can read these files.
user {name}
"""


def mosquitto_durability(persistence: Path) -> str:
    """The queue and persistence limits with which a federation survives a killed broker."""
    return f"""# Sessions, queued and retained messages survive a restart. A crash costs the last five seconds: clients
# send an update again until they have its receipt, and the aggregator repeats what it retains when it reconnects.
# (Saving at every change writes the whole database for every message: 85 messages a second instead of thousands.)
persistence true
persistence_location {persistence}/
autosave_on_changes false
autosave_interval 5
persistent_client_expiration 14d
# The default of 1,000 queued messages drops updates of large federations while the aggregator restarts.
max_queued_messages 100000
max_queued_bytes 0
# Updates on their way to the aggregator, which asks for as many as it has room for: while it waits for its disk to
# store some, others come in.
max_inflight_messages 1000
max_packet_size 67108864
"""


def mosquitto_acl(federation: str) -> str:
    """The text of the ACL file: a client writes its own update and presence and reads its own receipt.

    ``aggregator`` runs the rounds; ``operator`` may read everything (``fedmpt status``) and write nothing;
    ``doctor`` reads what every client reads and writes nothing: with it a site checks its connection without
    displacing its own client, whose certificate is also its MQTT client id.
    """
    base = f"fedmpt/v1/{federation}"
    return f"""# Made by `fedmpt certs`; %u is the certificate's common name. See mosquitto.conf(5).
user aggregator
topic write {base}/manifest
topic write {base}/round
topic write {base}/status
topic write {base}/state/+
topic write {base}/receipt/+
topic read {base}/#

# The patterns below would let these two be clients.
user operator
topic deny {base}/update/+/operator
topic deny {base}/presence/operator
topic read {base}/#

user doctor
topic deny {base}/update/+/doctor
topic deny {base}/presence/doctor

pattern read {base}/manifest
pattern read {base}/round
pattern read {base}/status
pattern read {base}/state/+
pattern read {base}/receipt/%u
pattern write {base}/update/+/%u
pattern write {base}/presence/%u
"""


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CertificateError(f"{path}: no readable certificate ({error})") from error


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with atomic_path(path, mode=0o600) as temporary:
        temporary.write_bytes(text)
