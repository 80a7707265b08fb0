"""The shipped data: every big file is, bit for bit, the one whose digest stands in ``SHA256SUMS``."""

import re

import pytest

from fedmpt.protocol.files import sha256_file
from fedmpt.simulation.scenes_pack import PACK

DATA = PACK.parent
BIG = 100_000  # bytes
RENEW = "find * -type f -size +100000c | LC_ALL=C sort | xargs sha256sum > SHA256SUMS"
DIGESTS = {
    path: digest
    for digest, path in re.findall(
        r"^([0-9a-f]{64})  (.+)$", (DATA / "SHA256SUMS").read_text("utf-8"), flags=re.MULTILINE
    )
}


@pytest.mark.parametrize("path", DIGESTS)
def test_a_listed_file_has_its_digest(path):
    assert sha256_file(DATA / path) == DIGESTS[path], f"if {path} was meant to change: cd {DATA}; {RENEW}"


def test_every_file_above_100_kilobytes_is_listed():
    files = (path for path in DATA.rglob("*") if path.is_file() and path.stat().st_size > BIG)
    assert {path.relative_to(DATA).as_posix() for path in files} <= DIGESTS.keys(), f"cd {DATA}; {RENEW}"
