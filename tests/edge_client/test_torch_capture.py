"""The torch engine's CUDA path without a GPU: its graph is recorded and replayed operation by operation.

The stand-in records what PyTorch's dispatcher sees between the start and the end of a capture; a replay runs the same
operations on the same tensors, as a CUDA graph does on the same addresses. It refuses what a capture cannot hold:
reading a value on the host, results whose size depends on values, and tensors made on the host in every step.
In Triton's interpreter (see ``tests/kernels/test_interpreter.py``) the step runs the Triton kernels.
"""

import contextlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmpt.edge_client import torch_engine
from fedmpt.edge_client.engine import EngineError
from fedmpt.edge_client.torch_engine import CapturedStep, TorchEngine
from fedmpt.kernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SYNCHRONISING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "is_nonzero",
}


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """A CUDA graph's stand-in: the operations of a capture, and the storages that they found there before."""

    def __init__(self, launches):
        super().__init__()
        self.calls, self.found, self.made, self.launches = [], set(), set(), launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        assert name not in SYNCHRONISING, f"{name} makes the host wait, which a capture forbids"
        masks = [t for t in tensors(args[1:]) if t.dtype == torch.bool]
        assert not (name.startswith("index") and masks), "the size of a selection depends on values"
        assert not name.startswith("lift"), "a tensor is made on the host in every step"
        if (
            function.namespace == "fedmpt"
        ):  # its preparations are held to the same rules, but replayed with it
            before = len(self.calls)
            with self:
                result = OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
            del self.calls[before:]
        else:
            result = function(*args, **kwargs)
        self.launches[name] = self.launches.get(name, 0) + 1
        self.found |= {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))} - self.made
        self.made |= {t.untyped_storage().data_ptr() for t in tensors(result)} - self.found
        self.calls.append((function, args, kwargs, result))
        return result

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                for old, new in zip(tensors(result), tensors(function(*args, **kwargs)), strict=True):
                    if new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
                        old.copy_(new)


class Event:
    """Counts; copies on a CPU are over when they return."""

    recorded = 0

    def record(self):
        self.recorded += 1

    def synchronize(self):
        pass


@pytest.fixture
def launches(monkeypatch):
    """Counts of the recorded operations, by name; PyTorch's CUDA interface stands on the CPU meanwhile."""
    counts = {}
    stream = SimpleNamespace(
        wait_stream=lambda other: None, wait_event=lambda event: None, synchronize=lambda: None
    )
    zeros = torch.zeros
    fakes = {
        "Stream": lambda device: stream,
        "Event": Event,
        "current_stream": lambda device=None: stream,
        "stream": lambda chosen: contextlib.nullcontext(),
        "CUDAGraph": lambda: Recorder(counts),
        "graph": lambda recorder, capture_error_mode: recorder,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "zeros", lambda *args, pin_memory=False, **kwargs: zeros(*args, **kwargs))
    monkeypatch.setattr(dispatch, "_takes_triton", lambda tensor: INTERPRETED)
    monkeypatch.setattr(torch_engine, "WARM_UP_STEPS", 1)
    return counts


@pytest.fixture
def captured(tiny_bundle, manifest, launches):
    """An engine in its CUDA path, whose captured step lies on the CPU."""
    engine = TorchEngine(tiny_bundle, manifest, torch.device("cpu"), half=True)
    arguments = engine._setup, manifest.training, manifest.tokens, engine._weights, torch.device("cpu")
    engine._step = CapturedStep(*arguments)
    engine._device = torch.device("cuda")
    return engine


def batch_of(manifest, count, seed=0):
    random = np.random.default_rng(seed)
    tokens = random.normal(size=(count, manifest.tokens.count, manifest.tokens.width))
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    labels = random.integers(-1, 2, size=(count, len(manifest.labels)))
    return tokens.astype(np.float16), labels.astype(np.int8)


def assert_equals(found, expected):
    tolerance = 2e-2 if INTERPRETED else 1e-5  # Triton multiplies float16 tokens in float16
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        limit = tolerance * np.abs(value).max()
        np.testing.assert_allclose(found[1][name], value, rtol=0, atol=limit, err_msg=name)


@pytest.mark.parametrize("count", [8, 5])
def test_replays_follow_batch_and_state(captured, tiny_bundle, manifest, state, count):
    eager = TorchEngine(tiny_bundle, manifest, torch.device("cpu"), half=True)
    for seed in range(3):
        batch = batch_of(manifest, count, seed)
        moved = {name: value + np.float32(0.01 * seed) for name, value in state.items()}
        assert_equals(captured.train_step(moved, *batch), eager.train_step(moved, *batch))


def test_the_step_is_recorded_once_with_its_kernels(captured, manifest, state, launches):
    before = dict(launches)
    captured.train_step(state, *batch_of(manifest, 8))
    assert launches == before
    names = ("region_transport", "region_transport_backward", "gated_asymmetric_loss")
    assert [before.get(name, 0) for name in names] == [int(INTERPRETED)] * len(names)


def test_a_capture_reads_nothing_that_a_later_step_would_free(captured):
    def found(step):
        own = {t.untyped_storage().data_ptr() for t in (step._state, step._tokens, step._labels)}
        return step._graph.found - own

    first = captured._step
    captured._step = None
    captured._device = torch.device("cpu")
    assert found(captured._captured()) == found(first)  # both are alive: addresses are not used again


def test_staged_batches_are_used_in_their_order(captured, manifest, state):
    batches = [batch_of(manifest, 8, seed) for seed in range(4)]
    expected = [captured.train_step(state, *batch)[0] for batch in batches]
    captured.stage(*batches[2])  # left over from a round that ended early
    captured.stage(*batches[0])
    found = []
    for number, batch in enumerate(batches):
        if number + 1 < len(batches):
            captured.stage(*batches[number + 1])
        found.append(captured.train_step(state, *batch)[0])
    assert found == expected
    assert len(set(found)) == len(found)


def test_a_batch_that_is_too_large_is_refused(captured, manifest, state):
    for refused in (captured.stage, lambda *batch: captured.train_step(state, *batch)):
        with pytest.raises(EngineError, match="a batch of 9 photos, but the bundle's train step takes 8"):
            refused(*batch_of(manifest, 9))


@pytest.mark.parametrize(
    "waiting", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: torch.tensor([1.0]) + x]
)
def test_the_stand_in_refuses_what_a_capture_cannot_hold(waiting, launches):
    with pytest.raises(AssertionError), Recorder(launches):
        waiting(torch.ones(3))
