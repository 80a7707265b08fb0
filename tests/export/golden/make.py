"""Rewrite the golden files: ``python tests/export/golden/make.py``. Do so only if the method itself changes.

``clip/`` is a tiny random CLIP; ``image_tokens.safetensors`` and ``<method>.safetensors`` hold inputs and the
outputs of the PyTorch functions in float64 arithmetic, stored as float32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmpt.export import methods, programs
from fedmpt.export.bundle import PAPER_POOLING, PAPER_TRAINING
from fedmpt.export.clip import TOKEN_KINDS, TOKEN_MODES, ClipCheckpoint, load_clip
from fedmpt.export.frozen import freeze
from fedmpt.export.methods import METHODS, Setup

HERE = Path(__file__).parent
LABELS = ("cat", "traffic light", "dog")
CONDITIONS = ("background", "lighting and weather")
TOKENS = 10


def setup_of(clip: ClipCheckpoint, method: str) -> tuple[Setup, dict[str, Tensor]]:
    """The set-up of a golden case; also used by the test."""
    conditions = CONDITIONS if METHODS[method].conditioned else ()
    return freeze(
        clip, LABELS, conditions, method, PAPER_POOLING, condition_context=2, class_context=3, adapter_rank=4
    )


def outputs_of(
    setup: Setup, weights: dict[str, Tensor], state: dict[str, Tensor], tokens: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Everything that the three graphs of a method give."""
    step = programs.run_train_step(setup, PAPER_TRAINING, weights, state, tokens, labels)
    with torch.no_grad():
        text = methods.text_features(setup, weights, state)
        return {**step, "text": text, **programs.run_head(setup, state, tokens, text)}


def main() -> None:
    """Write all files."""
    clip = load_clip(str(HERE / "clip"))
    generator = torch.Generator().manual_seed(0)
    size = clip.image_size
    pixels = torch.randint(0, 256, (2, size, size, 3), generator=generator).to(torch.uint8)
    vision = {name: value.double() for name, value in clip.vision.items()}
    images = {"pixels": pixels}
    for kind in TOKEN_KINDS:
        for mode in TOKEN_MODES:
            images[f"{kind}.{mode}"] = programs.run_image_encoder(clip, vision, pixels, kind, mode).float()
    save_file(images, HERE / "image_tokens.safetensors")
    for name in METHODS:
        setup, weights = setup_of(clip, name)
        shapes = methods.state_shapes(setup)
        state = {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}
        state |= {"scale": torch.tensor(10.0), "bias": torch.tensor(-2.0)}
        batch = programs.example_batch(setup, TOKENS, 4)
        double = {key: value.double() for key, value in weights.items()}
        wide = {key: value.double() for key, value in state.items()}
        outputs = outputs_of(setup, double, wide, batch["tokens"].double(), batch["labels"])
        inputs = {**{f"state.{key}": value for key, value in state.items()}, **batch}
        outputs = {key: value.float().contiguous() for key, value in outputs.items()}
        save_file({**inputs, **outputs}, HERE / f"{name}.safetensors")


if __name__ == "__main__":
    sys.exit(main())
