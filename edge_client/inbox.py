"""What a client knows of its federation: the latest manifest, round, states and receipts, checked on arrival."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from fedmpt.protocol.codec import CodecError, State, decode_state, state_digest
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import TensorSpec
from fedmpt.protocol.messages import Manifest, MessageError, Receipt, Round, from_json
from fedmpt.protocol.topics import Topics

logger = logging.getLogger(__name__)

RECEIPTS_KEPT = 16
RUNS_KEPT = 4


@dataclass(frozen=True)
class Task:
    """The round that is open, with the state that it starts from (or ends with, where it is finished).

    All are of the manifest's run. ``announcement`` counts the round messages that have come, so that a repeated one
    can be told.
    """

    manifest: Manifest
    round: Round
    state: State
    announcement: int


class Inbox:
    """Filled by the network thread, read by the training thread. A message that is refused changes nothing.

    ``specs`` are the tensors of the bundle's state: nothing else is accepted as a global state.
    """

    def __init__(self, topics: Topics, client: str, specs: Mapping[str, TensorSpec]) -> None:
        self._topics = topics
        self._client = client
        self._specs = specs
        self._changed = threading.Condition()
        self._manifest: Manifest | None = None
        self._rounds: dict[str, Round] = {}  # the latest of each run
        self._announcements = 0
        self._states: dict[str, State] = {}  # by digest
        self._digest_of_round: dict[int, str] = {}
        self._receipts: dict[str, Receipt] = {}  # by the update's digest
        self._error: FedmptError | None = None
        self._version = 0

    @property
    def subscriptions(self) -> list[str]:
        """The topics that fill this inbox."""
        topics = self._topics
        return [topics.manifest, topics.all_states, topics.round, topics.receipt(self._client)]

    def take(self, topic: str, payload: bytes) -> None:
        """File one message; one that is malformed or of another federation is logged and left out."""
        try:
            with self._changed:
                self._file(topic, payload)
                self._notify()
        except (MessageError, CodecError) as error:
            logger.warning("ignored a message: %s", error)

    def fail(self, error: FedmptError) -> None:
        """Let the training thread raise ``error`` the next time it looks."""
        with self._changed:
            self._error = error
            self._notify()

    def manifest(self) -> Manifest | None:
        """The federation's manifest, once it is here; raises what the network thread failed with."""
        with self._changed:
            self._raise()
            return self._manifest

    def phase(self) -> str | None:
        """The phase of the manifest's run, once its round is here; that may be of another bundle than this site's."""
        with self._changed:
            opened = self._current()
            return None if opened is None else opened.phase

    def task(self) -> Task | None:
        """The open round, once manifest, round and its state are all here; raises like :meth:`manifest`.

        A round of another run than the manifest's is what the broker remembers of an earlier one, and none.
        """
        with self._changed:
            self._raise()
            opened = self._current()
            if self._manifest is None or opened is None or opened.state not in self._states:
                return None
            return Task(self._manifest, opened, self._states[opened.state], self._announcements)

    def is_open(self, opened: Round) -> bool:
        """Whether this round still is the one to work on."""
        with self._changed:
            current = self._current()
            return current is not None and (current.run, current.round, current.phase, current.state) == (
                opened.run,
                opened.round,
                opened.phase,
                opened.state,
            )

    def receipt(self, update: str) -> Receipt | None:
        """The answer to the update with this digest."""
        with self._changed:
            self._raise()
            return self._receipts.get(update)

    @property
    def version(self) -> int:
        """Grows with everything that arrives."""
        return self._version

    def wait(self, seen: int, seconds: float) -> None:
        """Sleep until there is more than at version ``seen``, at most ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, seconds)

    def _current(self) -> Round | None:
        """The round of the manifest's run."""
        return None if self._manifest is None else self._rounds.get(self._manifest.run)

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _file(self, topic: str, payload: bytes) -> None:
        number = self._topics.round_of_state(topic)
        if number is not None:
            self._file_state(topic, number, payload)
        elif not payload:
            return  # a retained message was removed
        elif topic == self._topics.manifest:
            manifest = from_json(Manifest, payload, topic)
            self._require_federation(manifest.federation, topic)
            if self._manifest is not None and manifest.run != self._manifest.run:
                self._receipts.clear()  # the same bytes may be an update of the new run, too
            self._manifest = manifest
        elif topic == self._topics.round:
            opened = from_json(Round, payload, topic)
            self._require_federation(opened.federation, topic)
            known = self._rounds.pop(opened.run, None)
            if known is not None and opened.edition < known.edition:
                opened = known  # its successor overtook it
            else:
                self._announcements += 1
            self._rounds[opened.run] = opened
            while len(self._rounds) > RUNS_KEPT:
                del self._rounds[next(iter(self._rounds))]
        elif topic == self._topics.receipt(self._client):
            receipt = from_json(Receipt, payload, topic)
            self._receipts[receipt.update] = receipt
            while len(self._receipts) > RECEIPTS_KEPT:
                del self._receipts[next(iter(self._receipts))]

    def _file_state(self, topic: str, number: int, payload: bytes) -> None:
        state = decode_state(payload, self._specs, topic) if payload else None
        previous = self._digest_of_round.pop(number, None)
        if previous is not None and previous not in self._digest_of_round.values():
            self._states.pop(previous, None)
        if state is not None:
            digest = state_digest(state)
            self._digest_of_round[number] = digest
            self._states[digest] = state

    def _require_federation(self, name: str, topic: str) -> None:
        if name != self._topics.federation:
            raise MessageError(f"{topic}: is of federation {name[:64]!r}")
