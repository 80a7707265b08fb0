"""Conditions are derived in two stages from a server that speaks the chat-completions protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedmpt.export.conditions import DEFAULT_CONDITIONS, ConditionsError, Endpoint, derive_conditions

LABELS = ["cat", "traffic light", "dog", "chair", "bus", "sheep"]
GOOD = ["camera angle", "weather", "crowding", "indoor or outdoor", "object size"]

# An answer: HTTP status, headers, body.
Answer = tuple[int, dict[str, str], bytes]


class Model:
    """A language model of three lines behind a real HTTP server; ``script`` overrides its next answers."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.script: list[Answer] = []
        self.conditions: list[list[str]] = [GOOD]

    def answer(self, request: dict[str, Any], key: str | None) -> Answer:
        self.requests.append(request)
        self.keys.append(key)
        if self.script:
            return self.script.pop(0)
        question = request["messages"][1]["content"]
        if "descriptions" in question:
            asked = sum(line[:1].isdigit() for line in question.splitlines())
            return says({"descriptions": [f"Scene {number}." for number in range(asked)]})
        found = self.conditions.pop(0) if len(self.conditions) > 1 else self.conditions[0]
        return says({"conditions": found})


def says(content: object) -> Answer:
    text = content if isinstance(content, str) else f"Here it is:\n```json\n{json.dumps(content)}\n```"
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def endpoint(model: Model) -> Iterator[Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            status, headers, data = model.answer(body, self.headers["Authorization"])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "tiny", key="secret", timeout_seconds=10)
    server.shutdown()
    thread.join()
    server.server_close()


def never(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s for a healthy server")


def test_combinations_are_described_and_condensed(model: Model, endpoint: Endpoint) -> None:
    steps: list[tuple[int, int | None]] = []
    found = derive_conditions(
        LABELS, 5, endpoint, sleep=never, progress=lambda done, total: steps.append((done, total))
    )
    assert found == tuple(GOOD)
    assert [request["model"] for request in model.requests] == ["tiny"] * 5
    assert model.requests[-1]["messages"][1]["content"].count("- Scene") == 32
    assert steps[-1] == (5, 5)
    assert set(model.keys) == {"Bearer secret"}


def test_the_same_labels_and_seed_ask_the_same_questions(model: Model, endpoint: Endpoint) -> None:
    derive_conditions(LABELS, 5, endpoint, sleep=never)
    derive_conditions(LABELS, 5, endpoint, sleep=never)
    assert model.requests[:5] == model.requests[5:]


def test_accepted_answers_are_cached_without_the_key(
    model: Model, endpoint: Endpoint, tmp_path: Path
) -> None:
    first = derive_conditions(LABELS, 5, endpoint, cache=tmp_path, sleep=never)
    asked = len(model.requests)
    assert derive_conditions(LABELS, 5, endpoint, cache=tmp_path, sleep=never) == first
    assert len(model.requests) == asked
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (["dogs and a dog", *GOOD[1:]], "names the object 'dog'"),
        (["near a traffic light", *GOOD[1:]], "names the object 'traffic light'"),
        (["far too many words in it", *GOOD[1:]], "is not a phrase of one to four words"),
        (["Weather", *GOOD[1:]], "'weather' overlaps 'Weather'"),
        (["weather and light", *GOOD[1:]], "'weather' overlaps 'weather and light'"),
        (["object", *GOOD[1:]], "'object size' overlaps 'object'"),
        (GOOD[:4], "expected 5 items, got 4"),
        ([], "expected 5 items, got 0"),
    ],
)
def test_a_bad_list_goes_back_with_the_reason(
    model: Model, endpoint: Endpoint, bad: list[str], complaint: str
) -> None:
    model.conditions = [bad, GOOD]
    assert derive_conditions(LABELS, 5, endpoint, sleep=never) == tuple(GOOD)
    assert complaint in model.requests[-1]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("status", "headers", "longest"), [(503, {}, 1.0), (429, {"Retry-After": "7"}, 7.0), (500, {}, 1.0)]
)
def test_a_busy_server_is_asked_again(
    model: Model, endpoint: Endpoint, status: int, headers: dict[str, str], longest: float
) -> None:
    pauses: list[float] = []
    model.script = [(status, headers, b"busy")]
    assert derive_conditions(LABELS, 5, endpoint, sleep=pauses.append) == tuple(GOOD)
    assert len(pauses) == 1
    assert 0 <= pauses[0] <= longest
    assert pauses[0] == 7 or "Retry-After" not in headers


def test_an_absurd_wait_is_bounded(model: Model, endpoint: Endpoint) -> None:
    pauses: list[float] = []
    model.script = [(429, {"Retry-After": "86400"}, b"")]
    derive_conditions(LABELS, 5, endpoint, sleep=pauses.append)
    assert pauses == [30]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ((401, {}, b"no"), "HTTP 401 Unauthorized; check the address, model and key"),
        ((404, {}, b"no"), "HTTP 404 Not Found; check the address, model and key"),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), "HTTP 302 Found"),
        ((200, {}, b"<html>hello</html>"), "no chat completion; give an OpenAI-compatible"),
        ((200, {}, b'{"choices": []}'), "no chat completion"),
        ((200, {}, b" " * (2 << 20)), "above 1048576 bytes"),
    ],
)
def test_what_no_retry_can_mend_is_said_at_once(
    model: Model, endpoint: Endpoint, answer: Answer, text: str
) -> None:
    model.script = [answer]
    with pytest.raises(ConditionsError) as caught:
        derive_conditions(LABELS, 5, endpoint, sleep=never)
    assert text in str(caught.value)
    assert len(model.requests) == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("I cannot do that.", "it is no JSON object"),
        ("", "it is no JSON object"),
        ({"answer": []}, 'no list of texts under "descriptions"'),
        ({"descriptions": [1, 2]}, 'no list of texts under "descriptions"'),
    ],
)
def test_a_model_that_never_answers_properly_is_given_up(
    model: Model, endpoint: Endpoint, tmp_path: Path, content: object, text: str
) -> None:
    model.script = [says(content)] * 4
    with pytest.raises(ConditionsError, match="tiny gave no usable descriptions in 4 attempts") as caught:
        derive_conditions(LABELS, 5, endpoint, cache=tmp_path, sleep=never)
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_away_is_named_after_several_attempts() -> None:
    pauses: list[float] = []
    with pytest.raises(ConditionsError, match=r"127\.0\.0\.1:9/v1/chat/completions: .*refused.*, 4 times"):
        derive_conditions(LABELS, 5, Endpoint("http://127.0.0.1:9/v1", "tiny"), sleep=pauses.append)
    assert len(pauses) == 3


def test_only_web_addresses_are_opened() -> None:
    with pytest.raises(ConditionsError, match="not an http:// or https:// address"):
        derive_conditions(LABELS, 5, Endpoint("file:///etc", "tiny"), sleep=never)


def test_the_default_list_would_be_accepted(model: Model, endpoint: Endpoint) -> None:
    model.conditions = [list(DEFAULT_CONDITIONS)]
    assert derive_conditions(LABELS, 5, endpoint, sleep=never) == DEFAULT_CONDITIONS
    assert len(model.requests) == 5


def test_a_single_label_is_enough(model: Model, endpoint: Endpoint) -> None:
    assert derive_conditions(["cat"], 5, endpoint, sleep=never) == tuple(GOOD)
