"""Towers of the published CLIPs' shapes, with random weights and one layer, become bundles that hold."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from fedmpt.export.bundle import PAPER_POOLING, PAPER_TRAINING, build_bundle
from fedmpt.export.clip import CLIP_MEAN, CLIP_STD, ClipCheckpoint, checkpoint_of
from fedmpt.protocol.manifest import TensorSpec, verify_bundle


def random_clip(vocabulary: Path, patch_size: int, vision_width: int, text_width: int) -> ClipCheckpoint:
    """224 px, heads 64 wide, a joint space as wide as the text, logit scale 100; the words are the tests'."""
    tokenizer = AutoTokenizer.from_pretrained(vocabulary)
    text, vision = (
        {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": width // 64,
            "num_hidden_layers": 1,
        }
        for width in (text_width, vision_width)
    )
    config = CLIPConfig(
        text_config=text | {"vocab_size": len(tokenizer)},
        vision_config=vision | {"image_size": 224, "patch_size": patch_size},
        projection_dim=text_width,
        logit_scale_init_value=math.log(100),
    )
    torch.manual_seed(0)
    return checkpoint_of(
        CLIPModel(config), tokenizer, name="random", licence="none", mean=CLIP_MEAN, std=CLIP_STD
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch_size", "vision_width", "text_width", "options"),
    [
        pytest.param(16, 768, 512, {"method": "fedmpt-full"}, id="ViT-B/16"),
        pytest.param(32, 768, 512, {"method": "coop", "precision": "float16"}, id="ViT-B/32"),
        pytest.param(
            14,
            1024,
            768,
            {"token_kind": "clearclip", "pooling": dataclasses.replace(PAPER_POOLING, name="max")},
            id="ViT-L/14",
        ),
    ],
)
def test_a_bundle_of_published_shapes_is_verified_and_described(
    tiny_clip: Path,
    tmp_path: Path,
    patch_size: int,
    vision_width: int,
    text_width: int,
    options: dict[str, Any],
) -> None:
    labels, patches = ("cat", "traffic light"), (224 // patch_size) ** 2
    manifest = build_bundle(
        random_clip(tiny_clip, patch_size, vision_width, text_width),
        labels,
        tmp_path / "bundle",
        training=dataclasses.replace(PAPER_TRAINING, batch_size=2),
        **options,
    )
    verify_bundle(tmp_path / "bundle", manifest)
    prompts = len(manifest.conditions) or 1
    graphs = manifest.graphs
    assert graphs["image_encoder"].inputs == {"pixels": TensorSpec("uint8", ("batch", 224, 224, 3))}
    assert graphs["image_encoder"].outputs == {
        "tokens": TensorSpec("float32", ("batch", 1 + patches, text_width))
    }
    assert graphs["text_features"].outputs == {"text": TensorSpec("float32", (prompts, 2, text_width))}
    assert graphs["train_step"].inputs["tokens"].shape == (2, 1 + patches, text_width)
    assert graphs["train_step"].outputs == {
        "loss": TensorSpec("float32", ()),
        **{f"gradient.{name}": spec for name, spec in manifest.state.items()},
    }
    assert graphs["head"].outputs == {
        "scores": TensorSpec("float32", ("batch", 2)),
        "logits": TensorSpec("float32", ("batch", 2)),
        "plan": TensorSpec("float32", ("batch", 2, patches)),
    }
