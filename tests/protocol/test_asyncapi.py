"""docs/asyncapi.yaml describes what the code sends: topics, fields, enumerations, and one frozen message of each kind.

The golden files are protocol version 1 and never change; a change that breaks them needs another version.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml

from fedmpt.protocol import codec, messages
from fedmpt.protocol.manifest import TensorSpec, Training
from fedmpt.protocol.messages import Limits, Manifest, Presence, Receipt, Round, Status
from fedmpt.protocol.topics import Topics

GOLDEN = Path(__file__).parent / "golden"
DOCUMENT = yaml.safe_load((Path(__file__).parents[2] / "docs" / "asyncapi.yaml").read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]
SPECS = {"class_context": TensorSpec("float32", (2, 3)), "scale": TensorSpec("float32", ())}

EXAMPLES = {
    "manifest": Manifest(
        federation="birds",
        method="fedmpt-prompts",
        labels=("great tit", "Bläßhuhn"),
        conditions=("background", "lighting and weather"),
        bundle="ab" * 32,
        state=SPECS,
        training=Training("sgd", 0.001, 0.9, 0.0, 0.0, 10.0, 32, 1, 20, True, 1.0, 2.0, 0.05, 0),
        strategy="uniform",
        encoding="float16",
        metrics=True,
        limits=Limits(65_600, 10_000_000, 1000.0),
        run="0123456789abcdef",
    ),
    "round": Round(
        "birds",
        3,
        "train",
        ("class_context", "scale"),
        "cd" * 32,
        1795390000.5,
        ("site-a", "site-b"),
        1795390000500,
        "0123456789abcdef",
    ),
    "receipt": Receipt(
        "birds", "site-a", 3, "ef" * 32, "rejected", "norm", "its L2 norm is 2000, but at most 1000"
    ),
    "presence": Presence("birds", "site-a", False, "ab" * 32, 120, {"engine": "onnx"}, left=True),
    "status": Status(
        "birds",
        True,
        3,
        20,
        "train",
        4,
        4,
        2,
        1,
        0,
        None,
        "waiting for absent clients: site-c",
        {"mAP": 0.5},
        1795390000.5,
    ),
}
RECORDS = {
    "Manifest": Manifest,
    "Round": Round,
    "Receipt": Receipt,
    "Presence": Presence,
    "Status": Status,
    "Limits": Limits,
    "Training": Training,
    "TensorSpec": TensorSpec,
    "StateHeader": codec.StateHeader,
    "UpdateHeader": codec.UpdateHeader,
}


def validate(value: Any, schema: str) -> None:
    root = {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    jsonschema.validate(value, root, cls=jsonschema.Draft202012Validator)


def header_of(payload: bytes) -> dict[str, Any]:
    size = int.from_bytes(payload[:8], "little")
    return json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["fedmpt"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_golden_message_is_read_and_written_unchanged(name: str) -> None:
    data = (GOLDEN / f"{name}.json").read_bytes()
    assert messages.from_json(type(EXAMPLES[name]), data, name) == EXAMPLES[name]
    assert messages.to_json(EXAMPLES[name]) == data


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_golden_message_follows_the_specification(name: str) -> None:
    validate(json.loads((GOLDEN / f"{name}.json").read_bytes()), type(EXAMPLES[name]).__name__)


@pytest.mark.parametrize("encoding", messages.ENCODINGS)
def test_a_golden_update_is_read_and_follows_the_specification(encoding: str) -> None:
    payload = (GOLDEN / f"update-{encoding}.safetensors").read_bytes()
    update, used = codec.decode_update(payload, SPECS, len(payload))
    assert used == encoding
    assert codec.encode_update(update, encoding) == payload
    exact = np.asarray([[0.0, 0.25, -0.5], [1.0, -1.0, 0.75]])
    if encoding == "int8":
        exact = (np.rint(exact * 127).astype(np.float32) * np.float32(1 / 127)).astype(np.float64)
    assert update.difference["class_context"].tolist() == exact.tolist()
    validate(header_of(payload), "UpdateHeader")


def test_the_golden_state_is_read_and_has_its_digest() -> None:
    payload = (GOLDEN / "state.safetensors").read_bytes()
    state = codec.decode_state(payload, SPECS)
    assert codec.encode_state(state, {"federation": "birds"}) == payload
    assert codec.state_digest(state) == (GOLDEN / "state.digest").read_text().strip()
    validate(header_of(payload), "StateHeader")


@pytest.mark.parametrize("name", RECORDS)
def test_the_specification_has_the_fields_of_the_code(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(RECORDS[name])}
    assert set(SCHEMAS[name]["properties"]) == fields
    since = {
        "Manifest": {"run"},
        "Round": {"run"},
        "Presence": {"left"},
    }  # what earlier releases do not write
    assert set(SCHEMAS[name]["required"]) == fields - since.get(name, set())


@pytest.mark.parametrize(
    ("name", "field", "value"), [("manifest", "run", ""), ("round", "run", ""), ("presence", "left", False)]
)
def test_a_message_of_an_earlier_release_is_read(name: str, field: str, value: object) -> None:
    said = json.loads((GOLDEN / f"{name}.json").read_bytes())
    del said[field]
    validate(said, type(EXAMPLES[name]).__name__)
    read = messages.from_json(type(EXAMPLES[name]), json.dumps(said).encode(), name)
    assert read == dataclasses.replace(EXAMPLES[name], **{field: value})


def test_the_specification_has_the_words_of_the_code() -> None:
    assert tuple(SCHEMAS["Encoding"]["enum"]) == messages.ENCODINGS
    assert tuple(SCHEMAS["Round"]["properties"]["phase"]["enum"]) == messages.PHASES
    assert tuple(SCHEMAS["Status"]["properties"]["phase"]["enum"]) == messages.PHASES
    assert tuple(SCHEMAS["Receipt"]["properties"]["status"]["enum"]) == messages.RECEIPTS
    assert SCHEMAS["Version"]["const"] == messages.VERSION


def test_the_specification_has_the_bounds_of_metrics() -> None:
    metrics = SCHEMAS["UpdateHeader"]["properties"]["metrics"]
    assert metrics["maxProperties"] == codec.MAXIMUM_METRICS
    assert metrics["additionalProperties"]["maximum"] == codec.MAXIMUM_METRIC
    assert metrics["additionalProperties"]["minimum"] == -codec.MAXIMUM_METRIC


def test_the_specification_has_the_topics_of_the_code() -> None:
    topics = Topics("F")
    expected = {
        "manifest": topics.manifest,
        "round": topics.round,
        "status": topics.status,
        "state": topics.state(7),
        "update": topics.update(7, "C"),
        "receipt": topics.receipt("C"),
        "presence": topics.presence("C"),
    }
    addresses = {
        name: channel["address"].format(federation="F", round=7, client="C")
        for name, channel in DOCUMENT["channels"].items()
    }
    assert addresses == expected


def test_every_channel_has_one_operation_with_quality_of_service_1() -> None:
    operations = DOCUMENT["operations"].values()
    channels = sorted(operation["channel"]["$ref"].removeprefix("#/channels/") for operation in operations)
    assert channels == sorted(DOCUMENT["channels"])
    assert all(operation["bindings"]["mqtt"]["qos"] == 1 for operation in operations)


def test_every_reference_of_the_specification_leads_somewhere() -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                target = DOCUMENT
                for part in value["$ref"].removeprefix("#/").split("/"):
                    target = target[part]
            for item in value.values():
                check(item)
        elif isinstance(value, list):
            for item in value:
                check(item)

    check(DOCUMENT)
