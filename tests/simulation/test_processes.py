"""Child processes end with the block that started them, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmpt.simulation.processes import GRACE_SECONDS, Child, ProcessError, processes

SCRIPT = """
import subprocess, sys, time
from pathlib import Path
from fedmpt.simulation.processes import Child, processes
with processes(Path(sys.argv[1])) as running:
    sleeper = subprocess.Popen(sys.argv[2:], start_new_session=True, stdout=subprocess.PIPE)
    running.children.append(Child("sleeper", sleeper, Path("unused"), Path("unused")))
    sleeper.stdout.readline()
    print(sleeper.pid, flush=True)
    time.sleep(60)
"""
REAL_CHILD = """
import sys, time
from pathlib import Path
from fedmpt.simulation.demo import BUNDLE, free_port
from fedmpt.simulation.processes import processes
with processes(Path(sys.argv[1])) as running:
    store = ["--store", Path(sys.argv[1]) / "store", "--federation", "farm"]
    child = running.start("it", ["aggregator", "--bundle", BUNDLE, "--embedded", "--port", free_port(), *store])
    while "broker" not in child.log.read_text():
        time.sleep(0.05)
    print(child.process.pid, flush=True)
    time.sleep(60)
"""
WILLING = ["sh", "-c", "echo ready; exec sleep 60"]
STUBBORN = ["sh", "-c", "trap '' TERM; echo ready; exec sleep 60"]


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


def heed_signals() -> None:
    """As in a terminal: under nohup, or in the background of a script, these would stay ignored."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def start(*command: str) -> tuple[subprocess.Popen[str], int]:
    """A process that started a child of its own, and the child's process number."""
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=heed_signals
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.stdout.close()
    return parent, pid


def ended(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_children_end_when_the_parent_is_stopped(tmp_path: Path, sent: signal.Signals) -> None:
    parent, pid = start(sys.executable, "-c", SCRIPT, str(tmp_path), *WILLING)
    parent.send_signal(sent)
    parent.wait(20)
    assert ended(pid)


def test_a_second_interrupt_kills_a_child_that_does_not_end(tmp_path: Path) -> None:
    parent, pid = start(sys.executable, "-c", SCRIPT, str(tmp_path), *STUBBORN)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert alive(pid)
    parent.send_signal(signal.SIGINT)
    parent.wait(GRACE_SECONDS / 2)
    assert ended(pid)


def test_children_end_themselves_when_the_parent_is_killed(tmp_path: Path) -> None:
    parent, pid = start(sys.executable, "-c", REAL_CHILD, str(tmp_path))
    parent.kill()
    parent.wait(5)
    assert ended(pid, 10)


def test_an_ignored_hang_up_stays_ignored(tmp_path: Path) -> None:
    parent, pid = start("nohup", sys.executable, "-c", SCRIPT, str(tmp_path), *WILLING)
    parent.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert alive(pid)
    parent.terminate()
    parent.wait(20)
    assert ended(pid)


def test_the_first_started_ends_last(tmp_path: Path) -> None:
    order = tmp_path / "order.txt"
    with processes(tmp_path) as running:
        for name in ("broker", "client"):
            script = f"trap 'echo {name} >> {order}; exit' TERM; echo ready; while :; do sleep 0.05; done"
            child = subprocess.Popen(["sh", "-c", script], start_new_session=True, stdout=subprocess.PIPE)
            assert child.stdout is not None
            with child.stdout:
                child.stdout.readline()
            running.children.append(Child(name, child, Path("unused"), Path("unused")))
    assert order.read_text().split() == ["client", "broker"]
