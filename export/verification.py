"""Run a bundle's graphs in ONNX Runtime and compare them with the PyTorch functions that they were traced from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch

from fedmpt.export import methods, programs
from fedmpt.export.clip import ClipCheckpoint
from fedmpt.export.graphs import Tensors
from fedmpt.export.methods import Setup
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleManifest
from fedmpt.protocol.onnx_file import check_external_data

# Relative to the largest entry of each output: float32 sums of another order differ by up to 1e-5. A plan magnifies
# the rounding of its cosines, by s/τ in the cost and 1/λ in the exponent, so that a sharp one needs more.
TOLERANCE = 2e-5
# Most of a context's gradient cancels, since labels and photos share it: that one differs by up to 4e-5 (PyTorch alone
# by 1e-5 from float64).
CONTEXT_GRADIENT_TOLERANCE = 1e-4
TOLERANCE_PER_SHARPNESS = 4e-9  # s/τλ: 1,250 for the default at CLIP's logit scale of 100


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

    ``state`` gets noise first, so that no gradient hides behind a zero and the conditions differ.

    Raises:
        VerificationError: a difference above the tolerance: the exporter or ONNX Runtime is at fault.
    """
    generator = torch.Generator().manual_seed(1)
    state = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in state.items()
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
    loss, scale = float(expected["train_step"]["loss"]), float(state["scale"])
    # Rounding is relative to the terms, where these cancel: a score may be a difference of cosines.
    least = {"gradient.scale": loss, "gradient.bias": loss, "scores": 0.01, "logits": 0.01 * scale}
    sharpness = setup.logit_scale / setup.pooling.tau / setup.pooling.reg
    allowed = TOLERANCE + TOLERANCE_PER_SHARPNESS * sharpness
    return {
        name: _compare(folder / manifest.graphs[name].file, manifest.files, given, outputs, least, allowed)
        for name, outputs in expected.items()
    }


def _compare(
    path: Path,
    files: Collection[str],
    given: Tensors,
    expected: Tensors,
    least: Mapping[str, float],
    allowed: float,
) -> float:
    """The graph's largest difference, relative to an output's largest entry, or to ``least`` where that is more."""
    import onnxruntime

    check_external_data(path, files)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {item.name: given[item.name].numpy() for item in session.get_inputs()}
    worst = 0.0
    for (output, reference), array in zip(expected.items(), session.run(list(expected), inputs), strict=True):
        exact = reference.numpy()
        size = max(float(np.abs(exact).max()), least.get(output, 1e-6))
        difference = float(np.abs(array - exact).max()) / size
        context = output.startswith("gradient.") and output.endswith("context")
        limit = max(allowed, CONTEXT_GRADIENT_TOLERANCE) if context else allowed
        if not difference <= limit:
            raise VerificationError(
                f"{path.name}: {output} differs from PyTorch by {difference:.1e} (allowed {limit:.0e}); "
                "try other versions of torch, onnxscript and onnxruntime"
            )
        worst = max(worst, difference)
    return worst
