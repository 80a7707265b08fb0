"""Checkpoints are loaded as Hugging Face reads them, or refused with a reason; image tokens are as defined."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel

from fedmpt.export.clip import CheckpointError, ClipCheckpoint, image_tokens, load_clip


def tokens_of(clip: ClipCheckpoint, pixels: Tensor, kind: str, mode: str = "full") -> Tensor:
    return image_tokens(
        clip.vision,
        pixels,
        spec=clip.vision_spec,
        mean=clip.image_mean,
        std=clip.image_std,
        kind=kind,
        mode=mode,
    )


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 48, 48, 3), generator=generator).to(torch.uint8)


def standardised(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
    return ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2).float()


@torch.no_grad()
def test_plain_tokens_are_the_projected_last_hidden_states(tiny_clip: Path, pixels: Tensor) -> None:
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    hidden = model.vision_model(standardised(pixels)).last_hidden_state
    expected = normalize(model.visual_projection(model.vision_model.post_layernorm(hidden)), dim=-1)
    torch.testing.assert_close(
        tokens_of(load_clip(str(tiny_clip)), pixels, "plain"), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["plain", "maskclip", "clearclip"])
@torch.no_grad()
def test_the_class_token_is_clips_own_image_feature(tiny_clip: Path, pixels: Tensor, kind: str) -> None:
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    feature = model.visual_projection(model.vision_model(standardised(pixels)).pooler_output)
    found = tokens_of(load_clip(str(tiny_clip)), pixels, kind)[:, 0]
    torch.testing.assert_close(found, normalize(feature, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["maskclip", "clearclip"])
@torch.no_grad()
def test_patch_tokens_follow_the_papers(tiny_clip: Path, pixels: Tensor, kind: str) -> None:
    """The last block rewritten, head by head, on top of the modules of ``transformers``."""
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    vision, last = model.vision_model, model.vision_model.encoder.layers[-1]
    x = vision(standardised(pixels), output_hidden_states=True).hidden_states[-2]
    attention, inside = last.self_attn, last.layer_norm1(x)
    value = attention.v_proj(inside)
    if kind == "maskclip":
        y = x + attention.out_proj(value)
        y = y + last.mlp(last.layer_norm2(y))
    else:
        query, heads = attention.q_proj(inside), []
        for q, v in zip(query.chunk(4, dim=-1), value.chunk(4, dim=-1), strict=True):
            heads.append(torch.softmax(q @ q.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1) @ v)
        y = attention.out_proj(torch.cat(heads, dim=-1))
    expected = normalize(model.visual_projection(vision.post_layernorm(y)), dim=-1)[:, 1:]
    found = tokens_of(load_clip(str(tiny_clip)), pixels, kind)[:, 1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_pooling_merges_neighbours_and_pads_an_odd_grid(tiny_clip: Path, pixels: Tensor) -> None:
    clip = load_clip(str(tiny_clip))
    full, pooled = (tokens_of(clip, pixels, "clearclip", mode) for mode in ("full", "pooled"))
    grid = full[:, 1:].unflatten(1, (3, 3))
    corners = [grid[:, :2, :2].sum((1, 2)), grid[:, :2, 2].sum(1), grid[:, 2, :2].sum(1), grid[:, 2, 2]]
    assert pooled.shape == (2, 1 + 4, 24)
    torch.testing.assert_close(pooled[:, 0], full[:, 0])
    torch.testing.assert_close(
        pooled[:, 1:], normalize(torch.stack(corners, dim=1), dim=-1), rtol=0, atol=1e-6
    )


@torch.no_grad()
def test_pooling_an_even_grid_leaves_a_quarter(make_clip: Callable[..., Path], tmp_path: Path) -> None:
    clip = load_clip(str(make_clip(tmp_path, image_size=64)))
    pixels = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    assert tokens_of(clip, pixels, "plain", "pooled").shape == (1, 1 + 4, 24)


def test_the_tokenizer_gives_words_without_start_and_end(tiny_clip: Path) -> None:
    clip = load_clip(str(tiny_clip))
    assert len(clip.tokenize("cat dog.")) == 3
    assert not {clip.start, clip.end} & set(clip.tokenize("cat dog."))


def test_statistics_and_licence_come_from_the_checkpoint(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    (folder / "README.md").write_text("---\ntags: [vision]\nlicense: mit\n---\n# A model\n")
    clip = load_clip(str(folder))
    assert (clip.licence, clip.name, clip.image_mean) == ("mit", "clip", (0.48, 0.46, 0.41))
    (folder / "README.md").unlink()
    (folder / "preprocessor_config.json").unlink()
    assert load_clip(str(folder)).licence == "unknown"
    assert load_clip(str(folder)).image_mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert load_clip(str(folder), licence="apache-2.0").licence == "apache-2.0"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="nowhere: no such folder; give a CLIPModel folder or a hub name"
    ):
        load_clip(str(tmp_path / "nowhere"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json in it"):
        load_clip(str(tmp_path))


def test_an_unreachable_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"nobody/nothing: config.json cannot be loaded.*check the name and the network"
    ):
        load_clip("nobody/nothing")


def test_another_kind_of_model_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(CheckpointError, match="holds a siglip model; only CLIPModel checkpoints serve"):
        load_clip(str(folder))


def test_missing_weights_are_never_made_up(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing \(visual_projection.weight"):
        load_clip(str(folder))


@pytest.mark.parametrize("size", [0, 1000, -1000])
def test_a_truncated_file_of_weights_is_named(tiny_clip: Path, tmp_path: Path, size: int) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(
        CheckpointError, match=r"clip: its file of weights \(model\.safetensors\) cannot.*restore"
    ):
        load_clip(str(folder))


def test_weights_of_another_configuration_are_refused_in_one_line(
    tiny_clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "projection_dim": 16}))
    wanted = (
        r"config\.json, which wants text_projection\.weight of shape \[16, 32\], not \[24, 32\]; take both"
    )
    with pytest.raises(CheckpointError, match=wanted):
        load_clip(str(folder))
    assert not caplog.records


def test_an_impossible_configuration_is_named(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be loaded.*not a multiple.*restore it"):
        load_clip(str(folder))


@pytest.mark.parametrize("content", ["{", "[]", '{"image_mean": [0.5, 0.5]}', '{"image_std": "abc"}'])
def test_a_damaged_preprocessor_file_is_named(tiny_clip: Path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"clip: preprocessor_config\.json cannot be loaded .*restore it"
    ):
        load_clip(str(folder))


def test_statistics_may_stand_in_the_processor_file(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    processor = {"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    assert load_clip(str(folder)).image_mean == (0.1, 0.2, 0.3)


def test_a_folder_without_a_vocabulary_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(
        CheckpointError, match=r"clip: its tokenizer knows no words; add vocab\.json and merges"
    ):
        load_clip(str(folder))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_damaged_vocabulary_is_named(tiny_clip: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    (folder / name).write_bytes(b"\xff")
    with pytest.raises(
        CheckpointError, match=r"its tokenizer \(vocab\.json and merges\.txt, or .* restore it"
    ):
        load_clip(str(folder))


def test_an_unknown_activation_is_refused(make_clip: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_clip(tmp_path, activation="relu")
    with pytest.raises(CheckpointError, match="unknown activation 'relu'; known are quick_gelu, gelu"):
        load_clip(str(folder))
