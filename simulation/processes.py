"""Child processes of one run: each ``fedmpt`` command in a process of its own, with a log, ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fedmpt.protocol.errors import FedmptError

GRACE_SECONDS = 10.0
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# A child's standard input is a pipe whose other end the parent alone holds. Where the parent is killed outright, the
# kernel closes that end, and the child asks itself to end.
CHILD = """\
import os, signal, sys, threading

def end_with_parent():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_parent, daemon=True).start()
from fedmpt.cli import main
sys.exit(main())
"""


class ProcessError(FedmptError):
    """A child process failed; the text has the end of its log."""


@dataclass(frozen=True)
class Child:
    """A running command with the file that its standard error goes to."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    output: Path


@dataclass
class Processes:
    """Starts ``fedmpt`` commands; use within :func:`processes`, which ends them."""

    logs: Path
    lifeline: int
    children: list[Child] = field(default_factory=list)
    ending: bool = False

    def start(self, name: str, arguments: Sequence[object], threads: int | None = None) -> Child:
        """Start ``fedmpt <arguments>``; its output goes to ``<name>.out`` and ``<name>.log``."""
        log, output = self.logs / f"{name}.log", self.logs / f"{name}.out"
        environment = dict(os.environ)
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("wb") as errors, output.open("wb") as results:
            process = subprocess.Popen(
                [sys.executable, "-c", CHILD, *map(str, arguments)],
                stdin=self.lifeline,
                stdout=results,
                stderr=errors,
                env=environment,
                # Its own session, so that Ctrl-C reaches it through us, once, and in order.
                start_new_session=True,
            )
        child = Child(name, process, log, output)
        self.children.append(child)
        return child

    def check(self) -> None:
        """Raise ProcessError if a child has failed."""
        for child in self.children:
            if child.process.poll() not in (None, 0):
                raise ProcessError(
                    f"{child.name} ended with exit code {child.process.returncode}; the end of {child.log}:\n"
                    + _tail(child.log)
                )

    def wait(self, children: Sequence[Child], poll: Callable[[], None] | None = None) -> None:
        """Wait until the given children have ended well; ``poll`` is called ten times a second meanwhile."""
        while True:
            self.check()
            if poll:
                poll()
            if all(child.process.poll() is not None for child in children):
                self.check()
                return
            time.sleep(0.1)

    def end(self) -> None:
        """Ask every child that still runs to end, and kill those that do not; the first started ends last."""
        self.ending = True
        deadline = time.monotonic() + GRACE_SECONDS
        still = [child.process for child in self.children if child.process.poll() is None]
        # The first is what the others talk to: a client that says goodbye to nobody waits for seconds.
        for group in (still[1:], still[:1]):
            for process in group:
                process.terminate()
            for process in group:
                try:
                    process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    self.kill()
                    process.wait()

    def kill(self) -> None:
        """End at once every child that still runs."""
        for child in self.children:
            if child.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def processes(logs: Path) -> Iterator[Processes]:
    """Yield a :class:`Processes` whose children all end with the block.

    Ctrl-C, SIGTERM and a terminal that closes end the block; once more, and the children are killed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    lifeline, parents_end = os.pipe()
    running = Processes(logs, lifeline)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if running.ending:
            running.kill()
            return
        running.ending = True
        raise KeyboardInterrupt

    # What is ignored stays ignored: `nohup` asks for that.
    heeded = [number for number in ENDING_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield running
    finally:
        running.end()
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(lifeline)
        os.close(parents_end)


def _tail(path: Path, lines: int = 15) -> str:
    text = path.read_text(errors="replace").splitlines()
    return "\n".join(text[-lines:])
