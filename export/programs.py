"""The four programs of a bundle, traced into ONNX graphs; every method has the same four."""

from __future__ import annotations

import torch
from onnx import ModelProto
from torch import Tensor

from fedmpt.export import graphs, methods
from fedmpt.export.clip import ClipCheckpoint, image_tokens
from fedmpt.export.graphs import Tensors
from fedmpt.export.methods import METHODS, Setup
from fedmpt.export.towers import normalise
from fedmpt.protocol.manifest import Training


def run_image_encoder(clip: ClipCheckpoint, weights: Tensors, pixels: Tensor, kind: str, mode: str) -> Tensor:
    """``uint8 [B, S, S, 3]`` to tokens ``[B, M, D]``."""
    return image_tokens(
        weights, pixels, spec=clip.vision_spec, mean=clip.image_mean, std=clip.image_std, kind=kind, mode=mode
    )


def run_train_step(
    setup: Setup, training: Training, weights: Tensors, state: Tensors, tokens: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """``loss`` and ``gradient.<name>`` for every state tensor."""
    leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
    with torch.enable_grad():
        loss = methods.local_loss(setup, training, weights, leaves, tokens, labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = zip(leaves, gradients, strict=True)
    return {"loss": loss.detach()} | {f"gradient.{name}": gradient for name, gradient in named}


def run_head(setup: Setup, state: Tensors, tokens: Tensor, text: Tensor) -> dict[str, Tensor]:
    """``scores [B, C]``, ``logits [B, C]``, ``plan [B, C, M−1]`` with sums of 1 over the patches."""
    found = methods.score(setup, tokens, text, state)
    assert found.plan is not None
    gate = found.gate[..., None]
    scores = (gate * found.psi).sum(1)
    plan = (gate[..., None] * found.plan).sum(1) * text.shape[1]
    return {
        "scores": scores,
        "logits": state["scale"] * scores + state["bias"],
        "plan": plan.transpose(1, 2),
    }


def trace_image_encoder(clip: ClipCheckpoint, kind: str, mode: str) -> ModelProto:
    """``pixels`` → ``tokens``."""
    pixels = torch.zeros(2, clip.image_size, clip.image_size, 3, dtype=torch.uint8)
    return graphs.trace_forward(
        lambda weights, inputs: {"tokens": run_image_encoder(clip, weights, inputs["pixels"], kind, mode)},
        clip.vision,
        {"pixels": pixels},
        batched=["pixels"],
    )


def trace_train_step(
    setup: Setup, training: Training, weights: Tensors, state: Tensors, count: int
) -> ModelProto:
    """State, ``tokens``, ``labels`` → ``loss``, gradients; the batch is ``training.batch_size``."""
    # The layout's index tensors are made once in a process and then kept: make them before the trace, or a first
    # trace would name them otherwise than later ones do, and digests would differ.
    with torch.no_grad():
        methods.text_features(setup, weights, state)
    inputs = {**state, **example_batch(setup, count, training.batch_size)}
    return graphs.trace_step(
        lambda weights, inputs: run_train_step(
            setup,
            training,
            weights,
            {name: inputs[name] for name in state},
            inputs["tokens"],
            inputs["labels"],
        ),
        weights,
        inputs,
    )


def trace_text_features(setup: Setup, weights: Tensors, state: Tensors) -> ModelProto:
    """The state tensors that the text depends on → ``text``."""
    needed = {name: state[name] for name in METHODS[setup.method].text_state}
    return graphs.trace_forward(
        lambda weights, inputs: {"text": methods.text_features(setup, weights, inputs)},
        weights,
        needed,
        batched=[],
    )


def trace_head(setup: Setup, weights: Tensors, state: Tensors, count: int) -> ModelProto:
    """``tokens``, ``text`` and the state tensors that the text does not hold → ``scores``, ``logits``, ``plan``."""
    needed = {name: value for name, value in state.items() if name not in METHODS[setup.method].text_state}
    with torch.no_grad():
        text = methods.text_features(setup, weights, state)
    inputs = {"tokens": example_batch(setup, count, 2)["tokens"], "text": text, **needed}
    return graphs.trace_forward(
        lambda weights, inputs: run_head(setup, inputs, inputs["tokens"], inputs["text"]),
        {},
        inputs,
        batched=["tokens"],
    )


def example_batch(setup: Setup, count: int, batch: int) -> dict[str, Tensor]:
    """Random unit tokens ``[B, M, D]`` and labels, some unknown, the last photo's all."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 2, (batch, len(setup.labels)), generator=generator).to(torch.int8)
    labels[-1] = -1
    return {
        "tokens": normalise(torch.randn(batch, count, setup.width, generator=generator)),
        "labels": labels,
    }
