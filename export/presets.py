"""How regions are pooled and how clients train: the paper's values, and the project's measured default."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedmpt.protocol.manifest import Pooling, Training


@dataclass(frozen=True)
class Preset:
    """Pooling and training set-up of a bundle."""

    pooling: Pooling
    training: Training


PAPER = Preset(
    Pooling("transport", tau=4.0, reg=0.2, iterations=10),
    Training(
        optimizer="sgd",
        learning_rate=0.001,
        momentum=0.9,
        weight_decay=0.0,
        gradient_clip=0.0,
        scalar_rate_factor=10.0,
        batch_size=32,
        epochs=1,
        rounds=20,
        calibrate=True,
        gamma_pos=1.0,
        gamma_neg=2.0,
        clip=0.05,
        seed=0,
    ),
)
PAPER_POOLING, PAPER_TRAINING = PAPER.pooling, PAPER.training
# docs/method.md has the measurements behind these.
DEFAULT = Preset(
    Pooling("transport", tau=4.0, reg=0.02, iterations=10),
    replace(PAPER_TRAINING, optimizer="adamw", learning_rate=0.001),
)
PRESETS = {"default": DEFAULT, "paper": PAPER}
