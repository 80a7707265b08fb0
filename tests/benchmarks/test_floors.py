"""The operations that floors are worked out from: no more than what is really computed, and not far below."""

from __future__ import annotations

import torch
from clip_shapes import encoder_flops, random_clip
from local_step import Case
from torch.utils.flop_counter import FlopCounterMode

from fedmpt.export import programs


def test_the_encoder_needs_what_its_floor_counts() -> None:
    clip = random_clip(
        layers=3, vision_width=128, text_width=64, joint_width=64, image_size=64, vocabulary=16
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        programs.run_image_encoder(
            clip, clip.vision, torch.zeros(1, 64, 64, 3, dtype=torch.uint8), "clearclip", "full"
        )
    least = encoder_flops(layers=3, width=128, patches=16, joint_width=64)
    assert 0.9 * counter.get_total_flops() < least <= counter.get_total_flops()


def test_the_local_step_needs_what_its_floor_counts() -> None:
    case = Case.make(labels=20, conditions=5, layers=2, photos=2)
    with FlopCounterMode(display=False) as counter:
        case.eager(shared=True, cached=True)
    least = case.text_flops() + case.head_flops()
    assert 0.7 * counter.get_total_flops() < least <= counter.get_total_flops()
