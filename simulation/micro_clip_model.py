"""The micro-CLIP as a model: CLIP's architecture in small, its image tokens and text features, and its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from fedmpt.protocol.files import write_atomically
from fedmpt.simulation.micro_clip_captions import CONTEXT
from fedmpt.simulation.micro_clip_tokenizer import CONTEXT_LENGTH
from fedmpt.simulation.scenes import SIZE

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own normalisation
STD = (0.26862954, 0.26130258, 0.27577711)
# Written by hand: transformers' own class of this name wants torchvision since its version 5, and warns without.
PREPROCESSOR = {
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": MEAN,
    "image_processor_type": "CLIPImageProcessor",
    "image_std": STD,
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": SIZE},
}
WIDTH = 192  # of both towers and of the space they share
WEIGHTS = Path(__file__).parent / "data" / "micro-clip"  # the shipped folder


def make_model(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """A micro-CLIP with random weights."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 3,
        "projection_dim": WIDTH,
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT_LENGTH, "num_hidden_layers": 3}
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    vision = {"image_size": SIZE, "patch_size": 16, "num_hidden_layers": 6}
    return CLIPModel(
        CLIPConfig(
            text_config={**tower, **text, **tokens},
            vision_config={**tower, **vision},
            projection_dim=WIDTH,
            logit_scale_init_value=math.log(10.0),
            attn_implementation="eager",  # on a CPU its backward pass is three times as fast
        )
    )


def image_tokens(model: CLIPModel, pixels: np.ndarray) -> torch.Tensor:
    """Class token and patches ``[B, M, D]``, L2-normalised, of uint8 pictures ``[B, S, S, 3]``."""
    values = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
    values = (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    vision = model.vision_model
    states = vision.post_layernorm(vision(pixel_values=values).last_hidden_state)
    return functional.normalize(model.visual_projection(states).float(), dim=-1)


def text_features(
    model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str], runs: Iterator[torch.Tensor] | None = None
) -> torch.Tensor:
    """Features ``[Q, D]`` of texts; where a text holds ``*`` the next of `runs` ``[k, W]`` takes its place."""
    embedding = model.text_model.embeddings.token_embedding
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = []
    for text in texts:
        parts: list[torch.Tensor] = [embedding.weight[begin][None]]
        for number, words in enumerate(text.split(CONTEXT)):
            if number and runs is not None:
                parts.append(next(runs))
            ids = tokenizer(words, add_special_tokens=False)["input_ids"] if words.strip() else []
            if ids:
                parts.append(embedding(torch.tensor(ids)))
        rows.append(torch.cat([*parts, embedding.weight[end][None]]))
    last = torch.tensor([len(row) - 1 for row in rows])
    return text_features_of(model, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), last)


def text_features_of(model: CLIPModel, embedded: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Features ``[Q, D]``, L2-normalised, of embedded prompts ``[Q, T, W]`` that end at position `last` ``[Q]``."""
    text = model.text_model
    hidden = text.embeddings(inputs_embeds=embedded)
    length = hidden.shape[1]
    mask = torch.full((1, 1, length, length), torch.finfo(hidden.dtype).min).triu(1)
    states = text.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
    at_end = text.final_layer_norm(states[torch.arange(len(last)), last])
    return functional.normalize(model.text_projection(at_end).float(), dim=-1)


def save_model(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a folder that ``CLIPModel``, ``CLIPTokenizer`` and ``CLIPProcessor`` load; weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    half = make_model(tokenizer, 0)
    half.load_state_dict(model.state_dict())
    half.half()
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, which older readers want
    write_atomically(folder / "preprocessor_config.json", json.dumps(PREPROCESSOR, indent=2) + "\n")


def load_micro_clip(folder: Path = WEIGHTS) -> tuple[CLIPModel, CLIPTokenizer]:
    """The model in float32, frozen, and its tokenizer."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.eval()
    return model.requires_grad_(False), CLIPTokenizer.from_pretrained(folder, local_files_only=True)
