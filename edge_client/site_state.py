"""What a client keeps on disk, so that a restart costs at most the epoch in flight.

The folder holds ``checkpoint-<key>.safetensors`` (a round in training), ``update-<key>.safetensors`` (the last
finished update), ``run-<federation>`` (the run in which this client takes part) and ``lock``. The key is a digest of
all that the work depends on, so that a file is either exactly the wanted one or not looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.numpy

from fedmpt.edge_client.trainer import Checkpoint
from fedmpt.protocol.codec import CodecError, load_provenance, save_state, state_digest
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import write_atomically
from fedmpt.protocol.manifest import canonical_json


class SiteStateError(FedmptError):
    """The state folder cannot be used."""


@dataclass(frozen=True)
class Work:
    """One client's task in one round: train from the state with the digest ``base``.

    ``setup`` is a digest of the federation's manifest and the site's data.
    """

    federation: str
    client: str
    round: int
    phase: str
    base: str
    setup: str

    @property
    def key(self) -> str:
        """32 hexadecimal digits that name this work's files."""
        return hashlib.sha256(canonical_json(dataclasses.asdict(self))).hexdigest()[:32]


@contextmanager
def open_site_state(folder: Path) -> Iterator[SiteState]:
    """Make the folder if needed and hold its lock.

    Raises:
        SiteStateError: another client uses it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise SiteStateError(
            f"{folder}: cannot be used as state folder ({error.strerror}); choose another with --state-dir"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SiteStateError(
                f"{folder}: another client is using this state folder; give each client its own --state-dir"
            ) from None
        yield SiteState(folder)


class SiteState:
    """The files of one client; every write is whole or absent, and what cannot be read counts as absent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save_checkpoint(self, work: Work, checkpoint: Checkpoint) -> None:
        """Keep a round after a finished epoch."""
        tensors = {f"state.{name}": value for name, value in checkpoint.state.items()}
        tensors |= {f"memory.{name}": value for name, value in checkpoint.memory.items()}
        provenance = {
            "epochs": str(checkpoint.epochs),
            "loss": repr(checkpoint.loss),
            "digest": state_digest(tensors),
        }
        save_state(self._path("checkpoint", work), tensors, provenance)
        self._remove_others("checkpoint", work)

    def load_checkpoint(self, work: Work) -> Checkpoint | None:
        """The last checkpoint of exactly this work, or None."""
        path = self._path("checkpoint", work)
        try:
            provenance = load_provenance(path)
            tensors = safetensors.numpy.load_file(path)
        except (CodecError, OSError, safetensors.SafetensorError):
            return None
        if provenance.get("digest") != state_digest(tensors):
            return None
        parts = {
            part: {name[len(part) :]: value for name, value in tensors.items() if name.startswith(part)}
            for part in ("state.", "memory.")
        }
        epochs, loss = int(provenance["epochs"]), float(provenance["loss"])
        return Checkpoint(epochs, parts["state."], parts["memory."], loss)

    def save_update(self, work: Work, payload: bytes) -> None:
        """Keep a finished update; the update and checkpoints of earlier work are no longer needed."""
        write_atomically(self._path("update", work), payload)
        self._remove_others("update", work)
        self._path("checkpoint", work).unlink(missing_ok=True)

    def load_update(self, work: Work) -> bytes | None:
        """The finished update of exactly this work, or None."""
        with contextlib.suppress(OSError):
            return self._path("update", work).read_bytes()
        return None

    def discard_update(self, work: Work) -> None:
        """Forget an update that was refused, so that a restart computes it anew."""
        self._path("update", work).unlink(missing_ok=True)

    def join_run(self, federation: str, run: str) -> None:
        """Note that this client takes part in a run, so that it knows its end from an earlier run's."""
        if not self.is_in_run(federation, run):
            write_atomically(self._run_file(federation), run)

    def is_in_run(self, federation: str, run: str) -> bool:
        """Whether this client takes part in a run, and has not been told its end."""
        try:
            return self._run_file(federation).read_bytes() == run.encode()
        except OSError:
            return False

    def end_run(self, federation: str) -> None:
        """Note that the run is over."""
        self._run_file(federation).unlink(missing_ok=True)

    def _run_file(self, federation: str) -> Path:
        return self._folder / f"run-{federation}"

    def _path(self, kind: str, work: Work) -> Path:
        return self._folder / f"{kind}-{work.key}.safetensors"

    def _remove_others(self, kind: str, work: Work) -> None:
        for path in self._folder.glob(f"{kind}-*.safetensors"):
            if path != self._path(kind, work):
                path.unlink(missing_ok=True)
