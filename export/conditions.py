"""Derive conditions for a list of labels with any language model behind an OpenAI-compatible endpoint.

Two stages: the model describes how many random combinations of labels look together; then it condenses these
descriptions to N short conditions that do not overlap and name no label. Answers are checked, a bad one is
sent back with the reason, good ones are cached. Without an endpoint ``DEFAULT_CONDITIONS`` serve.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import Message
from functools import partial
from pathlib import Path
from typing import IO, Any

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import write_atomically
from fedmpt.protocol.manifest import canonical_json

DEFAULT_CONDITIONS = (
    "spatial layout",
    "object pose",
    "background",
    "lighting and weather",
    "object scale",
)
COMBINATIONS = 32
COMBINATIONS_PER_REQUEST = 8
ATTEMPTS = 4
MAXIMUM_ANSWER_BYTES = 1 << 20
MAXIMUM_WORDS = 4
LONGEST_PAUSE_SECONDS = 30.0

SYSTEM = "You help to recognise objects in photos. Answer with one JSON object and nothing else."
DESCRIBE = """\
For each combination of objects below, describe in one sentence what a photo of them together can look like: where \
they stand, how they are posed, what surrounds them, light and weather, how large they appear.
{combinations}
Answer as {{"descriptions": ["…", …]}} with exactly {count} sentences, in this order."""
CONDENSE = """\
These sentences describe photos:
{descriptions}
Name exactly {count} general visual conditions in which such photos differ from each other. Each is a phrase of one to \
four words, in lower case; they do not overlap, and none names an object such as {examples}.
Answer as {{"conditions": ["…", …]}}."""

Progress = Callable[[int, "int | None"], None]
Sleep = Callable[[float], None]


class ConditionsError(FedmptError):
    """The endpoint cannot be reached or refuses, or its answers stay unusable."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server: ``url`` up to and including ``/v1``; ``key`` goes into no file or message."""

    url: str
    model: str
    key: str | None = None
    timeout_seconds: float = 60.0


def derive_conditions(
    labels: Sequence[str],
    count: int,
    endpoint: Endpoint,
    *,
    cache: Path | None = None,
    seed: int = 0,
    sleep: Sleep = time.sleep,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Ask for ``count`` conditions that suit the labels.

    Args:
        cache: folder of accepted answers; the same question is asked once.
        seed: of the label combinations.
        sleep: how to wait between attempts (tests pass their own).

    Raises:
        ConditionsError: the text says what was wrong and with which server.
    """
    if not endpoint.url.startswith(("http://", "https://")):
        raise ConditionsError(
            f"{endpoint.url}: not an http:// or https:// address; give one like http://host:8000/v1"
        )
    combinations = _combinations(labels, random.Random(seed))
    batches = [
        combinations[start : start + COMBINATIONS_PER_REQUEST]
        for start in range(0, len(combinations), COMBINATIONS_PER_REQUEST)
    ]
    descriptions: list[str] = []
    for done, batch in enumerate(batches):
        if progress:
            progress(done, len(batches) + 1)
        listed = "\n".join(f"{number}. {', '.join(names)}" for number, names in enumerate(batch, 1))
        question = DESCRIBE.format(combinations=listed, count=len(batch))
        check = partial(_check_count, count=len(batch))
        descriptions += _ask(endpoint, question, "descriptions", check, cache, sleep)
    if progress:
        progress(len(batches), len(batches) + 1)
    question = CONDENSE.format(
        descriptions="\n".join(f"- {text}" for text in descriptions),
        count=count,
        examples=", ".join(labels[:5]),
    )
    found = _ask(
        endpoint, question, "conditions", lambda found: _check_conditions(found, count, labels), cache, sleep
    )
    if progress:
        progress(len(batches) + 1, len(batches) + 1)
    return tuple(found)


def _combinations(labels: Sequence[str], generator: random.Random) -> list[list[str]]:
    """Random sets of one to four labels, each set once."""
    chosen: dict[frozenset[str], list[str]] = {}
    for _ in range(4 * COMBINATIONS):
        names = generator.sample(list(labels), min(len(labels), generator.randint(1, 4)))
        chosen.setdefault(frozenset(names), names)
        if len(chosen) == COMBINATIONS:
            break
    return list(chosen.values())


def _check_count(found: list[str], count: int) -> str | None:
    return None if len(found) == count else f"expected {count} items, got {len(found)}"


def _check_conditions(found: list[str], count: int, labels: Sequence[str]) -> str | None:
    """What is wrong with the conditions, in words that the model can act upon; None if nothing."""
    names = {" ".join(re.findall(r"\w+", label.casefold())) for label in labels}
    earlier: dict[str, set[str]] = {}
    for condition in found:
        words = re.findall(r"[\w-]+", condition.casefold())
        if not 1 <= len(words) <= MAXIMUM_WORDS or not condition.isprintable():
            return f"{condition!r} is not a phrase of one to four words"
        text = f" {' '.join(words)} "
        named = next((name for name in sorted(names) if f" {name} " in text), None)
        if named:
            return f"{condition!r} names the object {named!r}"
        own = set(words)
        twin = next((other for other, its in earlier.items() if own <= its or its <= own), None)
        if twin:
            return f"{condition!r} overlaps {twin!r}: the words of one are all in the other"
        earlier[condition] = own
    return _check_count(found, count)


def _ask(
    endpoint: Endpoint,
    question: str,
    field: str,
    check: Callable[[list[str]], str | None],
    cache: Path | None,
    sleep: Sleep,
) -> list[str]:
    """One question until its answer passes ``check``; a wrong answer goes back with the complaint."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    key = hashlib.sha256(canonical_json([endpoint.url, endpoint.model, messages, field])).hexdigest()
    stored = cache / f"{key}.json" if cache else None
    if stored and stored.is_file():
        found, complaint = _parse(stored.read_text(encoding="utf-8"), field, check)
        if not complaint:
            return found
    complaint = ""
    for _ in range(ATTEMPTS):
        answer = _complete(endpoint, messages, sleep)
        found, complaint = _parse(answer, field, check)
        if not complaint:
            if stored:
                write_atomically(stored, json.dumps({field: found}, ensure_ascii=False))
            return found
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": f"That cannot be used: {complaint}. Answer again."},
        ]
    raise ConditionsError(
        f"{endpoint.url}: {endpoint.model} gave no usable {field} in {ATTEMPTS} attempts (last: {complaint}); "
        "try another model, or use the default conditions"
    )


def _parse(answer: str, field: str, check: Callable[[list[str]], str | None]) -> tuple[list[str], str]:
    """The list under ``field`` and an empty complaint, or the complaint."""
    begin, end = answer.find("{"), answer.rfind("}")
    try:
        value = json.loads(answer[begin : end + 1])
    except (ValueError, RecursionError):
        return [], "it is no JSON object"
    items = value.get(field) if isinstance(value, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, str) and item.strip() for item in items):
        return [], f'it has no list of texts under "{field}"'
    found = [" ".join(item.split()) for item in items]
    return found, check(found) or ""


def _complete(endpoint: Endpoint, messages: list[dict[str, str]], sleep: Sleep) -> str:
    """One chat completion; busy servers and broken connections are tried again, with growing random pauses."""
    url = endpoint.url.rstrip("/") + "/chat/completions"
    body = json.dumps({"model": endpoint.model, "messages": messages, "temperature": 0.7}).encode()
    headers = {"Content-Type": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    problem = ""
    for attempt in range(ATTEMPTS):
        pause = random.uniform(0, min(2.0**attempt, LONGEST_PAUSE_SECONDS))
        try:
            request = urllib.request.Request(url, body, headers)
            with _OPENER.open(request, timeout=endpoint.timeout_seconds) as response:
                data = response.read(MAXIMUM_ANSWER_BYTES + 1)
            return _content(data, url)
        except urllib.error.HTTPError as error:
            with error:
                problem = f"HTTP {error.code} {error.reason}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise ConditionsError(f"{url}: {problem}; check the address, model and key") from None
                pause = max(pause, _retry_after(error.headers))
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        if attempt + 1 < ATTEMPTS:
            sleep(pause)
    raise ConditionsError(f"{url}: {problem}, {ATTEMPTS} times; is the server running and reachable?")


def _content(data: bytes, url: str) -> str:
    if len(data) > MAXIMUM_ANSWER_BYTES:
        raise ConditionsError(
            f"{url}: an answer above {MAXIMUM_ANSWER_BYTES} bytes; this is no chat completion"
        )
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise ConditionsError(
            f"{url}: the answer is no chat completion; give an OpenAI-compatible server's /v1"
        )
    return content


def _retry_after(headers: Message) -> float:
    """Seconds that the server asks to wait, bounded; 0 if it asks for none."""
    value = headers.get("Retry-After", "")
    return min(float(value), LONGEST_PAUSE_SECONDS) if re.fullmatch(r"\d{1,6}", value) else 0.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Any:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
