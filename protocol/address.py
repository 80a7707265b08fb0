"""Where a broker is and how to prove oneself to it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fedmpt.protocol.errors import FedmptError


class AddressError(FedmptError):
    """A broker's URL, certificate file or password file cannot be used."""


@dataclass(frozen=True)
class BrokerAddress:
    """One broker. ``authority``, ``certificate`` and ``key`` are PEM files; all three or none are given."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = None
    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @property
    def url(self) -> str:
        """The address as people write it, without the password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def tls_context(self) -> ssl.SSLContext | None:
        """A context that verifies the broker and shows our certificate; None without TLS.

        Raises:
            AddressError: a certificate or key file is missing, malformed, or they do not belong together.
        """
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.authority)
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key)
        except OSError as error:
            files = ", ".join(str(path) for path in (self.authority, self.certificate, self.key) if path)
            raise AddressError(
                f"{files}: not usable for TLS ({error}); give PEM files as `fedmpt certs` writes them"
            ) from error
        return context


def parse_broker(
    url: str,
    *,
    authority: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> BrokerAddress:
    """Read ``mqtt://[user@]host[:port]`` (1883) or ``mqtts://…`` (TLS, 8883).

    Raises:
        AddressError: another scheme, no host, a bad port, TLS files without ``mqtts``, or a lone certificate or key.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AddressError(f"broker {url!r}: {error}") from None
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path not in ("", "/"):
        raise AddressError(f"broker {url!r}: write mqtt://host:1883, or mqtts://host:8883 for TLS")
    tls = parts.scheme == "mqtts"
    if (authority or certificate or key) and not tls:
        raise AddressError(f"broker {url!r}: certificates need TLS; write mqtts://")
    if (certificate is None) != (key is None):
        raise AddressError("a client certificate needs both --cert and --key")
    if parts.password:
        raise AddressError("a password in the broker's URL shows in process lists; set FEDMPT_MQTT_PASSWORD")
    return BrokerAddress(
        host=parts.hostname,
        port=port or (8883 if tls else 1883),
        tls=tls,
        username=unquote(parts.username) if parts.username else None,
        authority=authority,
        certificate=certificate,
        key=key,
    )
