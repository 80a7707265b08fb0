"""Today's PyTorch functions and today's ONNX graphs still give the outputs that were kept with the source."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedmpt.export import graphs, programs
from fedmpt.export.bundle import PAPER_TRAINING
from fedmpt.export.clip import TOKEN_KINDS, TOKEN_MODES, ClipCheckpoint, load_clip
from fedmpt.export.graphs import Tensors
from fedmpt.export.methods import METHODS, Setup

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # of each output's largest entry, or of 0.001 where a sum cancels


@pytest.fixture(scope="module")
def clip() -> ClipCheckpoint:
    return load_clip(str(GOLDEN / "clip"))


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(method: str) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """State, tokens, labels and expected outputs of a golden file."""
    tensors = load_file(GOLDEN / f"{method}.safetensors")
    state = {
        name.removeprefix("state."): tensors.pop(name) for name in list(tensors) if name.startswith("state.")
    }
    return state, tensors.pop("tokens"), tensors.pop("labels"), tensors


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, reference in expected.items():
        difference = (found[name] - reference).abs().max()
        # Sums over all photos and labels, whose terms cancel: processors without AVX-512 round them otherwise.
        least = 0.1 * float(expected["loss"]) if name in ("gradient.scale", "gradient.bias") else 1e-3
        assert difference <= TOLERANCE * max(float(reference.abs().max()), least), f"{name}: {difference:.1e}"


def run(model: bytes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    feed = {item.name: inputs[item.name].numpy() for item in session.get_inputs()}
    return {
        name: torch.from_numpy(np.asarray(array))
        for name, array in zip(names, session.run(names, feed), strict=True)
    }


def run_graphs(
    setup: Setup, weights: Tensors, state: Tensors, tokens: Tensor, labels: Tensor, text: Tensor
) -> dict[str, Tensor]:
    """What ``make.outputs_of`` gives, by the three graphs."""
    training = dataclasses.replace(PAPER_TRAINING, batch_size=len(tokens))
    found: dict[str, Tensor] = {}
    inputs = {**state, "tokens": tokens, "labels": labels, "text": text}
    for model in (
        programs.trace_train_step(setup, training, weights, state, tokens.shape[1]),
        programs.trace_text_features(setup, weights, state),
        programs.trace_head(setup, weights, state, tokens.shape[1]),
    ):
        graphs.place_weights(model, weights, None)
        found |= run(model.SerializeToString(), inputs)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_pytorch_gives_the_golden_outputs(clip: ClipCheckpoint, make: ModuleType, method: str) -> None:
    setup, weights = make.setup_of(clip, method)
    state, tokens, labels, expected = read(method)
    assert_close(make.outputs_of(setup, weights, state, tokens, labels), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_onnx_runtime_gives_the_golden_outputs(clip: ClipCheckpoint, make: ModuleType, method: str) -> None:
    setup, weights = make.setup_of(clip, method)
    state, tokens, labels, expected = read(method)
    assert_close(run_graphs(setup, weights, state, tokens, labels, expected["text"]), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pooling", "reg"),
    [("transport", 0.2), ("transport", 0.02), ("transport", 0.005), ("softmax", 0.2), ("max", 0.2)],
)
def test_onnx_runtime_computes_what_pytorch_computes_under_every_pooling(
    clip: ClipCheckpoint, make: ModuleType, pooling: str, reg: float
) -> None:
    setup, weights = make.setup_of(clip, "fedmpt-full")
    chosen = dataclasses.replace(setup.pooling, name=pooling, reg=reg)
    setup = dataclasses.replace(setup, pooling=chosen)
    state, tokens, labels, _ = read("fedmpt-full")
    expected = make.outputs_of(setup, weights, state, tokens, labels)
    assert_close(run_graphs(setup, weights, state, tokens, labels, expected["text"]), expected)


@pytest.mark.parametrize("mode", TOKEN_MODES)
@pytest.mark.parametrize("kind", TOKEN_KINDS)
@torch.no_grad()
def test_pytorch_gives_the_golden_image_tokens(clip: ClipCheckpoint, kind: str, mode: str) -> None:
    images = load_file(GOLDEN / "image_tokens.safetensors")
    found = programs.run_image_encoder(clip, clip.vision, images["pixels"], kind, mode)
    assert_close({"tokens": found}, {"tokens": images[f"{kind}.{mode}"]})


@pytest.mark.slow
@pytest.mark.parametrize("mode", TOKEN_MODES)
@pytest.mark.parametrize("kind", TOKEN_KINDS)
def test_onnx_runtime_gives_the_golden_image_tokens(clip: ClipCheckpoint, kind: str, mode: str) -> None:
    images = load_file(GOLDEN / "image_tokens.safetensors")
    model = graphs.place_weights(programs.trace_image_encoder(clip, kind, mode), clip.vision, None)
    found = run(model.SerializeToString(), {"pixels": images["pixels"]})
    assert_close(found, {"tokens": images[f"{kind}.{mode}"]})
