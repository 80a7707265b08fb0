"""Measure a micro-CLIP: ``python -m fedmpt.simulation.micro_clip_evaluation``.

Tells zero-shot accuracy, pointing and retrieval, what wordings gain on the federation set without training, and what
a search over the vocabulary, prompts and adapters trained centrally on unbiased labels gain there, as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from fedmpt.protocol.files import write_atomically
from fedmpt.simulation.micro_clip_model import (
    WEIGHTS,
    image_tokens,
    load_micro_clip,
    text_features,
)
from fedmpt.simulation.micro_clip_tuning import mean_average_precision, search_tokens, similarities, tune
from fedmpt.simulation.micro_clip_wordings import PROMPT, STYLE_WORDINGS, WORDINGS, strange_wordings
from fedmpt.simulation.scenes import SceneSet, SceneSpecification, draw_scenes
from fedmpt.simulation.scenes_render import BACKGROUNDS
from fedmpt.simulation.scenes_sets import federation_plan
from fedmpt.simulation.sprites import LABELS

GRID = 7
PATCH = 16


@torch.no_grad()
def encode_scenes(model: CLIPModel, pixels: np.ndarray, batch: int = 100) -> torch.Tensor:
    """Image tokens ``[n, M, D]`` of uint8 pictures ``[n, S, S, 3]``."""
    return torch.cat([image_tokens(model, pixels[i : i + batch]) for i in range(0, len(pixels), batch)])


def zero_shot(
    model: CLIPModel, tokenizer: CLIPTokenizer, scenes: SceneSet, tokens: torch.Tensor
) -> dict[str, float]:
    """mAP of ``a photo of a {label}.`` with each of the two similarities."""
    with torch.no_grad():
        text = text_features(model, tokenizer, [PROMPT.format(name) for name in scenes.specification.labels])
    found = similarities(tokens, text)
    return {name: mean_average_precision(scores.numpy(), scenes.truth) for name, scores in found.items()}


@torch.no_grad()
def best_wording(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    wordings: tuple[str, ...],
    scenes: SceneSet,
    tokens: torch.Tensor,
) -> dict[str, dict[str, float | str]]:
    """Of all wordings the one that does best on these very pictures, and the mean of all their features."""
    names = scenes.specification.labels
    texts = torch.stack([text_features(model, tokenizer, [w.format(x) for x in names]) for w in wordings])
    mean = functional.normalize(texts.mean(0), dim=-1)
    report: dict[str, dict[str, float | str]] = {}
    for name, ensemble in similarities(tokens, mean).items():
        singles = [
            mean_average_precision(similarities(tokens, text)[name].numpy(), scenes.truth) for text in texts
        ]
        best = int(np.argmax(singles))
        report[name] = {
            "best": singles[best],
            "wording": wordings[best],
            "median": float(np.median(singles)),
            "mean_of_features": mean_average_precision(ensemble.numpy(), scenes.truth),
        }
    return report


def pointing(
    model: CLIPModel, tokenizer: CLIPTokenizer, scenes: SceneSet, tokens: torch.Tensor
) -> dict[str, float]:
    """Of all shown labels: is the best patch's centre in a box of theirs, does the patch touch one."""
    with torch.no_grad():
        text = text_features(model, tokenizer, [PROMPT.format(name) for name in scenes.specification.labels])
    best = (tokens[:, 1:] @ text.T).argmax(1).numpy()
    rows = scenes.objects[scenes.objects["label"] >= 0]
    patch = best[rows["scene"], rows["label"]]
    left, top = patch % GRID * PATCH, patch // GRID * PATCH
    x, y, box = left + PATCH / 2, top + PATCH / 2, rows["box"].T
    centre = (box[0] <= x) & (x < box[2]) & (box[1] <= y) & (y < box[3])
    touch = (box[0] < left + PATCH) & (left < box[2]) & (box[1] < top + PATCH) & (top < box[3])
    key = rows["scene"].astype(np.int64) * 1000 + rows["label"]
    shown = np.unique(key)  # a label shown twice is pointed at once
    return {
        "centre_in_box": float(np.isin(shown, key[centre]).mean()),
        "patch_touches_box": float(np.isin(shown, key[touch]).mean()),
        "chance_centre_in_box": float(_box_share(rows)),
    }


def _box_share(rows: np.ndarray) -> float:
    box = rows["box"].astype(float)
    return float(((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (GRID * PATCH) ** 2).mean())


@torch.no_grad()
def background_retrieval(
    model: CLIPModel, tokenizer: CLIPTokenizer, scenes: SceneSet, tokens: torch.Tensor
) -> float:
    """Share of pictures (with an object) whose own background ranks first among all in a caption that names both."""
    labels = scenes.specification.labels
    forms = "a photo of a {} with {} in the background."
    text = text_features(model, tokenizer, [forms.format(x, b) for x in labels for b in BACKGROUNDS])
    text = text.view(len(labels), len(BACKGROUNDS), -1)
    pictures = np.flatnonzero(scenes.truth.any(1))
    first = scenes.truth[pictures].argmax(1)
    scores = torch.einsum("nd,nkd->nk", tokens[pictures, 0], text[first])
    return float((scores.argmax(1).numpy() == scenes.background[pictures]).mean())


def evaluate(
    model: CLIPModel, tokenizer: CLIPTokenizer, *, seeds: int = 3, scenes: int = 1000, searched: int = 400
) -> dict[str, object]:
    """All figures; the federation's are over `seeds` federations, training runs and fresh pictures.

    Zero-shot in the common styles over as many sets of pictures; pointing and backgrounds on the first of them.
    A search over the vocabulary begins with `searched` token sequences and changes the best four times as often.
    """
    spec = SceneSpecification(marginals=(0.05,) * len(LABELS))
    in_style = draw_scenes(spec, scenes, seed=900_001)
    tokens = encode_scenes(model, in_style.pixels)
    zero_shots = [zero_shot(model, tokenizer, in_style, tokens)]
    for seed in range(1, seeds):
        more = draw_scenes(spec, scenes, seed=900_001 + seed)
        zero_shots.append(zero_shot(model, tokenizer, more, encode_scenes(model, more.pixels)))
    report: dict[str, object] = {
        "in_style_zero_shot_map": zero_shots,
        "pointing": pointing(model, tokenizer, in_style, tokens),
        "background_first": background_retrieval(model, tokenizer, in_style, tokens),
        "logit_scale": float(model.logit_scale.exp()),
    }
    runs = []
    for seed in range(seeds):
        decorrelated = federation_plan(seed).decorrelated
        train, test = (draw_scenes(decorrelated, scenes, seed=900_100 + 10 * seed + part) for part in (1, 2))
        train_tokens, test_tokens = encode_scenes(model, train.pixels), encode_scenes(model, test.pixels)
        run: dict[str, object] = {
            "zero_shot": zero_shot(model, tokenizer, test, test_tokens),
            "untrained_wordings": best_wording(model, tokenizer, WORDINGS, test, test_tokens),
            "untrained_style_wordings": best_wording(model, tokenizer, STYLE_WORDINGS, test, test_tokens),
            "untrained_strange_wordings": best_wording(
                model, tokenizer, strange_wordings(), test, test_tokens
            ),
        }
        pairs = ((train_tokens, train.truth), (test_tokens, test.truth))
        run["searched_tokens"] = {
            pooling: search_tokens(
                model, tokenizer, pooling, *pairs, decorrelated.labels, seed, searched, 4 * searched
            )
            for pooling in ("class_token", "best_patch")
        }
        for method in ("coop", "adapter"):
            run[method] = {
                pooling: tune(model, tokenizer, method, pooling, *pairs, decorrelated.labels, seed)
                for pooling in ("class_token", "best_patch")
            }
        runs.append(run)
    report["federation_map"] = runs
    return report


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="the shipped one, if none is named")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args(argv)
    weights = (arguments.model / "model.safetensors").read_bytes()
    origin = {
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    report = evaluate(*load_micro_clip(arguments.model), seeds=arguments.seeds)
    text = json.dumps(origin | report, indent=1) + "\n"
    if arguments.out:
        write_atomically(arguments.out, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
