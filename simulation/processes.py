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
    children: list[Child] = field(default_factory=list)

    def start(self, name: str, arguments: Sequence[object], threads: int | None = None) -> Child:
        """Start ``fedmpt <arguments>``; its output goes to ``<name>.out`` and ``<name>.log``."""
        log, output = self.logs / f"{name}.log", self.logs / f"{name}.out"
        environment = dict(os.environ)
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, "-c", "import sys; from fedmpt.cli import main; sys.exit(main())"]
        with log.open("wb") as errors, output.open("wb") as results:
            process = subprocess.Popen(
                [*command, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
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
        """Ask every child that still runs to end, and kill those that do not."""
        for child in self.children:
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for child in self.children:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()


@contextlib.contextmanager
def processes(logs: Path) -> Iterator[Processes]:
    """Yield a :class:`Processes` whose children all end with the block, on SIGTERM and Ctrl-C too."""
    logs.mkdir(parents=True, exist_ok=True)
    running = Processes(logs)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield running
    finally:
        signal.signal(signal.SIGTERM, before)
        running.end()


def _tail(path: Path, lines: int = 15) -> str:
    text = path.read_text(errors="replace").splitlines()
    return "\n".join(text[-lines:])
