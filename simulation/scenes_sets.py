"""The standard sets by name and seed: ``pretrain`` and the federation set."""

from __future__ import annotations

from fedmpt.simulation.scenes import SceneSpecification
from fedmpt.simulation.sprites import LABELS


def pretrain_specification() -> SceneSpecification:
    """What the micro-CLIP learns on: all labels, independent; two styles are common and four are rare."""
    return SceneSpecification(
        labels=LABELS,
        marginals=(0.05,) * len(LABELS),
        styles=(
            ("rendered", 0.43),
            ("glossy", 0.43),
            ("flat", 0.05),
            ("sketch", 0.03),
            ("mosaic", 0.03),
            ("negative", 0.03),
        ),
    )
