"""Compare image tokens, poolings, τ and λ before any training, with the shipped micro-CLIP on scenes.

``python benchmarks/method_choices.py`` writes docs/results/method.json: mAP of "a photo of a {label}." on photos with
independent labels, how often the heaviest patch of a shown label touches a box of that label, and how far ten
iterations leave a transport plan's rows from the patches' importance (total variation, mean and largest over photos).
What training makes of these choices is measured by ``fedmpt simulate hyper-parameters``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmpt.edge_client.metrics import mean_average_precision
from fedmpt.export import methods, programs
from fedmpt.export.clip import TOKEN_KINDS, ClipCheckpoint, load_clip
from fedmpt.export.frozen import freeze
from fedmpt.protocol.files import write_atomically
from fedmpt.protocol.manifest import Pooling
from fedmpt.simulation.scenes import SceneSet, draw_scenes
from fedmpt.simulation.scenes_sets import FEDERATION_LABELS, federation_plan

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "method.json"
TAUS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
POOLINGS = (
    Pooling("max", 1.0, 0.1, 10),
    *(Pooling("softmax", tau, 0.1, 10) for tau in TAUS),
    *(Pooling("transport", tau, reg, 10) for tau in TAUS for reg in (0.01, 0.02, 0.05, 0.1, 0.2)),
)

Row = dict[str, Any]


def main() -> None:
    """Measure, write the result file, print the best of each pooling."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="federations (%(default)s)")
    parser.add_argument("--photos", type=int, default=400, help="of each federation (%(default)s)")
    arguments = parser.parse_args()
    clip = load_clip(str(ROOT / "simulation" / "data" / "micro-clip"))
    rows = [
        {"seed": seed, **row}
        for seed in arguments.seeds
        for row in compare(clip, draw_scenes(federation_plan(seed).decorrelated, arguments.photos, seed))
    ]
    write_atomically(RESULT, json.dumps(rows, indent=1) + "\n")
    print_best(rows)


@torch.no_grad()
def compare(clip: ClipCheckpoint, scenes: SceneSet) -> list[Row]:
    """One row for every kind and mode of token and every pooling, the class token among them."""
    setup, weights = freeze(
        clip,
        FEDERATION_LABELS,
        (),
        "zero-shot",
        POOLINGS[0],
        condition_context=4,
        class_context=4,
        adapter_rank=32,
    )
    text = methods.text_features(setup, weights, {})
    rows = []
    for kind in TOKEN_KINDS:
        for mode in ("full", "pooled"):
            tokens = encode(clip, scenes, kind, mode)
            class_token = (tokens[:, 0] @ text[0].T).numpy()
            common = {"tokens": kind, "mode": mode}
            accuracy = mean_average_precision(class_token, scenes.truth)
            rows.append({**common, "pooling": "class token", "mAP": accuracy})
            for pooling in POOLINGS:
                psi, plan = methods.pool(
                    dataclasses.replace(setup, pooling=pooling), tokens[:, 1:], text, pooling.name, {}, True
                )
                assert plan is not None
                found = {
                    "mAP": mean_average_precision(psi[:, 0].numpy(), scenes.truth),
                    "pointing": pointing(plan[:, 0], scenes),
                }
                if pooling.name == "transport":
                    scaled = tokens[:, 1:] @ text[0].T * (setup.logit_scale / pooling.tau)
                    away = (plan[:, 0].sum(2) - scaled.amax(2).softmax(1)).abs().sum(1) / 2
                    found |= {"row deviation": float(away.mean()), "largest row deviation": float(away.max())}
                setting = {"pooling": pooling.name, "tau": pooling.tau, "reg": pooling.reg}
                rows.append({**common, **setting, **found})
    return rows


def encode(clip: ClipCheckpoint, scenes: SceneSet, kind: str, mode: str) -> Tensor:
    """Tokens as a feature cache holds them, rounded to float16."""
    blocks = np.array_split(scenes.pixels, -(-len(scenes) // 32))
    parts = [
        programs.run_image_encoder(clip, clip.vision, torch.from_numpy(block), kind, mode) for block in blocks
    ]
    return torch.cat(parts).half().float()


def pointing(plan: Tensor, scenes: SceneSet) -> float:
    """How often the heaviest patch of a shown label's plan [B, M, C] touches a box of that label."""
    best = plan.argmax(1).numpy()
    side = round(plan.shape[1] ** 0.5)
    size = scenes.pixels.shape[1]
    patch = 16 * (2 if side < size // 16 else 1)
    hits: dict[tuple[int, int], bool] = {}
    for item in scenes.objects[scenes.objects["label"] >= 0]:
        key = (int(item["scene"]), int(item["label"]))
        top, left = best[key] // side * patch, best[key] % side * patch
        x0, y0, x1, y1 = item["box"]
        inside = left < x1 and left + patch > x0 and top < y1 and top + patch > y0
        hits[key] = hits.get(key, False) or bool(inside)
    return float(np.mean(list(hits.values())))


def print_best(rows: list[Row]) -> None:
    """For every kind of token the best setting of each pooling, by its mean over the federations."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("tokens", "mode", "pooling", "tau", "reg"))
        groups.setdefault(key, []).append(row)
    means = {
        key: tuple(float(np.mean([row.get(name, np.nan) for row in same])) for name in ("mAP", "pointing"))
        for key, same in groups.items()
    }
    best: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for key in sorted(means, key=lambda key: means[key][0]):
        best[key[:3]] = key
    for key in sorted(best.values(), key=str):
        print(*key, "mAP {:.3f}, pointing {:.3f}".format(*means[key]))


if __name__ == "__main__":
    main()
