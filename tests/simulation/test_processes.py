"""Child processes end with the block that started them, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmpt.simulation.processes import ProcessError, processes

SCRIPT = """
import subprocess, sys, time
from pathlib import Path
from fedmpt.simulation.processes import Child, processes
with processes(Path(sys.argv[1])) as running:
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    running.children.append(Child("sleeper", sleeper, Path("unused"), Path("unused")))
    print(sleeper.pid, flush=True)
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_failed_child_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(ProcessError, match=r"(?s)wrong ended with exit code 2.*wrong\.log"),
        processes(tmp_path) as r,
    ):
        r.wait([r.start("wrong", ["no-such-command"])])


def test_a_finished_child_leaves_its_output(tmp_path: Path) -> None:
    with processes(tmp_path) as running:
        child = running.start("version", ["--version"])
        running.wait([child])
    assert child.output.read_text().startswith("fedmpt ")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_children_end_when_the_parent_is_stopped(tmp_path: Path, sent: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(sent)
    parent.wait(20)
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
