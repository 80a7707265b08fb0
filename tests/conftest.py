"""Shared by all tests: a tiny random CLIP folder and the bundle made of it, each built once per session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TINY_LABELS = ("cat", "dog", "traffic light", "potted plant")
WORDS = ("cat", "dog", "light", "traffic", "plant", "photo", "layout", "background", "lighting", "weather")
TINY_CONDITIONS = ("spatial layout", "background", "lighting and weather")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face ``CLIPModel`` folder with random weights: 48 px, patch 16 (a 3 × 3 grid), width 32."""
    return write_tiny_clip(tmp_path_factory.mktemp("tiny-clip"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of ``tiny_clip`` for ``fedmpt-prompts``, ``TINY_LABELS`` and ``TINY_CONDITIONS``, batch 8."""
    import dataclasses

    from fedmpt.export.bundle import PAPER_TRAINING, build_bundle
    from fedmpt.export.clip import load_clip

    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    training = dataclasses.replace(PAPER_TRAINING, batch_size=8, rounds=3)
    build_bundle(
        load_clip(str(tiny_clip)), TINY_LABELS, folder, conditions=TINY_CONDITIONS, training=training
    )
    return folder


def write_tiny_clip(
    folder: Path,
    *,
    image_size: int = 48,
    layers: int = 2,
    width: int = 32,
    activation: str = "quick_gelu",
    end: int | None = None,
    positions: int = 77,
) -> Path:
    """Save a seeded random ``CLIPModel`` with a byte-level ``CLIPTokenizer`` and a preprocessor file.

    ``end`` is the configuration's ``eos_token_id`` (None: the tokenizer's; 2: as in old checkpoints).
    """
    import torch
    import transformers

    vocabulary = write_tokenizer(folder)
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "hidden_act": activation,
    }
    config = transformers.CLIPConfig(
        text_config=tower
        | {
            "vocab_size": vocabulary,
            "max_position_embeddings": positions,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1 if end is None else end,
            "pad_token_id": vocabulary - 1,
        },
        vision_config=tower | {"image_size": image_size, "patch_size": 16},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        # The stock initialisation is so small that towers of this size are nearly constant.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def grow(word: str) -> list[str]:
    """The byte-pair merges that build a word from its left."""
    return [f"{word[:end]} {word[end]}" + "</w>" * (end == len(word) - 1) for end in range(1, len(word))]


def write_tokenizer(folder: Path) -> int:
    """Write a ``CLIPTokenizer`` that knows every byte and a few words; return the size of its vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    merges = list(dict.fromkeys(merge for word in WORDS for merge in grow(word)))
    pieces = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in merges),
    ]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    preprocessor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 48}}
    preprocessor |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return len(vocabulary)
