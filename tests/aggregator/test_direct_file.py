"""Appending past the system's cache: what is in the file, whole and cut off, and what a failure leaves."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmpt.aggregator import direct_file
from fedmpt.aggregator.direct_file import BLOCK, DirectFile

PIECES = st.lists(st.integers(0, 3 * BLOCK), max_size=5)


@given(commits=st.lists(PIECES, max_size=5), gathered=st.sampled_from([BLOCK, 4 * BLOCK]))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_file_has_all_that_was_appended_and_after_closing_nothing_else(
    tmp_path: Path, commits: list[list[int]], gathered: int
) -> None:
    path, wanted = tmp_path / "log", b""
    path.write_bytes(wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_file, "GATHERED_BYTES", gathered)
        for number, sizes in enumerate(commits):
            pieces = [bytes([1 + (number + size) % 255]) * size for size in sizes]
            file = DirectFile(path, len(wanted))
            file.append(pieces[:2])
            file.append(pieces[2:])
            wanted += b"".join(pieces)
            found = path.read_bytes()
            assert found[: len(wanted)] == wanted
            assert found[len(wanted) :] == bytes(-len(wanted) % BLOCK), "zeros fill the last block"
            file.close()
            assert path.read_bytes() == wanted


def test_a_file_that_is_begun_anew_holds_nothing_of_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    file = DirectFile(path, 0)
    file.append([b"old" * BLOCK])
    file.restart()
    file.append([b"new"])
    file.close()
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_file_system_without_direct_writing_is_written_all_the_same(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "ramfs", "ramfs", str(tmp_path)], check=False).returncode:
        pytest.skip("this machine does not let tests mount a small file system")
    try:
        path = tmp_path / "log"
        path.touch()
        file = DirectFile(path, 0)
        file.append([b"a" * 5000])
        file.close()
        assert path.read_bytes() == b"a" * 5000
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
