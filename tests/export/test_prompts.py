"""Prefix-shared prompts equal prompts that are encoded whole, one by one, by Hugging Face's own text tower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPModel

from fedmpt.export.clip import load_clip
from fedmpt.export.prompts import encode_prompts

# Layers, width and activation: one block alone (nothing before the last), wider than deep, the other GELU.
TOWERS = {
    "one block": {"layers": 1, "width": 16, "activation": "quick_gelu"},
    "wide": {"layers": 2, "width": 64, "activation": "quick_gelu"},
    "deep, gelu": {"layers": 4, "width": 24, "activation": "gelu"},
}


@pytest.fixture(scope="module", params=TOWERS.values(), ids=TOWERS.keys())
def folder(
    request: pytest.FixtureRequest, make_clip: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"), **request.param)


def encode_whole(model: CLIPModel, prefixes: list[Tensor], suffixes: list[Tensor]) -> Tensor:
    """Every prompt on its own, padded to all 77 tokens, through ``transformers``; embeddings given."""
    embedding = model.text_model.embeddings.token_embedding
    end, features = model.config.text_config.eos_token_id, []
    for prefix in prefixes:
        for suffix in suffixes:
            length = len(prefix) + len(suffix)
            ids = torch.full((1, 77), end)
            ids[:, : length - 1] = 0
            rows = torch.cat([prefix, suffix, suffix[-1:].expand(77 - length, -1)])
            hook = embedding.register_forward_hook(lambda module, given, output, rows=rows: rows[None])
            pooled = model.text_model(input_ids=ids).pooler_output
            hook.remove()
            features.append(torch.nn.functional.normalize(model.text_projection(pooled)[0], dim=0))
    return torch.stack(features).unflatten(0, (len(prefixes), len(suffixes)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    prefixes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    suffixes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_features_and_gradients_equal_whole_prompts(
    folder: Path, prefixes: list[int], suffixes: list[int], seed: int
) -> None:
    clip, model = load_clip(str(folder)), CLIPModel.from_pretrained(folder).eval()
    width = clip.token_embedding.shape[1]
    generator = torch.Generator().manual_seed(seed)
    before = [torch.randn(length, width, generator=generator).requires_grad_() for length in prefixes]
    after = [torch.randn(length, width, generator=generator) for length in suffixes]

    shared = encode_prompts(clip.text, clip.text_spec, before, torch.cat(after), tuple(suffixes))
    whole = encode_whole(model, before, after)
    upstream = torch.randn(whole.shape, generator=generator)
    gradients = torch.autograd.grad((shared * upstream).sum(), before)
    expected = torch.autograd.grad((whole * upstream).sum(), before)

    assert shared.shape == (len(prefixes), len(suffixes), 24)
    assert (shared - whole).abs().max() <= 1e-5
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert (gradient - reference).abs().max() <= 1e-5 * max(largest, 1)


def test_nothing_after_the_end_is_computed(folder: Path) -> None:
    clip = load_clip(str(folder))
    width = clip.token_embedding.shape[1]
    rows: list[int] = []

    class Counter(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is torch.addmm:
                rows.append(args[1].shape[0])
            return function(*args, **(kwargs or {}))

    with Counter():
        encode_prompts(
            clip.text,
            clip.text_spec,
            [torch.zeros(3, width), torch.zeros(5, width)],
            torch.zeros(9, width),
            (2, 7),
        )
    # 8 prefix rows and 2 × 9 suffix rows; of the last block only the four ends go beyond keys and values.
    whole, last = ["query", "key", "value", "out", "up", "down"], [26, 26, 4, 4, 4, 4]
    assert rows == [26] * len(whole) * (clip.text_spec.layers - 1) + last
