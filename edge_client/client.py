"""The MQTT client of a site: join, train, publish, wait for the receipt; survive everything in between.

The network has threads of its own (paho's, and one that files messages in the inbox), so training goes on
whatever happens to the connection. All that a client needs to join is retained by the broker.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmpt.edge_client.answer import answer_round
from fedmpt.edge_client.engine import Engine, Progress
from fedmpt.edge_client.inbox import Inbox, Task
from fedmpt.edge_client.schedule import Window
from fedmpt.edge_client.site_connection import LOOK_SECONDS, Report, open_site_connection
from fedmpt.edge_client.site_state import SiteState, Work, open_site_state
from fedmpt.edge_client.trainer import Checkpoint, SiteData, TrainingStopped
from fedmpt.protocol.address import BrokerAddress
from fedmpt.protocol.codec import State, Update, encode_update
from fedmpt.protocol.connection import Connection
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleManifest, canonical_json
from fedmpt.protocol.messages import Manifest, Presence, Receipt
from fedmpt.protocol.topics import Topics

logger = logging.getLogger(__name__)

CALIBRATED = ("bias", "scale")
CHECKPOINT_SECONDS = 1.0  # of training between two checkpoints, where epochs are shorter than that
SETTLE_SECONDS = 3.0  # in which the retained round comes after its manifest
NEXT_RUN = "the next run: the last one ended before this client took part"
RESEND_SECONDS = (15.0, 300.0)  # first and longest wait for a receipt before an update is sent again


class ClientError(FedmptError):
    """The federation asks for what this site does not have or cannot do."""


@dataclass(frozen=True)
class Site:
    """Who takes part, and with what. ``fingerprint`` is a digest of the photos and labels."""

    federation: str
    client: str
    bundle: BundleManifest
    engine: Engine
    data: SiteData
    fingerprint: str
    capabilities: Mapping[str, str]


@dataclass(frozen=True)
class Limits:
    """The site's own limits: training seconds per round, and the daily window (None: no limit)."""

    seconds_per_round: float | None = None
    active: Window | None = None


def run_client(
    site: Site,
    address: BrokerAddress,
    state_folder: Path,
    *,
    limits: Limits = Limits(),
    stop: threading.Event,
    report: Report,
    progress: Progress | None = None,
    on_finished: Callable[[State], None] = lambda state: None,
) -> State | None:
    """Take part in a run of a federation until it is finished or ``stop`` is set.

    A run that had finished before this client took part in it is an earlier one: the client waits for the next.

    Args:
        site: who takes part, and with what.
        address: the broker.
        state_folder: where checkpoints and the finished update are kept; one client's alone.
        limits: the site's own limits.
        stop: set it (from a signal handler, say) to leave after the batch in flight.
        report: called with what happens: an event's name and its facts.
        progress: called with (batches done, batches in all) of the round in training.
        on_finished: called with the final state before the run is noted as over: a client that is killed meanwhile
            is told the end again.

    Returns:
        The final global state; None where ``stop`` came first.

    Raises:
        ClientError: the federation is of another bundle, or a round asks for what this version cannot do.
        BrokerUnreachable, IdentityTaken, PublishRefused, SubscribeRefused, PayloadTooLarge: see the connection.
        SiteStateError: the folder is in use or cannot be written.
    """
    topics = Topics(site.federation)
    inbox = Inbox(topics, site.client, site.bundle.state)
    presence = Presence(
        federation=site.federation,
        client=site.client,
        online=True,
        bundle=site.bundle.digest,
        samples=len(site.data.train),
        capabilities=site.capabilities,
    )
    with (
        open_site_state(state_folder) as files,
        open_site_connection(address, site.client, topics, presence, inbox, report, stop) as connection,
    ):
        client = _Client(site, topics, inbox, connection, files, limits, stop, report, progress)
        state = client.run()
        if state is not None:
            on_finished(state)
            files.end_run(site.federation)
        return state


@dataclass
class _Client:
    """The training thread's part; everything it waits for is in the inbox."""

    site: Site
    topics: Topics
    inbox: Inbox
    connection: Connection
    files: SiteState
    limits: Limits
    stop: threading.Event
    report: Report
    progress: Progress | None
    checked: Manifest | None = None  # the manifest that was found good
    answered: tuple[Work, int | None] | None = None  # the work whose receipt has come, and its announcement
    last_receipt: Receipt | None = None
    doubtful_since: float | None = None  # when a manifest of another bundle came
    waiting_for: str = ""
    seen: int = 0  # the inbox's version when it was last looked at

    def run(self) -> State | None:
        while not self.stop.is_set():
            self.seen = self.inbox.version
            if not self._is_of_this_bundle():
                self._wait(NEXT_RUN)
                continue
            self._check_manifest()
            self._check_receipt()
            task = self.inbox.task()
            if task is None:
                self._wait("the federation's manifest, round and state")
                continue
            federation, run = self.site.federation, task.manifest.run
            if task.round.phase != "finished":
                self.files.join_run(federation, run)
            elif self.files.is_in_run(federation, run):
                self.report("finished", {"round": task.round.round, "state": task.round.state})
                return task.state
            if task.round.phase == "finished":
                self._wait(NEXT_RUN)
            elif self.site.client not in task.round.clients:
                self._wait(f"the next round (not chosen for round {task.round.round})")
            elif self.answered in ((work := self._work(task), None), (work, task.announcement)):
                self._wait(f"the end of round {task.round.round}")
            elif (payload := self.files.load_update(work)) is not None:
                self._deliver(task, work, payload)
            elif not self._is_active():
                self._wait("the time window in which this site trains")
            else:
                update = self._train(task, work)
                if update is not None:
                    self.files.save_update(work, encode_update(update, task.manifest.encoding))
        return None

    def _is_of_this_bundle(self) -> bool:
        """Refuse a federation of another bundle; False if it is a finished run's, which the broker remembers."""
        manifest = self.inbox.manifest()
        if manifest is None or manifest.bundle == self.site.bundle.digest:
            self.doubtful_since = None
            return True
        self.doubtful_since = self.doubtful_since or time.monotonic()
        phase = self.inbox.phase()
        if phase == "finished" or (phase is None and time.monotonic() - self.doubtful_since < SETTLE_SECONDS):
            return False
        raise ClientError(
            f"federation {manifest.federation} trains the bundle {manifest.bundle[:12]}…, but this site's "
            f"bundle is {self.site.bundle.digest[:12]}…; copy the federation's bundle folder to this site"
        )

    def _check_manifest(self) -> None:
        """Refuse a federation whose updates could not be delivered."""
        manifest = self.inbox.manifest()
        if manifest is None or manifest == self.checked:
            return
        nothing = {name: np.zeros(_sizes(spec.shape), np.float32) for name, spec in manifest.state.items()}
        update = Update(self.site.federation, 0, self.site.client, "0" * 64, 0, 0, {}, nothing)
        size = len(encode_update(update, manifest.encoding))
        if size > manifest.limits.update_bytes:
            raise ClientError(
                f"an update of this bundle has {size} bytes, but federation {manifest.federation} accepts "
                f"{manifest.limits.update_bytes}; ask its operator to raise the limit"
            )
        self.connection.check_size(self.topics.update(0, self.site.client), size)
        self.checked = manifest
        self.report("joined", {"method": manifest.method, "rounds": manifest.training.rounds})

    def _check_receipt(self) -> None:
        """Tell of an update that counted for less than it says: it was long beside the others."""
        if self.last_receipt is None:
            return
        later = self.inbox.receipt(self.last_receipt.update)
        if later is not None and later.reason and later != self.last_receipt:
            self.last_receipt = later
            self._report_receipt(later)
            logger.warning("round %d: %s", later.round, later.reason)

    def _work(self, task: Task) -> Work:
        setup = canonical_json([dataclasses.asdict(task.manifest), self.site.fingerprint])
        return Work(
            federation=self.site.federation,
            client=self.site.client,
            round=task.round.round,
            phase=task.round.phase,
            base=task.round.state,
            setup=hashlib.sha256(setup).hexdigest(),
        )

    def _train(self, task: Task, work: Work) -> Update | None:
        """The round's update; None where it was interrupted."""
        self.waiting_for = ""
        opened, manifest = task.round, task.manifest
        expected = sorted(CALIBRATED) if opened.phase == "calibrate" else sorted(manifest.state)
        if sorted(opened.trainable) != expected:
            raise ClientError(
                f"round {opened.round} ({opened.phase}) asks to train {', '.join(opened.trainable)}, but this "
                f"version trains {', '.join(expected)}; run the same release on all sites"
            )
        self.report("training", {"round": opened.round, "phase": opened.phase})
        limit, start = self.limits.seconds_per_round, time.monotonic()

        saved = start

        def should_stop() -> bool:
            return not self._is_wanted(task) or not self._is_active()

        def on_epoch(checkpoint: Checkpoint) -> None:
            nonlocal saved
            if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                self.files.save_checkpoint(work, checkpoint)
                saved = time.monotonic()

        try:
            update = answer_round(
                self.site.engine,
                self.site.data,
                task.state,
                manifest,
                phase=opened.phase,
                round_number=opened.round,
                client=self.site.client,
                resume=self.files.load_checkpoint(work),
                on_epoch=on_epoch,
                out_of_time=lambda: limit is not None and time.monotonic() - start >= limit,
                should_stop=should_stop,
                progress=self.progress,
            )
        except TrainingStopped:
            self.report("interrupted", {"round": opened.round})
            return None
        seconds = round(time.monotonic() - start, 3)
        self.report(
            "trained",
            {
                "round": opened.round,
                "phase": opened.phase,
                "seconds": seconds,
                "samples": update.samples,
                **update.metrics,
            },
        )
        return update

    def _deliver(self, task: Task, work: Work, payload: bytes) -> None:
        """Send an update until it is answered, or its round is over."""
        digest = hashlib.sha256(payload).hexdigest()
        topic = self.topics.update(work.round, work.client)
        pause, longest = RESEND_SECONDS
        while self._is_wanted(task):
            delivery = self.connection.publish(topic, payload)
            self.report("sent", {"round": work.round, "bytes": len(payload)})
            sent = time.monotonic()
            # What the broker has not taken yet waits in the connection; sending it again would double it.
            while not (delivery.wait(0) and time.monotonic() - sent >= pause):
                self.seen = self.inbox.version
                # Looked up before the receipt, because a round's receipt comes before the next round.
                wanted = self._is_wanted(task)
                receipt = self.inbox.receipt(digest)
                if receipt is not None:
                    self._finish(task, work, receipt)
                    return
                if not wanted:
                    return
                self.inbox.wait(self.seen, LOOK_SECONDS)
            pause = min(2 * pause, longest)

    def _finish(self, task: Task, work: Work, receipt: Receipt) -> None:
        # A round that is announced again may come from an aggregator that has lost our update, so it gets it
        # again (a duplicate changes nothing); what was refused once would be refused again.
        self.answered = (work, None if receipt.status == "rejected" else task.announcement)
        self.last_receipt = receipt
        self._report_receipt(receipt)
        if receipt.status == "rejected":
            logger.error("round %d: update refused (%s): %s", receipt.round, receipt.check, receipt.reason)
            self.files.discard_update(work)

    def _report_receipt(self, receipt: Receipt) -> None:
        facts = {name: getattr(receipt, name) for name in ("round", "status", "check", "reason")}
        self.report("receipt", facts)

    def _is_wanted(self, task: Task) -> bool:
        return not self.stop.is_set() and self.inbox.is_open(task.round)

    def _is_active(self) -> bool:
        window = self.limits.active
        return window is None or window.contains(datetime.datetime.now().time())

    def _wait(self, reason: str) -> None:
        if reason != self.waiting_for:
            self.waiting_for = reason
            self.report("waiting", {"for": reason})
        self.inbox.wait(self.seen, LOOK_SECONDS)


def _sizes(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(int(size) for size in shape)
