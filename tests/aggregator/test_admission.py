"""Every check of an update, by name, with the limit in its text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from fedmpt.aggregator.admission import CHECKS, AdmissionContext, Admitted, Refused, admit
from fedmpt.protocol.codec import State, state_digest
from fedmpt.protocol.manifest import BundleManifest
from fedmpt.protocol.messages import Limits

MakeUpdate = Callable[..., bytes]


@pytest.fixture
def context(bundle: BundleManifest, state: State) -> AdmissionContext:
    return AdmissionContext(
        federation="birds",
        round=2,
        base=state_digest(state),
        chosen=frozenset({"a", "b"}),
        trainable=bundle.state,
        limits=Limits(update_bytes=1000, samples=500, norm=10.0),
        metrics=True,
    )


def test_a_good_update_is_admitted(context: AdmissionContext, state: State, make_update: MakeUpdate) -> None:
    result = admit(make_update(state, "a", 2, samples=500), "a", context)
    assert isinstance(result, Admitted)


@pytest.mark.parametrize(
    ("changes", "check", "text"),
    [
        ({"client": "c"}, "chosen", "c is not among the 2 clients"),
        ({"federation": "fish"}, "identity", "it says federation fish"),
        ({"number": 1}, "identity", "round 1"),
        ({"names": ("scale",)}, "names", "missing: bias, class_context"),
        ({"samples": 0}, "samples", "0 samples, but 1 to 500 are accepted"),
        ({"samples": 501}, "samples", "501 samples, but 1 to 500 are accepted"),
        ({"step": 100.0}, "norm", "at most 10 is accepted"),
    ],
    ids=lambda value: str(value),
)
def test_a_bad_update_is_refused_by_name(
    changes: dict[str, object],
    check: str,
    text: str,
    context: AdmissionContext,
    state: State,
    make_update: MakeUpdate,
) -> None:
    fields = {"client": "a", "number": 2} | changes
    result = admit(make_update(state, **fields), str(fields["client"]), context)
    assert isinstance(result, Refused)
    assert result.check == check
    assert text in result.reason


def test_another_clients_update_is_refused(
    context: AdmissionContext, state: State, make_update: MakeUpdate
) -> None:
    result = admit(make_update(state, "b", 2), "a", context)
    assert isinstance(result, Refused)
    assert result.check == "identity"


def test_an_update_to_another_state_is_refused(
    context: AdmissionContext, state: State, make_update: MakeUpdate
) -> None:
    other = state | {"scale": np.asarray(9.0, np.float32)}
    result = admit(make_update(other, "a", 2), "a", context)
    assert isinstance(result, Refused)
    assert result.check == "base"


def test_size_comes_before_parsing(context: AdmissionContext) -> None:
    assert admit(b"\x00" * 1001, "a", context) == Refused(
        "size", "update: 1001 bytes, but at most 1000 are accepted"
    )


def test_metrics_are_refused_where_none_are_collected(
    context: AdmissionContext, state: State, make_update: MakeUpdate
) -> None:
    quiet = dataclasses.replace(context, metrics=False)
    result = admit(make_update(state, "a", 2), "a", quiet)
    assert isinstance(result, Refused)
    assert result.check == "metrics"
    assert isinstance(admit(make_update(state, "a", 2, metrics={}), "a", quiet), Admitted)


def test_every_check_can_fail_and_nothing_else_can(
    context: AdmissionContext, state: State, make_update: MakeUpdate
) -> None:
    def refused(client: str = "a", **changes: object) -> str:
        """The check that an update fails whose header has the changes."""
        payload = make_update(state, client, 2, encoding=encoding)
        size = int.from_bytes(payload[:8], "little")
        header = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["fedmpt"]) | changes
        tensors = safetensors.numpy.load(payload) | altered
        result = admit(safetensors.numpy.save(tensors, {"fedmpt": json.dumps(header)}), client, context)
        assert isinstance(result, Refused)
        return result.check

    altered: dict[str, object] = {}
    encoding = "float32"
    found = [
        refused("c"),
        refused(weather="x" * 1000),
        refused(version=2),
        refused(encoding="float64"),
        refused(federation="fish"),
        refused(base="0" * 64),
        refused(samples=0),
        refused(metrics={"mAP": 1e308}),
    ]
    altered = {"other": np.zeros(1, np.float32)}
    found.append(refused())
    altered = {"scale": np.zeros(1, np.float32)}
    found.append(refused())
    altered = {"scale": np.zeros((), np.float64)}
    found.append(refused())
    altered = {"scale": np.asarray(np.nan, np.float32)}
    found.append(refused())
    altered = {"scale": np.asarray(11, np.float32)}
    found.append(refused())
    altered, encoding = {}, "int8"
    found.append(refused(scales={}))
    assert sorted(found) == sorted(CHECKS)
