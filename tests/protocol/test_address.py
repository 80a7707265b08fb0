"""Broker URLs and TLS files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmpt.protocol.address import AddressError, BrokerAddress, parse_broker


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mqtt://hub", BrokerAddress("hub", 1883)),
        ("mqtts://hub", BrokerAddress("hub", 8883, tls=True)),
        ("mqtt://hub:9", BrokerAddress("hub", 9)),
        ("mqtt://[::1]:9", BrokerAddress("::1", 9)),
        ("mqtt://site%20a@hub", BrokerAddress("hub", 1883, username="site a")),
    ],
)
def test_urls_are_read(url: str, address: BrokerAddress) -> None:
    assert parse_broker(url) == address


@pytest.mark.parametrize("url", ["hub:1883", "http://hub", "mqtt://", "mqtt://hub/topic", "mqtt://hub:99999"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(AddressError, match="broker"):
        parse_broker(url)


def test_a_password_in_the_url_is_refused() -> None:
    with pytest.raises(AddressError, match="FEDMPT_MQTT_PASSWORD"):
        parse_broker("mqtt://me:secret@hub")


def test_certificates_need_tls() -> None:
    with pytest.raises(AddressError, match="write mqtts://"):
        parse_broker("mqtt://hub", authority=Path("ca.pem"))


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(AddressError, match="needs both --cert and --key"):
        parse_broker("mqtts://hub", certificate=Path("me.pem"))


def test_a_missing_authority_file_is_named(tmp_path: Path) -> None:
    address = parse_broker("mqtts://hub", authority=tmp_path / "ca.pem")
    with pytest.raises(AddressError, match=r"ca.pem: not usable for TLS"):
        address.tls_context()


def test_the_password_is_never_shown() -> None:
    assert "secret" not in BrokerAddress("hub", 1883, username="me", password="secret").url
