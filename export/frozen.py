"""The frozen text side of a bundle: tower, words, sizes; made from a checkpoint, read back from a bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from fedmpt.export.clip import ClipCheckpoint
from fedmpt.export.methods import METHODS, Setup
from fedmpt.export.towers import Weights
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import write_atomically
from fedmpt.protocol.manifest import Pooling, canonical_json, from_plain

TEXT_WEIGHTS = "text_weights.safetensors"


class PromptError(FedmptError):
    """A label or condition cannot become a prompt."""


def freeze(
    clip: ClipCheckpoint,
    labels: Sequence[str],
    conditions: Sequence[str],
    method: str,
    pooling: Pooling,
    *,
    condition_context: int,
    class_context: int,
    adapter_rank: int,
) -> tuple[Setup, dict[str, Tensor]]:
    """The text tower with the words' embeddings baked in, so that an edge needs no tokenizer.

    Raises:
        PromptError: words that the tokenizer does not know, or a prompt longer than the tower takes.
    """
    phrases = [_ids(clip, phrase) if phrase else [] for phrase in METHODS[method].phrases(conditions)]
    names = [[*_ids(clip, f"{label}."), clip.end] for label in labels]
    setup = Setup(
        method=method,
        spec=clip.text_spec,
        phrases=tuple(map(len, phrases)),
        labels=tuple(map(len, names)),
        width=clip.text["projection.weight"].shape[1],
        text_width=clip.text["projection.weight"].shape[0],
        condition_context=condition_context,
        class_context=class_context,
        adapter_rank=adapter_rank,
        logit_scale=clip.logit_scale,
        pooling=pooling,
    )
    _check_length(setup, labels, len(clip.text["position"]))

    def embed(ids: Sequence[int]) -> Tensor:
        return clip.token_embedding[torch.tensor(ids, dtype=torch.int64)]

    words = {
        "words.start": embed([clip.start]),
        "words.phrases": embed([token for phrase in phrases for token in phrase]),
        "words.labels": embed([token for name in names for token in name]),
    }
    return setup, {**clip.text, **words}


def save_frozen(folder: Path, setup: Setup, weights: Weights) -> None:
    """Write ``text_weights.safetensors``; the set-up goes into its metadata."""
    metadata = {"setup": canonical_json(dataclasses.asdict(setup)).decode()}
    write_atomically(folder / TEXT_WEIGHTS, save(dict(weights), metadata))


def load_frozen(folder: Path) -> tuple[Setup, dict[str, Tensor]]:
    """Set-up and float32 weights of a bundle, for an engine that runs PyTorch."""
    path = folder / TEXT_WEIGHTS
    with safetensors.safe_open(path, framework="pt") as file:
        setup = from_plain(Setup, json.loads(file.metadata()["setup"]), str(path))
        return setup, {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118


def _ids(clip: ClipCheckpoint, words: str) -> list[int]:
    ids = clip.tokenize(words)
    if not ids or clip.end in ids or clip.start in ids:
        raise PromptError(
            f"{words!r}: the tokenizer of {clip.name} does not know these characters; reword it"
        )
    return ids


def _check_length(setup: Setup, labels: Sequence[str], limit: int) -> None:
    prefix = 1 + max(setup.phrases) + METHODS[setup.method].context(setup)
    longest = max(setup.labels)
    if prefix + longest > limit:
        label = labels[setup.labels.index(longest)]
        raise PromptError(
            f"label {label!r}: its longest prompt has {prefix + longest} tokens, the text tower takes {limit}; "
            "shorten the label, the conditions or the contexts"
        )
