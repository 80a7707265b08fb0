"""Run a bundle's graphs in ONNX Runtime and compare them with the PyTorch functions that they were traced from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedmpt.export import methods, programs
from fedmpt.export.clip import ClipCheckpoint
from fedmpt.export.graphs import Tensors
from fedmpt.export.methods import Setup
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleManifest

# Relative to the largest entry of each output. Float32 sums of another order differ by a few 1e-6.
TOLERANCE = 1e-4


class VerificationError(FedmptError):
    """A graph does not compute what PyTorch computes."""


def verify_graphs(
    folder: Path,
    manifest: BundleManifest,
    clip: ClipCheckpoint,
    setup: Setup,
    weights: Tensors,
    state: Tensors,
) -> dict[str, float]:
    """Compare each graph's outputs on random inputs; return the largest relative difference per graph.

    ``state`` gets a little noise first, so that no gradient hides behind a zero.

    Raises:
        VerificationError: a difference above ``TOLERANCE``: the exporter or ONNX Runtime is at fault.
    """
    generator = torch.Generator().manual_seed(1)
    state = {
        name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in state.items()
    }
    size = manifest.clip.image_size
    pixels = torch.randint(0, 256, (1, size, size, 3), generator=generator).to(torch.uint8)
    batch = programs.example_batch(setup, manifest.tokens.count, manifest.training.batch_size)
    with torch.no_grad():
        text = methods.text_features(setup, weights, state)
        kind, mode = manifest.tokens.kind, manifest.tokens.mode
        expected = {
            "image_encoder": {"tokens": programs.run_image_encoder(clip, clip.vision, pixels, kind, mode)},
            "text_features": {"text": text},
            "head": programs.run_head(setup, state, batch["tokens"], text),
            "train_step": programs.run_train_step(
                setup, manifest.training, weights, state, batch["tokens"], batch["labels"]
            ),
        }
    given = {**state, **batch, "pixels": pixels, "text": text}
    return {name: _compare(folder, manifest, name, given, outputs) for name, outputs in expected.items()}


def _compare(folder: Path, manifest: BundleManifest, name: str, given: Tensors, expected: Tensors) -> float:
    import onnxruntime

    graph = manifest.graphs[name]
    session = onnxruntime.InferenceSession(folder / graph.file, providers=["CPUExecutionProvider"])
    found = session.run(list(expected), {item: given[item].numpy() for item in graph.inputs})
    worst = 0.0
    for (output, reference), array in zip(expected.items(), found, strict=True):
        exact = reference.numpy()
        size = float(np.abs(exact).max())
        if exact.ndim == 0 and "loss" in expected:
            # A scalar's gradient sums terms of both signs, each about as large as its share of the loss.
            size = max(size, float(expected["loss"]))
        difference = float(np.abs(array - exact).max()) / max(size, 1e-6)
        if not difference <= TOLERANCE:
            raise VerificationError(
                f"{graph.file}: {output} differs from PyTorch by {difference:.1e} (allowed {TOLERANCE:.0e}); "
                "try other versions of torch, onnxscript and onnxruntime"
            )
        worst = max(worst, difference)
    return worst
