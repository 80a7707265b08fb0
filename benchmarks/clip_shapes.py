"""CLIP checkpoints of any size with random weights: what is measured needs the shapes, not the knowledge."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from fedmpt.export.clip import CLIP_MEAN, CLIP_STD, ClipCheckpoint
from fedmpt.export.towers import TowerSpec

# (rows, inner, columns) of the image encoder's products, for eight photos.
VISION_PRODUCTS = [(1576, 768, 3072), (1576, 3072, 768), (1576, 768, 768), (1024, 1024, 1024)]


def encoder_flops(layers: int = 12, width: int = 768, patches: int = 196, joint_width: int = 512) -> float:
    """The least operations to encode one photo: products with weights, and attention, that the result depends on.

    Of the last block, `clearclip` tokens need queries, values, attention and its output, and no feed-forward.
    """
    tokens = patches + 1
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    last = 3 * patches * width**2 + 2 * patches**2 * width
    ends = patches * width * 3 * 16**2 + tokens * width * joint_width
    return 2.0 * ((layers - 1) * block + last + ends)


def random_clip(
    *,
    layers: int = 12,
    vision_width: int = 768,
    text_width: int = 512,
    joint_width: int = 512,
    image_size: int = 224,
    patch_size: int = 16,
    vocabulary: int = 49408,
    seed: int = 0,
) -> ClipCheckpoint:
    """A checkpoint of ViT-B/16's shapes by default; heads are 64 wide, as in every published CLIP."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 0.02) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    def tower(width: int) -> dict[str, Tensor]:
        weights = {"projection.weight": draw(width, joint_width, std=width**-0.5)}
        sizes = {
            **dict.fromkeys(("query", "key", "value", "out"), (width, width)),
            "up": (width, 4 * width),
            "down": (4 * width, width),
        }
        for layer in range(layers):
            for name, (rows, columns) in sizes.items():
                weights[f"layers.{layer}.{name}.weight"] = draw(rows, columns)
                weights[f"layers.{layer}.{name}.bias"] = torch.zeros(columns)
            for name in ("norm1", "norm2"):
                weights |= norm(f"layers.{layer}.{name}", width)
        return weights | norm("last_norm", width)

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    patches = (image_size // patch_size) ** 2
    return ClipCheckpoint(
        name="random",
        licence="none",
        image_size=image_size,
        patch_size=patch_size,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        logit_scale=100.0,
        vision=tower(vision_width)
        | norm("first_norm", vision_width)
        | {
            "class": draw(vision_width),
            "patch.weight": draw(vision_width, 3, patch_size, patch_size),
            "position": draw(patches + 1, vision_width),
        },
        vision_spec=TowerSpec(layers, vision_width // 64, "quick_gelu", 1e-5),
        text=tower(text_width) | {"position": draw(77, text_width, std=0.01)},
        text_spec=TowerSpec(layers, text_width // 64, "quick_gelu", 1e-5),
        token_embedding=draw(vocabulary, text_width),
        tokenize=lambda words: [zlib.crc32(word.encode()) % (vocabulary - 2) for word in words.split()],
        start=vocabulary - 2,
        end=vocabulary - 1,
    )
