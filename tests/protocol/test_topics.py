"""Topic names, and names that may stand in them."""

from __future__ import annotations

import pytest

from fedmpt.protocol.topics import TopicError, Topics, check_name

TOPICS = Topics("birds")


def test_topics_are_those_of_protocol_v1() -> None:
    assert TOPICS.manifest == "fedmpt/v1/birds/manifest"
    assert TOPICS.round == "fedmpt/v1/birds/round"
    assert TOPICS.status == "fedmpt/v1/birds/status"
    assert TOPICS.state(7) == "fedmpt/v1/birds/state/7"
    assert TOPICS.update(7, "site-a") == "fedmpt/v1/birds/update/7/site-a"
    assert TOPICS.receipt("site-a") == "fedmpt/v1/birds/receipt/site-a"
    assert TOPICS.presence("site-a") == "fedmpt/v1/birds/presence/site-a"


def test_topics_are_read_back() -> None:
    assert TOPICS.round_and_client_of_update(TOPICS.update(7, "site-a")) == (7, "site-a")
    assert TOPICS.client_of_presence(TOPICS.presence("site-a")) == "site-a"
    assert TOPICS.round_of_state(TOPICS.state(7)) == 7


@pytest.mark.parametrize(
    "topic",
    [
        "fedmpt/v1/fish/update/7/site-a",
        "fedmpt/v1/birds/update/07/site-a",
        "fedmpt/v1/birds/update/-7/site-a",
        "fedmpt/v1/birds/update/99999999/site-a",
        "fedmpt/v1/birds/update/7/..",
        "fedmpt/v1/birds/update/7/site-a/more",
        "fedmpt/v1/birds/update/٧/site-a",
        "",
    ],
)
def test_other_topics_are_no_updates(topic: str) -> None:
    assert TOPICS.round_and_client_of_update(topic) is None


@pytest.mark.parametrize("name", ["", "a/b", "a+", "#", ".hidden", "a b", "ä", "x" * 65, "a\n", "$SYS"])
def test_names_that_would_break_a_topic_are_refused(name: str) -> None:
    with pytest.raises(TopicError, match=r"client name .* cannot be used: take 1 to 64 letters"):
        check_name("client", name)
