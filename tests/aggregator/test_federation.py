"""A whole federation without a broker and without a clock."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmpt.aggregator.admission import Refused
from fedmpt.aggregator.federation import Federation, Outgoing
from fedmpt.aggregator.privacy import PrivacySettings
from fedmpt.aggregator.store import Store, StoreError
from fedmpt.aggregator.strategies import STRATEGIES
from fedmpt.protocol.codec import State, decode_state, state_digest
from fedmpt.protocol.manifest import BundleManifest, canonical_json
from fedmpt.protocol.messages import Manifest, Presence, Receipt, Round, Status, from_json, to_json

MakeSettings = Callable[..., object]
MakeUpdate = Callable[..., bytes]


class Site:
    """The aggregator's side of a federation in one process, with hand-made clients."""

    def __init__(
        self,
        bundle: BundleManifest,
        state: State,
        make_update: MakeUpdate,
        settings: object,
        folder: Path | None,
    ) -> None:
        self.bundle, self.initial, self.make_update, self.settings = bundle, state, make_update, settings
        self.folder = folder
        self.start()

    def start(self) -> None:
        self.store = Store(self.folder)
        self.federation = Federation(self.store, self.bundle, self.initial, self.settings)

    def restart(self) -> None:
        self.store.close()
        self.start()

    def join(self, *clients: str, online: bool = True, bundle: str | None = None) -> Receipt | None:
        receipt = None
        for client in clients:
            message = Presence("birds", client, online, bundle or self.bundle.digest, 10, {})
            receipt = self.federation.presence(client, to_json(message))
        return receipt

    def update(self, client: str, **changes: object) -> bytes:
        federation = self.federation
        fields = {"names": tuple(federation.trainable)} | changes
        return self.make_update(federation.state, client, federation.round.number, **fields)

    def send(self, client: str, **changes: object) -> Receipt | None:
        receipt = self.federation.receive(
            self.federation.round.number, client, self.update(client, **changes)
        )
        self.federation.commit()
        return receipt

    def finish(self, clients: tuple[str, ...] = ("a", "b")) -> None:
        now = 1000.0
        while not self.federation.finished:
            now += 1
            self.federation.tick(now)
            for client in clients:
                self.send(client)


@pytest.fixture
def begin(
    bundle: BundleManifest, state: State, make_update: MakeUpdate, make_settings: MakeSettings, tmp_path: Path
) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(durable: bool = False, **changes: object) -> Site:
        folder = tmp_path / f"store-{len(sites)}" if durable else None
        sites.append(Site(bundle, state, make_update, make_settings(**changes), folder))
        return sites[-1]

    yield make
    for site in sites:
        site.store.close()


def opened(begin: Callable[..., Site], **changes: object) -> Site:
    site = begin(**changes)
    site.join("a", "b")
    site.federation.tick(0.0)
    return site


def by_topic(messages: list[Outgoing]) -> dict[str, bytes]:
    return {message.topic.removeprefix("fedmpt/v1/birds/"): message.payload for message in messages}


def test_a_client_can_join_from_the_retained_topics_alone(
    begin: Callable[..., Site], bundle: BundleManifest
) -> None:
    site = opened(begin)
    retained = by_topic(site.federation.retained())
    assert from_json(Manifest, retained["manifest"], "").bundle == bundle.digest
    message = from_json(Round, retained["round"], "")
    assert (message.round, message.phase, message.clients) == (0, "calibrate", ("a", "b"))
    assert message.trainable == ("bias", "scale")
    assert state_digest(decode_state(retained["state/0"], bundle.state)) == message.state


def test_the_state_is_published_before_its_round_and_the_old_one_deleted_after(
    begin: Callable[..., Site],
) -> None:
    site = opened(begin, norm_factor=0.0)
    site.send("a")
    site.send("b")
    messages = site.federation.tick(1.0)
    names = [message.topic.removeprefix("fedmpt/v1/birds/") for message in messages]
    assert names == ["state/1", "round", "state/0"]
    assert messages[-1].payload == b""


def test_while_clients_are_missing_the_round_names_nobody(begin: Callable[..., Site]) -> None:
    site = begin()
    site.join("a")
    assert site.federation.tick(0.0) == []
    assert from_json(Round, by_topic(site.federation.retained())["round"], "").clients == ()
    assert site.federation.status(0.0).waiting == "waiting for 1 more client to begin"
    site.join("b")
    assert site.federation.tick(1.0) != []


def test_an_update_is_accepted_once(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    assert site.send("a").status == "accepted"
    again = site.send("a", samples=99)
    assert (again.status, again.reason) == ("duplicate", "this round has the client's update")
    assert site.federation.status(0.0).received == 1


def test_an_update_that_was_examined_ahead_is_answered_the_same(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    federation, number = site.federation, site.federation.round.number
    payloads = [site.update("a", step=1e6), b"rubbish", site.update("a"), site.update("a", samples=99)]
    topic = federation.topics.update(number, "a")
    ahead = [
        federation.receive(number, "a", payload, federation.examine(topic, payload)) for payload in payloads
    ]
    site = opened(begin)
    assert ahead == [site.federation.receive(number, "a", payload) for payload in payloads]
    assert [receipt.status for receipt in ahead] == ["rejected", "rejected", "accepted", "duplicate"]


def test_an_update_that_was_examined_for_a_round_that_has_closed_is_stale(begin: Callable[..., Site]) -> None:
    site = opened(begin, deadline=60.0)
    late = site.update("b")
    examined = site.federation.examine(site.federation.topics.update(0, "b"), late)
    assert examined is not None
    site.send("a")
    site.federation.tick(60.0)
    assert site.federation.receive(0, "b", late, examined).status == "stale"


def test_an_update_that_was_examined_for_other_clients_is_examined_again(begin: Callable[..., Site]) -> None:
    site = opened(begin, deadline=60.0)
    site.join("c")
    update, topic = site.update("c"), site.federation.topics.update(0, "c")
    examined = site.federation.examine(topic, update)
    assert examined is not None
    assert isinstance(examined.verdict, Refused)
    assert examined.verdict.check == "chosen"
    site.federation.tick(60.0)  # no update came: it is begun anew, with all who are there
    assert site.federation.receive(0, "c", update, examined).status == "accepted"


def test_only_updates_that_are_waited_for_are_examined_ahead(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    topics, examine = site.federation.topics, site.federation.examine
    update = site.update("a")
    assert site.send("a").status == "accepted"
    for topic in (topics.update(0, "a"), topics.update(1, "b"), topics.presence("b"), topics.round):
        assert examine(topic, update) is None


def test_a_late_update_is_stale(begin: Callable[..., Site]) -> None:
    site = opened(begin, deadline=60.0)
    late = site.update("b")
    site.send("a")
    site.federation.tick(60.0)
    assert site.federation.round.number == 1
    assert site.federation.receive(0, "b", late).status == "stale"


def test_a_refusal_names_the_check_and_the_round_goes_on(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    receipt = site.send("a", step=1e6)
    assert (receipt.status, receipt.check) == ("rejected", "norm")
    assert site.send("a").status == "accepted"


def test_a_client_over_the_limit_of_refusals_is_muted_for_the_round(begin: Callable[..., Site]) -> None:
    site = opened(begin, refusals=3)
    receipts = [site.send("b", step=1e6) for _ in range(6)]
    assert [receipt is None for receipt in receipts] == [False] * 4 + [True] * 2
    assert "muted until the round ends" in receipts[3].reason
    assert site.send("b") is None
    assert site.federation.status(0.0).muted == 1
    site.send("a")
    site.federation.tick(1.0)
    assert site.federation.round.number == 1, "nobody waits for a muted client"
    assert site.send("b").status == "accepted"


def test_refusals_are_counted_per_client_in_the_history(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    for client, step in (("b", 1e6), ("b", 1e6), ("a", 1e6), ("a", 0.1), ("b", 0.1)):
        site.send(client, step=step)
    site.federation.tick(1.0)
    (line,) = site.store.history()
    assert (line["refused"], line["refusals"]) == (3, {"b": 2, "a": 1})


def test_the_history_names_no_more_than_100_refused_clients(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    for number in range(150):
        site.federation.receive(0, f"site-{number}", b"rubbish")
    site.send("a")
    site.send("b")
    site.federation.tick(1.0)
    (line,) = site.store.history()
    assert (line["refused"], len(line["refusals"])) == (150, 100)


def muted_before_any_update(begin: Callable[..., Site], **changes: object) -> Site:
    """A round without a deadline, whose only client is muted."""
    site = begin(clients_min=1, refusals=3, **changes)
    site.join("a")
    site.federation.tick(0.0)
    for _ in range(4):
        site.send("a", step=1e6)
    site.federation.tick(1.0)
    return site


def test_a_round_whose_chosen_clients_are_all_muted_waits_for_others_and_says_so(
    begin: Callable[..., Site],
) -> None:
    site = muted_before_any_update(begin)
    assert site.federation.round.chosen == ()
    assert site.federation.status(1.0).waiting == (
        "waiting for 1 more client to begin, without those muted until a round ends or the aggregator is "
        "restarted: a"
    )
    assert site.send("a") is None, "it is still muted"


def test_a_round_whose_chosen_clients_are_all_muted_goes_on_with_others(begin: Callable[..., Site]) -> None:
    site = muted_before_any_update(begin)
    site.join("b", "c")
    site.federation.tick(2.0)
    assert (site.federation.round.number, site.federation.round.chosen) == (0, ("b", "c"))
    site.send("b")
    site.send("c")
    site.federation.tick(3.0)
    assert site.federation.round.chosen == ("a", "b", "c"), "the next round forgives"


def test_a_deadline_forgives_clients_that_were_all_muted(begin: Callable[..., Site]) -> None:
    site = muted_before_any_update(begin, deadline=60.0)
    site.federation.tick(60.0)
    assert site.federation.round.chosen == ("a",)
    assert site.send("a").status == "accepted"


def test_a_renewed_round_is_not_older_after_a_restart(begin: Callable[..., Site]) -> None:
    site = muted_before_any_update(begin, durable=True)
    renewed = site.federation.round
    site.restart()
    assert site.federation.round == renewed


def test_a_muted_client_does_not_hide_that_the_others_are_absent(begin: Callable[..., Site]) -> None:
    site = opened(begin, refusals=3)
    for _ in range(4):
        site.send("a", step=1e6)
    site.join("b", online=False)
    site.federation.tick(1.0)
    assert site.federation.status(1.0).waiting == "waiting for absent clients: b; not waiting for a (muted)"


def say(site: Site, client: str, **changes: object) -> None:
    """A presence message of a client."""
    said = Presence("birds", client, False, site.bundle.digest, 10, {}, **changes)
    assert site.federation.presence(client, to_json(said)) is None


def test_a_site_that_leaves_frees_its_place_at_once(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    site.send("a")
    assert site.federation.tick(1.0) == []
    say(site, "b", left=True)
    site.federation.tick(1.0)
    assert site.federation.round.number == 1


def test_a_site_that_is_offline_without_having_left_keeps_its_place(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    site.send("a")
    say(site, "b")
    site.federation.tick(1e6)
    assert site.federation.round.number == 0
    assert site.federation.status(1.0).waiting == "waiting for absent clients: b"


def test_a_site_that_left_and_is_back_is_waited_for_again(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    say(site, "b", left=True)
    assert site.federation.status(1.0).waiting == "waiting for a; not waiting for b (left)"
    site.join("b")
    site.send("a")
    site.federation.tick(1.0)
    assert site.federation.round.number == 0
    assert site.federation.status(1.0).waiting == "waiting for b"


@pytest.mark.parametrize("deadline", [None, 60.0])
def test_where_all_have_left_the_round_begins_anew_with_others(
    begin: Callable[..., Site], deadline: float | None
) -> None:
    site = opened(begin, deadline=deadline)
    site.join("c", "d")
    for client in ("a", "b"):
        say(site, client, left=True)
    site.federation.tick(1.0)
    assert site.federation.round.chosen == ("c", "d")


def test_a_site_whose_update_came_may_leave(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    site.send("a")
    say(site, "a", left=True)
    site.send("b")
    site.federation.tick(1.0)
    assert site.federation.round.number == 1
    assert set(site.store.history()[0]["bytes"]) == {"a", "b"}


def test_a_refused_client_is_not_waited_for(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    assert site.send("b", step=1e6).check == "norm"
    assert site.federation.status(1.0).waiting == "waiting for a; not waiting for b (norm)"
    site.send("a")
    site.federation.tick(1.0)
    assert site.federation.round.number == 1
    site.federation.tick(1.0)
    assert site.federation.round.chosen == ("a", "b")


def test_a_refused_client_whose_next_update_is_good_counts(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    site.send("b", step=1e6)
    assert site.send("b").status == "accepted"
    site.send("a")
    site.federation.tick(1.0)
    assert set(site.store.history()[0]["bytes"]) == {"a", "b"}


@pytest.mark.parametrize("deadline", [None, 60.0])
def test_where_all_are_refused_it_says_so_and_takes_others(
    begin: Callable[..., Site], deadline: float | None
) -> None:
    site = opened(begin, deadline=deadline)
    for client in ("a", "b"):
        site.send(client, step=1e6)
    site.federation.tick(1.0)
    assert site.federation.status(1.0).waiting == (
        "waiting for others than those whose update was refused: a, b"
    )
    site.join("c")
    site.federation.tick(2.0)
    assert site.federation.round.chosen == ("a", "b", "c")
    assert site.federation.status(2.0).waiting == "waiting for c; not waiting for a (norm), b (norm)"
    site.send("c")
    site.federation.tick(3.0)
    assert site.federation.round.number == 1


def test_where_one_is_refused_and_the_other_leaves_the_round_goes_on_when_it_is_back(
    begin: Callable[..., Site],
) -> None:
    site = opened(begin, deadline=3600.0)
    site.send("a", step=1e6)
    say(site, "b", left=True)
    site.federation.tick(1.0)
    assert site.federation.round.chosen == ()
    site.join("b")
    site.federation.tick(2.0)
    site.send("b")
    site.federation.tick(3.0)
    assert set(site.store.history()[0]["bytes"]) == {"b"}


def test_a_client_that_answered_an_earlier_state_is_still_waited_for(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    late = site.make_update(
        {name: value + 1 for name, value in site.initial.items()}, "a", 0, names=("bias", "scale")
    )
    assert site.federation.receive(0, "a", late).check == "base"
    assert site.federation.status(1.0).waiting == "waiting for a, b"


def test_who_has_left_is_known_beyond_a_reconnection(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    say(site, "b", left=True)
    site.federation.reconnected()
    site.join("a")
    site.send("a")
    site.federation.tick(1.0)
    assert site.federation.round.number == 1


def test_a_refused_client_that_is_started_anew_is_chosen_again(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    for client in ("a", "b"):
        site.send(client, step=1e6)
        say(site, client, left=True)
    site.federation.tick(1.0)
    site.join("a", "b")
    site.federation.tick(2.0)
    assert site.federation.round.chosen == ("a", "b")
    assert site.send("a").status == "accepted"


def test_absent_and_present_clients_are_told_apart(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    site.join("b", online=False)
    assert site.federation.status(1.0).waiting == "waiting for a; absent: b"


def test_a_run_has_one_identity_for_as_long_as_its_store(begin: Callable[..., Site]) -> None:
    site = begin(durable=True)
    run = site.federation.run
    site.restart()
    assert site.federation.run == run
    retained = by_topic(site.federation.retained())
    assert from_json(Manifest, retained["manifest"], "").run == run
    assert from_json(Round, retained["round"], "").run == run
    assert begin(durable=True).federation.run != run


def test_what_the_broker_keeps_of_an_earlier_run_is_deleted(begin: Callable[..., Site]) -> None:
    earlier = begin()
    earlier.join("a", "b")
    earlier.finish()
    left = by_topic(earlier.federation.retained())
    site = opened(begin)
    answer = site.federation.echo(left["round"])
    assert by_topic(answer) == {
        "round": by_topic(site.federation.retained())["round"],
        "state/3": b"",
        "state/4": b"",
    }
    assert all(message.retain for message in answer)
    own = by_topic(site.federation.retained())["round"]
    assert site.federation.echo(own) == []
    site.send("a")
    site.send("b")
    site.federation.tick(1.0)
    assert list(by_topic(site.federation.echo(own))) == ["round"]


def test_a_state_of_this_run_is_not_deleted_for_an_earlier_ones(begin: Callable[..., Site]) -> None:
    earlier = opened(begin)
    site = opened(begin)
    left = by_topic(earlier.federation.retained())["round"]
    assert list(by_topic(site.federation.echo(left))) == ["round"]


@pytest.mark.parametrize("payload", [b"", b"{", b"[]"])
def test_a_strangers_round_is_answered_with_ours(begin: Callable[..., Site], payload: bytes) -> None:
    assert list(by_topic(opened(begin).federation.echo(payload))) == ["round"]


SIX = ("a", "b", "c", "d", "e", "f")


def of_six(begin: Callable[..., Site], **changes: object) -> Site:
    site = begin(**({"clients_min": 6, "calibrate": False} | changes))
    site.join(*SIX)
    site.federation.tick(0.0)
    return site


def closed_with(site: Site, order: tuple[str, ...] = SIX, **steps: float) -> dict[str, Receipt]:
    """Send all updates, ``steps`` times as long as others', and close the round: what clients are told at the end."""
    for client in order:
        assert site.send(client, step=0.1 * steps.get(client, 1.0)).status == "accepted"
    messages = site.federation.tick(1.0)
    assert all(message.retain != ("/receipt/" in message.topic) for message in messages)
    return {
        topic.removeprefix("receipt/"): from_json(Receipt, payload, topic)
        for topic, payload in by_topic(messages).items()
        if topic.startswith("receipt/")
    }


def moved(site: Site) -> float:
    """How far the round moved the state."""
    return float(
        np.sqrt(sum(((site.federation.state[name] - site.initial[name]) ** 2).sum() for name in site.initial))
    )


def test_an_update_much_longer_than_the_others_counts_with_ten_times_their_median_and_is_told(
    begin: Callable[..., Site],
) -> None:
    site = of_six(begin)
    receipts = closed_with(site, c=1000.0)
    assert list(receipts) == ["c"]
    assert (receipts["c"].status, receipts["c"].check) == ("accepted", "norm")
    assert "10 times the median of this round's 6 updates" in receipts["c"].reason
    (record,) = site.store.history()
    assert record["norms"]["limit"] == 10 * record["norms"]["median"]
    assert record["scaled"] == {"c": record["norms"]["largest"]}
    assert record["norms"]["largest"] > 30 * record["norms"]["median"]
    # A sixth of the long update, and five sixths of five short ones at most.
    assert moved(site) <= record["norms"]["limit"] / 6 + 5 / 6 * 2 * record["norms"]["median"]


def test_scaling_down_is_what_it_says(begin: Callable[..., Site]) -> None:
    site, plain = of_six(begin), of_six(begin, norm_factor=0.0)
    closed_with(site, c=1000.0)
    (record,) = site.store.history()
    scale = record["norms"]["limit"] / record["norms"]["largest"]
    closed_with(plain, c=1000.0 * scale)
    for name in site.initial:
        np.testing.assert_allclose(site.federation.state[name], plain.federation.state[name], rtol=1e-5)


def test_the_order_of_arrival_changes_nothing_in_it(begin: Callable[..., Site]) -> None:
    forwards, backwards = of_six(begin), of_six(begin)
    first = closed_with(forwards, SIX, a=1000.0)
    second = closed_with(backwards, SIX[::-1], a=1000.0)
    assert list(first) == list(second) == ["a"]
    assert forwards.federation.digest == backwards.federation.digest


def test_nor_does_a_restart(begin: Callable[..., Site]) -> None:
    calm, site = of_six(begin), of_six(begin, durable=True)
    closed_with(calm, b=1000.0)
    for client in SIX:
        site.send(client, step=100.0 if client == "b" else 0.1)
    site.restart()
    site.join(*SIX)
    assert "receipt/b" in by_topic(site.federation.tick(1.0))
    assert site.federation.digest == calm.federation.digest


def test_a_restart_with_other_limits_knows_the_norms_all_the_same(
    begin: Callable[..., Site], make_settings: MakeSettings
) -> None:
    site = of_six(begin, durable=True)
    for client in SIX:
        site.send(client, step=100.0 if client == "b" else 0.1)
    site.settings = make_settings(clients_min=6, calibrate=False, norm=1.0)
    site.restart()
    site.federation.tick(1.0)
    assert list(site.store.history()[0]["scaled"]) == ["b"]


def test_of_fewer_than_three_the_state_sets_the_bound(begin: Callable[..., Site]) -> None:
    site = opened(begin, calibrate=False)
    site.send("a", step=300.0)
    site.send("b")
    messages = by_topic(site.federation.tick(1.0))
    reason = from_json(Receipt, messages["receipt/a"], "").reason
    norm = float(np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in site.initial.values())))
    assert f"it counts with {10 * norm:.6g}, 10 times the norm of the state" in reason
    assert "receipt/b" not in messages


def test_in_a_calibration_of_two_the_shorter_sets_the_bound(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    receipts = closed_with(site, ("a", "b"), a=1000.0)
    (record,) = site.store.history()
    assert record["scaled"] == {"a": record["norms"]["largest"]}
    assert record["norms"]["limit"] == 2 * record["norms"]["median"]
    assert "2 times the median of this round's 2 updates" in receipts["a"].reason


@pytest.mark.parametrize("changes", [{"norm_factor": 0.0}, {"clients_min": 1, "calibrate": True}])
def test_without_a_factor_and_in_a_calibration_of_one_none_is_scaled(
    begin: Callable[..., Site], changes: dict[str, float]
) -> None:
    site = begin(**({"clients_min": 6, "calibrate": False} | changes))
    few = SIX[: site.settings.rounds.clients_min]
    site.join(*few)
    site.federation.tick(0.0)
    assert closed_with(site, few, a=1000.0) == {}
    (record,) = site.store.history()
    assert record["scaled"] == {}
    assert "limit" not in record["norms"]


def test_updates_that_change_nothing_do_not_make_the_others_long(begin: Callable[..., Site]) -> None:
    site = of_six(begin)
    assert closed_with(site, b=0.0, c=0.0, d=0.0, e=0.0) == {}


def test_with_privacy_what_an_update_counts_for_does_not_depend_on_the_others(
    begin: Callable[..., Site],
) -> None:
    privacy = PrivacySettings(noise_multiplier=5.0, clip_norm=1.0, delta=1e-6)
    site = of_six(begin, privacy=privacy, metrics=False)
    for client in SIX:
        site.send(client, step=100.0 if client == "a" else 0.1, metrics={})
    assert not [topic for topic in by_topic(site.federation.tick(1.0)) if topic.startswith("receipt/")]
    (record,) = site.store.history()
    assert not {"norms", "scaled"} & record.keys()


def leave_unusable(site: Site, *clients: str) -> None:
    """Put updates into the store that an earlier release may have taken, and this one cannot read."""
    payload = b"of an earlier release"
    for client in clients:
        site.store.add_update(client, payload, hashlib.sha256(payload).digest())
    site.restart()
    site.join("a", "b")
    assert site.federation.status(0.0).received == len(clients)


def test_an_update_that_can_be_decoded_no_more_is_dropped_and_the_round_goes_on(
    begin: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    site = opened(begin, durable=True)
    leave_unusable(site, "a")
    site.send("b")
    site.federation.tick(1.0)
    assert "update dropped" in caplog.messages
    site.federation.tick(2.0)
    (line,) = site.store.history()
    assert list(line["bytes"]) == ["b"]
    assert line["refusals"] == {"a": 11}, "its sender is muted for the round"


def test_where_no_update_is_left_at_the_end_the_round_waits(begin: Callable[..., Site]) -> None:
    site = opened(begin, durable=True)
    before = site.federation.digest
    leave_unusable(site, "a", "b")
    for now in (1.0, 2.0, 3.0):
        site.federation.tick(now)
    assert (site.federation.round.number, site.federation.digest) == (0, before)
    assert "those muted until a round ends or the aggregator is restarted: a, b" in (
        site.federation.status(3.0).waiting
    )


def test_made_up_metrics_do_not_crowd_out_the_known_ones(begin: Callable[..., Site]) -> None:
    site = begin(clients_min=4)
    clients = ("a", "b", "c", "d")
    site.join(*clients)
    site.federation.tick(0.0)
    for client in clients[:3]:
        metrics = {f"{client}{number:02}".ljust(64, "x"): 0.5 for number in range(32)}
        assert site.send(client, metrics=metrics).status == "accepted"
    known = {"mAP": 0.5, "CF1": 0.4, "OF1": 0.3, "loss": 2.0}
    site.send("d", metrics=known)
    site.federation.tick(1.0)
    status = site.federation.status(1.0)
    assert {name: status.metrics[name] for name in known} == pytest.approx(known)
    assert len(status.metrics) == 16
    assert len(to_json(status)) < 2000


any_text = st.text(st.characters(), max_size=20)  # half surrogate pairs and control characters too
any_number = st.integers() | st.floats() | st.sampled_from((1.7e308, -1e308, 1e12, 10**400, 5e-324))


def with_header(payload: bytes, **changes: object) -> bytes:
    """The payload of an update with fields of its header replaced, as a hostile client would."""
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["fedmpt"]) | changes
    return safetensors.numpy.save(safetensors.numpy.load(payload), {"fedmpt": json.dumps(header)})


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(("bundle", "samples", "federation", "online", "version", "weather")),
        any_text | any_number,
    ),
    st.dictionaries(any_text, any_text | any_number, max_size=3),
    st.dictionaries(
        st.sampled_from(
            ("base", "round", "samples", "validation_samples", "federation", "client", "version")
        ),
        any_text | any_number,
        max_size=2,
    ),
    st.lists(st.dictionaries(any_text | st.just("mAP"), any_number, max_size=3), min_size=2, max_size=2),
)
def test_whatever_strangers_write_can_be_answered_and_the_round_closes(
    begin: Callable[..., Site],
    presence: dict[str, object],
    capabilities: dict[str, object],
    header: dict[str, object],
    metrics: list[dict[str, object]],
) -> None:
    site = begin(clients_min=3)
    site.join("a", "b", "c")
    site.federation.tick(0.0)
    said = json.loads(to_json(Presence("birds", "d", True, site.bundle.digest, 10, {})))
    answers = [
        site.federation.presence("d", json.dumps(said | presence | {"capabilities": capabilities}).encode())
    ]
    for client, values in zip("ab", metrics, strict=True):
        for changes in (header | {"metrics": values}, {"metrics": values}):
            payload = with_header(site.update(client), **changes)
            answers.append(site.federation.receive(0, client, payload))
        answers.append(site.send(client))
    answers.append(site.send("c"))
    for answer in answers:
        if answer is not None:
            assert from_json(Receipt, to_json(answer), "") == answer
            assert answer.reason.isprintable()
    site.federation.tick(1.0)
    assert site.federation.round.number == 1
    status = site.federation.status(1.0)
    assert from_json(Status, to_json(status), "") == status
    assert canonical_json(site.store.history())


@pytest.mark.parametrize("kind", ["duplicate", "stale"])
def test_a_flood_of_repetitions_mutes_its_sender_for_the_round(begin: Callable[..., Site], kind: str) -> None:
    site = opened(begin, refusals=3)
    number = {"duplicate": 0, "stale": 7}[kind]
    payload = site.update("b")
    if kind == "duplicate":
        site.send("b")
    receipts = [site.federation.receive(number, "b", payload) for _ in range(40)]
    assert [receipt.status for receipt in receipts[:31]] == [kind] * 31
    assert "repeated 31 times: muted until the round ends" in receipts[30].reason
    assert receipts[31:] == [None] * 9
    assert site.federation.status(0.0).muted == 1
    site.send("a")
    site.federation.tick(1.0)
    assert site.federation.round.number == 1, "its update counts if it came before the flood; nobody waits"
    assert site.send("b").status == "accepted"


def test_what_the_broker_repeats_after_a_reconnection_mutes_nobody(begin: Callable[..., Site]) -> None:
    site = opened(begin, refusals=1)
    payload = site.update("b")
    site.send("b")
    for _ in range(20):
        site.federation.reconnected()
        site.join("a", "b")
        assert [site.federation.receive(0, "b", payload).status for _ in range(3)] == ["duplicate"] * 3
    assert site.federation.status(0.0).muted == 0


def test_a_client_of_another_bundle_is_told_so_and_not_chosen(begin: Callable[..., Site]) -> None:
    site = begin()
    receipt = site.join("a", bundle="00" * 32)
    assert (receipt.status, receipt.check) == ("rejected", "bundle")
    assert "copy the aggregator's bundle folder" in receipt.reason
    assert site.federation.present() == []


def test_a_presence_in_another_clients_name_is_refused(
    begin: Callable[..., Site], bundle: BundleManifest
) -> None:
    site = begin()
    message = Presence("birds", "a", True, bundle.digest, 10, {})
    assert site.federation.presence("b", to_json(message)).check == "identity"


def test_when_all_clients_are_gone_it_waits_says_so_and_goes_on(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    site.join("a", "b", online=False)
    assert site.federation.tick(1e6) == []
    assert site.federation.status(0.0).waiting == "waiting for absent clients: a, b"
    site.join("a", "b")
    assert site.federation.status(0.0).waiting == "waiting for a, b"
    site.send("a")
    site.send("b")
    site.federation.tick(2e6)
    assert site.federation.round.number == 1


def test_a_deadline_without_updates_renews_the_round_with_those_present(begin: Callable[..., Site]) -> None:
    site = opened(begin, deadline=60.0)
    site.join("b", online=False)
    site.join("c")
    before = site.federation.digest
    messages = by_topic(site.federation.tick(60.0))
    message = from_json(Round, messages["round"], "")
    assert (message.round, message.clients, message.deadline) == (0, ("a", "c"), 120.0)
    assert message.state == before


def test_a_late_joiner_takes_part_from_the_next_round(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    site.join("c")
    assert site.send("c").check == "chosen"
    site.send("a")
    site.send("b")
    site.federation.tick(1.0)
    assert site.federation.round.chosen == ("a", "b", "c")


def test_calibration_moves_scale_and_bias_alone(begin: Callable[..., Site], state: State) -> None:
    site = opened(begin)
    site.send("a")
    site.send("b")
    site.federation.tick(1.0)
    changed = {name for name in state if not np.array_equal(state[name], site.federation.state[name])}
    assert changed == {"bias", "scale"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_of_arrival_changes_no_bit(strategy: str, begin: Callable[..., Site]) -> None:
    clients = ("a", "b", "c", "d", "e")
    digests = set()
    for order in (clients, clients[::-1], ("c", "a", "e", "b", "d")):
        site = begin(strategy=strategy, clients_min=5)
        site.join(*order)
        site.finish(order)
        digests.add(site.federation.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("strategy", ["uniform", "fedavgm", "fedyogi"])
def test_restarts_at_every_step_change_no_bit(strategy: str, begin: Callable[..., Site]) -> None:
    undisturbed = begin(strategy=strategy)
    undisturbed.join("a", "b")
    undisturbed.finish()
    site = begin(durable=True, strategy=strategy)
    now = 0.0
    while not site.federation.finished:
        site.join("a", "b")
        now += 1
        site.federation.tick(now)
        site.restart()
        site.send("a")
        site.restart()
        assert site.send("a").status == "duplicate"
        site.send("b")
        site.restart()
        site.federation.tick(now + 0.5)
    assert site.federation.digest == undisturbed.federation.digest


def test_history_has_the_sample_weighted_metrics_and_the_bytes(begin: Callable[..., Site]) -> None:
    site = opened(begin)
    sizes = {
        client: len(site.update(client, metrics={"mAP": value})) for client, value in (("a", 0.2), ("b", 0.6))
    }
    base = site.federation.digest
    site.send("a", metrics={"mAP": 0.2}, samples=30)
    site.send("b", metrics={"mAP": 0.6})
    site.federation.tick(7.0)
    (line,) = site.store.history()
    assert line["bytes"] == pytest.approx(sizes, abs=1)
    assert line["metrics"] == {"mAP": pytest.approx(0.4)}
    assert (line["round"], line["phase"], line["seconds"], line["received"]) == (0, "calibrate", 7.0, 2)
    assert (line["samples"], line["validation_samples"]) == (40, 8)
    assert (line["base"], line["state"]) == (base, site.federation.digest)


def test_the_end_is_announced_with_the_final_state(
    begin: Callable[..., Site], bundle: BundleManifest
) -> None:
    site = begin()
    site.join("a", "b")
    site.finish()
    retained = by_topic(site.federation.retained())
    message = from_json(Round, retained["round"], "")
    assert (message.round, message.phase, message.clients) == (4, "finished", ())
    assert (
        state_digest(decode_state(retained["state/4"], bundle.state))
        == message.state
        == site.federation.digest
    )
    assert site.send("a").status == "stale"


def test_a_store_of_another_strategy_is_refused(
    begin: Callable[..., Site], make_settings: MakeSettings, bundle: BundleManifest, state: State
) -> None:
    site = begin()
    with pytest.raises(StoreError, match="begun with strategy"):
        Federation(site.store, bundle, state, make_settings(strategy="median"))


def test_with_privacy_the_history_has_a_growing_epsilon(begin: Callable[..., Site]) -> None:
    pytest.importorskip("dp_accounting", reason="the privacy extra is not installed")
    privacy = PrivacySettings(noise_multiplier=1.0, clip_norm=1.0, delta=1e-5)
    site = opened(begin, privacy=privacy, metrics=False, rounds=1)
    while not site.federation.finished:
        for client in ("a", "b"):
            assert site.send(client, metrics={}).status == "accepted"
        site.federation.tick(1.0)
    epsilons = [line["epsilon"] for line in site.store.history()]
    assert 0 < epsilons[0] < epsilons[1]


def test_with_privacy_the_history_has_no_counts_of_photos(begin: Callable[..., Site]) -> None:
    pytest.importorskip("dp_accounting", reason="the privacy extra is not installed")
    privacy = PrivacySettings(noise_multiplier=1.0, clip_norm=1.0, delta=1e-5)
    site = opened(begin, privacy=privacy, metrics=False, rounds=1)
    for client in ("a", "b"):
        site.send(client, metrics={}, samples=30)
    site.federation.tick(1.0)
    (line,) = site.store.history()
    assert not {"samples", "validation_samples"} & line.keys()
    assert line["metrics"] == {}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_sequence_of_messages_stops_it_or_counts_twice(
    begin: Callable[..., Site], data: st.DataObject
) -> None:
    site = begin(deadline=50.0, rounds=2)
    clients = ("a", "b", "c")
    now = 0.0
    for _ in range(data.draw(st.integers(1, 25))):
        client = data.draw(st.sampled_from(clients))
        match data.draw(st.sampled_from(("join", "leave", "send", "bad", "rubbish", "tick", "late"))):
            case "join":
                site.join(client)
            case "leave":
                site.join(client, online=False)
            case "send":
                site.send(client)
            case "bad":
                site.send(client, step=1e6)
            case "rubbish":
                payload = data.draw(st.binary(max_size=40))
                site.federation.receive(site.federation.round.number, client, payload)
                site.federation.presence(client, payload)
            case "late":
                site.federation.receive(data.draw(st.integers(0, 9)), client, site.update(client))
            case "tick":
                now += data.draw(st.sampled_from((0.0, 1.0, 60.0)))
                before = site.federation.round.number
                site.federation.tick(now)
                assert site.federation.round.number in (before, before + 1)
        status = site.federation.status(now)
        assert status.received == len(site.store.clients()) <= status.chosen
        assert site.federation.digest == state_digest(site.federation.state)
    for line in site.store.history():
        assert 1 <= line["received"] <= line["chosen"]
